"""A real engine whose descriptors run out: its log stays small, and it serves again by itself."""

from __future__ import annotations

import os
import resource
import socket
import time
from pathlib import Path

from tests.engine.test_http_server import rest
from tests.system.engine import EngineProcess, small_model

SPARE_DESCRIPTORS = 4
CLIENTS = 60
FLAGS = ("--header-timeout-s", "0.5", "--max-connections", "200")
WAITING = "connections wait to be accepted"


def test_out_of_descriptors_the_log_stays_small_and_the_engine_serves_again(tmp_path: Path) -> None:
    with EngineProcess(small_model(tmp_path / "model"), tmp_path / "log", *FLAGS) as engine:
        body = {"model": engine.model_name, "prompt": "abc", "max_tokens": 1200}
        body |= {"ignore_eos": True, "stream": True}
        with engine.http.stream("POST", "/v1/completions", json=body) as bystander:
            pieces = bystander.iter_lines()
            assert next(pieces).startswith("data: ")
            began = time.monotonic()
            few = len(os.listdir(f"/proc/{engine.process.pid}/fd")) + SPARE_DESCRIPTORS
            resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE, (few, few))
            host, port = engine.url.removeprefix("http://").split(":")
            clients = [socket.create_connection((host, int(port)), 60) for _ in range(CLIENTS)]
            engine.wait_until(lambda: WAITING in engine.log.read_text())
            for client in clients:  # those that were let in are let go, and the others take turns
                rest(client)
                client.close()
            assert [line for line in pieces if line][-1] == "data: [DONE]"
        assert engine.http.get("/health").status_code == 200
        lines = [line for line in engine.log.read_text().splitlines() if WAITING in line]
        assert len(lines) <= time.monotonic() - began + 2  # one a second
        assert engine.log.stat().st_size < 100_000
