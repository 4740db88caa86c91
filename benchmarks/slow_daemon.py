"""`kvc2 serve` on a disk that is as slow, and fails as often, as a file in its folder says: for
slow_disk.py and faulty_disk.py.

The throttle lies where the system calls are (kvc2.tiers.disk.slab_file.Files): reads take turns,
as on one disk; writes are left alone unless `writes_too`. `failing`: this share of reads, writes
and syncs is EIO. `regardless` leaves the choice between loading and computing out: every prefix is
loaded, up to the acquire's deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvc2.answers import Acquired
from kvc2.cache.assemble import assemble
from kvc2.cache.cache import Cache
from kvc2.cache.sessions import Session
from kvc2.config import CpuConfig, DiskConfig, ServeConfig
from kvc2.metrics import Metrics
from kvc2.server import running
from kvc2.tiers.disk.slab_file import Files

GB = 1_000_000_000


@dataclass(frozen=True)
class Mode:
    """`bytes_per_s` 0: as fast as the disk is."""

    bytes_per_s: float = 0.0
    regardless: bool = False
    writes_too: bool = False
    failing: float = 0.0

    def write(self, folder: Path) -> None:
        path = folder / "mode.new"
        path.write_text(json.dumps(asdict(self)))
        path.rename(folder / "mode.json")

    @staticmethod
    def read(folder: Path) -> Mode:
        return Mode(**json.loads((folder / "mode.json").read_text()))


class SlowFiles(Files):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._turn = threading.Lock()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        mode = self._drawn()
        with self._slowed(mode.bytes_per_s, buffers):
            return super().read(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        mode = self._drawn()
        with self._slowed(mode.bytes_per_s if mode.writes_too else 0.0, buffers):
            return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._drawn()
        super().sync(fd)

    def _drawn(self) -> Mode:
        """The mode now; OSError for an operation that is to fail."""
        mode = Mode.read(self._folder)
        if mode.failing and random.random() < mode.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return mode

    @contextmanager
    def _slowed(self, bytes_per_s: float, buffers: Sequence[memoryview]) -> Iterator[None]:
        if bytes_per_s == 0:
            yield
            return
        with self._turn:
            begun = time.monotonic()
            yield
            took_s = sum(map(len, buffers)) / bytes_per_s
            time.sleep(max(0.0, begun + took_s - time.monotonic()))


async def slow_cache(config: ServeConfig, metrics: Metrics, folder: Path) -> Cache:
    """A cache on slow files, whose acquires may be made regardless of what computing takes."""
    cache = await assemble(config, metrics, files=SlowFiles(folder))
    acquire = cache.acquire

    async def regardless(session: Session, *more: Any, **named: Any) -> Acquired:
        told = session.prefill_rate
        if Mode.read(folder).regardless:
            session.prefill_rate = 0.0  # until the next commit: as of an engine that tells none
        try:
            return await acquire(session, *more, **named)
        finally:
            session.prefill_rate = session.prefill_rate or told

    cache.acquire = regardless  # type: ignore[method-assign]
    return cache


async def serve(folder: Path, cpu_gb: float) -> None:
    Mode().write(folder)
    config = ServeConfig(
        listen=f"unix:{folder / 'kvc2.sock'}",
        cpu=CpuConfig.of_bytes(int(cpu_gb * GB)),
        disk=DiskConfig.of_bytes(folder / "disk", 4 * GB),
    )
    async with running(config, open_cache=partial(slow_cache, folder=folder)) as daemon:
        daemon.stop_on_signals()
        await daemon.stopped.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of socket, disk tier and mode.json")
    parser.add_argument("--cpu-gb", type=float, default=1.0, help="of the cpu tier")
    flags = parser.parse_args()
    asyncio.run(serve(flags.folder, flags.cpu_gb))
    return 0


if __name__ == "__main__":
    sys.exit(main())
