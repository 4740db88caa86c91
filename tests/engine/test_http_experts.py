"""GET /experts and POST /experts/save, and how the command shows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from engine import asking
from engine.errors import EngineError
from engine.http.errors import ApiError
from engine.http.experts import add_experts

STATE: dict[str, Any] = {
    "layers": 2,
    "experts": 4,
    "activations": 20,
    "placed": True,
    "hot": 3,
    "device_share": 0.75,
    "exchanges": 1,
    "failed_copies": 0,
    "expert_bytes": 1000,
    "by_layer": [{"layer": 1, "hot": [0, 2, 3], "device_share": 0.75}],
}


class Placed:
    """Experts whose counts are saved to `saves`, or not."""

    saves: str | None = "/tmp/counts.json"
    error: OSError | None = None

    def state(self) -> dict[str, Any]:
        return STATE

    def save(self) -> str | None:
        if self.error is not None:
            raise self.error
        return self.saves


def client(experts: Placed, key: str = "") -> TestClient:
    app = FastAPI()

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Any:
        return error.response()

    def check(http: Request) -> None:
        if http.headers.get("authorization", "") != key:
            raise ApiError(401, "a key is needed")

    add_experts(app, experts, check)
    return TestClient(app)


def test_who_may_not_ask_is_told_nothing() -> None:
    assert client(Placed(), "Bearer k").get("/experts").status_code == 401
    assert client(Placed(), "Bearer k").post("/experts/save").status_code == 401


def test_state_and_saving_are_told() -> None:
    assert client(Placed()).get("/experts").json() == STATE
    assert client(Placed()).post("/experts/save").json() == {"saved": "/tmp/counts.json"}


def test_what_cannot_be_saved_is_said() -> None:
    nowhere, full = Placed(), Placed()
    nowhere.saves, full.error = None, OSError(28, "No space left on device")
    answer = client(nowhere).post("/experts/save")
    assert answer.status_code == 409
    assert "--expert-statistics FILE" in answer.json()["error"]["message"]
    answer = client(full).post("/experts/save")
    assert answer.status_code == 500
    assert "No space left" in answer.json()["error"]["message"]


@pytest.fixture
def answers() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """The address of a server, and what it answers next: status and body."""
    queued: list[tuple[int, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = queued.pop(0)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", queued
    server.shutdown()
    server.server_close()


def test_the_command_shows_an_engines_experts(
    answers: tuple[str, list[tuple[int, bytes]]],
) -> None:
    url, queued = answers
    queued += [(200, b'{"a": 1}'), (401, b'{"error": {"message": "a key"}}'), (200, b"[]")]
    assert asking.ask(url, "", "experts") == {"a": 1}
    for reason in (r"refuses \(401\): a key", "is no engine"):
        with pytest.raises(EngineError, match=reason):
            asking.ask(url, "k", "experts")
    for bad in ("file:///etc/passwd", "http://127.0.0.1:9"):
        with pytest.raises(EngineError):
            asking.ask(bad, "", "experts")


def test_the_table_has_a_row_for_each_layer() -> None:
    text = asking.experts(STATE, as_json=False)
    assert "3 of 8 are hot" in text
    assert text.splitlines()[-1].split() == ["1", "3", "75.0%"]
    assert "all experts are on the device" in asking.experts(
        STATE | {"placed": False}, as_json=False
    )
    assert asking.experts(STATE, as_json=True).startswith("{")
