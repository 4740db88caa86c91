"""Slabs go where they are needed: which layout gives one up, and how it is emptied.

Whoever owns the memory has one cache: what was not used for longest goes, whichever layout it is
of. So a pool that can't hold what it is asked to compares the age of its own next victim (in
acquires of all sessions, under any eviction policy) with that of the others', and gets a slab from
the one whose victim is oldest, if it would still be the older one afterwards; one that has a slab's
worth of free pages gives it first. The giver loses what its policy evicts next and nothing else:
what is left in the slab moves to its other slabs.

Nothing goes back and forth. A slab of n is an n-th of what a pool keeps, and so about an n-th of
its next victim's age; both sides are judged by what they would be after the move, so that the same
rule would not undo it. And a pool asks only when it has too few free pages for a batch: between two
slabs that it gets it has stored a slab's worth of bytes, so slabs move no faster than they fill.
Not here: a pool's growth while there is room (tiers/pools.py), the disk's slabs (disk_slabs.py).
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.arena import Arena
from kvc2.moving.mover import Mover
from kvc2.tiers.base import U32
from kvc2.tiers.pools import LayoutPools, Pools

NO_SLAB_COST = np.uint32(0xFFFFFFFF)  # of Index.slab_pages: no slab there, or a closed one

TRIES = 8  # of slabs of one layout, when what is cheapest is in use


SLAB_ROW = np.dtype(
    [("base", "i8"), ("bytes", "i8"), ("cost", "i8"), ("pool", "i8"), ("number", "i8")]
)


@dataclass(frozen=True)
class ArenaSlabs:
    """Slabs by where they begin; `cost`: bytes in them."""

    rows: NDArray[np.void]

    def cheapest_runs(self, arena: Arena, run_bytes: int) -> list[slice]:
        """Which of the slabs (rows) would have to go for a free run of so many bytes, the cheapest
        first, TRIES of them at most."""
        bases, ends = self.rows["base"], self.rows["base"] + self.rows["bytes"]
        units = [np.arange(*each, arena.unit_bytes) for each in zip(bases, ends, strict=True)]
        taken = np.concatenate(units) if units else np.empty(0, np.int64)
        starts = arena.runs_beside(run_bytes, taken)
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(bases, starts + run_bytes, side="left")
        sums = np.concatenate([[0], np.cumsum(self.rows["cost"])])
        cheapest = np.argsort(sums[last] - sums[first], kind="stable")[:TRIES].tolist()
        return [slice(int(first[each]), int(last[each])) for each in cheapest]

    def of(self, owner: LayoutPools, run: slice) -> list[int]:
        """Numbers of the owner's slabs among these rows."""
        rows = self.rows[run]
        return [int(each) for each in rows["number"][rows["pool"] == owner.cpu.id]]


class Slabs:
    """All on the event loop. `high_watermark`: the share of its cpu pool that a layout keeps free,
    and does not give away for nothing."""

    def __init__(
        self, index: _core.Index, mover: Mover, pools: Pools, high_watermark: float
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._high = high_watermark
        self._busy = asyncio.Lock()

    async def serve(self) -> None:
        """What was wanted on calls that could not wait for it."""
        for digest, pages in list(self._pools.wanted.items()):
            needy = self._pools.layouts[digest]
            await self.make_room(needy, pages)
            self._pools.served(needy)

    async def make_room(self, needy: LayoutPools, pages: int) -> None:
        """Free pages in a cpu pool: from the arena, and then from layouts that need them less."""
        if self._pools.grow(needy, pages) or not self._pools.arena.populated:
            return
        async with self._busy:
            while not self._pools.grow(needy, pages):
                if not await self._take_run(needy):
                    return

    async def _take_run(self, needy: LayoutPools) -> bool:
        """A run of the arena that holds a slab of `needy` is free now, or there is none to get."""
        others = [each for each in self._pools.layouts.values() if each.cpu.store.slabs()]
        ids = {each.cpu.id: self._spare(each.cpu.id, self._high) for each in others}
        owners = [
            next(each for each in others if each.cpu.id == number)
            for number in givers(self._index, needy.cpu.id, ids)
        ]
        for group in [*([each] for each in owners), owners]:  # each alone, then all together
            slabs = self._slabs_of(group)
            for run in slabs.cheapest_runs(self._pools.arena, needy.shape.slab_bytes):
                parts = [(owner, slabs.of(owner, run)) for owner in group]
                if self._close(parts):
                    emptied = [await self._empty(owner, numbers) for owner, numbers in parts]
                    return all(emptied)
        return False

    def _slabs_of(self, owners: list[LayoutPools]) -> ArenaSlabs:
        """Their slabs in the arena, but for those that can't go."""
        found = []
        for owner in owners:
            costs = self._index.slab_pages(owner.cpu.id)
            numbers = np.flatnonzero(costs != NO_SLAB_COST)
            rows = np.empty(numbers.size, SLAB_ROW)
            rows["pool"], rows["number"] = owner.cpu.id, numbers
            rows["base"], rows["bytes"] = owner.cpu.store.bases(numbers), owner.shape.slab_bytes
            rows["cost"] = costs[numbers].astype(np.int64) * owner.shape.page_bytes
            found.append(rows)
        rows = np.concatenate(found) if found else np.empty(0, SLAB_ROW)
        return ArenaSlabs(rows[np.argsort(rows["base"])])

    def _close(self, parts: list[tuple[LayoutPools, list[int]]]) -> bool:
        """Close these slabs, or none of them: something in them is in use."""
        slabs = [(owner.cpu.id, number) for owner, numbers in parts for number in numbers]
        for done, (pool, number) in enumerate(slabs):
            if not self._index.close_slab(pool, number):
                for each in slabs[:done]:
                    self._index.reopen_slab(*each)
                return False
        return True

    async def _empty(self, owner: LayoutPools, numbers: list[int]) -> bool:
        """Closed slabs go back to the arena. False, and what is left of them is open again, when
        that can't be."""
        pool, taken = owner.cpu.id, 0
        try:
            counts = self._index.pool_counts(pool)
            open_pages = (counts.slabs - len(numbers)) * owner.shape.pages_per_slab
            held = counts.pages - open_pages  # in these slabs: what was free there is gone
            self._index.evict(pool, max(0, held - counts.free))
            for number in numbers:
                while move := self._index.plan_move(pool, number, owner.shape.pages_per_slab):
                    moved = await asyncio.shield(self._mover.move_in_arena(owner, move))
                    if not moved.left.size:
                        break  # all in use
            for number in numbers:
                if self._index.take_slab(pool, number):
                    owner.cpu.store.remove_slab(number)
                    taken += 1
        finally:
            for number in numbers:
                self._index.reopen_slab(pool, number)  # does nothing to one that was taken
        return taken == len(numbers)

    def _spare(self, pool: int, share: float) -> int:
        counts = self._index.pool_counts(pool)
        return max(0, counts.free - math.ceil(counts.pages * share))


def cheapest(costs: U32) -> list[int]:
    """Numbers of the slabs that can go, the emptiest first."""
    order = costs.argsort(kind="stable")[:TRIES]
    return [int(each) for each in order if costs[each] != NO_SLAB_COST]


def givers(index: _core.Index, needy: int, spare: dict[int, int]) -> list[int]:
    """Pools that should give a slab to `needy`, whoever should most first. `spare`: pages that
    each has free and has no use for."""
    slabs, own = index.pool_counts(needy).slabs, index.victim_age(needy)
    if slabs and own is None:
        return []  # all of it is in use this very moment
    older_than = (own or 0) * (1 + 1 / slabs) if slabs else -1.0
    ages = {each: _age_after(index, each) for each in spare if each != needy}
    free = {each: spare[each] // _slab_pages(index, each) for each in ages}
    found = [each for each in ages if free[each] > 0 or ages[each] > older_than]
    return sorted(found, key=lambda each: (free[each], ages[each]), reverse=True)


def _age_after(index: _core.Index, pool: int) -> float:
    """About how old its next victim would be with a slab less; the last one counts as half."""
    age = index.victim_age(pool) or 0
    return age * (1 - 1 / max(2, index.pool_counts(pool).slabs))


def _slab_pages(index: _core.Index, pool: int) -> int:
    counts = index.pool_counts(pool)
    return max(1, counts.pages // max(1, counts.slabs))
