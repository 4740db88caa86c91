"""The cache as the server calls it: asks the index for plans and has them carried out.

All methods run on the event loop's thread. Index calls are inline; bytes move on the mover's
threads. Not here: the wire and its checks (server/), which block goes where (csrc/index), how
bytes move (mover.py), what goes to slower tiers and when (background.py), what is asked of all that
is cached at once (whole.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from kvc2 import _core, errors
from kvc2.answers import (
    U32,
    Asked,
    CacheStats,
    Evicted,
    Explained,
    Flushed,
    Invalidated,
)
from kvc2.arena import Arena
from kvc2.cache.copied import CopiedCommits
from kvc2.cache.counts import Counts
from kvc2.cache.explain import Explainer
from kvc2.cache.leases import Leases, u32
from kvc2.cache.namespaces import Namespace, Namespaces, Owner
from kvc2.cache.pins import Pins
from kvc2.cache.prefetch import Prefetcher
from kvc2.cache.quotas import TenantQuotas
from kvc2.cache.sessions import Session
from kvc2.cache.ticker import Ticker
from kvc2.cache.whole import Whole
from kvc2.config import ServeConfig
from kvc2.layout import Layout
from kvc2.metrics import Metrics
from kvc2.moving.background import Background
from kvc2.moving.changes import Changes
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.mover import Mover
from kvc2.moving.scrub import Scrubber
from kvc2.tiers.base import TIER_NUMBERS, PageShape
from kvc2.tiers.disk.records import NamespaceEntry
from kvc2.tiers.executors import Executors
from kvc2.tiers.gpu import GpuExecutor
from kvc2.tiers.pools import Pools

RESCUE_S = 2.0  # for a dead engine's uncopied blocks
NOBODY = Owner()


@dataclass(frozen=True)
class Parts:
    """What a cache is made of (assemble.py). `gpus`, `sessions`: the open ones by epoch.
    `executors`: what moves the pages of a session's pool."""

    config: ServeConfig
    metrics: Metrics
    index: _core.Index
    ticker: Ticker
    pools: Pools
    mover: Mover
    leases: Leases
    background: Background
    namespaces: Namespaces
    counts: Counts
    quotas: TenantQuotas
    pins: Pins
    prefetcher: Prefetcher
    scrubber: Scrubber
    explainer: Explainer
    copied: CopiedCommits
    whole: Whole
    gpus: dict[int, GpuPool]
    sessions: dict[int, Session]
    executors: Executors
    ticking: asyncio.Task[None]
    woken: Changes


@dataclass(frozen=True)
class KeyedLayout:
    """Of a namespace's pages; opaque: keys name its blocks, not tokens."""

    layout: Layout
    opaque: bool = False


class Cache:
    """Assembled whole by assemble.py; `stop` ends it."""

    def __init__(self, parts: Parts) -> None:
        self.index, self.namespaces, self.counts = parts.index, parts.namespaces, parts.counts
        self.quotas, self.pins, self.explainer = parts.quotas, parts.pins, parts.explainer
        self.prefetcher, self.scrubber = parts.prefetcher, parts.scrubber
        self._config, self._metrics = parts.config, parts.metrics
        self._pools, self._background = parts.pools, parts.background
        self._mover, self.leases = parts.mover, parts.leases
        self._gpus, self._sessions, self.executors = parts.gpus, parts.sessions, parts.executors
        self._whole, self._ticking, self._wake = parts.whole, parts.ticking, parts.woken
        self.tick = parts.ticker.tick
        self.copied = parts.copied

    @property
    def arena(self) -> Arena:
        """The cpu tier's memory."""
        return self._pools.arena

    async def stop(self, deadline_s: float) -> Flushed:
        """Flush, then close sessions, threads and tiers."""
        await self.prefetcher.stop()
        await self.scrubber.stop()
        result = await self.flush(deadline_s, insists=False)
        for session in list(self._sessions.values()):
            await self.close_session(session)
        self._ticking.cancel()
        await self._background.stop()
        await self._background.writer.save_recency()
        await self.leases.stop()
        await asyncio.to_thread(self.copied.close)
        await asyncio.to_thread(self._mover.close)
        await self.executors.close()
        await asyncio.to_thread(self._pools.tiers.close)
        return result

    # ---- sessions ----

    def open_session(self, session: Session, store: GpuExecutor, *, kept_pages: U32) -> None:
        """A gpu pool for the session, over the cpu and disk pools of its layout. `store` moves its
        pages, for memory in which they all lie; it is closed with the session, and stays the
        caller's when this raises a Kvc2Error."""
        layout = session.layout
        pools = self._pools.of(PageShape.of(layout, self._config.slab_bytes))
        pool = self.index.add_pool(
            page_size=layout.page_size,
            pages_per_slab=max(1, session.num_pages),
            below=next((each.id for each in pools.chain), None),
            durable=False,
            tier=TIER_NUMBERS["gpu"],
            page_bytes=layout.payload_bytes,
        )
        if session.num_pages:
            self.index.add_slab(pool)
        if kept_pages.size and not self.index.keep(pool, u32(kept_pages)):
            self.index.close_pool(pool)
            self.index.remove_pool(pool)
            raise errors.InvalidRequest(
                "hello.pools[0].kept_pages", kept_pages.size, "each page once"
            )
        queue = ThreadPoolExecutor(1, f"kvc2-promote-{session.epoch}")
        session.pool = GpuPool(pool, pools, store, queue, session.life, session.give_up)
        self._gpus[session.epoch] = session.pool
        self._sessions[session.epoch] = session

    async def close_session(
        self, session: Session, at_rest: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        """Leases are gone at once. `at_rest` finds out whether the pool's pages can't change any
        more, since its engine is dead or has said so: then what no other tier holds is copied
        first, for at most 2 s. Else (None) it may write to them: nothing is read any more."""
        if self._sessions.pop(session.epoch, None) is None:
            return
        gpu = session.mapped_pool()
        if not session.life.over:
            session.life.become("silent")
        self.index.close_pool(gpu.id)
        self.index.release_all(session.end_leases())
        gpu.queue.shutdown(wait=False, cancel_futures=True)
        if await gpu.settle(at_rest or _may_change):
            await self._background.rescue(gpu, RESCUE_S)
        if gpu.pools.chain and (left := self.index.undemoted(gpu.id)):
            self._metrics.fault("undemoted_lost", left)
        await asyncio.to_thread(gpu.queue.shutdown, True)
        async with gpu.demoting:  # a batch under way still reads this memory
            session.life.become("closed")
            await self.executors.let_go(gpu.store)
        self.counts.forget(gpu)
        self.index.remove_pool(gpu.id)
        del self._gpus[session.epoch]
        session.pool = None
        with suppress(KeyError):  # it may never have told its rate
            self._metrics.prefill_rate.remove(str(session.epoch))
        self._wake()

    def open_namespace(
        self,
        session: Session,
        name: bytes,
        identity: bytes,
        ttl_s: int = 0,
        owner: Owner = NOBODY,
        *,
        of: KeyedLayout | None = None,
    ) -> Namespace:
        """Its record; the identity goes to the catalogue with the next batch. `of`: where its
        layout is not that of the session's pool, or keys name its blocks. Raises LimitReached: what
        the index knows stays known; InvalidRequest where the session has it open with another
        layout, whose offsets would be read as this one's."""
        pools, of = session.mapped_pool().pools, of or KeyedLayout(session.layout)
        if of.layout.digest != session.layout.digest:
            pools = self._pools.of(PageShape.of(of.layout, self._config.slab_bytes))
        with suppress(errors.NotFound):
            if session.layouts.get(self.namespaces.find(name).id, pools) is not pools:
                told = f"{of.layout.payload_bytes} bytes a page"
                raise errors.InvalidRequest("layout", told, "one layout for an identity")
        entry = NamespaceEntry(of.layout.page_size, identity, of.opaque)
        namespace = self.namespaces.open(name, pools, entry, owner, ttl_s=ttl_s)
        session.layouts[namespace.id] = pools
        for disk in self._pools.tiers.disks:
            if not disk.catalogue.add_namespace(name, entry):
                self._metrics.fault("catalogue_error")
        return namespace

    def leased_namespaces(self, session: Session) -> set[int]:
        """Ids of those that have open leases in the session."""
        return {each.namespace.id for each in session.leases.values()}

    # ---- requests ----

    def explain(self, session: Session | None, namespace: Namespace, asked: Asked) -> Explained:
        """What an acquire would find, in this session or in any, and why not more. Changes
        nothing."""
        pool = None if session is None else session.mapped_pool().id
        return self.explainer.of_asked(namespace, asked, pool)

    # ---- the whole (whole.py) ----

    async def invalidate(self, names: list[bytes]) -> Invalidated:
        """What is cached under these namespaces is dead. Raises NotFound and LimitReached."""
        return await self._whole.invalidate(names)

    async def wait_durable(self, session: Session, leases: list[int], wait_s: float) -> bool:
        """Whether all that these leases of the index have pages of is on disk, within that time."""
        return await self._whole.wait_durable(session.mapped_pool(), leases, wait_s)

    async def flush(self, deadline_s: float, *, insists: bool = True) -> Flushed:
        """Copy what is committed to the disk, within the deadline; what is not there, and why. What
        tiers refused is copied too, if it insists."""
        return await self._whole.flush(deadline_s, insists=insists)

    async def evict(self, tier: str, blocks: int) -> Evicted:
        """Drop up to `blocks` unpinned blocks (0: all) from gpu, cpu or disk."""
        return await self._whole.evict(tier, blocks)

    def stats(self) -> CacheStats:
        """Sizes and counts. Changes nothing."""
        return self.counts.stats()


async def _may_change() -> bool:
    return False
