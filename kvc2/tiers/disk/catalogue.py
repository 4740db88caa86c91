"""The disk's catalogue: which block lies in which page, in LMDB, one transaction a batch.

A block exists on disk only if its record is committed. Tables: `meta` (format version, start
count, eras of invalidated namespaces), `layouts` (digest -> shape), `namespaces` (32 bytes -> page
size, key mode, identity; never a secret), `blocks` ((layout number, page) -> record). Keyed by
page, so a page has at most one record whatever happens. Not here: what a record says (records.py),
the bytes of pages (slab_file.py).

One thread at a time commits to a Catalogue (`add_layout` and `add_namespace` may be called from
another), and nothing forks after it is open.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import numpy as np

from kvc2 import errors
from kvc2.layout import ALIGNMENT, HEADER_BYTES, check_page_size
from kvc2.tiers.base import U32, PageShape
from kvc2.tiers.disk.lmdb_file import PAGE_BYTES, Damaged, check_file
from kvc2.tiers.disk.records import KEY, NamespaceEntry, Stored, decode, keys_of

LOG = logging.getLogger(__name__)

FORMAT_VERSION = 2
FORMATS = (1, FORMAT_VERSION)  # that are read; a start makes each of them the last one
DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
LOCK_FILE_BYTES = 8192  # as LMDB makes it for its 126 readers
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
LAYOUT = struct.Struct("<IIQQQI")  # number, page_size, payload, page and slab bytes, pages a slab
START = struct.Struct("<Q")
SLACK_BYTES_MIN = 1 << 20  # namespaces, free lists and the copies that a transaction makes
ERA_PREFIX = b"era:"  # of the key in `meta`; a namespace's 32 bytes follow
# Entries of about 60 bytes, within the slack. They are never dropped: a record of an earlier era
# may still be there.
ERAS_MAX = 4096
BROKEN = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.IncompatibleError,
    lmdb.BadTxnError,
    lmdb.BadRslotError,
    lmdb.CursorFullError,
    lmdb.NotFoundError,  # a table that every start makes
)
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h


class Full(Exception):
    """The transaction did not fit; nothing of it happened."""


@dataclass
class Change:
    """What one transaction does, in this order: moves, deletes, then the rest."""

    moves: dict[int, list[tuple[U32, U32]]] = field(default_factory=dict)  # pages from, to
    deletes: dict[int, list[U32]] = field(default_factory=dict)  # pages by layout number
    inserts: list[tuple[bytes, bytes]] = field(default_factory=list)  # of records.encode


class Catalogue:
    """Raises Damaged or StartRefused at open; `slack_bytes` bounds what is beside the records.
    `read_only`: nothing is made or changed, this is no start, and nothing may be committed.
    `starts`: of the directory before, where the catalogue itself may not know. `format`: as it was
    found; the start's own transaction makes it the present one, whole or not at all."""

    def __init__(
        self, folder: Path, slack_bytes: int, *, read_only: bool = False, starts: int = 0
    ) -> None:
        self.folder = folder
        self.revision = 0  # of namespaces and eras: one more at each change
        self._read_only = read_only
        self._slack_bytes = max(slack_bytes, SLACK_BYTES_MIN)
        self._room_bytes = 0
        self._new_layouts: dict[int, PageShape] = {}
        self._new_namespaces: dict[bytes, NamespaceEntry] = {}
        self._gone_namespaces: set[bytes] = set()
        self._new_eras: dict[bytes, int] = {}
        if not read_only:
            folder.mkdir(mode=0o700, exist_ok=True)
            _allocate_locks(folder / LOCK_FILE)
        check_file(folder / DATA_FILE)
        try:
            self._open()
            self.start_count = self._starts() if read_only else self._begin(starts)
            self.layouts = self._layouts()
            self.namespaces = self._namespaces()
            self.eras = self._eras()
        except errors.StartRefused:
            self._env.close()
            raise
        except (*BROKEN, struct.error) as error:
            raise Damaged(str(error)) from error
        except lmdb.Error as error:
            raise errors.StartRefused(f"{folder}: {error}") from error

    def _open(self) -> None:
        # What is there may be of more slabs than are known yet, without a free page (after a
        # rebuild), and this start is to be committed: `make_room` sets the bound.
        data = self.folder / DATA_FILE
        there = data.stat().st_size if data.exists() else 0
        self._env = lmdb.open(
            str(self.folder),
            map_size=self.bytes_max + there,
            max_dbs=4,
            mode=0o600,
            writemap=False,
            sync=True,
            metasync=True,
            readonly=self._read_only,
            create=not self._read_only,
            lock=not self._read_only,  # who only reads has the directory to itself
        )
        self._meta, self._layout_table, self._namespace_table, self._blocks = (
            self._env.open_db(name, create=not self._read_only)
            for name in (b"meta", b"layouts", b"namespaces", b"blocks")
        )

    def _begin(self, starts: int) -> int:
        """Check the format and commit one more start: generations of this run are new ones, and
        from here on older versions refuse the directory."""
        with self._env.begin(db=self._meta, write=True) as txn:
            self.format = check_format(self.folder, txn)
            if self.format != FORMAT_VERSION:  # a plain block's record is the same in both
                count = txn.stat(self._blocks)["entries"]
                told = self.folder, self.format, FORMAT_VERSION, count
                LOG.warning("disk: %s: from format %d to %d with this start, %d records", *told)
            known = START.unpack(txn.get(b"starts", START.pack(0)))[0]
            count = max(known, starts) + 1
            txn.put(b"format", START.pack(FORMAT_VERSION))
            txn.put(b"starts", START.pack(count))
        return int(count)

    def _starts(self) -> int:
        with self._env.begin(db=self._meta) as txn:
            self.format = check_format(self.folder, txn)
            return int(START.unpack(txn.get(b"starts", START.pack(0)))[0])

    def _layouts(self) -> dict[int, PageShape]:
        with self._env.begin(db=self._layout_table) as txn:
            found = {}
            for digest, value in txn.cursor():
                number, *numbers = LAYOUT.unpack(value)
                shape = PageShape(digest, *numbers)
                check_shape(shape)
                found[number] = shape
        return found

    def _namespaces(self) -> dict[bytes, NamespaceEntry]:
        with self._env.begin(db=self._namespace_table) as txn:
            return {key: _namespace(value) for key, value in txn.cursor()}

    def _eras(self) -> dict[bytes, int]:
        with self._env.begin(db=self._meta) as txn:
            cursor = txn.cursor()
            rows = list(cursor.iternext()) if cursor.set_range(ERA_PREFIX) else []
        return {
            key.removeprefix(ERA_PREFIX): START.unpack(value)[0]
            for key, value in rows
            if key.startswith(ERA_PREFIX)
        }

    @property
    def bytes_max(self) -> int:
        """What the catalogue's files may come to, at most (LMDB's map is bounded by it)."""
        size = self._slack_bytes + self._room_bytes
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    def make_room(self, room: int) -> None:
        """Bytes for the records of all slabs (`room_bytes` of each): moves the bound of the map."""
        self._room_bytes = room
        self._env.set_mapsize(self.bytes_max)

    def keep_room(self) -> None:
        """Have the file system keep that room: while somebody else fills it, what is stored in
        slabs that are there is still committed. OSError: it has none. One that copies on write, or
        reserves nothing, promises nothing."""
        fd = os.open(self.folder / DATA_FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, self.bytes_max):
                error = ctypes.get_errno()
                if error not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
                    raise OSError(error, os.strerror(error))
        finally:
            os.close(fd)

    def add_layout(self, shape: PageShape) -> int:
        """The number of a layout; a new one is committed with the next change."""
        for number, known in self.layouts.items():
            if known.layout_digest == shape.layout_digest:
                return number
        number = max(self.layouts, default=0) + 1
        self.adopt_layout(number, shape)
        return number

    def adopt_layout(self, number: int, shape: PageShape) -> None:
        """Give a layout the number that it had before. To be committed with the next change."""
        self.layouts[number] = self._new_layouts[number] = shape

    def add_namespace(self, name: bytes, entry: NamespaceEntry) -> bool:
        """To be committed with the next change. False, and not stored, when namespaces would fill
        more than half of the slack: LMDB itself needs the rest."""
        if name in self.namespaces:
            return True
        used = sum(len(each.identity) + PAGE_BYTES // 8 for each in self.namespaces.values())
        if used + len(entry.identity) + PAGE_BYTES > self._slack_bytes // 2:
            return False
        self.namespaces[name] = self._new_namespaces[name] = entry
        self._gone_namespaces.discard(name)
        self.revision += 1
        return True

    def forget_namespace(self, name: bytes) -> None:
        """It holds no block any more; goes with the next change."""
        if self.namespaces.pop(name, None) is not None:
            self._new_namespaces.pop(name, None)
            self._gone_namespaces.add(name)
            self.revision += 1

    def begin_era(self, name: bytes) -> None:
        """What was stored of the namespace so far is of an earlier era, also after a restart. To be
        committed with the next change, and so before anything of the new era. Raises LimitReached.
        """
        if name not in self.eras and len(self.eras) >= ERAS_MAX:
            raise errors.LimitReached("invalidated namespaces", ERAS_MAX, "are remembered already")
        self.raise_era(name, self.eras.get(name, 0) + 1)

    def raise_era(self, name: bytes, era: int) -> None:
        """The namespace's era is at least this one. To be committed with the next change."""
        if era > self.eras.get(name, 0):
            self.eras[name] = self._new_eras[name] = era
            self.revision += 1

    def records(self, number: int) -> Stored:
        """All records of a layout. Raises Damaged when LMDB finds its file broken."""
        prefix = struct.pack(">I", number)
        with _damage(), self._env.begin(db=self._blocks) as txn:
            cursor = txn.cursor()
            items = cursor.iternext() if cursor.set_range(prefix) else iter(())
            rows = [(key, value) for key, value in items if key[:4] == prefix]
        keys, values = [key for key, _ in rows], [value for _, value in rows]
        return decode(keys, values, self.layouts[number].page_size)

    def unknown(self) -> dict[int, U32]:
        """Pages of records by layout number, of layouts that nothing describes: a restart doesn't
        see them. Raises Damaged."""
        found: dict[int, list[int]] = {}
        with _damage(), self._env.begin(db=self._blocks) as txn:
            cursor = txn.cursor()
            more = cursor.first()
            while more:
                key = bytes(cursor.key())
                if len(key) != KEY.itemsize:
                    raise Damaged("a record of another length")
                number, page = struct.unpack(">II", key)
                if number in self.layouts:
                    more = cursor.set_range(struct.pack(">I", number + 1))
                    continue
                found.setdefault(number, []).append(page)
                more = cursor.next()
        return {number: np.array(pages, np.uint32) for number, pages in found.items()}

    def commit(self, change: Change) -> None:
        """All of it, durable when this returns, or nothing: Full, or lmdb.Error for other faults.
        Layouts, namespaces and eras that are new since the last commit go along."""
        layouts, namespaces = dict(self._new_layouts), dict(self._new_namespaces)
        eras, gone = dict(self._new_eras), set(self._gone_namespaces)
        alone = layouts or namespaces or eras or gone
        if not (change.moves or change.deletes or change.inserts or alone):
            return
        with self._filling(), self._env.begin(write=True) as txn:
            for number, pairs in change.moves.items():
                for sources, targets in pairs:
                    _move(txn, self._blocks, keys_of(number, sources), keys_of(number, targets))
            for number, arrays in change.deletes.items():
                for pages in arrays:
                    _delete(txn, self._blocks, keys_of(number, pages))
            for number, shape in layouts.items():
                txn.put(shape.layout_digest, _pack(number, shape), db=self._layout_table)
            _delete(txn, self._namespace_table, gone)
            for name, entry in namespaces.items():
                value = struct.pack("<I", entry.word) + entry.identity
                txn.put(name, value, db=self._namespace_table)
            for name, era in eras.items():
                txn.put(ERA_PREFIX + name, START.pack(era), db=self._meta)
            if change.inserts:
                txn.cursor(self._blocks).putmulti(change.inserts)
        for number in layouts:
            del self._new_layouts[number]
        for name in namespaces:
            self._new_namespaces.pop(name, None)
        self._gone_namespaces -= gone
        for name, era in eras.items():
            if self._new_eras[name] == era:
                del self._new_eras[name]
        self._keep_whole()

    def let_go(self) -> None:
        """What the last commit freed can be used by the next one: LMDB keeps it until one more has
        passed. Full or lmdb.Error: not now."""
        with self._filling(), self._env.begin(db=self._meta, write=True) as txn:
            txn.put(b"format", START.pack(FORMAT_VERSION))
        self._keep_whole()

    def file_bytes(self) -> int:
        return (self.folder / DATA_FILE).stat().st_size

    def close(self) -> None:
        self._env.close()

    @contextmanager
    def _filling(self) -> Iterator[None]:
        """A transaction that may not fit."""
        try:
            yield
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            self._env.reader_check()  # what a dead reader may see is kept until somebody asks
            raise Full(str(error)) from error

    def _keep_whole(self) -> None:
        """LMDB may end its file before a page that it allocated and gave up in one transaction; the
        check at the next start would take that for a truncated file."""
        path = self.folder / DATA_FILE
        needed = (self._env.info()["last_pgno"] + 1) * PAGE_BYTES
        if path.stat().st_size < needed:
            os.truncate(path, needed)


def check_format(folder: Path, txn: lmdb.Transaction) -> int:
    """The one that the catalogue has, the present one if none yet. Raises StartRefused."""
    found = int.from_bytes(txn.get(b"format", START.pack(FORMAT_VERSION)), "little")
    if found not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise errors.StartRefused(
            f"{folder}: format {found}, this version reads {known};"
            " serve it with the version that wrote it, or give another disk.path"
        )
    return found


def _allocate_locks(path: Path) -> None:
    """LMDB maps this file and writes to it: in a full file system a hole there is SIGBUS. Raises
    StartRefused."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, LOCK_FILE_BYTES)
    except OSError as error:
        raise errors.StartRefused(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)


@contextmanager
def _damage() -> Iterator[None]:
    """What LMDB can't read is damage."""
    try:
        yield
    except lmdb.Error as error:
        raise Damaged(str(error)) from error


def check_shape(shape: PageShape) -> None:
    """Raises Damaged unless the numbers are those of one layout: LMDB has no checksums, and reads
    and writes of arena and slabs go by them."""
    _checked_page_size(shape.page_size)
    padded = -(-shape.payload_bytes // ALIGNMENT) * ALIGNMENT
    pages = shape.slab_bytes // shape.page_bytes if shape.page_bytes else 0
    if (
        len(shape.layout_digest) != 32
        or not shape.payload_bytes
        or shape.page_bytes != HEADER_BYTES + padded
        or shape.pages_per_slab != pages
        or not pages
    ):
        raise Damaged(f"a layout that can't be: {shape}")


def _namespace(value: bytes) -> NamespaceEntry:
    """Raises Damaged."""
    identity = value[4:]
    entry = NamespaceEntry.of(struct.unpack_from("<I", value)[0], identity)
    _checked_page_size(entry.page_size)
    try:
        sound = isinstance(json.loads(identity), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise Damaged(f"a namespace whose identity is no JSON object: {identity[:64]!r}")
    return entry


def _checked_page_size(page_size: int) -> None:
    try:
        check_page_size("page_size", page_size)
    except errors.InvalidRequest as error:
        raise Damaged(str(error)) from error


def _pack(number: int, shape: PageShape) -> bytes:
    return LAYOUT.pack(
        number,
        shape.page_size,
        shape.payload_bytes,
        shape.page_bytes,
        shape.slab_bytes,
        shape.pages_per_slab,
    )


def _move(
    txn: lmdb.Transaction, table: lmdb._Database, sources: list[bytes], targets: list[bytes]
) -> None:
    """Records keep what they say of a block; the page that it lies in is their key."""
    found = (
        (target, txn.pop(source, db=table)) for source, target in zip(sources, targets, strict=True)
    )
    txn.cursor(table).putmulti([(target, value) for target, value in found if value is not None])


def _delete(txn: lmdb.Transaction, table: lmdb._Database, keys: Iterable[bytes]) -> None:
    deque((txn.delete(key, db=table) for key in keys), maxlen=0)
