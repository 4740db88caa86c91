"""Open WebUI, unchanged, over our engine: it lists our model and answers what its page asks."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import free_port
from tests.doubles.scripted import Script
from tests.peers.environments import open_webui_python
from tests.system.engine import EngineProcess

pytestmark = pytest.mark.peers
START_S = 300  # its first start makes a database
BODY = {"model": "scripted", "messages": [{"role": "user", "content": "rain?"}]}
SETTINGS = {
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "of this test",
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_KEY": "none",
    "OFFLINE_MODE": "true",  # it loads no model of its own
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """What the page of a user who has signed in sends to Open WebUI's server."""
    python, folder = open_webui_python(), tmp_path_factory.mktemp("open-webui")
    (folder / "model").mkdir()
    model = Script({"rain": ("It ", "rains.")}).checkpoint(folder / "model")
    port = free_port()
    command = [python.with_name("open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (
        EngineProcess(model, folder / "log", "--served-model-name", "scripted") as engine,
        (folder / "server").open("wb") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        own = {"OPENAI_API_BASE_URL": f"{engine.url}/v1", "DATA_DIR": str(folder / "data")}
        server = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={**os.environ, **SETTINGS, **own, "HOME": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_healthy(server, http, folder / "server")
            signed = http.post("/api/v1/auths/signin", json={"email": "", "password": ""})
            http.headers["authorization"] = f"Bearer {signed.json()['token']}"
            yield http
        finally:
            server.kill()
            server.wait()


def wait_until_healthy(server: subprocess.Popen[bytes], http: httpx.Client, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:  # it does not listen yet
            pass
        time.sleep(1)
    pytest.fail(f"Open WebUI does not start: {log.read_text()[-2000:]}")


@pytest.mark.timeout(1800)  # with its environment
def test_it_lists_the_model(page: httpx.Client) -> None:
    assert [each["id"] for each in page.get("/api/models").json()["data"]] == ["scripted"]


def test_a_chat_is_answered(page: httpx.Client) -> None:
    answer = page.post("/api/chat/completions", json=BODY).json()
    assert answer["choices"][0]["message"]["content"] == "It rains."


def test_a_streamed_chat_comes_piece_by_piece(page: httpx.Client) -> None:
    told = page.post("/api/chat/completions", json={**BODY, "stream": True}).text.split("\n\n")
    *events, done = [each.removeprefix("data: ") for each in told if each]
    pieces = [json.loads(each)["choices"][0]["delta"].get("content") for each in events]
    assert done == "[DONE]"
    assert [each for each in pieces if each] == ["It ", "rains."]
