"""The arena is faulted in behind a serving daemon, by a thread: it may all be there between two
looks at it. Here it comes at the worst moment, and whoever waits for it hears of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvc2.answers import Asked, Prefetched, TierTokens
from kvc2.arena import Arena
from kvc2.cache.cache import Cache
from kvc2.moving.demotion import Demotion
from kvc2.moving.gpu_pools import GpuPool
from kvc2.tiers.pools import LayoutPools, Pools
from tests.doubles.caches import faults, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8
LARGE, SLAB_PAGES = 40_960, 6  # bytes of a segment, and what a slab has of such pages


class Late:
    """No memory comes before `now` is called; all of it is there when that returns. The event loop
    hears of it after `tell`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._may, self._there, self._told = (threading.Event() for _ in range(3))
        populate = Arena._populate

        def late(arena: Arena, on_ready: Callable[[], None]) -> None:
            self._may.wait(20)
            populate(arena, lambda: None)
            self._there.set()
            self._told.wait(20)
            on_ready()

        monkeypatch.setattr(Arena, "_populate", late)

    def now(self) -> None:
        self._may.set()
        assert self._there.wait(20)

    def tell(self) -> None:
        self._told.set()


async def on_disk_alone(tmp_path: Path, segment_bytes: int = 1024) -> None:
    async with running(tmp_path) as cache:
        await StandIn(cache, 32, segment_bytes=segment_bytes).ask(prompt(1, BLOCKS))
        assert (await cache.flush(10)).durable_blocks == BLOCKS


def after_a_page_was_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no memory for a page, and is none to come any more: all of it is there."""
    arena, make_room = Late(monkeypatch), Pools.make_room

    def between(self: Pools, pools: LayoutPools, pages: int) -> None:
        make_room(self, pools, pages)
        arena.now()
        arena.tell()

    monkeypatch.setattr(Pools, "make_room", between)


async def prefetch(engine: StandIn) -> Prefetched:
    return await engine.cache.prefetcher.prefetch(
        engine.session, engine.opened, Asked(prompt(1, BLOCKS)), tier="cpu", deadline_s=20.0
    )


def test_a_hit_on_disk_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        await on_disk_alone(tmp_path)
        after_a_page_was_wanted(monkeypatch)
        async with running(tmp_path) as cache:
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def test_what_is_prefetched_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        await on_disk_alone(tmp_path)
        after_a_page_was_wanted(monkeypatch)
        async with running(tmp_path) as cache:
            found = await prefetch(StandIn(cache, 32))
            assert (found.tiers, found.coming_tokens) == (TierTokens(cpu=BLOCKS * PAGE_SIZE), 0)

    asyncio.run(run())


def one_slab_comes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The others after the event."""
    units, go_on = iter(range(1 << 20)), threading.Event()

    def available_bytes() -> int:
        assert next(units) == 0 or go_on.wait(20)
        return 1 << 40

    monkeypatch.setattr("kvc2.arena.available_memory_bytes", available_bytes)
    return go_on


async def until_in_cpu(cache: Cache, blocks: int) -> None:
    while cache.counts.tier("cpu").resident_pages < blocks:
        await cache.leases._loader.until_changed()


async def until_it_waits(cache: Cache, task: asyncio.Task[Any]) -> None:
    """For a change, with the slab full; or is over."""
    await until_in_cpu(cache, SLAB_PAGES)
    while not (cache.leases._loader._waiters._waiting or task.done()):
        await asyncio.sleep(0)


def test_a_prefetch_evicts_nothing_for_memory_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await on_disk_alone(tmp_path, LARGE)
        go_on = one_slab_comes(monkeypatch)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32, segment_bytes=LARGE)
            await engine.ask(prompt(2, 2))
            await until_in_cpu(cache, 2)
            task = asyncio.create_task(prefetch(engine))
            await until_it_waits(cache, task)
            go_on.set()
            found = await task
            assert (found.tiers, found.coming_tokens) == (TierTokens(cpu=BLOCKS * PAGE_SIZE), 0)
            await cache.evict("gpu", 0)
            kept = cache.leases.match(engine.session, engine.opened, prompt(2, 2))
            assert kept.tiers == TierTokens(cpu=2 * PAGE_SIZE)

    asyncio.run(run())


def test_a_hit_on_disk_waits_for_more_than_the_first_slab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await on_disk_alone(tmp_path, LARGE)
        go_on = one_slab_comes(monkeypatch)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32, segment_bytes=LARGE)
            task = asyncio.create_task(engine.ask(prompt(1, BLOCKS)))
            await until_it_waits(cache, task)
            go_on.set()
            assert (await task).matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def after_a_vain_demotion(monkeypatch: pytest.MonkeyPatch) -> Late:
    arena, demote, rescue = Late(monkeypatch), Demotion._demote, Demotion.rescue

    async def demote_in_vain(self: Demotion, gpu: GpuPool) -> bool:
        moved = await demote(self, gpu)
        if not moved and self._index.undemoted(gpu.id):
            arena.now()
        return moved

    async def rescue_in_vain(self: Demotion, gpu: GpuPool) -> bool:
        moved = await rescue(self, gpu)
        if not moved and self._index.undemoted(gpu.id):
            arena.now()
            arena.tell()
        return moved

    monkeypatch.setattr(Demotion, "_demote", demote_in_vain)
    monkeypatch.setattr(Demotion, "rescue", rescue_in_vain)
    return arena


def test_what_a_dead_engine_committed_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was copied before."""

    async def nothing(self: Demotion) -> None:
        pass

    async def run() -> None:
        monkeypatch.setattr(Demotion, "work", nothing)
        after_a_vain_demotion(monkeypatch)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, BLOCKS))
            await engine.close(at_rest=True)
            assert faults(cache, "undemoted_lost") == 0
            assert cache.counts.tier("cpu").resident_pages == BLOCKS

    asyncio.run(run())
