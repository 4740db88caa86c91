"""Write-behind: when committed blocks go to slower tiers.

Two tasks on the event loop: gpu -> cpu soon after a commit, cpu -> disk when no load is under way.
Both yield to transfers that someone waits for, though not for ever, and keep some gpu and cpu pages
free (watermarks). The disk's order is kept here: two batches are under way at most, and end in
their order; nothing is planned into a disk pool while a page that the index has freed there still
has its record (`DiskPool.settled`); two batches of pages are kept free ahead, and what is freed for
that is committed with a batch under way: the next but one can be planned when that has ended.
Not here: which blocks (csrc/index), the copying (mover.py), durability itself (tiers/disk.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from kvc2 import _core
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.moving.batches import STORE_BYTES, Batches, store_pages
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.mover import Mover
from kvc2.moving.slabs import Slabs, cheapest
from kvc2.periodic import periodically
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.pools import LayoutPools, Pools

LOG = logging.getLogger(__name__)

GATHER_BYTES = 16 << 20  # about 4 ms of copying: what a promotion may have to wait for
PATIENCE_S = 0.5  # transfers behind yield this long before each batch, not for ever
RETRY_S = 1.0  # after copying failed, or the disk refused
FULL_RETRY_S = 4.0  # after the file system refused another slab; others may have made room
RECENCY_S = 30.0
REAP_PAGES = 4096  # a call: about 1 ms in the index
PRESSURE = 4  # write_policy back: copy when less than 1 / PRESSURE of a pool is free


class Behind:
    """All on the event loop. `gpus` is the cache's own table of open pools."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        pools: Pools,
        gpus: dict[int, GpuPool],
        *,
        config: ServeConfig,
        metrics: Metrics,
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._slabs = Slabs(index, mover, pools, config.high_watermark)
        pools.on_want = self.wake
        self._gpus = gpus
        self._policy = config.write_policy
        self._low, self._high = config.low_watermark, config.high_watermark
        self._metrics = metrics
        self._urgent = 0
        self._wakes = {"gpu": asyncio.Event(), "disk": asyncio.Event()}
        self._idle: set[str] = set()
        self._quiet = asyncio.Event()
        self._settled = asyncio.Event()
        self._woken = asyncio.Event()
        self._full_until = 0.0
        self._retry_at: dict[str, float] = {}  # by what has failed: "gpu" or "disk"
        self._populated = False  # the arena, when copies into it were last tried
        self._in_vain = False  # a slab was taken over, and the file system refused all the same
        self._batches = Batches()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run("gpu", self._demote_all)),
            asyncio.create_task(self._run("disk", self._store_all)),
            asyncio.create_task(periodically(RECENCY_S, self.save_recency, self._metrics)),
        ]

    async def stop(self) -> None:
        """Ends after the batches under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """There may be something to copy, or room for it."""
        self._woken.set()
        if not self._mover.waited_for:
            self._quiet.set()
        for name, event in self._wakes.items():
            self._idle.discard(name)
            event.set()

    async def drained(self, deadline_s: float) -> bool:
        """Copy without yielding until nothing more can be; False when the time is over first. What
        has failed is tried at once, in new slabs too, and not again before the answer."""
        self._urgent += 1
        if self._retry_at:
            self._retry_at = dict.fromkeys(self._retry_at, 0.0)
            self._full_until = 0.0  # not for room alone: each try takes what is left from others
        self._quiet.set()
        self.wake()
        try:
            async with asyncio.timeout(deadline_s):
                while len(self._idle) < len(self._wakes) or self._room_is_coming():
                    self._settled.clear()
                    await self._settled.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._urgent -= 1

    def _room_is_coming(self) -> bool:
        """A daemon that just started had no slabs yet for what was committed, when it was tried."""
        return not self._populated and self.undemoted() > 0

    async def rescue(self, gpu: GpuPool, timeout_s: float) -> None:
        """Copy what a dead engine committed and no other tier holds; its memory is still mapped."""
        self.wake()  # the disk too: what it takes makes room in cpu
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    self._woken.clear()
                    populated = self._pools.arena.populated  # when it is later, that wakes us
                    if await self._demote(gpu, rescue=True):
                        continue
                    stuck = populated and "disk" in self._idle  # which makes room in cpu
                    if stuck or not self._index.undemoted(gpu.id):
                        break
                    await self._woken.wait()
        self.wake()

    async def synced(self) -> bool:
        """Whether what is on disk is durable, also where disk.durability is relaxed."""
        return await asyncio.shield(self._mover.on_writer(DiskTier.sync))

    @property
    def failing(self) -> bool:
        """Whether the last batch of either kind has failed: it will be tried again."""
        return bool(self._retry_at)

    def _ended(self, name: str, *, good: bool) -> None:
        """Note how a batch ended; after a failure the next one waits for RETRY_S."""
        if good:
            self._retry_at.pop(name, None)
            return
        loop = asyncio.get_running_loop()
        self._retry_at[name] = loop.time() + RETRY_S
        loop.call_later(RETRY_S, self.wake)

    def _must_wait(self, name: str) -> bool:
        return asyncio.get_running_loop().time() < self._retry_at.get(name, 0.0)

    def undemoted(self) -> int:
        """Blocks that a slower tier should have and has not."""
        ids = [gpu.id for gpu in self._gpus.values()]
        ids += [each.cpu_id for each in self._pools.layouts.values() if each.disk is not None]
        return sum(self._index.undemoted(each) for each in ids)

    def not_admitted(self) -> int:
        """Blocks in memory that the disk has not, and takes once they are used again."""
        ids = (each.disk_id for each in self._pools.layouts.values())
        return sum(self._index.not_admitted(each) for each in ids if each is not None)

    async def _run(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        wake = self._wakes[name]
        while True:
            wake.clear()
            try:
                await work()
            except Exception:
                self._metrics.fault("internal_error")
                LOG.exception("write-behind to below %s", name)
            if not wake.is_set():
                self._idle.add(name)
                self._settled.set()
                self._woken.set()
            await wake.wait()

    @property
    def _yields(self) -> bool:
        return not self._urgent and self._policy != "through"

    async def _yield(self) -> None:
        if self._mover.waited_for and self._yields:
            self._quiet.clear()
            with suppress(TimeoutError):
                # not wait_for: on Python 3.11 it loses a cancellation that comes with its end
                async with asyncio.timeout(PATIENCE_S):
                    await self._quiet.wait()

    def _wanted(self, pool: int) -> bool:
        """write_policy back copies only what is about to be evicted, or for a flush."""
        if self._policy != "back" or self._urgent:
            return True
        counts = self._index.pool_counts(pool)
        return counts.free < counts.pages // PRESSURE

    # ---- watermarks ----

    def _keep_free(self, pool: int) -> None:
        """Below the low watermark: drop copies that a slower tier also holds up to the high one, so
        that whoever needs a page finds one. Last copies go only for a page that is needed now."""
        if self._index.pool_counts(pool).free < self._watermark(pool, self._low):
            self._index.keep_free(pool, self._watermark(pool, self._high))

    def _watermark(self, pool: int, share: float) -> int:
        """In pages; a pool that is closed or empty has none."""
        return math.ceil(self._index.pool_counts(pool).pages * share)

    # ---- the dead ----

    def reap(self) -> None:
        """Free the dead blocks' pages in memory, as far as nothing pins them."""
        ids = [gpu.id for gpu in self._gpus.values()]
        ids += [each.cpu_id for each in self._pools.layouts.values()]
        while sum(self._index.reap(each, REAP_PAGES).pages.size for each in ids):
            pass

    def _reap_disk(self, pools: LayoutPools) -> bool:
        assert pools.disk_id is not None
        found = False
        while (dead := self._index.reap(pools.disk_id, REAP_PAGES)).pages.size:
            self.drop(pools, dead)
            found = True
        return found

    # ---- gpu -> cpu ----

    async def _demote_all(self) -> None:
        self._populated = self._pools.arena.populated  # when it is later, that wakes us
        moved = True
        self.reap()
        await self._slabs.serve()
        while moved:
            moved = False
            for gpu in list(self._gpus.values()):
                moved |= await self._demote(gpu)
                if gpu.pools is not None:
                    self._index.trim(gpu.pools.cpu_id)
                if not gpu.life.over:
                    self._keep_free(gpu.id)

    async def _demote(self, gpu: GpuPool, *, rescue: bool = False) -> bool:
        """One batch; False when there was nothing to do."""
        if not rescue:
            await self._yield()
        async with gpu.demoting:
            if gpu.life.state == "closed" or gpu.pools is None or not self._index.undemoted(gpu.id):
                return False
            if not rescue and (gpu.life.over or not self._wanted(gpu.id)):
                return False
            if not rescue and self._must_wait("gpu"):
                return False
            pages = max(1, GATHER_BYTES // gpu.pools.shape.page_bytes)
            coming = not self._pools.arena.populated  # when it is there, that wakes us
            await self._slabs.make_room(gpu.pools, min(pages, self._index.undemoted(gpu.id)))
            if coming:  # nothing is evicted for want of memory that comes
                pages = min(pages, self._index.pool_counts(gpu.pools.cpu_id).free)
            if not pages:
                return False
            transfer = self._index.plan_demote(gpu.id, pages)
            if transfer is None:
                return False
            good = await asyncio.shield(self._mover.demote(gpu, transfer))
            # a copy that the session's end made worthless says nothing of the next one
            self._ended("gpu", good=good or gpu.life.over)
            self.wake()
            return good

    # ---- cpu -> disk ----

    async def _store_all(self) -> None:
        try:
            moved = True
            while moved:
                moved = False
                for pools in list(self._pools.layouts.values()):
                    if pools.disk is not None:
                        moved |= await self._store(pools)
                        self._pools.grow(pools, self._watermark(pools.cpu_id, self._low))
                        self._keep_free(pools.cpu_id)
                if not moved and self._batches:
                    await self._batches.first_ended()
                    moved = True
        finally:
            await self._batches.all_ended()

    async def _store(self, pools: LayoutPools) -> bool:
        """One step of a layout's disk pool; False when there is nothing that can be done."""
        disk, disk_id = pools.disk, pools.disk_id
        assert disk is not None
        assert disk_id is not None
        if self._reap_disk(pools):
            self.reap()  # what lies above them
        if self._batches.full or (self._batches and not disk.settled):
            await self._batches.first_ended()  # whose commit takes along what was dropped
            return True
        if not disk.settled:
            return await self._commit(pools)
        if not self._index.undemoted(pools.cpu_id) or not self._wanted(pools.cpu_id):
            return False
        if self._must_wait("disk"):
            return False
        await self._yield()
        if not await self._retire(pools):
            return False
        await self._make_room(pools)
        if not disk.settled:  # a load found bad pages while this waited
            return True
        transfers = self._plan(pools, self._batch_pages(pools))
        # only now: the plan must not have got a page whose record is still there
        if not transfers or self._batches or not self._index.undemoted(pools.cpu_id):
            self._free_ahead(pools)  # else after the next plan, which is not to wait for that
        if transfers:
            self._batches.begin(self._commit(pools, transfers))
        return bool(transfers) or not disk.settled

    def _free_ahead(self, pools: LayoutPools) -> None:
        """Two batches of disk pages, and what tenants have above their quotas."""
        assert pools.disk_id is not None
        self.drop(pools, self._index.trim(pools.disk_id))
        short = -self._free_beyond(pools)
        if short > 0:
            self.drop(pools, self._index.evict(pools.disk_id, short))

    def _plan(self, pools: LayoutPools, pages: int) -> list[_core.Transfer]:
        """What a batch of at most so many pages takes; the index plans few at a time."""
        found: list[_core.Transfer] = []
        while pages > 0 and (transfer := self._index.plan_demote(pools.cpu_id, pages)):
            found.append(transfer)
            pages -= transfer.target_pages.size
        return found

    async def _retire(self, pools: LayoutPools) -> bool:
        """Nothing is planned into slabs that failed to sync; an empty one is deleted. False while
        something in one is in use: the end of that wakes us."""
        disk, disk_id = pools.disk, pools.disk_id
        assert disk is not None
        assert disk_id is not None
        for number in sorted(disk.slabs.retired - disk.closed):
            if not self._index.close_slab(disk_id, number):
                return False
            disk.closed.add(number)
            self._metrics.fault("slab_retired")
        for number in sorted(disk.closed):
            if disk.settled and self._index.take_slab(disk_id, number):
                disk.closed.discard(number)
                shrink = partial(DiskTier.shrink, pool=disk, number=number)
                await asyncio.shield(self._mover.on_writer(shrink))
        return True

    async def _commit(self, pools: LayoutPools, transfers: Sequence[_core.Transfer] = ()) -> bool:
        patience_s = PATIENCE_S if self._yields else 0.0
        outcome = await asyncio.shield(self._mover.store(pools, transfers, patience_s=patience_s))
        if transfers:
            self._ended("disk", good=outcome.written)
        elif not outcome.committed:
            asyncio.get_running_loop().call_later(RETRY_S, self.wake)
        return outcome.committed

    def drop(self, pools: LayoutPools, evicted: _core.Evicted) -> None:
        """Pages that the index freed on disk: their records go with the next commit."""
        assert pools.disk is not None
        pools.disk.drop(evicted.pages)

    def _free_beyond(self, pools: LayoutPools) -> int:
        """Free disk pages beside the two batches that are kept free."""
        assert pools.disk_id is not None
        return self._index.pool_counts(pools.disk_id).free - 2 * self._batch_pages(pools)

    def _batch_pages(self, pools: LayoutPools) -> int:
        assert pools.disk_id is not None
        return store_pages(
            self._index.pool_counts(pools.cpu_id).pages,
            self._index.pool_counts(pools.disk_id).pages,
            pools.shape.page_bytes,
        )

    # ---- slabs on disk ----

    async def _make_room(self, pools: LayoutPools) -> None:
        """Slabs for what waits: of the budget, and then from layouts that need them less."""
        assert pools.disk is not None
        assert pools.disk_id is not None
        batch = max(self._batch_pages(pools), STORE_BYTES // pools.shape.page_bytes, 1)
        waiting = min(batch, self._index.undemoted(pools.cpu_id))
        # beside what waits, the two batches that would otherwise be evicted ahead
        while self._free_beyond(pools) < waiting:
            if not await self._grow(pools) and not await self._take_over(pools):
                return

    async def _grow(self, pools: LayoutPools) -> bool:
        disk, now = pools.disk, asyncio.get_running_loop().time()
        assert disk is not None
        assert pools.disk_id is not None
        assert self._pools.disk is not None
        if now < self._full_until or not self._pools.disk.has_budget(disk.shape):
            return False
        number = await asyncio.shield(self._mover.on_writer(lambda tier: tier.grow(disk)))
        if number is None:
            self._full_until = now + FULL_RETRY_S
            asyncio.get_running_loop().call_later(FULL_RETRY_S, self.wake)
            return False
        added = self._index.add_slab(pools.disk_id)
        if added != number:
            raise RuntimeError(f"slab {added} of the index is slab {number} on disk")
        self._in_vain = False
        return True

    async def _take_over(self, needy: LayoutPools) -> bool:
        """Empty and delete a slab of a layout that needs it less, where that can help: to make room
        in the budget, or once in a full file system until a slab has come of it."""
        tier = self._pools.disk
        assert tier is not None
        assert needy.disk is not None
        full = tier.has_budget(needy.disk.shape)
        if not tier.could_hold(needy.disk.shape) or (full and self._in_vain):
            return False
        for owner in self._givers(needy):
            disk, disk_id = owner.disk, owner.disk_id
            assert disk is not None
            assert disk_id is not None
            costs = self._index.slab_pages(disk_id)
            number = next((n for n in cheapest(costs) if self._index.close_slab(disk_id, n)), None)
            if number is None:
                continue  # loads read from all of them
            try:
                if not await self._empty(owner, number, int(costs[number])):
                    return False
            finally:
                self._index.reopen_slab(disk_id, number)  # does nothing to one that was taken
            await asyncio.shield(
                self._mover.on_writer(partial(DiskTier.shrink, pool=disk, number=number))
            )
            self._in_vain, self._full_until = full, 0.0
            return True
        return False

    def _givers(self, needy: LayoutPools) -> list[LayoutPools]:
        """Layouts that should give a slab, if all of theirs would come to one of `needy`."""
        assert needy.disk is not None
        assert needy.disk_id is not None
        others = {
            each.disk_id: each
            for each in self._pools.layouts.values()
            if each.disk_id is not None and self._index.pool_counts(each.disk_id).slabs
        }
        spare = {number: max(0, self._free_beyond(each)) for number, each in others.items()}
        found = [others[number] for number in self._slabs.givers(needy.disk_id, spare)]
        return found if sum(map(_disk_bytes, found)) >= needy.disk.shape.slab_bytes else []

    async def _empty(self, owner: LayoutPools, number: int, held: int) -> bool:
        """A closed slab with `held` pages goes from the index: what its owner evicts next goes, the
        rest moves. False when something in it stays in use, or the disk fails."""
        disk, disk_id = owner.disk, owner.disk_id
        assert disk is not None
        assert disk_id is not None
        short = held - self._index.pool_counts(disk_id).free
        self.drop(owner, self._index.evict(disk_id, max(0, short)))
        while disk.settled or await self._commit(owner):
            if self._index.take_slab(disk_id, number):
                return True
            move = self._index.plan_move(disk_id, number, disk.shape.pages_per_slab)
            if move is None or not await asyncio.shield(self._mover.move_on_disk(owner, move)):
                return False
        return False

    # ---- recency ----

    async def save_recency(self) -> None:
        """Write the order of use aside, and when blocks expire."""
        uses = {
            digest: (self._index.stamps(each.disk_id), self._index.lifetimes(each.disk_id))
            for digest, each in self._pools.layouts.items()
            if each.disk_id is not None
        }
        if uses:
            await self._mover.on_writer(lambda tier: tier.save_recency(uses))


def _disk_bytes(pools: LayoutPools) -> int:
    assert pools.disk is not None
    return len(pools.disk.slabs.numbers()) * pools.disk.shape.slab_bytes
