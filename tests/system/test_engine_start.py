"""How an engine starts: whose port it is, what callers hear while the model is loaded, and whose
cache it then has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess
from tests.system.engine import EngineProcess, small_model

START_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("start") / "small")


def command(model: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "engine", "serve", "--model", str(model), *flags]


@contextmanager
def loading_engine(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine that loads until `finish_loading(folder)`: its config.json is a pipe so far."""
    model = small_model(folder / "model")
    (model / "config.json").rename(folder / "config.json")
    os.mkfifo(folder / "pipe")
    (model / "config.json").hardlink_to(folder / "pipe")
    process = subprocess.Popen(
        command(model, "--port", "0", "--threads", "1"), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def finish_loading(folder: Path) -> None:
    """Let it read its configuration: this time through the pipe, then from a file."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").rename(folder / "model" / "config.json")
    (folder / "pipe").write_text(text)


def listening_port(process: subprocess.Popen[str]) -> int:
    """The port of the process, as soon as it listens."""
    found: list[int] = []

    def listens() -> bool:
        assert process.poll() is None, "the engine ended"
        ours = psutil.Process(process.pid).net_connections("tcp")
        found[:] = [each.laddr.port for each in ours if each.status == psutil.CONN_LISTEN]
        return bool(found)

    wait_until(listens, START_S)
    return found[0]


def test_the_port_is_taken_before_the_model_is_loaded(tmp_path: Path, model: Path) -> None:
    with loading_engine(tmp_path) as first:
        port = listening_port(first)
        second = subprocess.run(
            command(model, "--port", str(port)), capture_output=True, text=True, timeout=START_S
        )
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.splitlines()[-1].startswith(f"kvc2-engine: port = {port}: ")
        assert first.poll() is None


def test_while_the_model_is_loaded_requests_get_503(tmp_path: Path) -> None:
    with loading_engine(tmp_path) as engine:
        url = f"http://127.0.0.1:{listening_port(engine)}"
        with httpx.Client(base_url=url, timeout=START_S) as kept:
            reply = kept.post("/v1/completions", json={"model": "model", "prompt": "a"})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.json()["error"]["code"] == "unavailable"
            health = kept.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            finish_loading(tmp_path)
            assert engine.stdout is not None
            assert "serving model at" in engine.stdout.readline()
            assert kept.get("/health").json()["status"] == "ok"


def test_weights_replaced_behind_equal_time_stamps_hit_nothing(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    weights, other = model / "model.safetensors", tmp_path / "other"
    scaled = {name: 1.5 * each for name, each in load_file(weights).items()}
    save_file(scaled, other, metadata={"format": "pt"})
    for each in (weights, other):
        os.utime(each, (0, 0))
    first = tmp_path / "first"
    subprocess.run(["cp", "-p", weights, first], check=True)
    matched = []
    with DaemonProcess(tmp_path) as daemon:
        flags = ("--kvc2", daemon.address, "--served-model-name", "served")
        for replaced_by in (first, other, first):
            subprocess.run(["cp", "-p", replaced_by, weights], check=True)
            with EngineProcess(model, tmp_path / "engine.log", *flags) as engine:
                engine.wait_attached()
                matched.append(engine.complete(list(range(3, 200))).matched)
                engine.stop()
    assert matched == [0, 0, 192]


COLLECTS = """
import atexit, gc, sys
from engine.cli import main
tell = lambda: print("collects:", gc.isenabled(), gc.get_freeze_count() > 100_000, file=sys.stderr)
atexit.register(tell)
main()
"""


def test_an_engine_that_serves_collects_garbage_but_not_what_its_imports_left(
    tmp_path: Path, model: Path
) -> None:
    with EngineProcess(model, tmp_path / "log", python=("-c", COLLECTS)) as engine:
        engine.process.terminate()
        engine.process.wait(START_S)
    assert "collects: True True" in (tmp_path / "log").read_text()
