"""The disk tier: one directory with a catalogue and slab files, within one budget of bytes.

    DIR/lock  DIR/catalogue/data.mdb  DIR/slabs/<layout digest>/NNNNNNNN.slab  DIR/recency/<number>
    DIR/live/<layout digest>  DIR/namespaces: what a lost catalogue is rebuilt by

Order of a batch: data, one fdatasync a file, generations by page (live.py), one catalogue
transaction (deletes of what was evicted for later batches, inserts of this one), and only then it
is acknowledged. While a batch is synced and committed the next one may be written (`begin`), no
more: it is synced when its own writes have ended and that commit is over. A page whose delete isn't
committed is never planned into (`DiskPool.settled`). Not here: which blocks go to disk.

`finish`, `grow`, `shrink` and `save_recency` run on one thread, the writer, in the order of their
batches; `begin` on any.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np

from kvc2 import _core, errors
from kvc2.config import DiskConfig
from kvc2.metrics import Metrics
from kvc2.namespace import of_era
from kvc2.tiers.base import U8, U32, PageShape
from kvc2.tiers.disk import budget, rebuild
from kvc2.tiers.disk.batch import WriteBatch, Writers, Writing
from kvc2.tiers.disk.beside import Added, Beside
from kvc2.tiers.disk.catalogue import Catalogue, Change, Full
from kvc2.tiers.disk.pool import READ_FAILED, DiskPool
from kvc2.tiers.disk.recency import Clocks, Recency
from kvc2.tiers.disk.records import Stored, encode, room_bytes
from kvc2.tiers.disk.slab_file import Files, SlabFiles

LOG = logging.getLogger(__name__)

SMALL_COMMIT = 64  # deletes of one transaction after a large one did not fit
FAULT_OF_STATUS = {
    READ_FAILED: "disk_read",
    _core.BLOCK_BAD_HEADER: "corrupt_block",
    _core.BLOCK_BAD_PAYLOAD: "corrupt_block",
    _core.BLOCK_OTHER: "foreign_block",
    _core.BLOCK_STALE: "stale_page",
}


@dataclass(frozen=True)
class Outcome:
    """written: all blocks of the batch are durable (or none). committed: the deletes are."""

    written: bool
    committed: bool


class DiskTier:
    """Raises StartRefused when another daemon has the directory or its format is unknown.
    `clocks`: of what is kept over a restart."""

    def __init__(
        self,
        path: Path,
        config: DiskConfig,
        arena: U8,
        metrics: Metrics,
        *,
        files: Files | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        self.path = path
        self.size_bytes = config.size_bytes
        self._relaxed = config.durability == "relaxed"
        self._unsynced: list[tuple[DiskPool, U32]] = []
        self._arena = arena
        self._metrics = metrics
        self._files = files or Files()
        self._writers = Writers(arena)
        self.pools: dict[bytes, DiskPool] = {}
        self._stored: dict[int, Stored] = {}
        self.catalogue: Catalogue
        self._beside: Beside
        make_folders(path)
        self._lock_fd = lock(path)
        try:
            self.recency = Recency(path / "recency", clocks or Clocks())
            self._open_catalogue()
            self._sync_folders()
            self._open_pools()
            self._begin_beside()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def pool(self, shape: PageShape) -> DiskPool:
        """The pool of a layout, made when it has none yet. A layout keeps the slab shape that it
        was first stored with."""
        if shape.layout_digest not in self.pools:
            number = self.catalogue.add_layout(shape)
            known = self.catalogue.layouts[number]
            folder = self.path / "slabs" / known.layout_digest.hex()
            slabs = SlabFiles(folder, known, self._arena, self._files)
            self._beside.add_layout(number, known)
            self.pools[shape.layout_digest] = DiskPool(number, known, slabs)
        return self.pools[shape.layout_digest]

    # ---- the budget ----

    def has_budget(self, shape: PageShape) -> bool:
        """Whether one more slab of this shape keeps slabs and catalogue within size_bytes."""
        return self._fits([*self._held(), shape])

    def could_hold(self, shape: PageShape) -> bool:
        """Whether the budget has room for a slab of this shape when all others are gone."""
        return self._fits([shape])

    def grow(self, pool: DiskPool) -> int | None:
        """One more slab file; its number, or None when there is no budget or no room."""
        if not self.has_budget(pool.shape):
            return None
        number = pool.slabs.next_number()
        try:
            self._reserve_records([*self._held(), pool.shape])
            self.catalogue.keep_room()
            self._beside.make_room(pool.number, (number + 1) * pool.shape.pages_per_slab)
            pool.slabs.add(number)
        except (OSError, lmdb.Error) as error:
            self._metrics.fault("disk_full")
            LOG.warning("disk: no room for a slab: %s", error)
            return None
        return number

    def shrink(self, pool: DiskPool, number: int) -> None:
        """Delete a slab's file; its pages are free and their deletes committed."""
        try:
            pool.slabs.remove(number)
        except OSError as error:
            self._metrics.fault("disk_write")
            LOG.warning("disk: deleting a slab: %s", error)

    def _fits(self, slabs: list[PageShape]) -> bool:
        tables, table_bytes = len(self.pools) + 1, self._beside.table_bytes
        found = budget.bytes_bound(
            self.path, self.size_bytes, slabs, tables=tables, table_bytes=table_bytes
        )
        return found <= self.size_bytes

    def _reserve_records(self, slabs: list[PageShape]) -> None:
        self.catalogue.make_room(sum(map(room_bytes, slabs)))

    def _held(self) -> list[PageShape]:
        """The shape of each slab that is there."""
        return [each.shape for each in list(self.pools.values()) for _ in each.slabs.numbers()]

    # ---- batches ----

    def begin(self, batch: WriteBatch, before: Writing | None = None) -> Writing:
        """Have a batch written, behind what was begun before; `finish` makes it durable. `before`:
        what may fail yet, and this batch with it, for its blocks may hang below those."""
        return self._writers.begin(batch, before)

    def finish(self, pool: DiskPool | None = None, writing: Writing | None = None) -> Outcome:
        """Commit a batch of the pool, and what the pool has dropped and moved, durable when this
        returns. Never raises for a fault of the disk: it is counted, and the outcome says what did
        not happen."""
        inserts = None if writing is None else self._write(writing)
        change, outcome, added = Change(), Outcome(False, False), None
        if pool is not None:
            change = pool.take()
        if writing is not None and inserts is not None:
            batch, change.inserts = writing.batch, inserts
            added = batch.pool.number, batch.pages, batch.records
        try:
            outcome = self.commit(change, added)
        finally:
            if pool is not None:
                pool.ended(committed=outcome.committed)
        if writing is not None:
            writing.durable = outcome.written
        if added is not None and not outcome.written:
            self._beside.take_back(added)
        return outcome

    def commit(self, change: Change, added: Added | None = None) -> Outcome:
        """One transaction, of blocks whose data is durable; else as `finish`."""
        written = added is not None
        try:
            if not self._beside.save(change, added):
                self._metrics.fault("disk_write")
            self.catalogue.commit(change)
            return Outcome(written, True)
        except Full as error:
            self._metrics.fault("disk_full")
            LOG.warning("disk: the catalogue is full: %s", error)
            committed = self._commit_small(change)
            return Outcome(written and committed and self._commit_again(change), committed)
        except (OSError, lmdb.Error) as error:
            self._metrics.fault("catalogue_error")
            LOG.warning("disk: catalogue: %s", error)
            return Outcome(False, False)

    def sync(self) -> bool:
        """All that was written is durable, also where batches are not synced one by one. False,
        and counted, when the disk did not; that stays unsynced, and this False, until its slab is
        gone."""
        unsynced, self._unsynced = self._unsynced, []
        try:
            for pool, pages in unsynced:
                held = np.isin(pages // pool.shape.pages_per_slab, pool.slabs.numbers())
                pool.slabs.sync(pages[held])
        except OSError as error:
            self._unsynced = [*unsynced, *self._unsynced]
            self._metrics.fault("disk_write")
            LOG.warning("disk: syncing: %s", error)
            return False
        return True

    def _write(self, writing: Writing) -> list[tuple[bytes, bytes]] | None:
        """The records of a batch whose data is durable; None: it is not, or must not count."""
        batch, before, writing.before = writing.batch, writing.before, None
        try:
            checksums = writing.written()
            if before is not None and not before.durable:
                return None
            if self._relaxed:
                self._unsynced.append((batch.pool, batch.pages))
            else:
                self._writers.sync(batch.pool.slabs, batch.pages)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._metrics.fault("disk_full" if full else "disk_write")
            LOG.warning("disk: writing %d pages: %s", batch.pages.size, error)
            return None
        number, records = batch.pool.number, batch.records
        return encode(number, batch.pages, records, records.generations, checksums)

    def _commit_small(self, change: Change) -> bool:
        """The deletes alone, few at a time: after a full disk LMDB needs a small commit before a
        large one passes, and deletes are what makes room."""
        try:
            if change.moves:
                self.catalogue.commit(Change(moves=change.moves))
                change.moves = {}
            for number, arrays in change.deletes.items():
                pages = np.concatenate(arrays)
                for start in range(0, pages.size, SMALL_COMMIT):
                    part = {number: [pages[start : start + SMALL_COMMIT]]}
                    self.catalogue.commit(Change(deletes=part))
        except (Full, lmdb.Error) as error:
            LOG.warning("disk: deletes are not committed: %s", error)
            return False
        return True

    def _commit_again(self, change: Change) -> bool:
        """The blocks alone, in the room that these or earlier deletes have made."""
        try:
            self.catalogue.let_go()
            self.catalogue.commit(Change(inserts=change.inserts))
        except (Full, lmdb.Error) as error:
            LOG.warning("disk: the catalogue is still full: %s", error)
            return False
        return True

    # ---- restart ----

    def stored(self, pool: DiskPool) -> Stored:
        """The records of a pool whose slabs are there; those of lost slabs, and those of a later
        version, are deleted here. To be asked once, at start."""
        stored = self._stored.pop(pool.number)
        slabs = stored.pages // pool.shape.pages_per_slab
        held = np.isin(slabs, np.array(pool.slabs.numbers(), np.uint32))
        _count_lost(self._metrics, slabs[~held], stored.unread)
        pool.drop(np.concatenate([stored.pages[~held], stored.unread]))
        if not pool.settled:
            self.finish(pool)
        return stored.chosen(held)

    def _open_catalogue(self) -> None:
        """And all that lies beside it."""
        self.catalogue, self._stored = rebuild.open_catalogue(
            self.path, self.size_bytes, self._files, self._metrics
        )
        limit = budget.names_bytes(self.size_bytes)
        self._beside = Beside(self.path, self.catalogue, limit, self._files)

    def _begin_beside(self) -> None:
        saved = []
        try:
            for pool in self.pools.values():
                slabs = max(pool.slabs.numbers(), default=-1) + 1
                num_pages = slabs * pool.shape.pages_per_slab
                saved.append(self._beside.begin(pool.number, self._stored[pool.number], num_pages))
            saved.append(self._beside.save_names())
        except OSError as error:
            saved.append(False)
            LOG.warning("disk: beside the catalogue: %s", error)
        if not all(saved):
            self._metrics.fault("disk_write")

    def _sync_folders(self) -> None:
        """The names that lead to the catalogue are durable: LMDB syncs its file alone."""
        try:
            for folder in (self.catalogue.folder, self.path, self.path.parent):
                self._files.sync_folder(folder)
        except OSError as error:
            self.catalogue.close()
            raise errors.StartRefused(f"{self.path}: {error}") from error

    def _open_pools(self) -> None:
        shapes = list(self.catalogue.layouts.values())
        known = {shape.layout_digest.hex() for shape in shapes}
        for folder in (self.path / "slabs").iterdir():
            if folder.is_dir() and folder.name not in known:
                shutil.rmtree(folder)  # nothing names what lies there
        for shape in shapes:
            pool = self.pool(shape)
            for number, path in pool.slabs.stored().items():
                self._open_slab(pool, number, path)
        self._beside.drop_unknown()
        self._reserve_records(self._held())
        with suppress(OSError):  # somebody else has filled the file system
            self.catalogue.keep_room()

    def _open_slab(self, pool: DiskPool, number: int, path: Path) -> None:
        """A short file isn't opened, and so its records are dropped; nor is one over the budget."""
        whole = path.stat().st_size == pool.shape.slab_bytes
        if whole and self.has_budget(pool.shape):
            try:
                pool.slabs.add(number)
                return
            except OSError as error:
                LOG.warning("disk: %s: %s", path, error)
        path.unlink(missing_ok=True)

    def forget_namespaces(self, used: set[bytes]) -> None:
        """Drop the namespaces that no block of their era starts from. At start only."""
        eras = self.catalogue.eras
        unused = [
            name
            for name in self.catalogue.namespaces
            if of_era(name, eras.get(name, 0)) not in used
        ]
        for name in unused:
            self.catalogue.forget_namespace(name)

    def last_stamp(self) -> int:
        """The highest stamp that was written aside: this run's begin above it."""
        arrays = [self.recency.stamps(pool.number) for pool in self.pools.values()]
        return max((int(array.max()) for array in arrays if array.size), default=0)

    def save_recency(self, pool: DiskPool, stamps: U32, lifetimes: U32) -> None:
        """Write stamps and lifetimes of the pool's pages aside."""
        self.recency.save(pool.number, stamps, lifetimes)

    def close(self) -> None:
        self._writers.close()
        for pool in self.pools.values():
            pool.slabs.close()
        self._beside.close()
        self.catalogue.close()
        os.close(self._lock_fd)


def _count_lost(metrics: Metrics, slabs: U32, unread: U32) -> None:
    """What a start finds records of and can't take: slabs of blocks, pages of records."""
    if slabs.size:
        metrics.fault("lost_slab", np.unique(slabs).size)
        LOG.warning("disk: %d blocks lay in slabs that are gone", slabs.size)
    if unread.size:
        metrics.fault("restore_refused", unread.size)
        LOG.warning("disk: %d records say what this version doesn't know", unread.size)


def make_folders(path: Path) -> None:
    """The tier's folders, where they aren't there yet. Raises StartRefused."""
    try:
        for each in (path, *(path / name for name in ("slabs", "recency", "live"))):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise errors.StartRefused(f"disk.path: {each}: {error.strerror}") from error


def lock(path: Path) -> int:
    """Be the one process that has the directory, until this file is closed. Raises Served."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise errors.Served(f"{path}: another daemon serves this directory") from error
    return fd
