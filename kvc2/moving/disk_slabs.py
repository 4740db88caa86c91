"""The disk's slabs: a layout's pool grows by one, takes one over from another layout, and gives one
back that is retired.

Not here: whose slab goes (slabs.py), the files and the budget (tiers/disk/tier.py), what is written
into them (disk_writer.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from kvc2 import _core
from kvc2.metrics import Metrics
from kvc2.moving.batches import BATCH_BYTES, free_beside_batches, pages_per_batch
from kvc2.moving.mover import Mover
from kvc2.moving.slabs import cheapest, givers
from kvc2.tiers.pools import LayoutOnDisk, Pools

FULL_RETRY_S = 4.0  # after the file system refused another slab; others may have made room


class DiskSlabs:
    """All on the event loop. `commit` commits what a pool has dropped and says whether it did. A
    slab of a disk pool:

    | state  | to     | when [function]                                                |
    |--------|--------|----------------------------------------------------------------|
    | none   | open   | budget and file system have room [_grow]                       |
    | open   | closed | another layout needs it more [_take_over], or a sync of it has |
    |        |        | failed [retire]: nothing is planned into it any more           |
    | closed | open   | it can't be emptied for the other layout now [_take_over]      |
    | closed | none   | it is empty, its deletes are committed [_take_over, retire]    |

    The file system:

    | state                 | to                    | when [function]                             |
    |-----------------------|-----------------------|---------------------------------------------|
    | has room              | full                  | it refused a slab [_grow]                   |
    | full                  | has room              | FULL_RETRY_S have passed, or somebody can't |
    |                       |                       | wait [ask_again]; it is asked [_grow]       |
    | full                  | full despite takeover | a slab was taken over for it; no other      |
    |                       |                       | is, while it is so [_take_over]             |
    | full despite takeover | has room              | it gave a slab [_grow]                      |
    """

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        pools: Pools,
        *,
        commit: Callable[[LayoutOnDisk], Awaitable[bool]],
        wake: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._commit = commit
        self._wake = wake
        self._metrics = metrics
        self._full_until = 0.0
        self._full_despite_takeover = False

    def ask_again(self) -> None:
        """The next slab is asked for at once, also of a file system that has refused one."""
        self._full_until = 0.0

    # ---- slabs that failed to sync ----

    async def retire(self, pools: LayoutOnDisk) -> bool:
        """Nothing is planned into slabs that failed to sync; an empty one is deleted. False while
        something in one is in use: the end of that wakes the disk's writer."""
        disk, disk_id = pools.disk.store, pools.disk.id
        for number in sorted(disk.slabs.retired - disk.closed):
            if not self._index.close_slab(disk_id, number):
                return False
            disk.closed.add(number)
            self._metrics.fault("slab_retired")
        for number in sorted(disk.closed):
            if disk.settled and self._index.take_slab(disk_id, number):
                disk.closed.discard(number)
                await self._delete(pools, number)
        return True

    async def _delete(self, pools: LayoutOnDisk, number: int) -> None:
        shrink = partial(pools.files.shrink, pools.disk.store, number)
        await asyncio.shield(self._mover.on_writer(shrink))

    # ---- room ----

    async def make_room(self, pools: LayoutOnDisk) -> None:
        """Slabs for what waits: of the budget, and then from layouts that need them less."""
        batch = max(pages_per_batch(self._index, pools), BATCH_BYTES // pools.shape.page_bytes, 1)
        waiting = min(batch, self._index.undemoted(pools.cpu.id))
        # beside what waits, the two batches that would otherwise be evicted ahead
        while free_beside_batches(self._index, pools) < waiting:
            if not await self._grow(pools) and not await self._take_over(pools):
                return

    async def _grow(self, pools: LayoutOnDisk) -> bool:
        disk, now = pools.disk.store, asyncio.get_running_loop().time()
        if now < self._full_until or not pools.files.has_budget(disk.shape):
            return False
        number = await asyncio.shield(self._mover.on_writer(partial(pools.files.grow, disk)))
        if number is None:
            self._full_until = now + FULL_RETRY_S
            asyncio.get_running_loop().call_later(FULL_RETRY_S, self._wake)
            return False
        added = self._index.add_slab(pools.disk.id)
        if added != number:
            raise RuntimeError(f"slab {added} of the index is slab {number} on disk")
        self._full_despite_takeover = False
        return True

    async def _take_over(self, needy: LayoutOnDisk) -> bool:
        """Empty and delete a slab of a layout that needs it less, where that can help: to make room
        in the budget, or once in a full file system until a slab has come of it."""
        files, shape = needy.files, needy.disk.store.shape
        full = files.has_budget(shape)
        if not files.could_hold(shape) or (full and self._full_despite_takeover):
            return False
        for owner in self._givers(needy):
            disk_id = owner.disk.id
            costs = self._index.slab_pages(disk_id)
            number = next((n for n in cheapest(costs) if self._index.close_slab(disk_id, n)), None)
            if number is None:
                continue  # loads read from all of them
            try:
                if not await self._empty(owner, number, int(costs[number])):
                    return False
            finally:
                self._index.reopen_slab(disk_id, number)  # does nothing to one that was taken
            await self._delete(owner, number)
            self._full_despite_takeover, self._full_until = full, 0.0
            return True
        return False

    def _givers(self, needy: LayoutOnDisk) -> list[LayoutOnDisk]:
        """Layouts that should give a slab, if all of theirs would come to one of `needy`."""
        others = {
            each.disk.id: each
            for each in self._pools.on_disk()
            if self._index.pool_counts(each.disk.id).slabs
        }
        spare = {
            number: max(0, free_beside_batches(self._index, each))
            for number, each in others.items()
        }
        found = [others[number] for number in givers(self._index, needy.disk.id, spare)]
        return found if sum(map(_disk_bytes, found)) >= needy.disk.store.shape.slab_bytes else []

    async def _empty(self, owner: LayoutOnDisk, number: int, held: int) -> bool:
        """A closed slab with `held` pages goes from the index: what its owner evicts next goes, the
        rest moves. False when something in it stays in use, or the disk fails."""
        disk, disk_id = owner.disk.store, owner.disk.id
        short = held - self._index.pool_counts(disk_id).free
        owner.drop_records(self._index.evict(disk_id, max(0, short)))
        while disk.settled or await self._commit(owner):
            if self._index.take_slab(disk_id, number):
                return True
            move = self._index.plan_move(disk_id, number, disk.shape.pages_per_slab)
            if move is None:
                return False
            moved = await asyncio.shield(self._mover.move_on_disk(owner, move))
            if not moved.left.size:
                return False
        return False


def _disk_bytes(pools: LayoutOnDisk) -> int:
    disk = pools.disk.store
    return len(disk.slabs.numbers()) * disk.shape.slab_bytes
