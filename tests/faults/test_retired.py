"""After a failed fdatasync nobody knows what is on the disk, and the next one would succeed all the
same: that slab is retired, never written or synced again; nothing in doubt is called durable."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import MIB, faults, is_slab, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8


class OneFailure(Files):
    """The next sync of a slab fails while `armed`; then notes what is done to that file."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.failed: set[int] = set()
        self.after: list[str] = []

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in self.failed:
            self.after.append("write")
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        if fd in self.failed:
            self.after.append("sync")
        if self.armed and is_slab(fd):
            self.armed = False
            self.failed.add(fd)
            raise OSError(errno.EIO, "not synced")
        super().sync(fd)

    def close(self, fd: int) -> None:
        self.failed.discard(fd)
        super().close(fd)


def test_a_slab_that_failed_to_sync_is_retired(tmp_path: Path) -> None:
    async def run() -> None:
        files = OneFailure()
        async with running(tmp_path, files=files) as cache:
            engine = StandIn(cache, 64)
            await engine.ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).durable_blocks == BLOCKS
            files.armed = True
            await engine.ask(prompt(2, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {"error": BLOCKS}
            assert files.failed
            assert (await cache.flush(10)).not_durable_blocks == {}
            for seed in range(3, 6):
                await engine.ask(prompt(seed, BLOCKS))
                assert (await cache.flush(10)).not_durable_blocks == {}
            assert files.after == []
            assert faults(cache, "slab_retired") == 1
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)  # what was durable there is still read
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            await cache.evict("disk", 0)
            (pools,) = cache._pools.on_disk()
            await engine.ask(prompt(6, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
            assert not pools.disk.store.slabs.retired  # it was empty: its file is gone
            cache.index.check()
        async with running(tmp_path) as cache:
            found = await StandIn(cache, 64).ask(prompt(6, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def test_a_relaxed_flush_that_failed_is_not_forgotten(tmp_path: Path) -> None:
    async def run() -> None:
        files = OneFailure()
        async with running(tmp_path, files=files, durability="relaxed") as cache:
            engine = StandIn(cache, 64)
            files.armed = True
            await engine.ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {"error": BLOCKS}
            assert (await cache.flush(10)).not_durable_blocks == {"error": BLOCKS}
            assert not await engine.ask_durably(prompt(1, BLOCKS))
            await engine.ask(prompt(2, BLOCKS))  # goes to another slab
            assert files.after == []
            await cache.evict("disk", 0)
            await engine.ask(prompt(3, BLOCKS))
            await cache.flush(10)  # deletes the slab
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()

    asyncio.run(run())


def test_a_disk_that_never_syncs_costs_no_slab_after_the_other(tmp_path: Path) -> None:
    class Never(Files):
        count = 0

        def sync(self, fd: int) -> None:
            self.count += is_slab(fd)
            raise OSError(errno.EIO, "not synced")

    async def run() -> None:
        files = Never()
        async with running(tmp_path, files=files, disk_bytes=8 * MIB) as cache:
            engine = StandIn(cache, 64)
            await engine.ask(prompt(1, BLOCKS))
            for _ in range(20):
                assert (await cache.flush(2)).not_durable_blocks
            assert files.count <= 20
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            cache.index.check()

    asyncio.run(run())


class NoSync(Files):
    """While `failing`, no sync succeeds and there is no new slab."""

    failing = False

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._draw()
        super().allocate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        self._draw()
        super().sync(fd)

    def _draw(self) -> None:
        if self.failing:
            raise OSError(errno.EIO, "failing")


@pytest.mark.parametrize("full", [False, True])
def test_a_disk_whose_slabs_are_all_retired_is_written_again(tmp_path: Path, full: bool) -> None:
    """The budget has room for more slabs, and one was just refused; or retired slabs that hold
    blocks fill it. A flush that finds the disk sound makes everything durable either way."""

    async def run() -> None:
        files = NoSync()
        sizes = {"slab_bytes": 1 << 16, "disk_bytes": 3 * MIB}
        async with running(tmp_path, files=files, **sizes) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            for seed in range(1000, 1100 if full else 1001):
                await engine.ask(prompt(seed, BLOCKS))
                assert (await cache.flush(10)).not_durable_blocks == {}
            (pools,) = cache._pools.on_disk()
            assert cache._pools.tiers.disks[0].has_budget(pools.disk.store.shape) != full
            files.failing = True
            slabs = pools.disk.store.slabs
            for seed in range(100):
                await engine.ask(prompt(seed, BLOCKS))
                assert (await cache.flush(10)).not_durable_blocks != {}
                if slabs.retired == set(slabs.numbers()):
                    break
            else:
                pytest.fail("not all are retired")
            files.failing = False
            assert (await cache.flush(10)).not_durable_blocks == {}
            await engine.ask(prompt(5000, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()
        async with running(tmp_path, **sizes) as cache:  # type: ignore[arg-type]
            found = await StandIn(cache, 64).ask(prompt(5000, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())
