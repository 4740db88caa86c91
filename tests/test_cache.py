"""The cache over real tiers: every byte that comes back is judged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from kvc2.cache import Cache
from kvc2.config import CpuConfig, DiskConfig, ServeConfig
from kvc2.metrics import Metrics
from kvc2.tiers.slab_file import Files
from tests.stand_in import PAGE_SIZE, StandIn, prompt

MIB = 1 << 20
SLAB_BYTES = 1 * MIB


@asynccontextmanager
async def running(
    path: Path | None,
    *,
    cpu_bytes: int = 4 * MIB,
    disk_bytes: int = 16 * MIB,
    files: Files | None = None,
    **more: object,
) -> AsyncIterator[Cache]:
    config = ServeConfig(
        slab_bytes=SLAB_BYTES,
        cpu=CpuConfig.of_bytes(cpu_bytes),
        disk=DiskConfig() if path is None else DiskConfig.of_bytes(path, disk_bytes),
        copy_threads=2,
        **more,  # type: ignore[arg-type]
    )
    cache = Cache(config, Metrics(), files=files)
    await cache.start()
    try:
        yield cache
    finally:
        await cache.stop(10)


def faults(cache: Cache, kind: str) -> int:
    return int(cache._metrics.values()[f"faults_total{{kind={kind}}}"])


def test_bytes_come_back_equal_from_gpu_cpu_disk_and_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        tokens = prompt(1, 12)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(tokens)).matched_tokens == 0
            found = await engine.ask(tokens)
            assert found.tiers == (12 * PAGE_SIZE, 0, 0, 0)
            assert found.transfer == 0
            assert (await cache.evict("gpu", 0)).evicted == 12
            found = await engine.ask(tokens)
            assert found.tiers == (0, 12 * PAGE_SIZE, 0, 0)
            assert found.transfer == 1
            flushed = await cache.flush(10)
            assert (flushed.durable_blocks, flushed.not_durable) == (12, {})
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)
            assert (await engine.ask(tokens)).tiers == (0, 0, 12 * PAGE_SIZE, 0)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(tokens)).tiers == (0, 0, 12 * PAGE_SIZE, 0)
            cache.index.check()

    asyncio.run(run())
