"""SGLang's HiCache controller on our adapter, in each of its layouts: what it stored comes back bit
for bit from memory and from disk, in another process, and after kill -9 of the daemon."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.processes import Daemon
from tests.doubles.waiting import wait_until
from tests.peers.environments import peers_python

pytestmark = pytest.mark.peers
DRIVER = Path(__file__).with_name("hicache.py")
ALL = 2048  # tokens, as the driver has them
NOTHING = {"hit": 0, "loaded": 0, "equal": 0}
EVERYTHING = {"hit": ALL, "loaded": ALL, "equal": ALL}


@pytest.fixture(scope="module")
def python() -> Path:
    return peers_python()


class HiCache:
    """The driver, as a process."""

    def __init__(self, python: Path, folder: Path, layout: str) -> None:
        address = f"unix:{folder / 'kvc2.sock'}"
        self._log = folder / "hicache.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), str(DRIVER), address, layout, "1"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                text=True,
            )

    def ask(self, word: str) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-2000:]
        answer: dict[str, int] = json.loads(line)
        return answer

    def wait_attached(self) -> None:
        """Until then all is a miss."""
        wait_until(lambda: self.ask("load") != NOTHING)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["page_first", "layer_first", "page_first_direct"])
def test_pages_come_back_from_every_tier_and_after_deaths(
    python: Path, tmp_path: Path, layout: str
) -> None:
    daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
    daemon.wait_ready()
    first = HiCache(python, tmp_path, layout)
    try:
        assert first.ask("load") == NOTHING
        daemon.wait_sessions(1)
        wait_until(lambda: first.ask("store") == {"stored": ALL})
        assert first.ask("load") == EVERYTHING
        daemon.flush()
        daemon.evict("cpu")
        assert first.ask("load") == EVERYTHING  # from the disk
        first.kill()
        first = HiCache(python, tmp_path, layout)
        first.wait_attached()
        assert first.ask("load") == EVERYTHING
        daemon.kill()
        assert first.ask("load") == NOTHING  # a fault is a miss
        daemon = Daemon(tmp_path, cpu_gb=0.5, disk_gb=1.0)
        daemon.wait_ready()
        first.wait_attached()
        assert first.ask("load") == EVERYTHING
    finally:
        first.kill()
        daemon.stop()
