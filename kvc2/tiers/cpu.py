"""The cpu tier: pools of one layout each, whose slabs are runs of the arena.

Not here: when a pool gets or loses a slab (pools.py), and what lies in a page (csrc/index).
"""

from __future__ import annotations

import numpy as np

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
        """Numbers of its slabs, in the order in which they lie in the arena."""
        return sorted(self._slabs.numbers(), key=self._slabs.base)

    def runs(self) -> list[int]:
        """Where its slabs lie in the arena."""
        return [self._slabs.base(number) for number in self._slabs.numbers()]

    def slabs_within(self, run: int, run_bytes: int) -> list[int]:
        """Numbers of its slabs that lie in part or whole in a run of the arena."""
        first = run - self.shape.slab_bytes
        return [each for each in self.slabs() if first < self._slabs.base(each) < run + run_bytes]

    def offsets(self, pages: U32) -> U64:
        """[n] where each page (its header sector) begins in the arena."""
        return self._slabs.bases(pages).astype(np.uint64) + self._slabs.within(pages)
