"""Verifies the directory of a disk tier that no daemon serves: catalogue, slab files, every block.

What a start takes and a load verifies is asked of the same code (restart.py, DiskPool.verify); more
than a load does is one comparison: the record's checksum with the header's. Nothing is changed.
Not here: mending (repair.py), printing (kvc2/commands/check.py).
"""

from __future__ import annotations

import os
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvc2 import _core
from kvc2.namespace import of_era
from kvc2.tiers.base import U8, U32, PageShape
from kvc2.tiers.disk import live, names_file, rebuild, restart
from kvc2.tiers.disk.catalogue import DATA_FILE, SLACK_BYTES_MIN, Catalogue
from kvc2.tiers.disk.lmdb_file import Damaged
from kvc2.tiers.disk.pool import READ_FAILED, DiskPool
from kvc2.tiers.disk.records import NamespaceEntry, Stored
from kvc2.tiers.disk.slab_file import Files, SlabFiles, aligned
from kvc2.tiers.disk.tier import lock

# what is counted -> what it means
DAMAGE = {
    "catalogue": "the catalogue can't be read, or is not there: a start rebuilds it",
    "live_table": "tables of generations that can't be read: a start writes them anew",
    "namespaces": "the list of namespaces can't be read or lacks an Invalidate: the same",
    "unknown_layout": "records of a layout that the catalogue doesn't describe",
    "unread_record": "records that say what this version doesn't know: a start drops them",
    "forged_record": "records whose digest doesn't follow from their parent's and their tokens",
    "orphan_record": "records whose parent is neither a namespace nor a block that is there",
    "duplicate_record": "records of a block that another page holds",
    "lost_slab": "slab files that records name and that are not there, or not whole",
    "lost_block": "records of blocks in lost slabs",
    "orphan_slab": "slab files that nothing names, or too short to be one",
    "unreadable_block": "blocks that could not be read",
    "bad_header": "blocks whose header fails its checksum",
    "foreign_block": "sound blocks of another name than their record's",
    "stale_page": "blocks whose generation is not their record's",
    "bad_payload": "blocks whose payload fails its checksum",
    "other_payload": "sound blocks of another payload than their record's",
}
OF_RESULT = {
    _core.FORGED: "forged_record",
    _core.ORPHAN: "orphan_record",
    _core.CONFLICT: "duplicate_record",
}
OTHER_PAYLOAD = 254  # beside READ_FAILED and _core.BLOCK_*
OF_STATUS = {
    READ_FAILED: "unreadable_block",
    _core.BLOCK_BAD_HEADER: "bad_header",
    _core.BLOCK_OTHER: "foreign_block",
    _core.BLOCK_STALE: "stale_page",
    _core.BLOCK_BAD_PAYLOAD: "bad_payload",
    OTHER_PAYLOAD: "other_payload",
}
NAMED_MAX = 10  # blocks that a report names
PART_BYTES = 8 << 20  # of one read, and of each thread's memory
THREADS = 4  # reads of 8 MiB keep an NVMe disk busy; checksums need one or two of them
ERAS_MAX = 64  # of an invalidated namespace whose records may still be there
CHECKSUM = slice(_core.PAYLOAD_CHECKSUM_OFFSET, _core.PAYLOAD_CHECKSUM_OFFSET + 16)
Progress = Callable[[int, int], None]  # bytes verified, of so many


@dataclass(frozen=True)
class BadBlock:
    """A record that is damage, or whose block is; `page` is counted over all slabs."""

    kind: str
    digest: str
    slab: int
    page: int
    layout: str


@dataclass
class Report:
    """`damage`: counts by kind of DAMAGE. `dead_blocks` are of invalidated namespaces: the next
    start deletes their records. `bad`: by layout digest, pages and generations of all records that
    are damage or whose blocks are."""

    path: str
    format: int = 0  # not known
    layouts: int = 0
    namespaces: int = 0
    slabs: int = 0
    records: int = 0
    verified_blocks: int = 0
    verified_bytes: int = 0
    seconds: float = 0.0
    dead_blocks: int = 0
    unproven: int = 0
    rebuildable: int = 0
    damage: Counter[str] = field(default_factory=Counter)
    catalogue_error: str = ""
    blocks: list[BadBlock] = field(default_factory=list)
    bad: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.damage

    def add(self, kind: str, shape: PageShape, stored: Stored) -> None:
        """These records are damage of this kind."""
        self.damage[kind] += stored.pages.size
        rows = stored.records
        pairs = zip(stored.pages.tolist(), rows["generation"].tolist(), strict=True)
        self.bad.setdefault(shape.layout_digest, []).extend(pairs)
        for page, row in zip(stored.pages[:NAMED_MAX].tolist(), rows[:NAMED_MAX], strict=True):
            if len(self.blocks) < NAMED_MAX:
                slab = page // shape.pages_per_slab
                digest = bytes(row["digest"]).hex()
                layout = shape.layout_digest.hex()
                self.blocks.append(BadBlock(kind, digest, slab, page, layout))


@dataclass
class Part:
    """Pages that are verified in one go, with what the catalogue says of them."""

    pool: DiskPool
    stored: Stored
    records: _core.Records


def check(
    path: Path, progress: Progress = lambda done, total: None, *, files: Files | None = None
) -> Report:
    """Verify the directory whole; progress is told after each part. `files`: read-only ones. Raises
    Served when a daemon has it, StartRefused when its format is unknown. Memory: the records, as in
    a daemon, and 32 MiB or four pages."""
    report, begun = Report(str(path)), time.monotonic()
    held = lock(path)
    try:
        folder = path / "catalogue"
        if not rebuild.holds_data(folder):
            if rebuild.look(path).tables:
                _unreadable(path, Damaged(f"{folder / DATA_FILE}: it is not there"), report)
            else:
                _look_for_orphans(path, set(), report)
            return report
        try:
            catalogue = Catalogue(folder, SLACK_BYTES_MIN, read_only=True)
        except Damaged as error:
            _unreadable(path, error, report)
            return report
        try:
            _Checker(path, catalogue, report, files or Files(read_only=True)).run(progress)
        except Damaged as error:
            _unreadable(path, error, report)
        finally:
            catalogue.close()
    finally:
        report.seconds = time.monotonic() - begun
        os.close(held)
    return report


def _unreadable(path: Path, error: Damaged, report: Report) -> None:
    """What a start would go by instead."""
    report.damage = Counter({"catalogue": 1})
    report.catalogue_error = str(error)
    beside = rebuild.look(path)
    known = {digest.hex() for digest in beside.tables}
    _look_for_orphans(path, known, report)
    if beside.names is not None:
        counts = [np.count_nonzero(each.generations) for each in beside.tables.values()]
        report.rebuildable = int(sum(counts))


def _look_for_orphans(path: Path, known: set[str], report: Report) -> None:
    """Slab files of layouts that nothing describes."""
    folder = path / "slabs"
    for each in sorted(folder.iterdir()) if folder.is_dir() else []:
        if each.is_dir() and each.name not in known:
            found = sum(1 for file in each.iterdir() if file.is_file())
            if found:
                report.damage["orphan_slab"] += found


class _Checker:
    """One check of a directory whose catalogue could be opened."""

    def __init__(self, path: Path, catalogue: Catalogue, report: Report, files: Files) -> None:
        self._path = path
        self._files = files
        self._catalogue = catalogue
        self._report = report
        self._index = _core.Index()
        self._pools: list[tuple[int, DiskPool, Stored]] = []  # the index's number; what it has

    def run(self, progress: Progress) -> None:
        catalogue, report = self._catalogue, self._report
        report.format = catalogue.format
        report.layouts, report.namespaces = len(catalogue.layouts), len(catalogue.namespaces)
        names = restart.open_namespaces(self._index, catalogue)
        retired = self._open_retired(set(names))
        for pages in catalogue.unknown().values():
            report.damage["unknown_layout"] += pages.size
            report.records += pages.size
        for number, shape in catalogue.layouts.items():
            self._restore(number, shape)
        known = {shape.layout_digest.hex() for shape in catalogue.layouts.values()}
        _look_for_orphans(self._path, known, report)
        self._look_at_names()
        try:
            self._verify(retired, progress)
        finally:
            for _, pool, _ in self._pools:
                pool.slabs.close()

    def _open_retired(self, names: set[bytes]) -> set[bytes]:
        """Namespaces of ended eras: the records that hang on them are dead, no damage."""
        catalogue = self._catalogue
        sizes = {shape.page_size for shape in catalogue.layouts.values()}
        found = set()
        for name, era in catalogue.eras.items():
            unknown = NamespaceEntry(min(sizes, default=0), b"")
            entry = catalogue.namespaces.get(name, unknown)
            if name not in catalogue.namespaces and len(sizes) != 1:
                continue
            for each in range(max(0, era - ERAS_MAX), era):
                if (ended := of_era(name, each)) not in names:
                    self._index.open_namespace(ended, entry.page_size, opaque=entry.opaque)
                    found.add(ended)
        return found

    def _look_at_names(self) -> None:
        """The list of namespaces, where there is one."""
        path = self._path / "namespaces"
        if not path.exists():
            return
        names = names_file.read(path)
        eras = self._catalogue.eras.items()
        if names is None or any(names.eras.get(name, 0) < era for name, era in eras):
            self._report.damage["namespaces"] += 1

    # ---- slabs and records ----

    def _look_at_table(self, shape: PageShape, stored: Stored) -> None:
        """The generations that a rebuild goes by, where there are any."""
        path = self._path / "live" / shape.layout_digest.hex()
        found = live.read(path)
        generations = np.zeros(0, np.uint64) if found is None else found.generations
        if found is None and path.exists():
            self._report.damage["live_table"] += 1
        told = stored.pages < generations.size
        told[told] = generations[stored.pages[told]] == stored.records["generation"][told]
        self._report.unproven += int((~told).sum())

    def _restore(self, number: int, shape: PageShape) -> None:
        """A layout's slabs and records, as a start takes them; what it would not is damage."""
        stored = self._catalogue.records(number)
        self._report.records += stored.pages.size + stored.unread.size
        if stored.unread.size:
            self._report.damage["unread_record"] += stored.unread.size
        self._look_at_table(shape, stored)
        slabs = self._open_slabs(shape, stored)
        held = np.isin(stored.pages // shape.pages_per_slab, _numbers(slabs))
        if not held.all():
            lost = stored.pages[~held] // shape.pages_per_slab
            self._report.damage["lost_slab"] += np.unique(lost).size
            self._report.add("lost_block", shape, stored.chosen(~held))
        if slabs is None:
            return
        stored = stored.chosen(held)
        pool = restart.disk_pool(self._index, shape)
        restart.add_slabs(self._index, pool, slabs.numbers())
        result = restart.restore(self._index, pool, stored, np.empty(0, np.uint32))
        for code, kind in OF_RESULT.items():
            if (result == code).any():
                self._report.add(kind, shape, stored.chosen(result == code))
        there = stored.chosen(result == _core.RESTORED)
        self._pools.append((pool, DiskPool(number, shape, slabs), there))

    def _open_slabs(self, shape: PageShape, stored: Stored) -> SlabFiles | None:
        """The files that are whole."""
        folder = self._path / "slabs" / shape.layout_digest.hex()
        if not folder.is_dir():
            return None
        named = set(np.unique(stored.pages // shape.pages_per_slab).tolist())
        slabs = SlabFiles(folder, shape, np.empty(0, np.uint8), self._files)
        for number, path in slabs.stored().items():
            if path.stat().st_size == shape.slab_bytes:
                slabs.add(number)
            elif number not in named:
                self._report.damage["orphan_slab"] += 1
        self._report.slabs += len(slabs.numbers())
        return slabs

    # ---- blocks ----

    def _verify(self, retired: set[bytes], progress: Progress) -> None:
        """Read and verify what is there, a few parts at a time, each in memory of its own."""
        total = sum(there.pages.size * pool.shape.page_bytes for _, pool, there in self._pools)
        progress(0, total)
        part_bytes = max([PART_BYTES, *(pool.shape.page_bytes for _, pool, _ in self._pools)])
        idle: queue.SimpleQueue[U8] = queue.SimpleQueue()
        under_way: deque[Future[tuple[Part, U8]]] = deque()
        with ThreadPoolExecutor(THREADS, "kvc2-check") as threads:
            for _ in range(THREADS):
                idle.put(aligned(part_bytes))
            for part in self._parts():
                if len(under_way) == 2 * THREADS:
                    self._note(*under_way.popleft().result(), retired)
                    progress(self._report.verified_bytes, total)
                under_way.append(threads.submit(_verify_part, part, idle))
            while under_way:
                self._note(*under_way.popleft().result(), retired)
                progress(self._report.verified_bytes, total)

    def _parts(self) -> Iterator[Part]:
        for number, pool, there in self._pools:
            ordered = there.chosen(np.argsort(there.pages))
            step = max(1, PART_BYTES // pool.shape.page_bytes)
            for first in range(0, self._index.pool_counts(number).pages, step):
                found, records = self._index.residents(number, first, step)
                if found.size:
                    rows = np.searchsorted(ordered.pages, found)
                    yield Part(pool, ordered.chosen(rows), records)

    def _note(self, part: Part, status: U8, retired: set[bytes]) -> None:
        report, shape = self._report, part.pool.shape
        report.verified_blocks += status.size
        report.verified_bytes += status.size * shape.page_bytes
        for code, kind in OF_STATUS.items():
            if (status == code).any():
                report.add(kind, shape, part.stored.chosen(status == code))
        if retired:
            report.dead_blocks += sum(bytes(name) in retired for name in part.records.namespaces)


def _verify_part(part: Part, idle: queue.SimpleQueue[U8]) -> tuple[Part, U8]:
    """[n] codes of OF_STATUS, or BLOCK_OK."""
    pool, memory = part.pool, idle.get()
    try:
        status = pool.verify(memory, part.stored.pages, part.records)
        size = pool.shape.page_bytes
        headers = memory[: status.size * size].reshape(status.size, size)[:, CHECKSUM]
        other = (headers != part.stored.records["checksum"]).any(axis=1)
        status[other & (status == _core.BLOCK_OK)] = OTHER_PAYLOAD
        return part, status
    finally:
        idle.put(memory)


def _numbers(slabs: SlabFiles | None) -> U32:
    return np.array([] if slabs is None else slabs.numbers(), np.uint32)
