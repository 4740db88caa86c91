"""What is written aside of the disk's pages: when each was last used, and when its block expires.

    DIR/recency/<layout number>            [pages] little-endian u32: stamps, 0 where nothing is
    DIR/recency/<layout number>.lifetimes  [pages, 2] the same: second of the wall clock from which
                                           the block is dead, 0: never; generation, modulo 2**32

Losing a file costs order, or what a request alone had said of its blocks' lives; never bytes. So
nothing here is synced. An entry of a lifetime counts only for the generation that it names. The
wall clock may have been set since: whatever it says, what is left of a life is at most what was
left when the file was written (its mtime, by the same clock).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvc2.tiers.base import U32

LOG = logging.getLogger(__name__)

SECOND_MAX = (1 << 32) - 1  # of the wall clock, in 2106
STAMP_MAX = (1 << 32) - 2  # of a damaged file, too: the index goes on from above it


@dataclass(frozen=True)
class Clocks:
    """Now, in seconds: of the wall clock, which may be set while a daemon runs, and of the index's
    time, which never goes back and ends with the daemon."""

    wall: Callable[[], float] = time.time
    second: Callable[[], int] = lambda: 1


class Recency:
    def __init__(self, folder: Path, clocks: Clocks) -> None:
        self._folder = folder
        self._clocks = clocks

    def stamps(self, layout: int) -> U32:
        """[pages] as last saved; empty when there are none."""
        return np.minimum(self._read(str(layout)), np.uint32(STAMP_MAX))

    def lifetimes(self, layout: int) -> U32:
        """[pages, 2] as last saved, in seconds of the index's time, 1 for what is over; empty when
        there are none."""
        name = f"{layout}.lifetimes"
        numbers = self._read(name)
        rows = numbers[: numbers.size // 2 * 2].reshape(-1, 2)
        ends = rows[:, 0] > 0
        since = max(math.ceil(self._clocks.wall()), self._saved_at(name))
        left = rows[ends, 0].astype(np.int64) - since
        rows[ends, 0] = np.clip(self._clocks.second() + left, 1, SECOND_MAX)
        return rows

    def save(self, layout: int, stamps: U32, lifetimes: U32) -> None:
        """As `Index.stamps` and `Index.lifetimes` have them."""
        self._write(str(layout), stamps)
        rows = lifetimes.reshape(-1, 2).copy()
        ends = rows[:, 0] > 0
        left = rows[ends, 0].astype(np.int64) - self._clocks.second()
        rows[ends, 0] = np.clip(int(self._clocks.wall()) + left, 1, SECOND_MAX)
        self._write(f"{layout}.lifetimes", rows)

    def _read(self, name: str) -> U32:
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return np.empty(0, np.uint32)
        return np.frombuffer(data[: len(data) // 4 * 4], "<u4").astype(np.uint32)

    def _saved_at(self, name: str) -> int:
        """The second of the wall clock as it was; 0 where the file is gone."""
        try:
            return int((self._folder / name).stat().st_mtime)
        except OSError:
            return 0

    def _write(self, name: str, numbers: U32) -> None:
        path, now = self._folder / name, int(self._clocks.wall())
        try:
            aside = path.with_name(f"{name}.new")
            aside.write_bytes(numbers.astype("<u4").tobytes())
            os.utime(aside, (now, now))  # by our clock: a file server has its own
            aside.rename(path)
        except OSError as error:
            LOG.warning("disk: %s not written: %s", path, error)
