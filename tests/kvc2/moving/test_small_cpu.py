"""A cpu tier that is smaller than what waits for the disk: nothing is told durable that is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvc2.cache.cache import Cache
from kvc2.moving.disk_writer import DiskWriter
from kvc2.tiers.pools import LayoutOnDisk
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import StandIn, prompt

PROMPTS, BLOCKS = 8, 25


class Gate:
    """Lets nothing through to the disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open, step = False, DiskWriter._step

        async def gated(writer: DiskWriter, pools: LayoutOnDisk) -> bool:
            return self.is_open and await step(writer, pools)

        monkeypatch.setattr(DiskWriter, "_step", gated)


@asynccontextmanager
async def overflowing(path: Path) -> AsyncIterator[tuple[Cache, StandIn]]:
    """All of the prompts are in the engine's pool, and the cpu tier could hold two thirds."""
    async with running(path, cpu_bytes=MIB + MIB // 16) as cache:
        await asyncio.to_thread(cache._pools.arena.wait_populated)  # type: ignore[union-attr]
        engine = StandIn(cache, 256)
        for seed in range(PROMPTS):
            await engine.ask(prompt(seed, BLOCKS))
        assert await cache._background.drained(10)
        cpu = cache.counts.tier("cpu")
        assert cpu.resident_pages + cpu.evicted == PROMPTS * BLOCKS
        assert cpu.evicted > PROMPTS
        yield cache, engine
        cache.index.check()


def test_what_the_cpu_tier_could_not_keep_is_not_durable_before_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = Gate(monkeypatch)
        async with overflowing(tmp_path) as (cache, engine):
            evicted = cache.counts.tier("cpu").evicted
            flushed = await cache.flush(10)
            assert sum(flushed.not_durable_blocks.values()) == PROMPTS * BLOCKS
            assert not await engine.ask_durably(prompt(0, BLOCKS))
            # no hot loop: those that had to go wait for those that are there
            assert cache.counts.tier("cpu").evicted - evicted <= BLOCKS
            gate.is_open = True
            assert await engine.ask_durably(prompt(1, BLOCKS))
            flushed = await cache.flush(10)
            assert (flushed.durable_blocks, flushed.not_durable_blocks) == (PROMPTS * BLOCKS, {})

    asyncio.run(run())


def test_what_a_dead_engine_has_alone_goes_through_a_small_cpu_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = Gate(monkeypatch)
        async with overflowing(tmp_path) as (cache, engine):
            gate.is_open = True
            await engine.close(at_rest=True)
            assert faults(cache, "undemoted_lost") == 0
            assert (await cache.flush(10)).durable_blocks == PROMPTS * BLOCKS

    asyncio.run(run())


def test_what_a_dead_engine_has_alone_is_not_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        Gate(monkeypatch)
        monkeypatch.setattr("kvc2.cache.cache.RESCUE_S", 3600.0)
        async with overflowing(tmp_path) as (cache, engine):
            lost = cache.counts.tier("cpu").evicted
            async with asyncio.timeout(60):
                await engine.close(at_rest=True)
            assert faults(cache, "undemoted_lost") == lost

    asyncio.run(run())
