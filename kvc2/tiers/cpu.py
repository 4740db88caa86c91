"""The cpu tier: pools of one layout each, whose slabs are runs of the arena.

Not here: when a pool gets or loses a slab (pools.py), and what lies in a page (csrc/index).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvc2 import _core
from kvc2.arena import Arena
from kvc2.tiers.base import U32, U64, PageShape, SlabTable

NO_SLAB_COST = np.uint32(0xFFFFFFFF)  # of Index.slab_pages: no slab, or one that can't go


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

    def cheapest_runs(self, run_bytes: int, costs: U32, limit: int) -> list[list[int]]:
        """Numbers of the slabs that would have to go for a free run of so many bytes, the cheapest
        first, at most `limit` of them. `costs` by number; NO_SLAB: that one can't go."""
        numbers = np.array(self.slabs(), np.int64)
        numbers = numbers[costs[numbers] != NO_SLAB_COST]
        bases = self._slabs.bases((numbers * self.shape.pages_per_slab).astype(np.uint32))
        order = np.argsort(bases)
        numbers, bases = numbers[order], bases[order]
        runs = self.arena.runs_beside(run_bytes, bases.tolist(), self.shape.slab_bytes)
        starts = np.array(runs, np.int64)
        first = np.searchsorted(bases, starts - self.shape.slab_bytes, side="right")
        last = np.searchsorted(bases, starts + run_bytes, side="left")
        sums = np.concatenate([[0], np.cumsum(costs[numbers].astype(np.int64))])
        cheapest = np.argsort(sums[last] - sums[first], kind="stable")[:limit].tolist()
        return [numbers[first[each] : last[each]].tolist() for each in cheapest]

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
