"""Between the watermarks: pages are free before somebody needs them, and nothing is lost for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvc2 import errors
from kvc2.answers import TierCounts
from kvc2.config import ServeConfig
from tests.doubles.caches import MIB, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8  # of a prompt
PROMPTS = 5
PAGES = (PROMPTS + 1) * BLOCKS  # all prompts, and a grant


async def filled(path: Path | None, low: float, high: float, **more: object) -> list[TierCounts]:
    """The tiers after prompts have filled the gpu pool, and all is copied that can be."""
    async with running(path, low_watermark=low, high_watermark=high, **more) as cache:
        engine = StandIn(cache, PAGES)
        for seed in range(PROMPTS):
            await engine.ask(prompt(seed, BLOCKS))
        await cache.flush(10)
        found = await engine.ask(prompt(0, BLOCKS))
        assert found.matched_tokens == BLOCKS * PAGE_SIZE  # whatever was dropped is below
        await cache.flush(10)
        cache.index.check()
        return cache.stats().tiers


def test_below_the_low_watermark_spare_copies_go_until_the_high_one(tmp_path: Path) -> None:
    gpu, cpu, _ = asyncio.run(filled(tmp_path, 0.25, 0.5))
    assert gpu.free_pages + gpu.private_pages >= PAGES // 4
    assert gpu.evicted > 0
    assert (gpu.last_copies, cpu.last_copies) == (0, 0)
    assert cpu.resident_pages == PROMPTS * BLOCKS


def test_above_the_low_watermark_nothing_goes(tmp_path: Path) -> None:
    gpu, _, _ = asyncio.run(filled(tmp_path, 0.0, 0.0))
    assert (gpu.evicted, gpu.resident_pages) == (0, PROMPTS * BLOCKS)


def test_a_last_copy_is_never_dropped_ahead_of_need() -> None:
    """Without a disk nothing is below cpu: a full arena stays full."""
    _, cpu = asyncio.run(filled(None, 0.4, 0.5, cpu_bytes=MIB))
    assert (cpu.evicted, cpu.last_copies) == (0, 0)


def test_what_a_grant_evicts_is_counted() -> None:
    async def run() -> None:
        async with running(None, gpu_only=True) as cache:
            engine = StandIn(cache, 2 * BLOCKS)
            for seed in range(3):
                await engine.ask(prompt(seed, BLOCKS))
            (gpu,) = cache.stats().tiers
            assert (gpu.evicted, gpu.last_copies) == (BLOCKS, BLOCKS)
            await engine.close()
            (gpu,) = cache.stats().tiers  # the session is over, what it evicted is not forgotten
            assert (gpu.evicted, gpu.last_copies) == (BLOCKS, BLOCKS)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("low", "high", "key"),
    [(-0.1, 0.5, "low"), (0.6, 0.7, "low"), (0.2, 0.1, "high"), (0.2, 1.0, "high")],
)
def test_watermarks_that_cannot_be_are_refused_by_name(low: float, high: float, key: str) -> None:
    with pytest.raises(errors.InvalidConfig, match=f"{key}_watermark"):
        ServeConfig(low_watermark=low, high_watermark=high)
