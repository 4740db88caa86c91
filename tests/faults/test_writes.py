"""A write that comes short and a commit that fails: nothing is taken for done that was not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import lmdb
import pytest

from kvc2.tiers.disk.catalogue import Change
from kvc2.tiers.disk.check import check
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import faults, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8


class Short(Files):
    """The next write ends after `cut` bytes, of which whole sectors come to the disk."""

    cut: int | None = None

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.cut is None:
            return super().write(fd, buffers, offset)
        cut, self.cut = self.cut, None
        if sectors := cut // 4096 * 4096:
            super().write(fd, [buffers[0][:sectors]], offset)
        return cut


@pytest.mark.parametrize("cut", [0, 100, 4096, 4096 + 100])
def test_a_short_write_is_gone_on_with_or_is_a_fault(tmp_path: Path, cut: int) -> None:
    """What O_DIRECT can go on from it goes on from."""

    async def run() -> None:
        files = Short()
        async with running(tmp_path, files=files) as cache:
            engine = StandIn(cache, 32)
            files.cut = cut
            await engine.ask(prompt(1, BLOCKS))
            whole = cut == 4096
            await cache.flush(60)
            assert files.cut is None
            assert faults(cache, "disk_write") == (0 if whole else 1)
            assert (await cache.flush(60)).not_durable_blocks == {}
        async with running(tmp_path) as cache:
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE
        assert check(tmp_path).sound

    asyncio.run(run())


def test_deletes_of_a_commit_that_failed_are_committed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then no page of theirs is planned into."""

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, BLOCKS))
            assert (await cache.flush(60)).durable_blocks == BLOCKS
            (pool,) = cache._pools.tiers.disks[0].pools.values()

            def fails(change: Change) -> None:
                raise lmdb.Error("injected")

            with monkeypatch.context() as patched:
                patched.setattr(cache._pools.tiers.disks[0].catalogue, "commit", fails)
                assert (await cache.evict("disk", 0)).evicted_blocks == BLOCKS
                assert faults(cache, "catalogue_error") > 0
                assert not pool.settled
            await cache.flush(60)
            assert pool.settled
            await cache.evict("disk", 0)
            cache.index.check()
        assert check(tmp_path).records == 0

    asyncio.run(run())
