"""The cpu tier: pools of one layout each, whose slabs are runs of the arena.

Not here: when a pool gets or loses a slab (pools.py), and what lies in a page (csrc/index).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.arena import Arena
from kvc2.tiers.base import U32, U64, PageShape, SlabTable


class CpuPool:
    """Slabs of one layout in the arena. One thread (the event loop's) adds and removes slabs; page
    offsets are asked for on that thread too, before work goes elsewhere."""

    def __init__(self, arena: Arena, shape: PageShape) -> None:
        self.arena = arena
        self.shape = shape
        self._slabs = SlabTable(shape)

    def take_run(self) -> int | None:
        """A free run of the arena for one more slab; None when there is none (yet)."""
        return self.arena.take(self.shape.slab_bytes)

    def add_slab(self, number: int, run: int) -> None:
        self._slabs.put(number, run)

    def remove_slab(self, number: int) -> None:
        """The slab's run goes back to the arena; its pages must be free."""
        self.arena.give_back(self._slabs.drop(number), self.shape.slab_bytes)

    def slabs(self) -> list[int]:
        """Numbers of its slabs."""
        return self._slabs.numbers()

    def bases(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] where slabs begin in the arena."""
        return self._slabs.bases((numbers * self.shape.pages_per_slab).astype(np.uint32))

    def move(self, team: _core.ThreadTeam, sources: U32, targets: U32) -> Callable[[], None]:
        """Copies pages, headers too, from one slab to others, when it is called (on any thread).
        All sources lie in one slab."""
        size = np.uint64(self.shape.page_bytes)
        base = np.uint64(self._slabs.bases(sources[:1])[0])
        within = sources % np.uint32(self.shape.pages_per_slab)
        segments = np.array([[base, size, size]], np.uint64)
        offsets, memory = self.offsets(targets), self.arena.memory.data
        return lambda: _core.gather(team, memory, segments, within, memory, offsets)

    def offsets(self, pages: U32) -> U64:
        """[n] where each page (its header sector) begins in the arena."""
        return self._slabs.bases(pages).astype(np.uint64) + self._slabs.within(pages)
