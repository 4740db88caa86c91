"""LMCache on our adapter: its own bench of a second level, with its check of every byte, over a
daemon that is killed and one that is not there; and its server beside vLLM, both started anew."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.connectors import Vllm
from benchmarks.lmcache_peer import LmcacheServer, Load, bench, on_kvc2
from benchmarks.processes import Daemon
from engine import demo_model
from tests.doubles.waiting import wait_until
from tests.peers.environments import lmcache_python

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def python() -> Path:
    return lmcache_python()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block_kb", [64, 1024])
def test_its_bench_finds_and_verifies_all_that_it_stored(
    python: Path, tmp_path: Path, block_kb: int
) -> None:
    load = Load(block_kb << 10, rounds=3)
    second = on_kvc2(f"unix:{tmp_path / 'kvc2.sock'}")
    daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
    try:
        daemon.wait_ready()
        found = bench(python, second, load, tmp_path)
        assert found["Store"]["total_success"] == found["Load"]["total_success"] == load.objects
        assert found["Lookup"]["actual_hit_rate"] == 1
        daemon.flush()
        daemon.kill()
        nothing = bench(python, second, load, tmp_path, "--only", "load")  # a fault is a miss
        assert nothing["Load"]["total_success"] == 0
        daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
        daemon.wait_ready()
        again = bench(python, second, load, tmp_path, "--only", "load")  # of the disk
        assert again["Load"]["total_success"] == load.objects
    finally:
        daemon.stop()


class Setting:
    """A daemon, and LMCache's server with a vLLM beside it, which are started again and again."""

    def __init__(self, python: Path, folder: Path, stack: ExitStack) -> None:
        self._python, self._folder, self._stack = python, folder, stack
        self._model = demo_model.build(demo_model.default_directory())
        self.daemon = Daemon(folder, cpu_gb=1.0, disk_gb=2.0)
        stack.callback(self.daemon.stop)
        self.daemon.wait_ready()

    def started(self) -> tuple[LmcacheServer, Vllm]:
        server = LmcacheServer(self._python, self._folder, on_kvc2(self.daemon.address), 0.5)
        self._stack.callback(server.stop)
        server.wait_ready()
        folder, model, transfer = self._folder, self._model, server.transfer
        vllm = Vllm("vllm", self._python, model, folder, transfer=transfer, dtype="float32")
        self._stack.callback(vllm.stop)
        vllm.wait_ready()
        return server, vllm


@pytest.mark.timeout(1800)
def test_a_prompt_outlives_lmcaches_server_and_vllm(python: Path, tmp_path: Path) -> None:
    prompt = [(7 * each * each + 3 * each) % 30_000 + 100 for each in range(4 * 128 + 40)]
    with ExitStack() as stack:
        setting = Setting(python, tmp_path, stack)
        server, vllm = setting.started()
        computed = vllm.complete(prompt)
        assert computed.cached_tokens == 0
        wait_until(lambda: setting.daemon.admin.stats().blocks >= 4)
        setting.daemon.flush()
        vllm.kill()
        server.kill()
        setting.daemon.evict("cpu")
        _, vllm = setting.started()
        answer = vllm.complete(prompt)
        assert (answer.cached_tokens, answer.tokens) == (4 * 128, computed.tokens)
