"""The disk's order: deletes are committed before a page is used again, whatever fails."""

from __future__ import annotations

import asyncio
import errno
import struct
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from kvc2 import _core
from kvc2.layout import layer_major
from kvc2.moving.batches import batch_pages
from kvc2.tiers.base import PageShape
from kvc2.tiers.disk.batch import WriteBatch, Writing
from kvc2.tiers.disk.catalogue import SLACK_BYTES_MIN, Catalogue, Change, Full
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.slab_file import Files, SlabFiles
from kvc2.tiers.disk.tier import Outcome
from kvc2.tiers.pools import LayoutPools
from tests.doubles.caches import MIB, is_slab, running
from tests.doubles.stand_in import StandIn, prompt


class OneBadPart(Files):
    """The first write fails at once; the others take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.ended = 0
        self._lock = threading.Lock()

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not is_slab(fd):
            return super().write(fd, buffers, offset)
        with self._lock:
            self.begun += 1
            first = self.begun == 1
        if first:
            raise OSError(errno.EIO, "the first part")
        threading.Event().wait(0.05)
        put = super().write(fd, buffers, offset)
        with self._lock:
            self.ended += 1
        return put


def test_a_failed_batch_is_answered_when_none_of_its_parts_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc2.tiers.disk.batch.WRITE_PART_BYTES", 2 * 8192)
    files = OneBadPart()

    async def run() -> None:
        async with running(tmp_path, files=files) as cache:
            outcomes: list[tuple[bool, int]] = []
            disk = cache._pools.tiers.disks[0]
            assert disk is not None
            finish = disk.finish

            def noted(pool: DiskPool | None = None, writing: Writing | None = None) -> Outcome:
                outcome = finish(pool, writing)
                outcomes.append((outcome.written, files.begun - files.ended))
                return outcome

            disk.finish = noted  # type: ignore[method-assign]
            await StandIn(cache, 32).ask(prompt(1, 16))
            await cache.flush(10)
            assert files.ended > 1
            assert outcomes[0] == (False, 1)  # the one that failed never ended

    asyncio.run(run())


class Log:
    """An event that is never set, and files: what each was asked, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self._lock = threading.Lock()

    def note(self, name: str, value: float) -> None:
        with self._lock:
            self.calls.append((name, value))

    def wait(self, timeout: float) -> bool:
        self.note("wait", timeout)
        return False


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_each_part_of_a_batch_waits_for_loads_before_it_is_written_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr("kvc2.tiers.disk.batch.WRITE_PART_BYTES", 2 * 8192)
    log = Log()

    class Noted(Files):
        def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if is_slab(fd):
                log.note("write", offset)
            return super().write(fd, buffers, offset)

    async def run() -> None:
        async with running(tmp_path, files=Noted()) as cache:
            disk = cache._pools.tiers.disks[0]
            assert disk is not None
            begin = disk.begin

            def with_a_load(batch: WriteBatch, before: Writing | None) -> Writing:
                calm = cast(threading.Event, log)
                return begin(replace(batch, calm=calm, patience_s=patience_s), before)

            disk.begin = with_a_load  # type: ignore[method-assign]
            await StandIn(cache, 32).ask(prompt(1, 16))
            assert (await cache.flush(10)).durable_blocks == 16

    asyncio.run(run())
    names = [name for name, _ in log.calls]
    assert names.count("write") > 1
    for end in range(len(names)):
        assert names[:end].count("write") <= names[:end].count("wait")
    waits = [value for name, value in log.calls if name == "wait"]
    assert all(0 < each <= 60 if patience_s else each == 0 for each in waits)


def test_while_a_load_is_under_way_writes_are_told_so(tmp_path: Path) -> None:
    seen: list[bool] = []

    async def run() -> None:
        class Watched(Files):
            def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
                seen.append(cache._mover._calm.is_set())
                return super().read(fd, buffers, offset)

        async with running(tmp_path, files=Watched()) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 16))
            await cache.flush(10)
            for tier in ("gpu", "cpu"):
                await cache.evict(tier, 0)
            seen.clear()
            await engine.ask(prompt(1, 16))
            assert seen
            assert not any(seen)
            assert cache._mover._calm.is_set()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("cpu", "disk", "pages"),
    [
        (1000, 1000, 32),  # of 1 MiB
        (10_000, 8192, 128),
        (10_000, 2048, 64),
        (200, 100_000, 25),  # a small arena isn't pinned by two batches
        (10_000, 80, 10),  # nor a small disk kept free for two
        (4, 4, 1),
    ],
)
def test_a_batch_is_large_only_where_that_is_little_of_both_tiers(
    cpu: int, disk: int, pages: int
) -> None:
    assert batch_pages(cpu, disk, MIB) == pages


def test_an_eviction_is_answered_when_its_deletes_are_committed(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 32).ask(prompt(1, 8))
            assert (await cache.flush(10)).durable_blocks == 8
            disk = cache._pools.tiers.disks[0]
            assert disk is not None
            (number,) = disk.catalogue.layouts
            assert disk.catalogue.records(number).pages.size == 8
            assert (await cache.evict("disk", 0)).evicted_blocks == 8
            assert disk.catalogue.records(number).pages.size == 0

    asyncio.run(run())


@pytest.mark.parametrize("failing", [0, 3], ids=["sound", "every-third-commit-fails"])
def test_a_page_is_planned_only_after_its_delete_is_committed(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc2.moving.turns.RETRY_S", 0.0)
    recorded: set[int] = set()  # pages with a committed record
    reused = commits = 0

    async def run() -> None:
        nonlocal reused
        async with running(tmp_path, cpu_bytes=2 * MIB, disk_bytes=4 * MIB) as cache:
            disk, mover = cache._pools.tiers.disks[0], cache._mover
            assert disk is not None
            commit, write = disk.catalogue.commit, mover.write
            ever: set[int] = set()

            def sometimes(change: Change) -> None:
                nonlocal commits
                commits += 1
                if failing and commits % failing == 0:
                    raise Full("injected")
                commit(change)
                for arrays in change.deletes.values():
                    recorded.difference_update(np.concatenate(arrays).tolist())
                keys = b"".join(key for key, _ in change.inserts)
                recorded.update(np.frombuffer(keys, ">u4")[1::2].tolist())

            async def judged(
                pools: LayoutPools, transfers: Sequence[_core.Transfer], *, patience_s: float
            ) -> Outcome:
                nonlocal reused
                for transfer in transfers:
                    planned = set(transfer.target_pages.tolist())
                    assert not planned & recorded
                    reused += len(planned & ever)
                    ever.update(planned)
                return await write(pools, transfers, patience_s=patience_s)

            monkeypatch.setattr(disk.catalogue, "commit", sometimes)
            monkeypatch.setattr(mover, "write", judged)
            engine = StandIn(cache, 64)
            for seed in range(30):
                await engine.ask(prompt(seed, 32))
                await cache.flush(10)
            cache.index.check()
            assert reused > 0
            assert cache._metrics.values()["faults_total{kind=internal_error}"] == 0

    asyncio.run(run())

    async def again() -> None:
        async with running(tmp_path, disk_bytes=4 * MIB) as cache:
            engine = StandIn(cache, 64)
            for seed in range(30):
                await engine.ask(prompt(seed, 32))
            for kind in ("corrupt_block", "foreign_block", "stale_page"):
                assert cache._metrics.values()[f"faults_total{{kind={kind}}}"] == 0

    asyncio.run(again())


def test_generations_rise_over_restarts(tmp_path: Path) -> None:
    """A page that an earlier run wrote is never taken for one of this run, though nothing that the
    catalogue has reminds of it."""

    async def run(seed: int) -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 32).ask(prompt(seed, 4))
            assert (await cache.flush(60)).not_durable_blocks == {}

    async def forget() -> None:
        async with running(tmp_path) as cache:
            assert (await cache.evict("disk", 0)).evicted_blocks == 4

    def generations() -> set[int]:
        catalogue = Catalogue(tmp_path / "catalogue", SLACK_BYTES_MIN, read_only=True)
        (number,) = catalogue.layouts
        found = catalogue.records(number).records["generation"].tolist()
        catalogue.close()
        return set(found)

    asyncio.run(run(1))
    first = generations()
    asyncio.run(forget())
    asyncio.run(run(2))
    second = generations()
    assert len(second) == 4
    assert min(second) > max(first)


def test_the_name_of_a_deleted_slab_is_gone_for_good_before_its_room_is_taken(
    tmp_path: Path,
) -> None:
    """If it came back after a power cut, the start would not have room for the one in its place."""
    calls: list[tuple[str, Path]] = []

    class Noted(Files):
        def unlink(self, path: Path) -> None:
            super().unlink(path)
            calls.append(("unlink", path))

        def sync_folder(self, folder: Path) -> None:
            super().sync_folder(folder)
            calls.append(("sync", folder))

    shape = PageShape.of(layer_major(2, 8, segment_bytes=1024, page_size=4), 1 << 16)
    slabs = SlabFiles(tmp_path / "slabs", shape, np.empty(0, np.uint8), Noted())
    slabs.add(0)
    calls.clear()
    slabs.remove(0)
    assert calls == [("unlink", slabs.folder / "00000000.slab"), ("sync", slabs.folder)]


@pytest.mark.parametrize("records", [5000, 6000, 20_000])
def test_a_catalogue_without_a_free_page_is_opened(tmp_path: Path, records: int) -> None:
    """As a rebuild leaves it: more records than the slack holds, and then a commit."""
    folder = tmp_path / "catalogue"
    catalogue = Catalogue(folder, SLACK_BYTES_MIN)
    catalogue.make_room(16 << 20)
    rows = [(struct.pack(">II", 1, page), bytes(150)) for page in range(records)]
    catalogue.commit(Change(inserts=rows))
    catalogue.close()
    for start in range(2, 6):
        catalogue = Catalogue(folder, SLACK_BYTES_MIN)
        assert catalogue.start_count == start
        catalogue.close()
