"""LMCache as its users start it: its server with a second level, for a vLLM beside it (KV crosses
between the two by shared memory), and its own bench of a second level.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.disk_peers import LMCACHE, Unavailable, environment
from benchmarks.processes import HttpServer, ProcessError, free_port

CHUNK = 128  # tokens; a block of vLLM on the CPU
BENCH_S = 300.0
STEADY_S = 2.0  # as long as nothing was written, all is


def on_disk(folder: Path) -> dict[str, object]:
    """A second level of its own, read with O_DIRECT, as our disk is."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"type": "fs_native", "base_path": str(folder), "use_odirect": True}


def on_kvc2(address: str) -> dict[str, object]:
    """A second level in our daemon."""
    module = {"module_path": "kvc2.integrations.lmcache_l2", "class_name": "Kvc2L2"}
    return {"type": "plugin", **module, "adapter_params": {"address": address}}


class LmcacheServer(HttpServer):
    """`python`: of an environment that has it. `second`: its second level."""

    start_timeout_s = 300.0
    health = "/healthcheck"

    def __init__(
        self, python: Path, folder: Path, second: dict[str, object], memory_gb: float = 1.0
    ) -> None:
        self.port, self._requests = free_port(), free_port()
        command = ["env", "PYTHONHASHSEED=0", "PYTHONSAFEPATH=1", str(python)]
        command += ["-m", "lmcache.cli.main", "server", "--port", str(self._requests)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.port)]
        command += ["--prometheus-port", str(free_port()), "--l1-size-gb", str(memory_gb)]
        command += ["--eviction-policy", "LRU", "--chunk-size", str(CHUNK)]
        command += ["--supported-transfer-mode", "auto", "--l2-adapter", json.dumps(second)]
        super().__init__("lmcache", command, folder)

    @property
    def transfer(self) -> dict[str, object]:
        """vLLM's --kv-transfer-config. The connector in vLLM's own tree needs CUDA."""
        module = "lmcache.integration.vllm.lmcache_mp_connector"
        where = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self._requests}
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": where,
        }

    def forget(self) -> None:
        """Its memory is empty then."""
        body = json.dumps({"tier": "l1", "force": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/cache/clear", body, headers)
        urllib.request.urlopen(request, timeout=30).close()


@dataclass(frozen=True)
class Load:
    """Of `lmcache bench l2`: so many rounds of in_flight calls with so many keys each."""

    block_bytes: int
    keys: int = 16
    in_flight: int = 2
    rounds: int = 5

    @property
    def objects(self) -> int:
        """Of an operation that is measured."""
        return self.keys * self.in_flight * self.rounds

    @property
    def flags(self) -> list[str]:
        named = {
            "num-keys": self.keys,
            "in-flight": self.in_flight,
            "rounds": self.rounds,
            "data-size-kb": self.block_bytes >> 10,
            "l1-align-bytes": 4096,
            "lookup-max-hit-rate": 1.0,
        }
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def bench(
    python: Path, second: dict[str, object], load: Load, folder: Path, *more: str
) -> dict[str, dict[str, Any]]:
    """What it measured, by operation; it verifies every byte of what it stored. `more`: its other
    flags, of which `--only load` has nothing to verify. Raises Unavailable."""
    result = folder / "result.json"
    command = [str(python), "-m", "lmcache.cli.main", "bench", "l2", *load.flags, *more]
    command += ["--l2-adapter", json.dumps(second), "--no-skip-verify"]
    done = subprocess.run(
        [*command, "--format", "json", "--output", str(result)],
        check=False,
        capture_output=True,
        text=True,
        timeout=BENCH_S,
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    said = done.stdout + done.stderr
    if done.returncode or not (more or "[Verify]" in said):
        raise Unavailable(f"lmcache bench l2: {said[-2000:]}")
    metrics = json.loads(result.read_text())["metrics"].values()
    return {each["operation"]: each for each in metrics if "operation" in each}


def wait_steady(folder: Path, timeout_s: float = 60.0) -> None:
    """Until what it has is on its disk, of which it tells nobody: until nothing grows there."""
    end = time.monotonic() + timeout_s
    since, size = time.monotonic(), 0
    while time.monotonic() - since < STEADY_S or not size:
        if time.monotonic() > end:
            raise ProcessError(f"{folder}: {size} bytes, and still growing")
        now = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        if now != size:
            since, size = time.monotonic(), now
        time.sleep(0.05)


def lmcache_over(venvs: Path, vllm: Path) -> Path:
    """The python of an environment with LMCache over vLLM's. Raises Unavailable."""
    return environment(venvs / "lmcache", [], [], LMCACHE, over=vllm)
