"""The cache over real tiers: every byte that comes back is judged."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import Terms, TierTokens
from kvc2.cache.cache import Cache
from kvc2.tiers.disk.slab_file import Files
from tests import ROOT
from tests.doubles.caches import MIB, SLAB_BYTES, faults, running
from tests.doubles.stand_in import PAGE_SIZE, U32, StandIn, prompt


def test_bytes_come_back_equal_from_gpu_cpu_disk_and_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        tokens = prompt(1, 12)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(tokens)).matched_tokens == 0
            found = await engine.ask(tokens)
            assert found.tiers == TierTokens(gpu=12 * PAGE_SIZE)
            assert found.transfer == 0
            assert (await cache.evict("gpu", 0)).evicted_blocks == 12
            found = await engine.ask(tokens)
            assert found.tiers == TierTokens(cpu=12 * PAGE_SIZE)
            assert found.transfer == 1
            flushed = await cache.flush(10)
            assert (flushed.durable_blocks, flushed.not_durable_blocks) == (12, {})
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)
            assert (await engine.ask(tokens)).tiers == TierTokens(disk=12 * PAGE_SIZE)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(tokens)).tiers == TierTokens(disk=12 * PAGE_SIZE)
            cache.index.check()

    asyncio.run(run())


def test_eviction_under_pressure_keeps_serving_right_bytes(tmp_path: Path) -> None:
    """40 prompts of 8 blocks through 24 gpu pages, one cpu slab and 1 MiB-slabs on disk."""

    async def run() -> None:
        order = np.random.default_rng(7)
        async with running(tmp_path, cpu_bytes=MIB, disk_bytes=5 * MIB) as cache:
            engine = StandIn(cache, 24, segment_bytes=4096)
            tiers = np.zeros(4, int)
            for seed in order.integers(0, 40, 150).tolist():
                found = await engine.ask(prompt(seed, 8))
                tiers += np.array([*found.tiers])
                if seed % 3:
                    await cache.flush(10)
            assert (tiers[:3] > 0).all(), tiers
            cache.index.check()
            assert faults(cache, "corrupt_block") == 0
            await engine.close()

    asyncio.run(run())


def used_bytes(path: Path) -> int:
    """What the directory takes: the larger of length and blocks of each file."""
    total = 0
    for each in path.rglob("*"):
        facts = each.stat()
        total += max(facts.st_size, facts.st_blocks * 512) if each.is_file() else 0
    return total


class Watched(Files):
    """`most`: bytes that the directory took when a file had grown or was about to go."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.most = path, 0

    def _look(self) -> None:
        with suppress(FileNotFoundError):  # another thread renames a file meanwhile
            self.most = max(self.most, used_bytes(self.path))

    def allocate(self, fd: int, num_bytes: int) -> None:
        super().allocate(fd, num_bytes)
        self._look()

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._look()

    def unlink(self, path: Path) -> None:
        self._look()
        super().unlink(path)


@pytest.mark.parametrize("segment_bytes", [1024, 16384])
def test_the_disk_budget_holds_while_three_times_its_size_is_written(
    tmp_path: Path, segment_bytes: int
) -> None:
    budget = 6 * MIB
    files = Watched(tmp_path)

    async def run() -> None:
        sizes = {"cpu_bytes": 2 * MIB, "disk_bytes": budget}
        async with running(tmp_path, files=files, **sizes) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64, segment_bytes=segment_bytes)
            blocks = 3 * budget // engine.layout.page_bytes
            for seed in range(blocks // 32 + 1):
                await engine.ask(prompt(seed, 32))
                await cache.flush(10)
                await cache._background.writer.save_recency()
                assert max(files.most, used_bytes(tmp_path)) <= budget
            assert cache.stats().tiers[2].resident_pages > budget // 4 // engine.layout.page_bytes
            last = await engine.ask(prompt(seed, 32))
            assert last.matched_tokens == 32 * PAGE_SIZE
            cache.index.check()
        async with running(tmp_path, files=files, **sizes) as cache:  # type: ignore[arg-type]
            await StandIn(cache, 64, segment_bytes=8192).ask(prompt(1, 32))  # another layout
            assert (await cache.flush(10)).not_durable_blocks == {}
        assert budget / 2 < files.most <= budget

    asyncio.run(run())


def test_the_stats_say_what_tiers_of_other_sizes_would_have_hit(tmp_path: Path) -> None:
    """Two prompts of 24 blocks take turns in a gpu pool of 32 pages: 64 would have held both."""

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            for turn in range(20):
                await engine.ask(prompt(turn % 2, 24))
            await cache.flush(10)  # a tier without slabs has no size yet
            found = cache.stats()
            gpu, cpu, disk = (each.hit_rates for each in found.tiers)
            least = 18 / 20 * 24 * PAGE_SIZE / (24 * PAGE_SIZE + 1)
            assert gpu[:2] == (0.0, pytest.approx(least * 8 / 24, abs=0.05))
            assert gpu[2:] == pytest.approx((least, least))
            assert cpu[1] == disk[1] == pytest.approx(least)
            assert found.hit_rate_unlimited == pytest.approx(least)

    asyncio.run(run())


def test_gpu_only_is_a_chain_of_gpu_alone(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(None, gpu_only=True) as cache:
            engine = StandIn(cache, 16)
            await engine.ask(prompt(1, 4))
            assert (await engine.ask(prompt(1, 4))).tiers == TierTokens(gpu=4 * PAGE_SIZE)
            assert [each.tier for each in cache.stats().tiers] == ["gpu"]
            assert await cache.flush(1) == await cache.flush(1)
            assert (await cache.flush(1)).not_durable_blocks == {"no_disk": 4}
            assert not await engine.ask_durably(prompt(1, 4))
            assert (await cache.evict("gpu", 0)).last_copies == 4

    asyncio.run(run())


@pytest.mark.parametrize("at_rest", [True, False])
def test_an_ended_sessions_blocks_are_copied_only_if_its_pages_are_at_rest(at_rest: bool) -> None:
    async def run() -> None:
        async with running(None) as cache:
            first, second = StandIn(cache, 32), StandIn(cache, 32)
            cache._background._tasks[0].cancel()
            await first.ask(prompt(1, 20))
            await first.close(at_rest=at_rest)
            found = await second.ask(prompt(1, 20))
            assert found.tiers == TierTokens(cpu=20 * PAGE_SIZE if at_rest else 0)
            assert faults(cache, "undemoted_lost") == (0 if at_rest else 20)
            cache.index.check()

    asyncio.run(run())


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_copy_under_way_when_a_session_ends_counts_only_if_its_pages_are_at_rest(
    at_rest: bool,
) -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            store = cache._gpus[engine.session.epoch].store
            assert store is not None
            read, begun, let = store.read, threading.Event(), threading.Event()

            def slow_read(pages: U32, offsets: NDArray[np.uint64]) -> NDArray[np.uint8]:
                begun.set()
                assert let.wait(10)
                return read(pages, offsets)

            store.read = slow_read  # type: ignore[method-assign]
            await engine.ask(prompt(1, 20))
            await asyncio.to_thread(begun.wait, 10)
            closing = asyncio.ensure_future(engine.close(at_rest=at_rest))
            await asyncio.sleep(0)
            if not at_rest:
                engine.pool[:] = 0  # it thawed, and these pages are its own now
            let.set()
            await closing
            assert cache.stats().tiers[1].resident_pages == (20 if at_rest else 0)
            assert (await StandIn(cache, 32).ask(prompt(1, 20))).tiers.cpu == (80 if at_rest else 0)
            cache.index.check()

    asyncio.run(run())


def test_a_sessions_end_gives_its_leases_back_and_answers_what_waits(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 4))
            await engine.acquire(prompt(1, 4))
            assert cache.index.counts().leases == 1
            await engine.close()
            assert cache.index.counts().leases == 0
            with pytest.raises(errors.SessionOver):
                await engine.acquire(prompt(1, 4))
            with pytest.raises(errors.SessionOver):
                cache.leases.grant(engine.session, 1)

    asyncio.run(run())


def test_layouts_share_the_arena_and_the_last_to_come_gets_a_slab(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=6 * MIB) as cache:
            small = StandIn(cache, 256, segment_bytes=4096)
            for seed in range(12):
                await small.ask(prompt(seed, 32))
                await cache.flush(10)
            names = [hashlib.sha256(bytes([n])).digest() for n in range(2)]
            large = StandIn(cache, 64, segment_bytes=16384, namespace=names[0])
            await large.ask(prompt(100, 8))
            assert (await cache.flush(10)).not_durable_blocks == {}
            await cache.evict("gpu", 0)
            assert (await large.ask(prompt(100, 8))).tiers == TierTokens(cpu=8 * PAGE_SIZE)
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)
            assert (await large.ask(prompt(100, 8))).tiers == TierTokens(disk=8 * PAGE_SIZE)
            found = await small.ask(prompt(11, 32))
            assert found.matched_tokens > 0
            assert used_bytes(tmp_path) <= 6 * MIB
            cache.index.check()

    asyncio.run(run())


async def filled(cache: Cache, seeds: int) -> StandIn:
    """A layout of small pages that has taken all of the arena and of the disk."""
    small = StandIn(cache, 256, segment_bytes=4096)
    for seed in range(seeds):
        await small.ask(prompt(seed, 32))
        await cache.flush(10)
    return small


def test_a_layout_that_fits_nowhere_takes_nothing_from_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=6 * MIB) as cache:
            await filled(cache, 12)
            held = [each.resident_pages for each in cache.stats().tiers[1:]]
            assert min(held) > 100
            # one page is 8 MiB and a sector
            large = StandIn(cache, 4, segment_bytes=2 * MIB)
            for seed in range(3):
                await large.ask(prompt(100 + seed, 2))
                await cache.flush(0.2)
            assert [each.resident_pages for each in cache.stats().tiers[1:]] == held
            cache.index.check()

    asyncio.run(run())


def test_a_layout_takes_as_many_slabs_as_its_own_needs(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, cpu_bytes=4 * MIB, disk_bytes=8 * MIB) as cache:
            await filled(cache, 16)
            before = cache.counts.tier("cpu").pages
            # one page fills two slabs of 1 MiB
            large = StandIn(cache, 4, segment_bytes=496 << 10)
            per_slab = SLAB_BYTES // (4 * 4096 + 4096)
            await large.ask(prompt(100, 1))
            assert (await cache.flush(10)).not_durable_blocks == {}
            assert cache.counts.tier("cpu").pages == before - 2 * per_slab + 1
            assert cache.counts.tier("disk").resident_pages > per_slab
            cache.index.check()

    asyncio.run(run())


async def on_disk_only(cache: Cache, engine: StandIn, seed: int, blocks: int) -> None:
    await engine.ask(prompt(seed, blocks))
    assert (await cache.flush(10)).not_durable_blocks == {}
    await cache.evict("gpu", 0)
    await cache.evict("cpu", 0)


def test_two_acquires_of_one_prefix_load_it_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            first, second = StandIn(cache, 32), StandIn(cache, 32)
            await on_disk_only(cache, first, 1, 16)
            await asyncio.gather(first.ask(prompt(1, 16)), second.ask(prompt(1, 16)))
            while cache._mover.promoting:  # the engine sees its last layer before the loop does
                await cache.leases._loader.until_changed()
            values = cache._metrics.values()
            assert values["transfer_blocks_total{source=disk,target=cpu}"] == 16
            assert values["transfer_blocks_total{source=cpu,target=gpu}"] == 32

    asyncio.run(run())


def test_an_acquire_at_its_deadline_answers_with_what_is_settled(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await on_disk_only(cache, engine, 1, 8)
            request, found = await engine.acquire(prompt(1, 8), deadline_s=0)
            assert found.matched_tokens == 0
            assert faults(cache, "acquire_deadline") == 1
            cache.leases.release(engine.session, request)
            assert (await engine.ask(prompt(1, 8))).matched_tokens == 8 * PAGE_SIZE

    asyncio.run(run())


def test_a_release_cancels_the_acquire_under_way(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await on_disk_only(cache, engine, 1, 8)
            waiting = asyncio.ensure_future(engine.acquire(prompt(1, 8)))
            await asyncio.sleep(0)
            cache.leases.release(engine.session, engine.requests.to_bytes(4, "big"))
            _, found = await waiting
            assert found.prefix_pages.size == found.granted_pages.size == 0
            assert cache.index.counts().leases == 0

    asyncio.run(run())


def test_a_cancelled_acquire_is_granted_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await on_disk_only(cache, engine, 1, 8)
            waiting = asyncio.ensure_future(engine.acquire(prompt(1, 8), grant=4))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert cache.stats().pools[0].private_pages == 0
            cache.leases.release(engine.session, engine.requests.to_bytes(4, "big"))
            assert (await engine.ask(prompt(1, 8))).matched_tokens == 8 * PAGE_SIZE

    asyncio.run(run())


def test_a_second_acquire_of_a_released_request_can_be_released_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await on_disk_only(cache, engine, 1, 8)
            ask = (engine.session, engine.opened, b"same", prompt(1, 8), Terms(0, 20.0))
            first = asyncio.ensure_future(cache.leases.acquire(*ask))
            await asyncio.sleep(0)
            cache.leases.release(engine.session, b"same")
            second = asyncio.ensure_future(cache.leases.acquire(*ask))
            await asyncio.sleep(0)
            later = engine.session.leases[b"same"]
            await first
            assert engine.session.leases[b"same"] is later
            cache.leases.release(engine.session, b"same")
            assert later.ended.done()
            await second
            assert not engine.session.leases
            assert cache.index.counts().leases == 0

    asyncio.run(run())


def test_an_acquire_is_idempotent_while_its_lease_is_open() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 4))
            ask = (engine.session, engine.opened, b"same", prompt(1, 4), Terms(3, 1.0))
            first, second = await cache.leases.acquire(*ask), await cache.leases.acquire(*ask)
            assert first is second
            assert cache.index.counts().leases == 1
            cache.leases.release(engine.session, b"same")
            cache.leases.release(engine.session, b"same")
            assert cache.index.counts().leases == 0

    asyncio.run(run())


def test_what_memory_holds_is_answered_without_awaiting() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 8))
            await cache.evict("gpu", 0)
            waiting = cache.leases.acquire(
                engine.session, engine.opened, b"r", prompt(1, 8), Terms(0, 1.0)
            )
            with pytest.raises(StopIteration) as stopped:
                waiting.send(None)
            assert stopped.value.value.tiers == TierTokens(cpu=8 * PAGE_SIZE)

    asyncio.run(run())


def test_write_back_copies_for_a_flush(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, write_policy="back") as cache:
            engine = StandIn(cache, 64)
            await engine.ask(prompt(1, 8))
            assert cache.stats().tiers[1].resident_pages == 0
            assert (await cache.flush(10)).durable_blocks == 8

    asyncio.run(run())


def test_another_slab_size_finds_what_was_stored(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 32).ask(prompt(1, 8))
        async with running(tmp_path, slab_bytes=2 * SLAB_BYTES) as cache:
            found = await StandIn(cache, 32).ask(prompt(1, 8))
            assert found.tiers == TierTokens(disk=8 * PAGE_SIZE)

    asyncio.run(run())


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path

from tests import ROOT
from tests.doubles.caches import running
from tests.doubles.stand_in import StandIn, prompt

async def run():
    async with running(Path(sys.argv[1])) as cache:
        engine = StandIn(cache, 128)
        for seed in range(6):
            await engine.ask(prompt(seed, 16))
        assert (await cache.flush(20)).not_durable_blocks == {}
        print("flushed", flush=True)
        for seed in range(6, 100):
            await engine.ask(prompt(seed, 16))
            if seed == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run())
"""


@pytest.mark.parametrize("moment", [6, 19])
def test_what_was_flushed_survives_kill_9(tmp_path: Path, moment: int) -> None:
    import sys

    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(moment)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert "flushed" in done.stdout

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 64)
            for seed in range(6):
                found = await engine.ask(prompt(seed, 16))
                assert found.matched_tokens == 16 * PAGE_SIZE
            for seed in range(6, moment + 1):
                await engine.ask(prompt(seed, 16))  # there or not: the bytes are right
            assert faults(cache, "corrupt_block") == 0
            cache.index.check()

    asyncio.run(run())
