"""What is asked of all that is cached at once: invalidate, wait_durable, flush, evict.

On the event loop's thread, as all of the cache. Not here: what one request asks (cache.py), which
blocks (csrc/index), what is copied when nobody waits (background.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from kvc2 import _core
from kvc2.answers import Evicted, Flushed, Invalidated
from kvc2.cache.counts import Counts
from kvc2.cache.namespaces import Namespaces
from kvc2.config import ServeConfig
from kvc2.moving.background import Background
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.loading import Loader
from kvc2.tiers.pools import LayoutOnDisk

EVICT_DRAIN_S = 2.0
ALL = 0xFFFFFFFF


class Whole:
    def __init__(
        self,
        index: _core.Index,
        namespaces: Namespaces,
        counts: Counts,
        *,
        loader: Loader,
        background: Background,
        config: ServeConfig,
    ) -> None:
        self._index = index
        self._namespaces = namespaces
        self._counts = counts
        self._loader = loader
        self._background = background
        self._pools = counts.pools
        self._policy = config.write_policy

    async def invalidate(self, names: list[bytes]) -> Invalidated:
        """What is cached under these namespaces is dead, in every tier, before this awaits; its
        pages are freed as pins end. Who has them open goes on, matches nothing and commits anew;
        what their open leases commit is refused. Raises NotFound and LimitReached."""
        blocks = self._namespaces.retire(names)
        self._background.free.reap()
        self._background.wake()
        return Invalidated(len(names), blocks, await self._namespaces.write_eras())

    async def wait_durable(self, gpu: GpuPool, leases: Sequence[int], deadline_s: float) -> bool:
        """Whether all that these leases have pages of is on disk, within the deadline. Where there
        is no disk it waits under write_policy through alone, for the copies in memory."""
        through = self._policy == "through"
        if not self._pools.tiers.disks and not through:
            return False
        for lease in leases:
            with suppress(KeyError):  # it is over: nothing keeps its blocks
                self._index.insist(lease)
        self._background.wake()
        await self._background.drained(deadline_s)
        if not isinstance(gpu.pools, LayoutOnDisk):
            return False
        if not all(self._is_on_disk(gpu.pools, lease) for lease in leases):
            return False
        return await self._background.synced()

    def _is_on_disk(self, pools: LayoutOnDisk, lease: int) -> bool:
        try:
            return self._index.held_in(lease, pools.disk.id) == self._held(pools, lease)
        except KeyError:  # it was released while this waited: nothing keeps its blocks
            return False

    def _held(self, pools: LayoutOnDisk, lease: int) -> int:
        """Blocks that it has pages of: of a prompt, or of keys, with those that it has stored."""
        try:
            return self._index.lease(lease).pages.size
        except KeyError:
            return self._index.held_in(lease, pools.cpu.id)

    async def flush(self, deadline_s: float, *, insists: bool) -> Flushed:
        """Copy what is committed towards the disk until all of it is there or the time is over. If
        it insists, what tiers have refused goes too."""
        if not self._pools.tiers.disks:
            blocks = self._index.counts().blocks
            return Flushed(0, {"no_disk": blocks} if blocks else {})
        for each in self._pools.on_disk() if insists else ():
            self._index.insist_all(each.disk.id)
        self._background.wake()
        drained = await self._background.drained(deadline_s)
        reason = "disk_full"
        if not await self._background.synced():
            return Flushed(0, {"error": self._counts.tier("disk").resident_pages})
        if self._background.failing:
            reason = "error"
        elif not drained:
            reason = "deadline"
        found = {
            reason: self._background.undemoted(),
            "not_admitted": self._background.writer.not_admitted(),
        }
        durable = self._counts.tier("disk").resident_pages
        return Flushed(durable, {why: count for why, count in found.items() if count})

    async def evict(self, tier: str, blocks: int) -> Evicted:
        """Drop up to `blocks` unpinned blocks (0: all) from gpu, cpu or disk; what slower tiers
        don't hold yet is copied there first, within 2 s. What was evicted from the disk is gone
        there too, unless its commit fails or takes longer than 2 s."""
        if tier != "disk":
            await self._background.drained(EVICT_DRAIN_S)
        with suppress(TimeoutError):  # what is on its way is pinned
            async with asyncio.timeout(EVICT_DRAIN_S):
                await self._loader.until_idle()
        wanted, evicted, last_copies = blocks or ALL, 0, 0
        on_disk = {each.disk.id: each for each in self._pools.on_disk()}
        for pool in self._counts.pool_ids(tier):
            found = self._index.evict(pool, wanted - evicted)
            evicted += found.pages.size
            last_copies += found.last_copies
            if pool in on_disk:
                on_disk[pool].drop_records(found)
        self._background.wake()
        if tier == "disk":
            await self._background.drained(EVICT_DRAIN_S)
        return Evicted(evicted, last_copies)
