"""The arena is faulted in behind a serving daemon, by a thread: it may all be there between two
looks at it. Here it comes at the worst moment, and whoever waits for it hears of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvc2.arena import Arena
from kvc2.behind import Behind
from kvc2.mover import GpuPool
from kvc2.tiers.pools import LayoutPools, Pools
from tests.caches import faults, running
from tests.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8


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


def test_a_hit_on_disk_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no memory for a page, and is none to come any more: all of it is there."""
    make_room = Pools.make_room

    async def run() -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).durable_blocks == BLOCKS
        arena = Late(monkeypatch)

        def between(self: Pools, pools: LayoutPools, pages: int) -> None:
            make_room(self, pools, pages)
            arena.now()
            arena.tell()

        monkeypatch.setattr(Pools, "make_room", between)
        async with running(tmp_path) as cache:
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def after_a_vain_demotion(monkeypatch: pytest.MonkeyPatch) -> Late:
    arena, demote = Late(monkeypatch), Behind._demote

    async def vain(self: Behind, gpu: GpuPool, *, rescue: bool = False) -> bool:
        moved = await demote(self, gpu, rescue=rescue)
        if not moved and self._index.undemoted(gpu.id):
            arena.now()
            if rescue:
                arena.tell()
        return moved

    monkeypatch.setattr(Behind, "_demote", vain)
    return arena


def test_what_a_dead_engine_committed_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was copied before."""

    async def nothing(self: Behind) -> None:
        pass

    async def run() -> None:
        monkeypatch.setattr(Behind, "_demote_all", nothing)
        after_a_vain_demotion(monkeypatch)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, BLOCKS))
            await engine.close(at_rest=True)
            assert faults(cache, "undemoted_lost") == 0
            assert cache.counts.tier("cpu").resident == BLOCKS

    asyncio.run(run())
