"""vLLM's tiers of offloaded KV over ours: what its own manager stored comes back bit for bit from
memory and from disk, in another process, and after kill -9 of the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.driven import Driven
from benchmarks.processes import Daemon
from tests.doubles.waiting import wait_until
from tests.peers.environments import vllm_python

pytestmark = pytest.mark.peers
DRIVER = Path(__file__).with_name("vllm_tier.py")
ALL = 32  # chunks, as the driver has them
NOTHING = {"found": 0, "equal": 0}
EVERYTHING = {"found": ALL, "equal": ALL}


def started(python: Path, folder: Path, chunk_bytes: int) -> Driven:
    address = f"unix:{folder / 'kvc2.sock'}"
    return Driven(python, DRIVER, folder, address, str(chunk_bytes), "1")


def again(vllm: Driven) -> dict[str, int]:
    """Loaded from below its own memory."""
    vllm.ask("forget")
    return vllm.ask("load")


@pytest.mark.timeout(1800)  # with its environment
@pytest.mark.parametrize("chunk_bytes", [1 << 14, 1 << 20])
def test_chunks_come_back_from_every_tier_and_after_deaths(
    tmp_path: Path, chunk_bytes: int
) -> None:
    python, daemon = vllm_python(), Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
    daemon.wait_ready()
    vllm = started(python, tmp_path, chunk_bytes)
    try:
        assert vllm.ask("load") == NOTHING
        daemon.wait_sessions(1)
        wait_until(lambda: vllm.ask("store") == {"whole": 1})
        assert again(vllm) == EVERYTHING
        daemon.flush()
        daemon.evict("cpu")
        assert again(vllm) == EVERYTHING  # from the disk
        vllm.kill()
        vllm = started(python, tmp_path, chunk_bytes)
        wait_until(lambda: vllm.ask("load") != NOTHING)
        assert again(vllm) == EVERYTHING
        daemon.kill()
        assert again(vllm) == NOTHING  # a fault is a miss
        daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
        daemon.wait_ready()
        wait_until(lambda: vllm.ask("load") != NOTHING)
        assert again(vllm) == EVERYTHING
    finally:
        vllm.kill()
        daemon.stop()
