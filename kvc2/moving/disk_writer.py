"""Write-behind: committed blocks go from the cpu tier to the disk, in batches and in their order.

Two batches are under way at most, and end in their order. Nothing is planned into a disk pool while
a page that the index has freed there still has its record (`DiskPool.settled`). Two batches of
pages are kept free ahead, and what is freed for that is committed with a batch under way: the next
but one can be planned when that has ended. Not here: which blocks (csrc/index), the copying
(mover.py), slabs (disk_slabs.py), durability itself (tiers/disk/tier.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from kvc2 import _core
from kvc2.metrics import Metrics
from kvc2.moving.batches import (
    UNDER_WAY_MAX,
    Batches,
    free_beside_batches,
    pages_per_batch,
)
from kvc2.moving.disk_slabs import DiskSlabs
from kvc2.moving.free_pages import REAP_PAGES, FreePages
from kvc2.moving.mover import Mover
from kvc2.moving.turns import Retry, Turns
from kvc2.tiers.pools import LayoutOnDisk, Pools


class DiskWriter:
    """All on the event loop. A layout's disk pool, as it is seen here:

    | state      | to         | when [function]                                                 |
    |------------|------------|-----------------------------------------------------------------|
    | settled    | settled    | a batch is planned into it and begun [_step]                    |
    | settled    | unsettled  | a page was freed or moved [LayoutOnDisk.drop_records, Mover]    |
    | unsettled  | committing | the commit of the first batch under way begins; where none is,  |
    |            |            | one of its own [_step]                                          |
    | committing | settled    | the commit is durable [DiskPool.ended]                          |
    | committing | unsettled  | the commit failed, or more was freed meanwhile [DiskPool.ended] |
    """

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        pools: Pools,
        *,
        free: FreePages,
        turns: Turns,
        metrics: Metrics,
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._free = free
        self._turns = turns
        self._batches = Batches()
        self.retry = Retry(turns.wake)
        self.slabs = DiskSlabs(
            index, mover, pools, commit=self._commit, wake=turns.wake, metrics=metrics
        )

    def undemoted(self) -> int:
        """Blocks in memory that the disk should have and has not."""
        return sum(self._index.undemoted(each.cpu.id) for each in self._pools.on_disk())

    def not_admitted(self) -> int:
        """Blocks in memory that the disk has not, and takes once they are used again."""
        return sum(map(self._index.not_admitted, self._pools.ids("disk")))

    async def work(self) -> None:
        """Write until there is nothing to write, no room, or no turn; batches have ended then."""
        try:
            moved = True
            while moved:
                moved = False
                for pools in self._pools.on_disk():
                    moved |= await self._step(pools)
                    self._pools.grow(pools, self._free.low_pages(pools.cpu.id))
                    self._free.keep(pools.cpu.id)
                if not moved and self._batches:
                    await self._batches.first_ended()
                    moved = True
        finally:
            await self._batches.all_ended()

    async def _step(self, pools: LayoutOnDisk) -> bool:
        """One step of a layout's disk pool; False when there is nothing that can be done."""
        disk = pools.disk.store
        if self._reap(pools):
            self._free.reap()  # what lies above them
        if self._batches.full or (self._batches and not disk.settled):
            await self._batches.first_ended()  # whose commit takes along what was dropped
            return True
        if not disk.settled:
            return await self._commit(pools)
        if not self._index.undemoted(pools.cpu.id) or not self._turns.wanted(pools.cpu.id):
            return False
        if self.retry.must_wait:
            return False
        await self._turns.quiet()
        if not await self.slabs.retire(pools):
            return False
        await self.slabs.make_room(pools)
        if not disk.settled:  # a load found bad pages while this waited
            return True
        transfers = self._plan(pools, pages_per_batch(self._index, pools))
        # only now: the plan must not have got a page whose record is still there
        if not transfers or self._batches or not self._index.undemoted(pools.cpu.id):
            self._free_ahead(pools)  # else after the next plan, which is not to wait for that
        if transfers:
            self._batches.begin(self._commit(pools, transfers))
        return bool(transfers) or not disk.settled

    def _reap(self, pools: LayoutOnDisk) -> bool:
        """Free the dead blocks' pages on disk; whether there were any."""
        found = False
        while (dead := self._index.reap(pools.disk.id, REAP_PAGES)).pages.size:
            pools.drop_records(dead)
            found = True
        return found

    def _free_ahead(self, pools: LayoutOnDisk) -> None:
        """Two batches of disk pages, and what tenants have above their quotas."""
        pools.drop_records(self._index.trim(pools.disk.id))
        short = -free_beside_batches(self._index, pools)
        if short > 0:
            pools.drop_records(self._index.evict(pools.disk.id, short))

    def _plan(self, pools: LayoutOnDisk, pages: int) -> list[_core.Transfer]:
        """What a batch of at most so many pages takes; the index plans few at a time."""
        found: list[_core.Transfer] = []
        kept = UNDER_WAY_MAX * pages  # free, also where the disk is full
        while pages > 0 and (transfer := self._index.plan_demote(pools.cpu.id, pages, ahead=kept)):
            found.append(transfer)
            pages -= transfer.target_pages.size
        return found

    async def _commit(self, pools: LayoutOnDisk, transfers: Sequence[_core.Transfer] = ()) -> bool:
        """A batch of these transfers, and what the pool has dropped. Whether it is committed."""
        patience_s = self._turns.patience_s
        outcome = await asyncio.shield(self._mover.write(pools, transfers, patience_s=patience_s))
        if transfers:
            self.retry.ended(good=outcome.written)
        elif not outcome.committed:
            self.retry.wake_later()
        return outcome.committed

    async def save_recency(self) -> None:
        """Write the order of use aside, and when blocks expire."""
        for each in self._pools.on_disk():
            number = each.disk.id
            stamps, lifetimes = self._index.stamps(number), self._index.lifetimes(number)
            save = partial(each.files.save_recency, each.disk.store, stamps, lifetimes)
            await self._mover.on_writer(save)
