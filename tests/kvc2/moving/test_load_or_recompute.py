"""Load or recompute, in virtual time: what a request waits for is sooner than computing it.

A prompt of 64 blocks is 1.3 MiB on disk. The engine prefills 64 tokens/s: what a whole prompt
costs without a cache is four seconds, and the break-even disk reads 0.33 MB/s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvc2.answers import Acquired, Terms
from kvc2.cache.cache import Cache
from kvc2.moving.loading import Errand, Loader
from kvc2.moving.pace import PATIENCE_SHARE
from kvc2.tiers.meter import PROBE_S
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt
from tests.doubles.virtual_time import Clock, SlowFiles, run

BLOCKS = 64
TOKENS = BLOCKS * PAGE_SIZE
RATE = 64.0  # tokens/s
COLD_S = TOKENS / RATE
FAST, BREAK_EVEN, SLOW = 1e9, 0.325e6, 0.025e6  # bytes/s
PROMPTS = 12
QUICK = 16  # times RATE: an eighth of its computing is less than what a busy disk may be late
STALL_S = 0.06


class House:
    """A cache on a slow disk that alone holds PROMPTS prompts, and an engine of known rate."""

    def __init__(self, cache: Cache, clock: Clock, files: SlowFiles) -> None:
        self.cache, self.clock, self.files = cache, clock, files
        self.engine = StandIn(cache, 2 * BLOCKS, segment_bytes=4096)
        self.rate = RATE

    async def fill(self) -> None:
        arena = self.cache._pools.arena
        assert arena is not None
        while not arena.populated:  # by a thread that virtual time knows nothing of
            await self.cache.leases._loader.until_changed()
        for seed in range(PROMPTS):
            await self.engine.ask(prompt(seed, BLOCKS))
            assert (await self.cache.flush(10)).not_durable_blocks == {}
        await self.forget()
        self.engine.session.prefill_rate = self.rate

    async def forget(self) -> None:
        """The disk alone holds everything again."""
        await self.cache.evict("gpu", 0)
        await self.cache.evict("cpu", 0)

    async def ready_s(self, seed: int) -> float:
        """Until the whole prompt is ready: waiting for the lease, then computing what it lacks."""
        begun = self.clock()
        request, found = await self.engine.acquire(prompt(seed, BLOCKS))
        waited_s = self.clock() - begun
        self.cache.leases.release(self.engine.session, request)
        self.cache.index.check()
        return waited_s + (TOKENS - found.matched_tokens) / self.rate

    def quicken(self, times: int) -> float:
        """An engine that computes so much faster; the seconds of a whole prompt."""
        self.rate = self.engine.session.prefill_rate = RATE * times
        return COLD_S / times

    async def came(self) -> None:
        while self.cache._mover.loading_bytes:
            await self.cache.leases._loader.until_changed()

    async def settled(self) -> None:
        """What was given up on has come, and a probe may be made again."""
        await self.came()
        await self.forget()
        self.clock.now += 400.0


def in_house(
    tmp_path: Path,
    bytes_per_s: float,
    work: Callable[[House], Awaitable[None]],
    load_policy: str = "faster",
) -> None:
    clock = Clock()
    files = SlowFiles(clock, bytes_per_s)

    async def main() -> None:
        async with running(
            tmp_path,
            cpu_bytes=32 * MIB,
            disk_bytes=64 * MIB,
            files=files,
            clock=clock,
            load_policy=load_policy,
        ) as cache:
            house = House(cache, clock, files)
            await house.fill()
            try:
                await work(house)
            finally:
                clock.wake_all()

    run(clock, main)


@pytest.mark.parametrize("bytes_per_s", [FAST, 4 * BREAK_EVEN, BREAK_EVEN, SLOW, SLOW / 10])
def test_with_a_measured_disk_no_request_is_slower_than_without_a_cache(
    tmp_path: Path, bytes_per_s: float
) -> None:
    async def work(house: House) -> None:
        await house.ready_s(0)  # measures the disk, behind or not
        for seed in range(1, PROMPTS):
            await house.settled()
            assert await house.ready_s(seed) <= COLD_S * 1.001
        worth_it = bytes_per_s > BREAK_EVEN
        brought = house.cache._metrics.values()["recomputed_tokens_total{why=slower}"] == 0
        assert brought == worth_it

    in_house(tmp_path, bytes_per_s, work)


def test_who_wants_it_all_loaded_waits_for_it(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        for seed in range(3):
            assert COLD_S < await house.ready_s(seed) < 2 * COLD_S
            await house.settled()
        assert house.cache._metrics.values()["recomputed_tokens_total{why=slower}"] == 0

    in_house(tmp_path, 0.8 * BREAK_EVEN, work, load_policy="always")


@pytest.mark.parametrize("times", [1, QUICK])
def test_a_disk_that_became_slow_costs_one_request_an_eighth_and_no_other(
    tmp_path: Path, times: int
) -> None:
    async def work(house: House) -> None:
        cold_s = house.quicken(times)
        assert await house.ready_s(0) < cold_s / 50
        await house.settled()
        house.files.bytes_per_s = SLOW
        first = await house.ready_s(1)
        assert cold_s < first <= cold_s * (1 + 1 / PATIENCE_SHARE) * 1.001
        for seed in range(2, PROMPTS):  # while the load that was given up on goes on
            assert await house.ready_s(seed) <= cold_s * 1.001
        assert house.cache._metrics.values()["recomputed_tokens_total{why=overdue}"] == TOKENS
        assert faults(house.cache, "acquire_deadline") == 0

    in_house(tmp_path, FAST, work)


def test_a_disk_that_stalls_now_and_then_is_given_up_on_once(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        cold_s = house.quicken(QUICK)
        assert cold_s / PATIENCE_SHARE < STALL_S < cold_s / 2
        await house.ready_s(0)
        overdue = []
        for asked in range(45):
            await house.settled()
            house.files.stall_s = STALL_S if asked % 15 == 0 else 0.0
            if await house.ready_s(asked % PROMPTS) > cold_s:
                overdue.append(asked)
        assert overdue == [0]

    in_house(tmp_path, FAST, work)


def test_a_stall_long_ago_buys_a_slow_disk_no_patience(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        cold_s = house.quicken(QUICK)
        await house.ready_s(0)
        for asked in range(60):
            await house.settled()
            house.files.stall_s = STALL_S if asked == 0 else 0.0
            await house.ready_s(asked % PROMPTS)
        await house.settled()
        house.files.bytes_per_s = SLOW
        assert cold_s < await house.ready_s(1) <= cold_s * (1 + 1 / PATIENCE_SHARE) * 1.001
        await house.came()  # 52 s late: that teaches no patience
        house.files.bytes_per_s = FAST
        for _ in range(2):  # an eighth of all time is not over sooner after 52 s
            await house.settled()
        await house.ready_s(2)
        for seed in range(3, 6):
            await house.settled()
            assert await house.ready_s(seed) < cold_s / 50
        await house.settled()
        house.files.bytes_per_s = SLOW
        assert cold_s < await house.ready_s(6) <= cold_s * (1 + 1 / PATIENCE_SHARE) * 1.001

    in_house(tmp_path, FAST, work)


def test_what_was_given_up_on_comes_behind_and_is_not_read_again(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        assert await house.ready_s(0) > COLD_S
        await house.came()
        read = house.cache._metrics.values()["transfer_blocks_total{source=disk,target=cpu}"]
        assert read == BLOCKS
        assert await house.ready_s(0) == 0
        assert (
            house.cache._metrics.values()["transfer_blocks_total{source=disk,target=cpu}"] == read
        )

    in_house(tmp_path, SLOW, work)


def test_what_came_for_a_request_is_its_own_before_others_can_evict_it(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        loop, mover = asyncio.get_running_loop(), house.cache._mover
        cpu, told = house.engine.session.pool.pools.cpu.id, mover._on_done

        def others_run() -> None:
            loop.call_soon(house.cache.index.evict, cpu, BLOCKS)
            told()

        mover._on_done = others_run
        _, found = await house.engine.acquire(prompt(0, BLOCKS), deadline_s=4.0)
        assert found.matched_tokens == TOKENS

    in_house(tmp_path, FAST, work)


def test_a_load_of_which_a_request_can_have_nothing_is_its_last(tmp_path: Path) -> None:
    """All pages of its pool are in use, and others evict what was loaded."""

    async def work(house: House) -> None:
        assert house.cache.leases.grant(house.engine.session, 2 * BLOCKS).size == 2 * BLOCKS
        cpu, next_load = house.engine.session.pool.pools.cpu.id, Loader._next_load
        looks = 0

        def evicted(loader: Loader, errand: Errand, bytes_max: int) -> None:
            nonlocal looks
            looks += 1
            house.cache.index.evict(cpu, BLOCKS)
            next_load(loader, errand, bytes_max)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loader, "_next_load", evicted)
            _, found = await house.engine.acquire(prompt(0, BLOCKS), deadline_s=4.0)
        assert (found.matched_tokens, looks) == (0, 1)
        assert faults(house.cache, "acquire_deadline") == 0

    in_house(tmp_path, FAST, work)


def test_what_comes_for_a_request_that_was_answered_changes_nothing(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        cache, session = house.cache, house.engine.session
        session.prefill_rate = 0.0

        async def acquire() -> Acquired:
            terms = Terms(0, 100.0)
            return await cache.leases.acquire(
                session, house.engine.opened, b"1", prompt(0, BLOCKS), terms
            )

        caller = asyncio.create_task(acquire())
        while not cache._mover.loading_bytes:
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        await house.came()
        held = cache.index.lease(session.leases[b"1"].id).pages
        assert (await acquire()).prefix_pages.size == held.size == 0

    in_house(tmp_path, SLOW, work)


def test_a_disk_that_recovered_is_used_again_within_seconds(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        await house.ready_s(0)
        await house.settled()
        assert await house.ready_s(1) == COLD_S  # a probe goes on behind, at 52 s a prompt
        await house.settled()
        house.files.bytes_per_s = FAST
        assert await house.ready_s(2) == COLD_S  # and this one's finds out
        await house.came()
        for seed in range(3, 6):
            house.clock.now += PROBE_S
            assert await house.ready_s(seed) < COLD_S / 50

    in_house(tmp_path, SLOW, work)


def test_an_engine_that_tells_no_rate_waits_as_long_as_its_deadline(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        house.engine.session.prefill_rate = 0.0
        begun = house.clock()
        _, found = await house.engine.acquire(prompt(0, BLOCKS), deadline_s=2.0)
        assert house.clock() - begun == pytest.approx(2.0)
        assert found.matched_tokens == 0
        assert faults(house.cache, "acquire_deadline") == 1

    in_house(tmp_path, SLOW, work)


def test_a_prefix_that_can_not_come_by_the_deadline_is_split(tmp_path: Path) -> None:
    """Loading all of it takes two seconds: sooner than computing it, but too late."""

    async def work(house: House) -> None:
        await house.ready_s(0)
        await house.settled()
        begun = house.clock()
        _, found = await house.engine.acquire(prompt(1, BLOCKS), deadline_s=1.6)
        assert house.clock() - begun <= 1.25
        assert 0.4 * TOKENS < found.matched_tokens < 0.8 * TOKENS
        assert faults(house.cache, "acquire_deadline") == 0

    in_house(tmp_path, 2 * BREAK_EVEN, work)


def test_a_second_request_sees_that_the_first_computes_what_it_did_not_bring(
    tmp_path: Path,
) -> None:
    async def work(house: House) -> None:
        await house.ready_s(0)
        await house.settled()
        _, first = await house.engine.acquire(prompt(1, BLOCKS))
        _, second = await house.engine.acquire(prompt(1, BLOCKS))
        assert (first.matched_tokens, first.computing_tokens) == (0, 0)
        assert (second.matched_tokens, second.computing_tokens) == (0, TOKENS)

    in_house(tmp_path, SLOW, work)
