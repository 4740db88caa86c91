"""Two batches to the disk at a time: each is durable by its own sync and commit, in their order."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from kvc2 import _core
from kvc2.cache.cache import Cache
from kvc2.moving.mover import Mover
from kvc2.tiers.base import PageShape
from kvc2.tiers.disk.batch import WriteBatch, Writing
from kvc2.tiers.disk.catalogue import Catalogue, Change
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.slab_file import Files, SlabFiles
from kvc2.tiers.disk.tier import DiskTier, Outcome
from kvc2.tiers.pools import LayoutOnDisk
from tests.doubles.caches import MIB, faults, is_slab, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BATCH_PAGES = 4
BLOCKS = 16
LIMIT_S = 20.0  # for what comes at once, or never


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvc2.moving.batches.batch_pages", lambda *_: BATCH_PAGES)
    monkeypatch.setattr("kvc2.moving.turns.RETRY_S", 0.0)


def pages_of(change: Change) -> list[int]:
    """Pages whose records it inserts."""
    keys = b"".join(key for key, _ in change.inserts)
    return np.frombuffer(keys, ">u4")[1::2].tolist()


@dataclass
class Events:
    """What happened to slabs and catalogue, in order, from any thread."""

    log: list[tuple[str, object]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, value: object) -> None:
        with self.lock:
            self.log.append((what, value))

    def unsynced(self) -> list[int]:
        """Pages whose records were committed without a sync of their own: one of their file that
        began when they were written, and ended before the commit began."""
        dirty: set[int] = set()
        syncing: dict[object, set[int]] = {}
        found = []
        for what, value in self.log:
            if what == "written":
                dirty.add(cast(int, value))
            elif what == "syncing":
                syncing[value] = set(dirty)
            elif what == "synced":
                dirty -= syncing.pop(value)
            elif what == "committing":
                found += [page for page in cast(list[int], value) if page in dirty]
        return found


class Noted(Files):
    """Tests put what waits or fails into `before_write` and `after_write`, which are called with
    the first page that is written, and `before_sync`, with the number of the call."""

    def __init__(self, events: Events, page_bytes: int = 8192) -> None:
        super().__init__()
        self.events, self.page_bytes = events, page_bytes
        self.syncs = 0
        self.before_write: Callable[[int], None] = lambda _: None
        self.after_write: Callable[[int], None] = lambda _: None
        self.before_sync: Callable[[int], None] = lambda _: None

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not is_slab(fd):
            return super().write(fd, buffers, offset)
        first = offset // self.page_bytes
        self.before_write(first)
        put = super().write(fd, buffers, offset)
        for page in range(first, (offset + put) // self.page_bytes):
            self.events.note("written", page)
        self.after_write(first)
        return put

    def sync(self, fd: int) -> None:
        if not is_slab(fd):
            super().sync(fd)
            return
        with self.events.lock:
            self.syncs += 1
            number = self.syncs
        self.events.note("syncing", number)
        self.before_sync(number)
        super().sync(fd)
        self.events.note("synced", number)


@contextmanager
def committing(monkeypatch: pytest.MonkeyPatch, events: Events) -> Iterator[None]:
    """Commits of batches are noted too."""
    commit = Catalogue.commit

    def noted(self: Catalogue, change: Change) -> None:
        if change.inserts:
            events.note("committing", pages_of(change))
        commit(self, change)
        if change.inserts:
            events.note("committed", pages_of(change))

    with monkeypatch.context() as patched:
        patched.setattr(Catalogue, "commit", noted)
        yield


def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Pages of each batch, in the order in which they are begun."""
    found: list[list[int]] = []
    begin = DiskTier.begin

    def noted(self: DiskTier, batch: WriteBatch, before: Writing | None = None) -> Writing:
        found.append(batch.pages.tolist())
        return begin(self, batch, before)

    monkeypatch.setattr(DiskTier, "begin", noted)
    return found


async def stored(folder: Path, files: Files) -> None:
    """A prompt goes to the disk in batches, in pages 0, 1, ..."""
    async with running(folder, files=files) as cache:
        await StandIn(cache, 32).ask(prompt(1, BLOCKS))
        assert (await cache.flush(60)).durable_blocks == BLOCKS


def test_the_next_batch_is_written_while_one_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the sync of one does not count for the other."""
    events, second, came = Events(), threading.Event(), []
    files = Noted(events)

    def before_sync(number: int) -> None:
        if number == 1:
            came.append(second.wait(LIMIT_S))

    files.before_sync = before_sync
    files.after_write = lambda page: second.set() if page == BATCH_PAGES else None
    with committing(monkeypatch, events):
        asyncio.run(stored(tmp_path, files))
    assert came == [True]
    assert events.unsynced() == []


def test_what_is_written_first_is_not_committed_before_what_was_begun_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, second, came = Events(), threading.Event(), []
    files, batches = Noted(events), begun(monkeypatch)

    def before_write(page: int) -> None:
        if page == 0:
            came.append(second.wait(LIMIT_S))

    files.before_write = before_write
    files.after_write = lambda page: second.set() if page == BATCH_PAGES else None
    with committing(monkeypatch, events):
        asyncio.run(stored(tmp_path, files))
    assert came == [True]
    assert [pages for what, pages in events.log if what == "committed"] == batches
    assert events.unsynced() == []


def test_two_batches_are_under_way_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, write = 0, 0, Mover.write

    async def counted(
        self: Mover,
        pools: LayoutOnDisk,
        transfers: Sequence[_core.Transfer] = (),
        *,
        patience_s: float = 0.0,
    ) -> Outcome:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        outcome = await write(self, pools, transfers, patience_s=patience_s)
        under_way -= 1
        return outcome

    async def run() -> None:
        async with running(tmp_path) as cache:
            engines = [StandIn(cache, 64), StandIn(cache, 64, segment_bytes=4096)]
            for seed in range(4):
                for each in engines:
                    await each.ask(prompt(seed, BLOCKS))
            await cache.flush(60)

    monkeypatch.setattr(Mover, "write", counted)
    asyncio.run(run())
    assert (under_way, most) == (0, 2)


def test_no_page_is_planned_into_while_its_delete_is_being_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are evicted while a batch is committed: with the next one's commit they are gone."""
    recorded: set[int] = set()  # pages with a committed record
    ever: set[int] = set()
    wrong: list[int] = []
    commit, begin = Catalogue.commit, DiskTier.begin
    reused = 0
    loop: asyncio.AbstractEventLoop
    cache: Cache

    async def evict() -> None:
        (pools,) = cache._pools.on_disk()
        pools.drop_records(cache.index.evict(pools.disk.id, 3))

    def with_evictions(self: Catalogue, change: Change) -> None:
        if change.inserts:
            asyncio.run_coroutine_threadsafe(evict(), loop).result(LIMIT_S)
        commit(self, change)
        for arrays in change.deletes.values():
            recorded.difference_update(np.concatenate(arrays).tolist())
        recorded.update(pages_of(change))

    def judged(self: DiskTier, batch: WriteBatch, before: Writing | None = None) -> Writing:
        nonlocal reused
        wrong.extend(recorded.intersection(batch.pages.tolist()))
        reused += len(ever.intersection(batch.pages.tolist()))
        ever.update(batch.pages.tolist())
        return begin(self, batch, before)

    async def run() -> None:
        nonlocal loop, cache
        loop = asyncio.get_running_loop()
        async with running(tmp_path, cpu_bytes=2 * MIB, disk_bytes=4 * MIB) as cache:
            monkeypatch.setattr(Catalogue, "commit", with_evictions)
            monkeypatch.setattr(DiskTier, "begin", judged)
            engine = StandIn(cache, 64)
            for seed in range(24):
                await engine.ask(prompt(seed, 32))
                await cache.flush(60)
            cache.index.check()
            monkeypatch.setattr(Catalogue, "commit", commit)

    asyncio.run(run())
    assert wrong == []
    assert reused > 100


def test_what_a_transaction_has_taken_is_not_settled_before_it_is_committed() -> None:
    pool = DiskPool(7, cast(PageShape, None), cast(SlabFiles, None))
    first, second = np.array([1, 2], np.uint32), np.array([3], np.uint32)
    assert pool.settled
    pool.drop(first)
    assert not pool.settled
    assert pool.take().deletes == {7: [first]}
    assert not pool.settled
    pool.drop(second)
    pool.ended(committed=False)
    assert pool.take().deletes == {7: [first, second]}
    pool.moved(first, second)
    pool.ended(committed=True)
    assert not pool.settled  # what has come since waits for the next one
    assert pool.take() == Change(moves={7: [(first, second)]})
    assert not pool.settled
    pool.ended(committed=True)
    assert pool.settled


@pytest.mark.parametrize("where", ["write", "sync", "commit"])
def test_what_was_begun_after_a_batch_that_fails_is_not_committed_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its blocks may hang below those that failed. Both come with the next try."""
    events, batches = Events(), begun(monkeypatch)
    files, second = Noted(events), threading.Event()
    begin, commit, failed = DiskTier.begin, Catalogue.commit, []

    def tell(self: DiskTier, batch: WriteBatch, before: Writing | None = None) -> Writing:
        writing = begin(self, batch, before)
        if len(batches) == 2:
            second.set()
        return writing

    def fail_once(first: int) -> None:
        if first == (0 if where == "write" else 1) and not failed:
            failed.append(second.wait(LIMIT_S))
            raise OSError(errno.EIO, "injected")

    def commit_fails(self: Catalogue, change: Change) -> None:
        if change.inserts and not failed:
            failed.append(second.wait(LIMIT_S))
            raise OSError(errno.EIO, "injected")
        commit(self, change)

    if where == "commit":
        monkeypatch.setattr(Catalogue, "commit", commit_fails)
    elif where == "write":
        files.before_write = fail_once
    else:
        files.before_sync = fail_once
    monkeypatch.setattr(DiskTier, "begin", tell)

    async def run() -> None:
        async with running(tmp_path, files=files) as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            await cache.flush(60)
            assert (await cache.flush(60)).durable_blocks == BLOCKS
            cache.index.check()
        async with running(tmp_path) as cache:
            assert faults(cache, "restore_refused") == 0
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    with committing(monkeypatch, events):
        asyncio.run(run())
    assert failed == [True]
    committed = [pages for what, pages in events.log if what == "committed"]
    assert committed
    begun_later = batches[2:]
    assert all(pages in begun_later for pages in committed)
    assert events.unsynced() == []


def test_a_stop_waits_for_both(tmp_path: Path) -> None:
    files, gate = Noted(Events()), threading.Event()
    files.before_sync = lambda _: cast(None, gate.wait(LIMIT_S))

    async def run() -> None:
        async with running(tmp_path, files=files) as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            while len(cache._background.writer._batches) < 2:
                await asyncio.sleep(0)
            stopping = asyncio.create_task(cache._background.stop())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not stopping.done()
            gate.set()
            await stopping
            assert cache.index.counts().transfers == 0
            assert records(cache) == 2 * BATCH_PAGES
            cache._background.start()  # for the flush at the end

    asyncio.run(run())


def records(cache: Cache) -> int:
    (number,) = cache._pools.tiers.disks[0].catalogue.layouts
    return cache._pools.tiers.disks[0].catalogue.records(number).pages.size


def test_a_batch_has_its_patience_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits behind another batch has not waited for loads yet."""
    waits: list[float] = []

    class Load:
        def wait(self, timeout: float) -> bool:
            waits.append(timeout)
            return False

    now = [100.0]
    monkeypatch.setattr("kvc2.tiers.disk.batch.time.monotonic", lambda: now[0])
    none = np.empty(0, np.uint32)
    calm = cast(threading.Event, Load())
    batch = WriteBatch(
        cast(DiskPool, None), none, none.astype(np.uint64), cast(_core.Records, None), calm, 60.0
    )
    writing = Writing(batch, None)
    for now[0] in (200.0, 230.0, 300.0):
        writing.calm_down()
    assert waits == [60.0, 30.0, 0.0]
