"""A Cache on real tiers for tests: small slabs, every fault countable."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from kvc2.cache.assemble import assemble
from kvc2.cache.cache import Cache
from kvc2.config import Admission, CpuConfig, DiskConfig, Durability, ServeConfig
from kvc2.metrics import Metrics
from kvc2.tiers.disk.slab_file import Files

MIB = 1 << 20
SLAB_BYTES = 1 * MIB


@asynccontextmanager
async def running(
    path: Path | None,
    *,
    cpu_bytes: int = 4 * MIB,
    disk_bytes: int = 16 * MIB,
    durability: Durability = "durable",
    admission: Admission = "always",
    files: Files | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    **more: object,
) -> AsyncIterator[Cache]:
    more.setdefault("slab_bytes", SLAB_BYTES)
    config = ServeConfig(
        cpu=CpuConfig.of_bytes(cpu_bytes),
        disk=DiskConfig()
        if path is None
        else DiskConfig.of_bytes(path, disk_bytes, durability, admission),
        copy_threads=2,
        **more,  # type: ignore[arg-type]
    )
    cache = await assemble(config, Metrics(), clock, files=files, wall=wall)
    try:
        yield cache
    finally:
        await cache.stop(10)


@asynccontextmanager
async def with_arena(path: Path | None, **more: object) -> AsyncIterator[Cache]:
    """`running`, with all of the arena to be had from the start."""
    async with running(path, **more) as cache:  # type: ignore[arg-type]
        await asyncio.to_thread(cache.arena.wait_populated, 30)
        yield cache


def is_slab(fd: int) -> bool:
    """Whether a file of `Files` is a slab's, not one beside the catalogue."""
    return os.readlink(f"/proc/self/fd/{fd}").endswith(".slab")


def on_disk(cache: Cache) -> set[bytes]:
    """Digests of all blocks there."""
    found: set[bytes] = set()
    for pools in cache._pools.layouts.values():  # type: ignore[union-attr]
        pages = cache.index.pool_counts(pools.disk.id).pages
        _, records = cache.index.residents(pools.disk.id, 0, pages)
        found |= {bytes(row) for row in records.digests}
    return found


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder on a tmpfs where there is one, for tests that sync often and measure nothing."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def faults(cache: Cache, kind: str) -> int:
    return int(cache._metrics.values()[f"faults_total{{kind={kind}}}"])
