"""benchmarks.soak for a while on a small model: no wrong answer, and nothing leaks. Throughput is
left to whoever runs it on a machine that does nothing else."""

from __future__ import annotations

import json
import random
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import soak
from benchmarks.soak_users import Lost, Told, Visit, Wanted
from tests.system.engine import small_model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_minutes_of_everything_at_once(tmp_path: Path) -> None:
    model, told = small_model(tmp_path / "model"), tmp_path / "told.json"
    sizes = ["--cpu-gb", "0.016", "--disk-gb", "0.1", "--prompts", "24"]
    words = ["--minutes", "2", "--model", str(model), *sizes, "--slowest", "0"]
    code = soak.main([*words, "--json", str(told)])
    found = json.loads(told.read_text())
    assert (code, found["failures"]) == (0, [])
    counts = found["counts"]
    for what in ("whole: equal", "streamed: equal", "vanished", "stalled"):
        assert counts[what] > 10, counts
    assert all(counts[f"act: {act}"] >= soak.PARTS for act in soak.ACTS)


class Failing(BaseHTTPRequestHandler):
    """Streams a piece, then an error."""

    error: dict[str, str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for event in ({"choices": [{"text": "a"}]}, {"error": self.error}):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


@pytest.mark.parametrize(("code", "failed"), [({"code": "unavailable"}, 0), ({}, 1)])
def test_a_stream_that_ends_in_a_failure_is_one(code: dict[str, str], failed: int) -> None:
    """Only one that may be asked again is counted, and no more."""
    handler = type("Handler", (Failing,), {"error": {"message": "a step failed", **code}})
    told = Told()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine: Any = SimpleNamespace(port=server.server_port, served="m", name="engine")
        visit = Visit(engine, random.Random(1), told)
        with suppress(Lost):
            visit.streamed(Wanted((1, 2), (3,), "ab"))
        server.shutdown()
    assert len(told.wrong) == failed
    assert told.counts["streamed: 503"] == 1 - failed


def test_a_process_that_holds_more_than_before_is_told() -> None:
    before = soak.Held("first", 1, 100.0, 50, 20)
    same = soak.Held("first", 1, 130.0, 54, 12)
    assert soak.growth(before, same, 64.0) == []
    grown = soak.Held("first", 1, 170.0, 55, 29)
    assert [each.split()[1] for each in soak.growth(before, grown, 64.0)] == [
        "descriptors",
        "threads",
        "memory_mib",
    ]
