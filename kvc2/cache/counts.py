"""Sizes and counts of the tiers and of each session's pool, as stats and /metrics show them.

Not here: counters of what calls and transfers did (metrics.py). All on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvc2 import _core
from kvc2.answers import SIZES, CacheStats, LayoutSlabs, Refusals, TierCounts
from kvc2.cache.sessions import Session
from kvc2.moving.gpu_pools import GpuPool
from kvc2.tiers.base import TIER_NUMBERS
from kvc2.tiers.cpu import CpuPool
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.pools import Pools, TierPool


class Counts:
    """`open_now` are the cache's own tables of pools and sessions, by epoch. Nothing here changes
    the cache."""

    def __init__(
        self,
        index: _core.Index,
        open_now: tuple[Mapping[int, GpuPool], Mapping[int, Session]],
        pools: Pools,
    ) -> None:
        self._index = index
        self._gpus, self._sessions = open_now
        self.pools = pools
        self._forgotten = (0, 0)  # evicted, last copies: of sessions that are over

    def stats(self) -> CacheStats:
        counts = self._index.counts()
        return CacheStats(
            tiers=tuple(self.tier(tier) for tier in ("gpu", *self.pools.tiers.names)),
            pools=tuple(self._session(epoch) for epoch in self._sessions),
            blocks=counts.blocks,
            holes=counts.holes,
            leases=counts.leases,
            namespaces=counts.namespaces,
            metadata_bytes=counts.metadata_bytes,
            hit_rate_unlimited=self._hit_rates([_core.NO_LIMIT])[0],
            slabs=self._slabs(),
        )

    def _slabs(self) -> tuple[LayoutSlabs, ...]:
        layouts = self.pools.layouts.values()
        return tuple(
            self._layout(link)
            for tier in self.pools.tiers.names
            for each in layouts
            for link in each.chain
            if link.tier == tier
        )

    def _layout(self, link: TierPool[CpuPool] | TierPool[DiskPool]) -> LayoutSlabs:
        # on disk the same pages may lie in slabs of another size
        counts, shape = self._index.pool_counts(link.id), link.store.shape
        sessions = self._sessions.values()
        return LayoutSlabs(
            layout=shape.layout_digest.hex(),
            tier=link.tier,
            engines=tuple(
                each.engine_name for each in sessions if each.layout.digest == shape.layout_digest
            ),
            page_size=shape.page_size,
            page_bytes=shape.page_bytes,
            slab_bytes=shape.slab_bytes,
            slabs=counts.slabs,
            pages=counts.pages,
            resident_pages=counts.resident,
        )

    def tier(self, tier: str) -> TierCounts:
        """All pools of a tier together."""
        capacity_bytes = self._capacity_bytes(tier)
        found = [self._index.pool_counts(each) for each in self.pool_ids(tier)]
        evicted, last_copies = self._evicted(tier)
        return TierCounts(
            tier=tier,
            capacity_bytes=capacity_bytes,
            pages=sum(each.pages for each in found),
            free_pages=sum(each.free for each in found),
            private_pages=sum(each.private for each in found),
            resident_pages=sum(each.resident for each in found),
            in_flight_pages=sum(each.in_flight for each in found),
            pinned_pages=sum(each.pinned for each in found),
            evicted=evicted,
            last_copies=last_copies,
            refusals=Refusals(
                sum(each.refused for each in found), *self._index.regret(TIER_NUMBERS[tier])
            ),
            hit_rates=self._hit_rates_at(tier, capacity_bytes),
        )

    def _capacity_bytes(self, tier: str) -> int:
        if tier == "gpu":
            return sum(_pool_bytes(each) for each in self._sessions.values())
        return self.pools.tiers.capacity_bytes(tier)

    def _hit_rates_at(self, tier: str, capacity_bytes: int) -> tuple[float, ...]:
        """Of the tier and all faster ones, at SIZES times its capacity: as if it alone were that
        large and evicted the least recently used leaf. Pools of several layouts count as one."""
        tokens, held_bytes = 0, 0
        for page_size, page_bytes, pages in self._shapes(tier):
            tokens += pages * page_size
            held_bytes += pages * page_bytes
        if not held_bytes:
            return ()
        capacity = capacity_bytes * tokens / held_bytes
        return self._hit_rates([round(size * capacity) for size in SIZES])

    def _shapes(self, tier: str) -> list[tuple[int, int, int]]:
        """(tokens of a page, its bytes, pages) of each pool that has pages."""
        if tier == "gpu":
            layouts = [(each.layout, each.num_pages) for each in self._sessions.values()]
            return [(each.page_size, each.payload_bytes, pages) for each, pages in layouts]
        return [
            (each.shape.page_size, each.shape.page_bytes, self._index.pool_counts(link.id).pages)
            for each in self.pools.layouts.values()
            for link in each.chain
            if link.tier == tier
        ]

    def _hit_rates(self, tokens: list[int]) -> tuple[float, ...]:
        return tuple(self._index.hit_rates(np.array(tokens, np.uint64)).tolist())

    def _evicted(self, tier: str) -> tuple[int, int]:
        """Since the start, from sessions too that are over or ending."""
        gpu = tier == "gpu"
        ids = [each.id for each in self._gpus.values()] if gpu else self.pool_ids(tier)
        found = [self._index.pool_counts(each) for each in ids]
        before = self._forgotten if gpu else (0, 0)
        return (
            before[0] + sum(each.evicted for each in found),
            before[1] + sum(each.last_copies for each in found),
        )

    def pool_ids(self, tier: str) -> list[int]:
        """The index's ids of a tier's pools; of gpu those of sessions that are not ending."""
        if tier == "gpu":
            return [gpu.id for gpu in self._gpus.values() if not gpu.life.over]
        return self.pools.ids(tier)

    def forget(self, gpu: GpuPool) -> None:
        """The pool is about to be removed; what it has evicted stays counted."""
        counts = self._index.pool_counts(gpu.id)
        evicted, last_copies = self._forgotten
        self._forgotten = evicted + counts.evicted, last_copies + counts.last_copies

    def _session(self, epoch: int) -> TierCounts:
        counts = self._index.pool_counts(self._gpus[epoch].id)
        return TierCounts(
            tier="gpu",
            capacity_bytes=_pool_bytes(self._sessions[epoch]),
            pages=counts.pages,
            free_pages=counts.free,
            private_pages=counts.private,
            resident_pages=counts.resident,
            in_flight_pages=counts.in_flight,
            pinned_pages=counts.pinned,
            evicted=counts.evicted,
            last_copies=counts.last_copies,
            session_epoch=epoch,
        )


def _pool_bytes(session: Session) -> int:
    return session.num_pages * session.layout.payload_bytes
