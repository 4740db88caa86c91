"""disk.admission: what only one request has used is not written to disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvc2 import errors
from kvc2.config import DiskConfig
from tests.doubles.caches import running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8


def test_a_second_request_brings_a_block_to_disk(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, admission="second_access") as cache:
            engine = StandIn(cache, 64)
            await engine.ask(prompt(1, BLOCKS))
            assert not await engine.ask_durably(prompt(2, BLOCKS))
            flushed = await cache.flush(10)
            assert (flushed.durable_blocks, flushed.not_durable_blocks) == (
                0,
                {"not_admitted": 2 * BLOCKS},
            )
            half = prompt(1, BLOCKS)[: BLOCKS // 2 * PAGE_SIZE + 1]
            await engine.ask(half)
            flushed = await cache.flush(10)
            left = 2 * BLOCKS - BLOCKS // 2
            assert flushed.durable_blocks == BLOCKS // 2
            assert flushed.not_durable_blocks == {"not_admitted": left}
            await engine.ask(prompt(1, BLOCKS))
            assert await engine.ask_durably(prompt(2, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()

    asyncio.run(run())


def test_by_default_everything_is_admitted(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 64).ask(prompt(1, BLOCKS))
            flushed = await cache.flush(10)
            assert (flushed.durable_blocks, flushed.not_durable_blocks) == (BLOCKS, {})

    asyncio.run(run())


def test_another_admission_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidConfig, match=r"disk.admission.*never.*second_access"):
        DiskConfig.of_bytes(tmp_path, 1 << 30, admission="never")  # type: ignore[arg-type]
