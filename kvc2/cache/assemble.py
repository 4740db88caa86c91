"""Puts a cache together: opens the tiers, restores what the disk holds, connects the parts.

Not responsible for what a part does, nor for closing them (Cache.stop).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from kvc2 import _core
from kvc2.arena import Arena
from kvc2.cache.beyond import Beyond
from kvc2.cache.cache import Cache, Parts
from kvc2.cache.copied import CopiedCommits
from kvc2.cache.counts import Counts
from kvc2.cache.explain import Explainer
from kvc2.cache.lease_views import LeaseViews
from kvc2.cache.leases import Leases
from kvc2.cache.namespaces import Namespace, Namespaces
from kvc2.cache.pins import Pins
from kvc2.cache.prefetch import Prefetcher
from kvc2.cache.quotas import TenantQuotas
from kvc2.cache.remote import Remote, store_of
from kvc2.cache.sessions import Session
from kvc2.cache.ticker import TICK_S, Seconds, Ticker
from kvc2.cache.whole import Whole
from kvc2.config import ServeConfig
from kvc2.cuda.nursery import NO_CUDA, CudaHost
from kvc2.host import numa
from kvc2.metrics import Metrics
from kvc2.moving.background import Background
from kvc2.moving.changes import Changes
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.loading import Loader
from kvc2.moving.mover import Mover
from kvc2.moving.scrub import Scrubber
from kvc2.periodic import periodically
from kvc2.tiers.disk.recency import Clocks
from kvc2.tiers.disk.slab_file import Files, raise_file_limit
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.executors import Executors
from kvc2.tiers.pools import Pools, Tiers


async def assemble(
    config: ServeConfig,
    metrics: Metrics,
    clock: Callable[[], float] = time.monotonic,
    *,
    files: Files | None = None,
    wall: Callable[[], float] = time.time,
    cuda: CudaHost = NO_CUDA,
) -> Cache:
    """A whole cache, its threads and tasks running. `clock` is monotonic seconds. `wall` is read
    for times that outlive this run, and for nothing else: it may be set at any moment. `files` is
    where tests put faults of the disk. `cuda`: what was found of it before this process had
    threads. Raises StartRefused."""
    seconds = Seconds(clock)
    tiers = _tiers(config, metrics, files, Clocks(wall, seconds), clock, cuda)
    index = _index(config, tiers)
    pools = Pools(index, tiers, metrics, config)
    gpus: dict[int, GpuPool] = {}
    sessions: dict[int, Session] = {}
    changes = CacheChanges(Changes(), Changes(), Changes())
    ticker = Ticker(index, seconds, changes.expired)
    mover = Mover(index, metrics, tiers.meters, changes.ended, clock=clock)
    loader = Loader(index, mover, metrics, pools, always=config.load_policy == "always")
    held, limits = partial(_held, sessions), config.limits
    disk = next(iter(tiers.disks), None)
    namespaces = Namespaces(index, mover, disk, limits, now=ticker.tick, held=held)
    namespaces.adopt(pools.restore())
    counts = Counts(index, (gpus, sessions), pools)
    pins = Pins(index, namespaces, counts, config, tick=ticker.tick)
    explainer = Explainer(index, namespaces, counts, config, tick=ticker.tick)
    background = Background(index, mover, pools, gpus, config=config, metrics=metrics)
    changes.connect(loader, background)
    beyond, wake = _beyond(config, (index, pools, loader), metrics, changes), changes.woken
    leases = Leases(index, loader, explainer, tick=ticker.tick, wake=wake, beyond=beyond)
    parts = Parts(
        config=config,
        metrics=metrics,
        index=index,
        ticker=ticker,
        pools=pools,
        mover=mover,
        leases=leases,
        background=background,
        namespaces=namespaces,
        counts=counts,
        quotas=TenantQuotas(index, config),
        pins=pins,
        prefetcher=Prefetcher(index, pins, pools, loader=loader, mover=mover, beyond=beyond),
        scrubber=Scrubber(index, pools, loader=loader, mover=mover),
        explainer=explainer,
        copied=CopiedCommits(index, pools, tick=ticker.tick, wake=wake),
        whole=Whole(index, namespaces, counts, loader=loader, background=background, config=config),
        gpus=gpus,
        sessions=sessions,
        executors=Executors(pools.arena.memory, config.copy_threads, cuda),
        ticking=asyncio.create_task(periodically(TICK_S, ticker.tick, metrics)),
        woken=wake,
    )
    _begin(parts, changes)
    return Cache(parts)


def _held(sessions: Mapping[int, Session]) -> Iterator[Namespace]:
    """What open sessions have open: not let go of."""
    for session in sessions.values():
        yield from session.namespaces.values()


@dataclass(frozen=True)
class CacheChanges:
    """ended: a transfer has, or the arena has grown. expired: blocks have died of age. woken: there
    may be something to copy, or room for it."""

    ended: Changes
    expired: Changes
    woken: Changes

    def connect(self, loader: Loader, background: Background) -> None:
        self.ended.listen(loader.changed)
        self.ended.listen(self.woken)
        self.expired.listen(self.woken)
        self.woken.listen(background.wake)


def _tiers(
    config: ServeConfig,
    metrics: Metrics,
    files: Files | None,
    clocks: Clocks,
    clock: Callable[[], float],
    cuda: CudaHost,
) -> Tiers:
    raise_file_limit()
    if config.gpu_only:
        return Tiers.of(Arena(0, config.slab_bytes), (), clock)
    nodes = numa.wanted(config.cpu.numa)
    arena = Arena(
        config.cpu.memory_bytes, config.slab_bytes, nodes=nodes, before_seal=cuda.give_arena
    )
    if config.disk.path is None:
        return Tiers.of(arena, (), clock)
    path, memory = config.disk.path, arena.memory
    disk = DiskTier(path, config.disk, memory, metrics, files=files, clocks=clocks)
    return Tiers.of(arena, (disk,), clock)


def _beyond(
    config: ServeConfig,
    over: tuple[_core.Index, Pools, Loader],
    metrics: Metrics,
    changes: CacheChanges,
) -> Beyond | None:
    """The remote store, where there is one."""
    if config.remote.url is None:
        return None
    index, pools, loader = over
    make = store_of(config.remote)
    remote = Remote(index, pools, make, config, metrics, wake=changes.woken)
    remote.start(loader)
    return Beyond(index, remote, LeaseViews(index, loader))


def _index(config: ServeConfig, tiers: Tiers) -> _core.Index:
    """Its generations and stamps go on where those on disk end."""
    starts = max((each.catalogue.start_count for each in tiers.disks), default=0)
    stamp = max((each.last_stamp() for each in tiers.disks), default=0)
    return _core.Index(
        first_generation=(starts << 32) + 1,
        first_stamp=stamp + 1,
        policy=config.eviction_policy,
        admission=config.admission == "worth",
        dead_blocks=config.limits.max_dead_blocks,
        kv_event_bytes=config.kv_events.buffer_bytes,
    )


def _begin(parts: Parts, changes: CacheChanges) -> None:
    """What goes on by itself from now on."""
    parts.ticker.tick()  # what expired while nobody ran is dead
    config, arena = parts.config, parts.pools.arena
    if parts.pools.tiers.disks and config.disk.scrub_mb_per_s:
        parts.scrubber.keep(config.disk.scrub_mb_per_s)
    parts.background.start()

    def grew(short_bytes: int) -> None:
        if short_bytes:
            parts.metrics.fault("arena_short")
        changes.ended()

    loop = asyncio.get_running_loop()
    arena.start(lambda: _from_thread(loop, partial(grew, arena.short_bytes)))


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(call)
