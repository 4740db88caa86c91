"""What a restart keeps of blocks' lives: a time to live goes on by the wall clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest

from kvc2.answers import Hints
from kvc2.cache.cache import Cache
from tests.doubles.caches import running
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE, StandIn, prompt

BLOCKS = 4


class World:
    """A directory and the time of day; each run's own clock starts anywhere. `wrong`: by how many
    seconds the wall clock is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.day = 1_700_000_000.0
        self.wrong = 0
        self._runs = 0

    def run(self) -> AbstractAsyncContextManager[Cache]:
        self._runs += 1
        began, base = self.day, 1e6 / self._runs
        return running(
            self.folder,
            clock=lambda: base + self.day - began,
            wall=lambda: self.day + self.wrong,
        )

    @property
    def lifetimes(self) -> Path:
        (found,) = self.folder.glob("recency/*.lifetimes")
        return found


def left(cache: Cache, engine: StandIn, *seeds: int) -> list[int]:
    """Blocks of each prompt that match."""
    found = [
        cache.leases.match(engine.session, engine.opened, prompt(seed, BLOCKS)) for seed in seeds
    ]
    return [each.matched_tokens // PAGE_SIZE for each in found]


async def store(world: World, *lives: int) -> None:
    """A run that stores prompt 0, 1, ... for so many seconds each, 0: for ever."""
    async with world.run() as cache:
        engine = StandIn(cache, 64)
        for seed, ttl_s in enumerate(lives):
            await engine.ask(prompt(seed, BLOCKS), Hints(ttl_s=ttl_s))
        assert (await cache.flush(10)).not_durable_blocks == {}


def test_a_requests_time_to_live_goes_on_while_nobody_runs(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, 60, 0, 25)
        world.day += 20
        for passes, there in [(4, [4, 4, 4]), (1, [4, 4, 0]), (34, [4, 4, 0]), (1, [0, 4, 0])]:
            async with world.run() as cache:
                world.day += passes
                engine = StandIn(cache, 64)
                assert left(cache, engine, 0, 1, 2) == there
                cache.index.check()

    asyncio.run(run())


def test_what_expired_while_nobody_ran_gives_its_pages_up(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, 60, 0)
        world.day += 61
        async with world.run() as cache:
            await cache.flush(10)
            disk = next(each for each in cache.stats().tiers if each.tier == "disk")
            assert disk.resident_pages == BLOCKS

    asyncio.run(run())


def test_without_the_file_a_namespaces_time_counts_from_its_opening(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, 60)
        world.lifetimes.unlink()
        world.day += 1000
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            assert left(cache, engine, 0) == [4]  # only the request had said it
            cache.open_namespace(engine.session, NAMESPACE, b"{}", 10)
            world.day += 9
            assert left(cache, engine, 0) == [4]
            world.day += 1
            assert left(cache, engine, 0) == [0]

    asyncio.run(run())


def test_a_namespace_opened_for_a_shorter_time_caps_what_it_has(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            cache.open_namespace(engine.session, NAMESPACE, b"{}", 100)
            await engine.ask(prompt(0, BLOCKS))
            world.day += 50
            cache.open_namespace(engine.session, NAMESPACE, b"{}", 1000)  # gives nothing back
            cache.open_namespace(engine.session, NAMESPACE, b"{}", 20)
            world.day += 19
            assert left(cache, engine, 0) == [4]
            world.day += 1
            assert left(cache, engine, 0) == [0]

    asyncio.run(run())


def other_generations(rows: np.ndarray) -> np.ndarray:
    return rows + np.array([0, 1], rows.dtype)


def half_a_number(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint8).reshape(-1)[:3]


def test_an_entry_that_is_not_of_this_block_says_nothing(tmp_path: Path) -> None:
    """Written before the page got another block, or damaged: the block lives, the tier starts."""

    async def run(change: Callable[[np.ndarray], np.ndarray], folder: Path) -> list[int]:
        world = World(folder)
        await store(world, 60)
        rows = np.fromfile(world.lifetimes, "<u4").reshape(-1, 2)
        assert np.count_nonzero(rows[:, 0]) == BLOCKS
        change(rows).tofile(world.lifetimes)
        world.day += 1000
        async with world.run() as cache:
            return left(cache, StandIn(cache, 64), 0)

    assert asyncio.run(run(lambda rows: rows, tmp_path / "same")) == [0]
    assert asyncio.run(run(other_generations, tmp_path / "other")) == [4]
    assert asyncio.run(run(half_a_number, tmp_path / "cut")) == [4]


DAY = 86_400
HINTED = 60


@pytest.mark.parametrize("back", [1, 30, DAY, 10**9])
def test_a_clock_set_back_gives_a_block_no_more_than_its_time(back: int, tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, HINTED, 0)
        world.day -= back
        async with world.run() as cache:
            world.day += HINTED - 1
            engine = StandIn(cache, 64)
            assert left(cache, engine, 0, 1) == [4, 4]
            world.day += 1
            assert left(cache, engine, 0, 1) == [0, 4]

    asyncio.run(run())


def test_a_clock_set_back_at_each_restart_still_gives_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, HINTED)
        for _ in range(3):
            world.day -= DAY
            async with world.run() as cache:
                assert left(cache, StandIn(cache, 64), 0) == [4]
                world.day += 10
        async with world.run() as cache:
            assert left(cache, StandIn(cache, 64), 0) == [4]
            world.day += HINTED - 30
            assert left(cache, StandIn(cache, 64), 0) == [0]

    asyncio.run(run())


def test_a_clock_set_forward_costs_a_miss_and_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        await store(world, HINTED, 0)
        world.day += DAY
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            assert left(cache, engine, 0, 1) == [0, 4]
            await engine.ask(prompt(0, BLOCKS), Hints(ttl_s=HINTED))
            assert left(cache, engine, 0) == [4]
            assert (await cache.flush(10)).not_durable_blocks == {}
        world.day -= DAY  # and right again
        async with world.run() as cache:
            world.day += HINTED
            assert left(cache, StandIn(cache, 64), 0, 1) == [0, 4]

    asyncio.run(run())


@pytest.mark.parametrize("wrong", [-DAY, DAY])
def test_a_clock_set_right_while_a_daemon_runs_says_when_a_block_dies(
    wrong: int, tmp_path: Path
) -> None:
    """As a machine's does that boots without one: what was begun by the wrong time ends by the
    right one."""

    async def run() -> None:
        world = World(tmp_path)
        world.wrong = wrong
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            await engine.ask(prompt(0, BLOCKS), Hints(ttl_s=HINTED))
            world.wrong = 0
            assert (await cache.flush(10)).not_durable_blocks == {}
        world.day += HINTED - 1
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            assert left(cache, engine, 0) == [4]
            world.day += 1
            assert left(cache, engine, 0) == [0]

    asyncio.run(run())


def test_last_uses_of_any_number_let_the_tier_start(tmp_path: Path) -> None:
    """The file has no checksum: all its bits may be set."""

    async def run() -> None:
        world = World(tmp_path)
        await store(world, 0, 0)
        (stamps,) = (each for each in tmp_path.glob("recency/*") if each.suffix == "")
        stamps.write_bytes(b"\xff" * stamps.stat().st_size)
        async with world.run() as cache:
            engine = StandIn(cache, 64)
            assert left(cache, engine, 0, 1) == [4, 4]
            await engine.ask(prompt(2, BLOCKS))
            assert left(cache, engine, 0, 1, 2) == [4, 4, 4]
            cache.index.check()

    asyncio.run(run())
