"""What is written aside of the disk's pages: when each was last used, and when its block expires.

    DIR/recency/<layout number>            [pages] little-endian u32: stamps, 0 where nothing is
    DIR/recency/<layout number>.lifetimes  [pages, 2] the same: second of the wall clock from which
                                           the block is dead, 0: never; generation, modulo 2**32

Losing a file costs order, or what a request alone had said of its blocks' lives; never bytes. So
nothing here is synced. An entry of a lifetime counts only for the generation that it names.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from kvc2.tiers.base import U32

LOG = logging.getLogger(__name__)

SECOND_MAX = (1 << 32) - 1  # of the wall clock, in 2106


class Recency:
    """second_zero: of the wall clock, when the index's time was 0."""

    def __init__(self, folder: Path, second_zero: int) -> None:
        self._folder = folder
        self._second_zero = second_zero

    def stamps(self, layout: int) -> U32:
        """[pages] as last saved; empty when there are none."""
        return self._read(str(layout))

    def lifetimes(self, layout: int) -> U32:
        """[pages, 2] as last saved, in seconds of the index's time, 1 for what is over; empty when
        there are none."""
        numbers = self._read(f"{layout}.lifetimes")
        rows = numbers[: numbers.size // 2 * 2].reshape(-1, 2)
        ends = rows[:, 0] > 0
        rows[ends, 0] = np.maximum(rows[ends, 0].astype(np.int64) - self._second_zero, 1)
        return rows

    def save(self, layout: int, stamps: U32, lifetimes: U32) -> None:
        """As `Index.stamps` and `Index.lifetimes` have them."""
        self._write(str(layout), stamps)
        rows = lifetimes.reshape(-1, 2).copy()
        ends = rows[:, 0] > 0
        wall = rows[ends, 0].astype(np.int64) + self._second_zero
        rows[ends, 0] = np.minimum(wall, SECOND_MAX)
        self._write(f"{layout}.lifetimes", rows)

    def _read(self, name: str) -> U32:
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return np.empty(0, np.uint32)
        return np.frombuffer(data[: len(data) // 4 * 4], "<u4").astype(np.uint32)

    def _write(self, name: str, numbers: U32) -> None:
        path = self._folder / name
        try:
            aside = path.with_name(f"{name}.new")
            aside.write_bytes(numbers.astype("<u4").tobytes())
            aside.rename(path)
        except OSError as error:
            LOG.warning("disk: %s not written: %s", path, error)
