"""LMCache's own bench of a second level over our adapter, with its check of every byte, over a
daemon that is killed and one that is not there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Daemon
from tests.peers.environments import peers_python

pytestmark = pytest.mark.peers
KEYS, IN_FLIGHT, ROUNDS = 16, 2, 3
OBJECTS = KEYS * IN_FLIGHT * ROUNDS  # of an operation that is measured


@pytest.fixture(scope="module")
def python() -> Path:
    return peers_python()


class Bench:
    def __init__(self, python: Path, folder: Path, block_kb: int) -> None:
        self._python, self._folder, self._block_kb = python, folder, block_kb
        self._result = folder / "result.json"

    def run(self, *more: str) -> dict[str, dict[str, Any]]:
        """What it measured, by operation. It fails where a byte differs."""
        params = {"address": f"unix:{self._folder / 'kvc2.sock'}"}
        module = {"module_path": "kvc2.integrations.lmcache_l2", "class_name": "Kvc2L2"}
        adapter = {"type": "plugin", **module, "adapter_params": params}
        command = [
            str(self._python), "-m", "lmcache.cli.main", "bench", "l2",
            "--l2-adapter", json.dumps(adapter),
            "--num-keys", str(KEYS), "--in-flight", str(IN_FLIGHT), "--rounds", str(ROUNDS),
            "--data-size-kb", str(self._block_kb), "--l1-align-bytes", "4096",
            "--lookup-max-hit-rate", "1.0", "--no-skip-verify",
            "--format", "json", "--output", str(self._result), *more,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self._folder,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        said = done.stdout + done.stderr
        assert not done.returncode, said[-2000:]
        assert more or "[Verify]" in said, said[-2000:]
        metrics = json.loads(self._result.read_text())["metrics"].values()
        return {each["operation"]: each for each in metrics if "operation" in each}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block_kb", [64, 1024])
def test_its_bench_finds_and_verifies_all_that_it_stored(
    python: Path, tmp_path: Path, block_kb: int
) -> None:
    bench = Bench(python, tmp_path, block_kb)
    daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
    try:
        daemon.wait_ready()
        found = bench.run()
        assert found["Store"]["total_success"] == found["Load"]["total_success"] == OBJECTS
        assert found["Lookup"]["actual_hit_rate"] == 1
        daemon.flush()
        daemon.kill()
        nothing = bench.run("--only", "load")  # a fault is a miss
        assert nothing["Load"]["total_success"] == 0
        daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
        daemon.wait_ready()
        again = bench.run("--only", "load")  # of the disk
        assert again["Load"]["total_success"] == OBJECTS
    finally:
        daemon.stop()
