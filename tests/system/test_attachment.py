"""`kvc2-engine serve` before its daemon: it serves, says so once, and attaches when one comes."""

from __future__ import annotations

from pathlib import Path

from tests.system.daemon import DaemonProcess
from tests.system.engine import EngineProcess, small_model


def test_an_engine_that_is_not_attached_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "not yet"
    address = f"unix:{folder}/kvc2.sock"
    model = small_model(tmp_path / "model")
    with EngineProcess(model, tmp_path / "engine.log", "--kvc2", address) as engine:
        failures = "kvc2_engine_attach_failures_total"
        engine.wait_until(lambda: engine.metric(failures, reason="no_socket") >= 3)
        assert engine.complete("hello", 2).tokens  # it serves all the same
        health = engine.http.get("/health").json()
        words = f"no such socket: {folder}/kvc2.sock"
        assert health == {
            "status": "ok",
            "attached": False,
            "daemon": {
                "address": address,
                "attached": False,
                "reason": "no_socket",
                "message": words,
            },
        }
        told = [line for line in engine.log.read_text().splitlines() if "attached" in line]
        assert len(told) == 1
        assert words in told[0]
        folder.mkdir(mode=0o700)
        with DaemonProcess(folder):
            engine.wait_attached()
            daemon = engine.http.get("/health").json()["daemon"]
            assert daemon == {"address": address, "attached": True, "reason": None}
            assert "attached to the daemon at" in engine.log.read_text().splitlines()[-1]
