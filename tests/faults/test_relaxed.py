"""disk.durability relaxed: nothing is synced before a flush, nor said to be durable; what a power
cut costs is a miss."""

import asyncio
import errno
import shutil
from pathlib import Path

import pytest

from kvc2.config import Durability
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import faults, is_slab, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8


class Synced(Files):
    """Counts slabs that are synced; `broken`: nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.broken = False

    def sync(self, fd: int) -> None:
        self.count += is_slab(fd)
        if self.broken:
            raise OSError(errno.EIO, "not synced")
        super().sync(fd)


@pytest.mark.parametrize(("durability", "syncs"), [("durable", True), ("relaxed", False)])
def test_a_batch_is_synced_before_its_records_only_where_it_must_be(
    tmp_path: Path, durability: Durability, syncs: bool
) -> None:
    async def run() -> None:
        files = Synced()
        async with running(tmp_path, files=files, durability=durability) as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert await cache._background.drained(10)
            assert cache.counts.tier("disk").resident_pages == BLOCKS
            assert (files.count > 0) == syncs
            assert (await cache.flush(10)).durable_blocks == BLOCKS
            assert files.count > 0

    asyncio.run(run())


def test_what_is_not_synced_is_not_said_to_be_durable(tmp_path: Path) -> None:
    async def run() -> None:
        files = Synced()
        async with running(tmp_path, files=files, durability="relaxed") as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            files.broken = True
            assert (await cache.flush(10)).not_durable_blocks == {"error": BLOCKS}
            assert faults(cache, "disk_write") >= 1
            files.broken = False

    asyncio.run(run())


def test_what_a_power_cut_took_is_a_miss(tmp_path: Path) -> None:
    async def run() -> None:
        before, after = tmp_path / "before", tmp_path / "after"
        async with running(before, durability="relaxed") as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert await cache._background.drained(10)
            shutil.copytree(before, after)  # records are there, their bytes never came
        for slab in after.glob("slabs/*/*.slab"):
            slab.write_bytes(bytes(slab.stat().st_size))
        async with running(after, durability="relaxed") as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 0
            counted = cache._metrics.values()
            assert sum(n for name, n in counted.items() if name.startswith("faults_total")) >= 1
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())
