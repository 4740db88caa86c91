"""Several models at once: slabs go where they are needed; nothing decays when the mix shifts."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvc2.cache.cache import Cache
from kvc2.tiers.disk.catalogue import Change, Full
from kvc2.tiers.disk.slab_file import Files
from kvc2.tiers.pools import LayoutPools
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import StandIn, prompt

BLOCKS = 8  # of a prompt
CPU_BYTES = 8 * MIB
DISK_BYTES = 10 * MIB
# Segment bytes and page size of each model: about 280 to 400 blocks fill the arena.
SMALL, LARGE = (4096, 4), (6144, 8)
PROMPTS = 60  # of a model: half as many again as the arena holds
WARM, MEASURED = 150, 150
STRANDED_MAX = 0.10
TOLERANCE = 0.03


class Model:
    """One engine and the prompts that it is asked, at random."""

    def __init__(self, cache: Cache, number: int, shape: tuple[int, int] = SMALL) -> None:
        segment_bytes, page_size = shape
        self.cache = cache
        self.engine = StandIn(
            cache,
            3 * BLOCKS,
            segment_bytes=segment_bytes,
            page_size=page_size,
            namespace=hashlib.sha256(bytes([number])).digest(),
        )
        self.number = number
        self.order = np.random.default_rng(number)

    @property
    def pools(self) -> LayoutPools:
        pools = self.cache._gpus[self.engine.session.epoch].pools
        assert pools is not None
        return pools

    async def ask(self, seed: int) -> float:
        """One request, from below the gpu tier; the share that was there."""
        tokens = prompt(1000 * self.number + seed, BLOCKS, self.engine.layout.page_size)
        found = await self.engine.ask(tokens)
        await self.cache.flush(10)
        await self.cache.evict("gpu", 0)
        return found.matched_tokens / (tokens.size - 1)

    async def asked(self, times: int, stranded_by: Sequence[Model] = ()) -> float:
        """The hit rate of so many requests; `stranded_by`: models that are asked nothing now."""
        hits = []
        for seed in self.order.integers(0, PROMPTS, times).tolist():
            hits.append(await self.ask(seed))
            if stranded_by:
                assert stranded(self.cache, stranded_by) <= STRANDED_MAX
        return float(np.mean(hits))


def stranded(cache: Cache, idle: Sequence[Model]) -> float:
    """The share of the arena that holds nothing, and that nobody who needs it can fill."""
    arena, useful = cache._pools.arena.capacity_bytes, 0
    resting = {model.pools.shape.layout_digest for model in idle}
    for digest, pools in cache._pools.layouts.items():
        counts = cache.index.pool_counts(pools.cpu.id)
        pages = counts.resident if digest in resting else counts.pages
        useful += pages * pools.shape.page_bytes
    return 1 - useful / arena


async def alone(number: int, shape: tuple[int, int]) -> float:
    async with running(None, cpu_bytes=CPU_BYTES, eviction_policy="lru") as cache:
        model = Model(cache, number, shape)
        await model.asked(WARM)
        return await model.asked(MEASURED)


def test_after_the_mix_has_shifted_a_model_hits_as_if_the_other_had_never_been() -> None:
    async def run() -> None:
        expected = {1: await alone(1, SMALL), 2: await alone(2, LARGE)}
        # lru: what it keeps depends on the last requests alone, so both sides settle within WARM
        async with running(None, cpu_bytes=CPU_BYTES, eviction_policy="lru") as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            await first.asked(WARM)
            for now, before in ((second, first), (first, second)):
                now.order = np.random.default_rng(now.number)
                await now.asked(WARM, stranded_by=[before])
                rate = await now.asked(MEASURED, stranded_by=[before])
                assert rate == pytest.approx(expected[now.number], abs=TOLERANCE)
                assert before.pools.cpu.store.slabs() == []  # it gave everything back
                cache.index.check()

    asyncio.run(run())


async def kept_by(cache: Cache, model: Model) -> set[int]:
    """The prompts that the disk holds whole."""
    await cache.evict("gpu", 0)
    await cache.evict("cpu", 0)
    size = model.engine.layout.page_size
    kept = set()
    for seed in range(PROMPTS):
        tokens = prompt(1000 * model.number + seed, BLOCKS, size)
        found = cache.leases.match(model.engine.session, model.engine.opened, tokens)
        if found.matched_tokens == BLOCKS * size:
            kept.add(seed)
    return kept


def sound(cache: Cache) -> None:
    kinds = ("corrupt_block", "foreign_block", "stale_page", "disk_read", "internal_error")
    assert {kind: faults(cache, kind) for kind in kinds} == dict.fromkeys(kinds, 0)
    cache.index.check()


def test_slabs_on_disk_go_where_they_are_needed_and_a_restart_keeps_what_moved(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=DISK_BYTES) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            await first.asked(WARM)
            before = disk_slabs(first)
            await second.asked(WARM)
            assert disk_slabs(first) < before
            await asyncio.gather(first.asked(60), second.asked(60))
            assert moved(cache, "disk") > 0
            kept = [await kept_by(cache, each) for each in (first, second)]
            assert all(kept)
            sound(cache)
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=DISK_BYTES) as cache:
            for number, (shape, seeds) in enumerate(zip((SMALL, LARGE), kept, strict=True), 1):
                model = Model(cache, number, shape)
                assert await kept_by(cache, model) == seeds
                for seed in list(seeds)[:10]:
                    assert await model.ask(seed) == 1.0  # its bytes are judged
            sound(cache)

    asyncio.run(run())


def test_what_only_the_disk_holds_is_loaded_though_another_model_fills_the_arena(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        sizes = {"cpu_bytes": 2 * MIB, "disk_bytes": 2 * DISK_BYTES}
        async with running(tmp_path, **sizes) as cache:
            await Model(cache, 2, LARGE).ask(0)
        async with running(tmp_path, **sizes) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            for seed in range(20):
                await first.ask(seed)
            assert (len(first.pools.cpu.store.slabs()), second.pools.cpu.store.slabs()) == (2, [])
            assert await second.ask(0) == 1.0
            assert len(second.pools.cpu.store.slabs()) == 1
            sound(cache)

    asyncio.run(run())


@pytest.mark.parametrize("failing", [2, 3])
def test_a_commit_that_fails_while_slabs_move_loses_nothing_and_serves_no_wrong_byte(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc2.moving.turns.RETRY_S", 0.0)

    async def run() -> None:
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=DISK_BYTES) as cache:
            commit, commits = cache._pools.tiers.disks[0].catalogue.commit, itertools.count(1)

            def sometimes(change: Change) -> None:
                if next(commits) % failing == 0:
                    raise Full("injected")
                commit(change)

            monkeypatch.setattr(cache._pools.tiers.disks[0].catalogue, "commit", sometimes)
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            await first.asked(WARM)
            for _ in range(6):
                await second.asked(20)
                await first.asked(10)
            assert moved(cache, "disk") > 0
            sound(cache)
        async with running(tmp_path, cpu_bytes=3 * MIB, disk_bytes=DISK_BYTES) as cache:
            for number, shape in enumerate((SMALL, LARGE), 1):
                model = Model(cache, number, shape)
                for seed in await kept_by(cache, model):
                    await model.ask(seed)
            sound(cache)

    asyncio.run(run())


class FailingWrites(Files):
    """Every ninth write of pages fails, of batches and of moves alike."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.writes += 1
        if self.writes % 9 == 0:
            raise OSError(errno.EIO, "injected")
        return super().write(fd, buffers, offset)


def test_a_write_that_fails_while_slabs_move_costs_no_block_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc2.moving.turns.RETRY_S", 0.0)

    async def run() -> None:
        sizes = {"cpu_bytes": 3 * MIB, "disk_bytes": DISK_BYTES}
        async with running(tmp_path, files=FailingWrites(), **sizes) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            await first.asked(WARM)
            await second.asked(WARM)
            assert moved(cache, "disk") > 0
            assert faults(cache, "disk_write") > 0
            kept = await kept_by(cache, second)
            sound(cache)
        async with running(tmp_path, **sizes) as cache:
            second = Model(cache, 2, LARGE)
            for seed in kept:
                assert await second.ask(seed) == 1.0
            sound(cache)

    asyncio.run(run())


def disk_slabs(model: Model) -> int:
    return model.cache.index.pool_counts(model.pools.disk.id).slabs


def moved(cache: Cache, tier: str) -> float:
    """Blocks that went from slab to slab."""
    return cache._metrics.values()[f"transfer_blocks_total{{source={tier},target={tier}}}"]


def test_many_models_share_what_there_is_and_none_of_it_is_stranded() -> None:
    """Six layouts, two of them busy at a time; ten slabs of arena."""

    async def run() -> None:
        async with running(None, cpu_bytes=10 * MIB) as cache:
            shapes = [(1024 * each, 4 << each % 2) for each in (2, 3, 4, 5, 6, 8)]
            models = [Model(cache, number, shape) for number, shape in enumerate(shapes)]
            for pair in (models[0:2], models[2:4], models[4:6], models[0:2]):
                idle = [each for each in models if each not in pair]
                for each in pair * 2:
                    await each.asked(WARM // 2)
                rates = [await each.asked(40, stranded_by=idle) for each in pair]
                assert min(rates) > 0.2
                assert sum(len(each.pools.cpu.store.slabs()) for each in pair) >= 9
                cache.index.check()

    asyncio.run(run())


def test_slabs_move_no_faster_than_they_are_filled_and_rest_when_the_mix_does() -> None:
    async def run() -> None:
        async with running(None, cpu_bytes=CPU_BYTES) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            taken = 0
            for turn in range(60):
                before = len(first.pools.cpu.store.slabs())
                await (first, second)[turn % 2].asked(5)
                taken += abs(len(first.pools.cpu.store.slabs()) - before)
                if turn == 29:
                    settled = taken
            stored = cache._metrics.values()["transfer_bytes_total{source=gpu,target=cpu}"]
            assert 0 < taken <= stored / MIB
            assert taken - settled <= 3, (taken, settled, stored / MIB)

    asyncio.run(run())


def test_a_large_slab_is_made_of_small_ones_of_several_models() -> None:
    async def run() -> None:
        async with running(None, cpu_bytes=6 * MIB) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            seeds = itertools.count()
            for model in (first, second) * 3:  # slabs of one lie between the other's
                held = len(model.pools.cpu.store.slabs())
                while len(model.pools.cpu.store.slabs()) == held:
                    await model.ask(next(seeds))
            assert cache._pools.arena.take(MIB) is None
            third = StandIn(cache, 4, segment_bytes=496 << 10)  # one page fills 2 MiB
            await third.ask(prompt(1, 1))
            await cache.flush(10)
            await cache.evict("gpu", 0)
            assert (await third.ask(prompt(1, 1))).tiers.cpu == third.layout.page_size
            cache.index.check()

    asyncio.run(run())
