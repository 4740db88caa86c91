"""Several models at once: slabs go where they are needed; nothing decays when the mix shifts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np
import pytest

from kvc2.cache import Cache
from kvc2.tiers.pools import LayoutPools
from tests.caches import MIB, running
from tests.stand_in import StandIn, prompt

BLOCKS = 8  # of a prompt
CPU_BYTES = 8 * MIB
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
    assert cache._pools is not None
    arena, useful = cache._pools.arena.capacity_bytes, 0
    resting = {model.pools.shape.layout_digest for model in idle}
    for digest, pools in cache._pools.layouts.items():
        counts = cache.index.pool_counts(pools.cpu_id)
        pages = counts.resident if digest in resting else counts.pages
        useful += pages * pools.shape.page_bytes
    return 1 - useful / arena


async def alone(number: int, shape: tuple[int, int]) -> float:
    async with running(None, cpu_bytes=CPU_BYTES) as cache:
        model = Model(cache, number, shape)
        await model.asked(WARM)
        return await model.asked(MEASURED)


def test_after_the_mix_has_shifted_a_model_hits_as_if_the_other_had_never_been() -> None:
    async def run() -> None:
        expected = {1: await alone(1, SMALL), 2: await alone(2, LARGE)}
        async with running(None, cpu_bytes=CPU_BYTES) as cache:
            first, second = Model(cache, 1, SMALL), Model(cache, 2, LARGE)
            await first.asked(WARM)
            for now, before in ((second, first), (first, second)):
                now.order = np.random.default_rng(now.number)
                await now.asked(WARM, stranded_by=[before])
                rate = await now.asked(MEASURED, stranded_by=[before])
                assert rate == pytest.approx(expected[now.number], abs=TOLERANCE)
                assert before.pools.cpu.slabs() == []  # it gave everything back
                cache.index.check()

    asyncio.run(run())
