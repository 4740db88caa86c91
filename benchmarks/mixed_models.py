"""Several models in one arena: what each one's prompts still hit when the mix shifts.

The real index, pools, slabs and mover; KV bytes are not computed, so that only slabs that move are
copied. Conversations of each model begin with a shared system prompt and grow by a turn a request;
which one is next is drawn with Zipf's law. Peers: the arena split in equal parts for good; limit:
the model alone with all of it, asked the same. Rates are of tokens, and of the second half of each
phase: the first half is what a shift costs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.probe import Probe
from kvc2 import _core
from kvc2.arena import Arena
from kvc2.config import DiskConfig, ServeConfig
from kvc2.layout import layer_major
from kvc2.metrics import Metrics
from kvc2.moving.mover import Mover
from kvc2.moving.slabs import Slabs
from kvc2.tiers.base import PageShape
from kvc2.tiers.disk.batch import WriteBatch
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.pools import LayoutPools, Pools, Tiers

U32 = NDArray[np.uint32]
MIB = 1 << 20
ARENA_BYTES, SLAB_BYTES = 128 * MIB, 4 * MIB
REAL_SLAB_BYTES = 64 * MIB  # as served; for what moving one costs
HIGH_WATERMARK = 0.02
POLICY = ServeConfig().eviction_policy
VOCABULARY = 50_000
SYSTEM_BLOCKS, TURN_BLOCKS, LAST_BLOCKS = 8, 4, 48
CONVERSATIONS = 120
ZIPF = 0.7
# What is asked in turn: models by number, one more often the more often it stands there.
PHASES = {"a alone": (0,), "then b alone": (1,), "then both": (0, 1), "then a again": (0,)}


@dataclass(frozen=True)
class ModelShape:
    name: str
    layers: int
    segment_bytes: int
    page_size: int

    def pages(self, slab_bytes: int) -> PageShape:
        layout = layer_major(
            self.layers, 1, segment_bytes=self.segment_bytes, page_size=self.page_size
        )
        return PageShape.of(layout, slab_bytes)


MODELS = (ModelShape("a", 4, 16384, 16), ModelShape("b", 2, 20480, 32))


class Traffic:
    """The prompts of one model, one after the other; the same for the same seed."""

    def __init__(self, model: ModelShape, seed: int) -> None:
        self._random = np.random.default_rng([seed, model.page_size])
        self._size = model.page_size
        self._system = self._tokens(SYSTEM_BLOCKS)
        self._open = [self._system] * CONVERSATIONS
        shares = 1.0 / np.arange(1, CONVERSATIONS + 1) ** ZIPF
        self._shares = shares / shares.sum()

    def prompt(self) -> U32:
        which = int(self._random.choice(CONVERSATIONS, p=self._shares))
        if self._open[which].size >= LAST_BLOCKS * self._size:
            self._open[which] = self._system
        self._open[which] = np.concatenate([self._open[which], self._tokens(TURN_BLOCKS)])
        return self._open[which]

    def _tokens(self, blocks: int) -> U32:
        return self._random.integers(0, VOCABULARY, blocks * self._size, dtype=np.uint32)


class House:
    """An arena and the models that share it. `asked` is one request, from below the gpu tier."""

    def __init__(self, arena: Arena, slab_bytes: int) -> None:
        self.arena = arena
        self.index = _core.Index(policy=POLICY)
        metrics = Metrics()
        tiers = Tiers.of(arena, (), time.perf_counter)
        self.pools = Pools(self.index, tiers, metrics, ServeConfig())
        self.mover = Mover(self.index, metrics, tiers.meters, lambda: None, clock=time.perf_counter)
        self.slabs = Slabs(self.index, self.mover, self.pools, HIGH_WATERMARK)
        self._slab_bytes = slab_bytes
        self._known: dict[str, tuple[LayoutPools, int, int]] = {}  # its pools, gpu pool, namespace

    def of(self, model: ModelShape) -> tuple[LayoutPools, int, int]:
        if model.name not in self._known:
            pools = self.pools.of(model.pages(self._slab_bytes))
            gpu = self.index.add_pool(
                page_size=model.page_size,
                pages_per_slab=2 * LAST_BLOCKS,
                below=pools.cpu.id,
                durable=False,
            )
            self.index.add_slab(gpu)
            name = hashlib.sha256(model.name.encode()).digest()
            space = self.index.open_namespace(name, model.page_size)
            self._known[model.name] = pools, gpu, space
        return self._known[model.name]

    async def asked(self, model: ModelShape, tokens: U32) -> float:
        """The share of its blocks that was cached."""
        pools, gpu, space = self.of(model)
        index, blocks = self.index, tokens.size // model.page_size
        lease = index.acquire(space, gpu, tokens, blocks)
        if (promotion := index.promote(lease.id)) is not None:
            index.complete(promotion.id, promotion.target_pages.size)
        held = index.lease(lease.id).pages.size
        pages = index.grant(gpu, blocks - held)
        index.commit(lease.id, held, tokens[held * model.page_size :], pages)
        index.release(lease.id)
        while left := index.undemoted(gpu):
            await self.slabs.make_room(pools, left)
            if (copy := index.plan_demote(gpu, left)) is not None:
                index.complete(copy.id, copy.target_pages.size)
        index.evict(gpu, 2 * LAST_BLOCKS)
        return lease.matched / blocks

    def stranded(self, busy: Sequence[ModelShape]) -> float:
        """The share of the arena that holds nothing and that no busy model can fill."""
        of_busy = {self.of(model)[0].cpu.id for model in busy}
        useful = 0
        for pools in self.pools.layouts.values():
            counts = self.index.pool_counts(pools.cpu.id)
            pages = counts.pages if pools.cpu.id in of_busy else counts.resident
            useful += pages * pools.shape.page_bytes
        return 1 - useful / self.arena.capacity_bytes

    def counts(self, model: ModelShape) -> _core.PoolCounts:
        return self.index.pool_counts(self.of(model)[0].cpu.id)


@asynccontextmanager
async def opened(arena_bytes: int, slab_bytes: int = SLAB_BYTES) -> AsyncIterator[House]:
    arena = Arena(arena_bytes, slab_bytes)
    arena.start()
    await asyncio.to_thread(arena.wait_populated)
    house = House(arena, slab_bytes)
    try:
        yield house
    finally:
        house.mover.close()
        arena.close()


Rates = dict[tuple[str, str], list[float]]  # (phase, model): by request


async def replay(house: House, asked: set[str], requests: int, seed: int) -> tuple[Rates, float]:
    """Hits by request of the models in `asked`; the others' requests only pass. And the largest
    stranded share after the arena was full once, in the second halves of phases."""
    traffic = {model.name: Traffic(model, seed) for model in MODELS}
    rates: Rates = defaultdict(list)
    most = 0.0
    for phase, numbers in PHASES.items():
        busy = [MODELS[number] for number in numbers]
        for turn in range(requests * len(busy)):
            model = busy[turn % len(busy)]
            tokens = traffic[model.name].prompt()
            if model.name in asked:
                rates[phase, model.name].append(await house.asked(model, tokens))
            if turn > requests * len(busy) // 2:
                most = max(most, house.stranded(busy))
    return rates, most


def settled(hits: list[float]) -> float:
    """Percent, of the second half."""
    return 100 * statistics.mean(hits[len(hits) // 2 :])


async def hit_rates(requests: int, repeats: int) -> list[report.Row]:
    ours, split, alone = (defaultdict(list) for _ in range(3))
    stranded = []
    everybody = {model.name for model in MODELS}
    for seed in range(repeats):
        async with opened(ARENA_BYTES) as house:
            rates, most = await replay(house, everybody, requests, seed)
        stranded.append(100 * most)
        for case, hits in rates.items():
            ours[case].append(settled(hits))
        for model in MODELS:
            for found, arena_bytes in (split, ARENA_BYTES // len(MODELS)), (alone, ARENA_BYTES):
                async with opened(arena_bytes) as house:
                    rates, _ = await replay(house, {model.name}, requests, seed)
                for case, hits in rates.items():
                    found[case].append(settled(hits))
    rows = [
        report.row(
            f"hits of {name}, {phase}",
            "%",
            "higher",
            samples,
            limit=statistics.median(alone[phase, name]),
            limit_name="alone with the whole arena",
            peers={"static partition": statistics.median(split[phase, name])},
        )
        for (phase, name), samples in ours.items()
    ]
    return [*rows, report.row("most stranded", "%", "lower", stranded, goal="<= 10")]


async def moving(repeats: int, folder: Path) -> list[report.Row]:
    """Milliseconds until a slab of 64 MiB that model a has filled is free for model b."""
    probe = Probe(REAL_SLAB_BYTES, folder / "probe")
    in_arena, on_disk, copies, reads = [], [], [], []
    for seed in range(repeats):
        async with opened(4 * REAL_SLAB_BYTES, REAL_SLAB_BYTES) as house:
            giver, taker = MODELS
            traffic = Traffic(giver, seed)
            counts = house.counts(giver)
            while counts.slabs < 4 or counts.evicted < 3 * counts.pages:  # no slab is of one age
                await house.asked(giver, traffic.prompt())
                counts = house.counts(giver)
            begin = time.perf_counter()
            await house.slabs.make_room(house.of(taker)[0], 1)
            in_arena.append(1e3 * (time.perf_counter() - begin))
            if house.counts(taker).slabs != 1:
                raise RuntimeError("no slab came")
            copies.append(1e3 * probe.copy_s())
        on_disk.append(1e3 * await asyncio.to_thread(disk_move_s, folder / str(seed)))
        reads.append(1e3 * probe.read_s())
    return [
        report.row("a slab goes, arena", "ms", "lower", in_arena,
                   peers={"copying all of it": statistics.median(copies)}),
        report.row("a slab's blocks move, disk", "ms", "lower", on_disk,
                   limit=statistics.median(reads), limit_name="O_DIRECT read of 64 MiB"),
    ]  # fmt: skip


def disk_move_s(folder: Path) -> float:
    """Seconds of moving a full slab: read, verified, written, synced, its records moved."""
    shape = MODELS[0].pages(REAL_SLAB_BYTES)
    arena = Arena(REAL_SLAB_BYTES, REAL_SLAB_BYTES)
    config = DiskConfig.of_bytes(folder, 4 * REAL_SLAB_BYTES)
    tier = DiskTier(folder, config, arena.memory, Metrics())
    try:
        pool, index = tier.pool(shape), _core.Index()
        disk = index.add_pool(
            page_size=shape.page_size, pages_per_slab=shape.pages_per_slab, below=None, durable=True
        )
        top = index.add_pool(
            page_size=shape.page_size,
            pages_per_slab=shape.pages_per_slab,
            below=disk,
            durable=False,
        )
        space = index.open_namespace(bytes(32), shape.page_size)
        for each in (top, disk):
            index.add_slab(each)
        tier.grow(pool)
        tokens = np.arange(shape.pages_per_slab * shape.page_size, dtype=np.uint32)
        lease = index.acquire(space, top, tokens, 0)
        index.commit(lease.id, 0, tokens, index.grant(top, shape.pages_per_slab))
        while (copy := index.plan_demote(top, shape.pages_per_slab)) is not None:
            assert copy.records is not None
            offsets = copy.source_pages.astype(np.uint64) * np.uint64(shape.page_bytes)
            batch = WriteBatch(pool, copy.target_pages, offsets, copy.records)
            tier.finish(pool, tier.begin(batch))
            index.complete(copy.id, copy.target_pages.size)
        index.add_slab(disk)
        tier.grow(pool)
        index.close_slab(disk, 0)
        begin = time.perf_counter()
        while (move := index.plan_move(disk, 0, shape.pages_per_slab)) is not None:
            assert move.records is not None
            status = pool.move(move.source_pages, move.target_pages, move.records)
            if (status != _core.BLOCK_OK).any():
                raise RuntimeError(f"blocks did not come whole: {status}")
            pool.moved(index.complete(move.id, status.size), move.target_pages)
            tier.finish(pool)
        seconds = time.perf_counter() - begin
        if not index.take_slab(disk, 0):
            raise RuntimeError("the slab is not empty")
        return seconds
    finally:
        tier.close()
        arena.close()


async def run(arguments: argparse.Namespace) -> list[report.Row]:
    rows = await hit_rates(arguments.requests, arguments.repeats)
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        return rows + await moving(arguments.repeats, Path(folder))


def main() -> int:
    parser = report.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=1500, help="of each model in a phase (%(default)s)"
    )
    parser.add_argument("--disk", type=Path, help="a folder on the disk to measure")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments))
    report.finish("several models in one arena", rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
