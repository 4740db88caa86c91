"""`kvc2 serve` on a disk that reads as slowly as a file in its folder says, for slow_disk.py.

The throttle lies where the system calls are (kvc2.tiers.slab_file.Files): reads take turns, as on
one disk; writes are left alone. `regardless` leaves the choice between loading and computing out:
every prefix is loaded, up to the acquire's deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvc2.cache import Cache
from kvc2.config import CpuConfig, DiskConfig, ServeConfig
from kvc2.metrics import Metrics
from kvc2.results import AcquireResult
from kvc2.server import Daemon
from kvc2.sessions import Session
from kvc2.tiers.slab_file import Files

GB = 1_000_000_000


@dataclass(frozen=True)
class Mode:
    """`bytes_per_s` 0: as fast as the disk is."""

    bytes_per_s: float = 0.0
    regardless: bool = False

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
        bytes_per_s = Mode.read(self._folder).bytes_per_s
        if bytes_per_s == 0:
            return super().read(fd, buffers, offset)
        with self._turn:
            begun = time.monotonic()
            got = super().read(fd, buffers, offset)
            time.sleep(max(0.0, begun + got / bytes_per_s - time.monotonic()))
        return got


class SlowCache(Cache):
    def __init__(self, config: ServeConfig, metrics: Metrics, folder: Path) -> None:
        super().__init__(config, metrics, files=SlowFiles(folder))
        self._folder = folder

    async def acquire(self, session: Session, *more: Any, **named: Any) -> AcquireResult:
        told = session.prefill_rate
        if Mode.read(self._folder).regardless:
            session.prefill_rate = 0.0  # until the next commit: as of an engine that tells none
        try:
            return await super().acquire(session, *more, **named)
        finally:
            session.prefill_rate = session.prefill_rate or told


async def serve(folder: Path) -> None:
    Mode().write(folder)
    config = ServeConfig(
        listen=f"unix:{folder / 'kvc2.sock'}",
        cpu=CpuConfig.of_bytes(1 * GB),
        disk=DiskConfig.of_bytes(folder / "disk", 4 * GB),
    )
    async with Daemon(config, cache=lambda *own: SlowCache(*own, folder)) as daemon:
        daemon.stop_on_signals()
        await daemon.stopped.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of socket, disk tier and mode.json")
    asyncio.run(serve(parser.parse_args().folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
