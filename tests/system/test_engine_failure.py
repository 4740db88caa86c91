"""An engine whose scheduler has failed: it answers what it took, and its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.system.engine import small_model

FAILING = """
from engine.scheduler import Scheduler

def fail(self):
    if self.requests:
        raise RuntimeError("a bug of the scheduler")
    return False

Scheduler.step = fail
from engine.cli import main
main()
"""
END_S = 60.0


def test_a_scheduler_that_failed_ends_the_process_with_exit_code_1(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    flags = ["serve", "--model", str(model), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        text=True,
    )
    try:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
        body = {"model": "model", "prompt": "abc"}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=END_S)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "unavailable"
        _, log = process.communicate(timeout=END_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "a bug of the scheduler" in log
    assert log.splitlines()[-1].startswith("kvc2-engine: the scheduler failed")
