"""`kvc2-engine serve` before its daemon: it serves, says so once, and attaches when one comes."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from tests.doubles.engines import TinyEngine
from tests.doubles.waiting import wait_until
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


def test_daemons_that_died_leave_nothing_in_an_engine_without_a_collector(tmp_path: Path) -> None:
    """A connection, and each try that was in vain, goes with its last reference."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    gc.disable()
    try:
        with DaemonProcess(tmp_path) as daemon, TinyEngine(daemon.address) as engine:
            for died in range(1, 6):
                failures = len(engine.failures)
                daemon.kill()
                assert engine.wait_detached(died)
                wait_until(lambda failures=failures: len(engine.failures) > failures, 10)
                daemon.start()
                assert engine.client.wait_attached(10)
                if died == 1:  # what is lazily made is made now
                    before = descriptors()
            assert descriptors() <= before + 1
    finally:
        gc.enable()
