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
Not here: a pool's growth while there is room (tiers/pools.py), the disk's order (behind.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from kvc2 import _core
from kvc2.mover import Mover
from kvc2.tiers.base import U32
from kvc2.tiers.cpu import NO_SLAB_COST
from kvc2.tiers.pools import LayoutPools, Pools

TRIES = 8  # of slabs of one layout, when what is cheapest is in use


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
        others = [each for each in self._pools.layouts.values() if each.cpu.slabs()]
        ids = {each.cpu_id: self._spare(each.cpu_id, self._high) for each in others}
        for owner_id in self.givers(needy.cpu_id, ids):
            owner = next(each for each in others if each.cpu_id == owner_id)
            costs = self._index.slab_pages(owner_id)
            for numbers in owner.cpu.cheapest_runs(needy.shape.slab_bytes, costs, TRIES):
                if self.close(owner_id, numbers):
                    return await self._empty(owner, numbers, int(costs[numbers].sum()))
        return False

    def givers(self, needy: int, spare: dict[int, int]) -> list[int]:
        """Pools that should give a slab to `needy`, whoever should most first. `spare`: pages that
        each has free and has no use for."""
        slabs, own = self._index.pool_counts(needy).slabs, self._index.victim_age(needy)
        if slabs and own is None:
            return []  # all of it is in use this very moment
        older_than = (own or 0) * (1 + 1 / slabs) if slabs else -1.0
        ages = {each: self._age_after(each) for each in spare if each != needy}
        free = {each: spare[each] // self._slab_pages(each) for each in ages}
        found = [each for each in ages if free[each] > 0 or ages[each] > older_than]
        return sorted(found, key=lambda each: (free[each], ages[each]), reverse=True)

    def _age_after(self, pool: int) -> float:
        """About how old its next victim would be with a slab less; the last one counts as half."""
        age = self._index.victim_age(pool) or 0
        return age * (1 - 1 / max(2, self._index.pool_counts(pool).slabs))

    def close(self, pool: int, numbers: Iterable[int]) -> bool:
        """Close these slabs, or none of them: something in them is in use."""
        closed: list[int] = []
        for number in numbers:
            if not self._index.close_slab(pool, number):
                for each in closed:
                    self._index.reopen_slab(pool, each)
                return False
            closed.append(number)
        return True

    async def _empty(self, owner: LayoutPools, numbers: list[int], held: int) -> bool:
        """Closed slabs, with `held` pages in them, go back to the arena. False, and what is left of
        them is open again, when that can't be."""
        pool = owner.cpu_id
        self._index.evict(pool, max(0, held - self._index.pool_counts(pool).free))
        for number in numbers:
            while move := self._index.plan_move(pool, number, owner.shape.pages_per_slab):
                if not await asyncio.shield(self._mover.move_in_arena(owner, move)):
                    break  # all in use
        taken = [each for each in numbers if self._index.take_slab(pool, each)]
        for number in taken:
            owner.cpu.remove_slab(number)
        for number in set(numbers) - set(taken):
            self._index.reopen_slab(pool, number)
        return len(taken) == len(numbers)

    def _spare(self, pool: int, share: float) -> int:
        counts = self._index.pool_counts(pool)
        return max(0, counts.free - math.ceil(counts.pages * share))

    def _slab_pages(self, pool: int) -> int:
        counts = self._index.pool_counts(pool)
        return max(1, counts.pages // max(1, counts.slabs))


def cheapest(costs: U32) -> list[int]:
    """Numbers of the slabs that can go, the emptiest first."""
    order = costs.argsort(kind="stable")[:TRIES]
    return [int(each) for each in order if costs[each] != NO_SLAB_COST]
