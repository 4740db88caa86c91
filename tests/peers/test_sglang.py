"""SGLang's HiCache controller on our adapter, in each of its layouts: what it stored comes back bit
for bit from memory and from disk, in another process, and after kill -9 of the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.driven import Driven
from benchmarks.processes import Daemon
from tests import ROOT
from tests.doubles.waiting import wait_until
from tests.peers.environments import sglang_python

pytestmark = pytest.mark.peers
DRIVER = ROOT / "benchmarks/hicache.py"
ALL = 2048  # tokens, as the driver has them
NOTHING = {"hit": 0, "loaded": 0, "equal": 0}
EVERYTHING = {"hit": ALL, "loaded": ALL, "equal": ALL}


@pytest.fixture(scope="module")
def python() -> Path:
    return sglang_python()


def started(python: Path, folder: Path, layout: str) -> Driven:
    return Driven(python, DRIVER, folder, f"unix:{folder / 'kvc2.sock'}", layout, "1")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["page_first", "layer_first", "page_first_direct"])
def test_pages_come_back_from_every_tier_and_after_deaths(
    python: Path, tmp_path: Path, layout: str
) -> None:
    daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
    daemon.wait_ready()
    first = started(python, tmp_path, layout)
    try:
        assert first.ask("load") == NOTHING
        daemon.wait_sessions(1)
        wait_until(lambda: first.ask("store") == {"stored": ALL})
        assert first.ask("load") == EVERYTHING
        daemon.flush()
        daemon.evict("cpu")
        assert first.ask("load") == EVERYTHING  # from the disk
        first.kill()
        first = started(python, tmp_path, layout)
        wait_until(lambda: first.ask("load") != NOTHING)
        assert first.ask("load") == EVERYTHING
        daemon.kill()
        assert first.ask("load") == NOTHING  # a fault is a miss
        daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
        daemon.wait_ready()
        wait_until(lambda: first.ask("load") != NOTHING)
        assert first.ask("load") == EVERYTHING
    finally:
        first.kill()
        daemon.stop()
