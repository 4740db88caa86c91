"""A catalogue made anew from what lies beside it: headers in the slabs, generations, namespaces.

A header proves what its page holds; that the block is still there, not evicted, its generation in
the layout's table (live.py); that its namespace wasn't invalidated, the list of names
(names_file.py). All three or it is no record: what one of them has lost is a miss. Payloads are
verified when they are loaded, as ever. It is built aside and becomes the catalogue by a rename.
Not here: when it is asked for (disk.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.metrics import Metrics
from kvc2.namespace import of_era
from kvc2.tiers.base import U8, U32, PageShape
from kvc2.tiers.disk import budget, live, names_file
from kvc2.tiers.disk.catalogue import (
    DATA_FILE,
    Catalogue,
    Change,
    Full,
    check_shape,
)
from kvc2.tiers.disk.lmdb_file import Damaged
from kvc2.tiers.disk.records import Stored, encode, room_bytes
from kvc2.tiers.disk.slab_file import HEADER_LANES, Files, SlabFiles, aligned, stored_in

LOG = logging.getLogger(__name__)

PART_PAGES = 4096  # headers of one transaction: 16 MiB of memory


@dataclass(frozen=True)
class Layouts:
    """What lies beside a catalogue: tables by layout digest, and the names; None: no such list."""

    tables: dict[bytes, live.Found]
    names: names_file.Names | None

    @property
    def starts(self) -> int:
        """Of the directory, at least."""
        return max((each.starts for each in self.tables.values()), default=0)


def look(path: Path) -> Layouts:
    """What a rebuild of this directory would go by. Raises StartRefused for unknown formats."""
    names = names_file.read(path / "namespaces")
    tables: dict[bytes, live.Found] = {}
    numbers: set[int] = set()
    folder = path / "live"
    for each in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = live.read(each)
        if found is None or found.shape.layout_digest.hex() != each.name:
            continue
        try:
            check_shape(found.shape)
        except Damaged:
            continue
        if found.number not in numbers:
            numbers.add(found.number)
            tables[found.shape.layout_digest] = found
    return Layouts(tables, names)


def slab_files(path: Path, found: live.Found) -> dict[int, Path]:
    """The whole slab files of a layout by number."""
    folder = path / "slabs" / found.shape.layout_digest.hex()
    files = stored_in(folder) if folder.is_dir() else {}
    size = found.shape.slab_bytes
    return {number: file for number, file in files.items() if file.stat().st_size == size}


def open_catalogue(
    path: Path, size_bytes: int, files: Files, metrics: Metrics
) -> tuple[Catalogue, dict[int, Stored]]:
    """The catalogue and its records by layout number. One that is damaged, or not there although
    it should be, is put aside (the last one is kept, to be looked into) and rebuilt."""
    folder, slack_bytes = path / "catalogue", budget.slack_bytes(size_bytes)
    beside = look(path)
    try:
        if beside.tables and not holds_data(folder):
            raise Damaged("it is not there")
        return _read(folder, slack_bytes, beside.starts)
    except Damaged as error:
        metrics.fault("catalogue_reset")
        LOG.error("disk: the catalogue is damaged (%s): put aside and rebuilt", error)
    if folder.exists():
        shutil.rmtree(path / "catalogue.damaged", ignore_errors=True)
        folder.rename(path / "catalogue.damaged")
    try:
        _make_room(path, size_bytes, beside)
        count = _rebuild(path, slack_bytes, beside, files)
        LOG.warning("disk: %d blocks are in the rebuilt catalogue", count)
        return _read(folder, slack_bytes, beside.starts)
    except (OSError, lmdb.Error, Full, Damaged) as error:
        metrics.fault("catalogue_error")
        LOG.error("disk: the catalogue can't be rebuilt (%s): the tier starts empty", error)
        shutil.rmtree(folder, ignore_errors=True)
        return _read(folder, slack_bytes, beside.starts)


def holds_data(folder: Path) -> bool:
    """Whether there is a catalogue at all; of an empty file LMDB would make a new one."""
    data = folder / DATA_FILE
    return data.exists() and data.stat().st_size > 0


def _read(folder: Path, slack_bytes: int, starts: int) -> tuple[Catalogue, dict[int, Stored]]:
    """Raises Damaged."""
    catalogue = Catalogue(folder, slack_bytes, starts=starts)
    try:
        return catalogue, {number: catalogue.records(number) for number in catalogue.layouts}
    except Damaged:
        catalogue.close()
        raise


def _make_room(path: Path, size_bytes: int, beside: Layouts) -> None:
    """Delete slab files, those with the fewest blocks first, until the rest fits beside the damaged
    catalogue."""
    held: list[tuple[float, Path, PageShape]] = []
    for found in beside.tables.values():
        per_slab = found.shape.pages_per_slab
        for number, file in slab_files(path, found).items():
            there = found.generations[number * per_slab : (number + 1) * per_slab]
            held.append((np.count_nonzero(there) / per_slab, file, found.shape))
    held.sort(key=lambda each: each[0], reverse=True)
    tables = len(beside.tables) + 1
    table_bytes = sum(each.generations.nbytes + live.SECTOR for each in beside.tables.values())
    while held:
        shapes = [shape for _, _, shape in held]
        bound = budget.bytes_bound(path, size_bytes, shapes, tables=tables, table_bytes=table_bytes)
        if bound <= size_bytes:
            break
        _, file, _ = held.pop()
        LOG.warning("disk: %s has no room beside the damaged catalogue", file)
        file.unlink()


def _rebuild(path: Path, slack_bytes: int, beside: Layouts, files: Files) -> int:
    """Make path/catalogue, which is not there; how many records it has. OSError, lmdb.Error and
    Full: it is not there."""
    aside, count = path / "catalogue.new", 0
    shutil.rmtree(aside, ignore_errors=True)
    catalogue = Catalogue(aside, slack_bytes)
    try:
        if beside.names is not None:
            count = _fill(path, catalogue, beside.tables, beside.names, files)
    finally:
        catalogue.close()
    aside.rename(path / "catalogue")
    files.sync_folder(path)
    return count


def _fill(
    path: Path,
    catalogue: Catalogue,
    tables: dict[bytes, live.Found],
    names: names_file.Names,
    files: Files,
) -> int:
    for name, era in names.eras.items():
        catalogue.raise_era(name, era)
    page_sizes = {}
    for name, entry in names.namespaces.items():
        if catalogue.add_namespace(name, entry):
            page_sizes[of_era(name, names.eras.get(name, 0))] = entry.page_size
    for found in tables.values():
        catalogue.adopt_layout(found.number, found.shape)
    catalogue.commit(Change())
    count, room = 0, 0
    for digest, found in tables.items():
        whole = slab_files(path, found)
        if not whole:
            continue
        folder = path / "slabs" / digest.hex()
        slabs = SlabFiles(folder, found.shape, aligned(live.SECTOR), files)
        try:
            for number in whole:
                slabs.add(number)
            room += len(whole) * room_bytes(found.shape)
            catalogue.make_room(room)
            for batch in _batches(slabs, found, page_sizes):
                catalogue.commit(Change(inserts=batch))
                count += len(batch)
        finally:
            slabs.close()
    return count


def _batches(
    slabs: SlabFiles, found: live.Found, page_sizes: dict[bytes, int]
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Records of blocks whose header, generation and namespace say that they are there."""
    shape = found.shape
    alive = {bytes(name) for name, page_size in page_sizes.items() if page_size == shape.page_size}
    pages = np.flatnonzero(found.generations).astype(np.uint32)
    pages = pages[np.isin(pages // shape.pages_per_slab, slabs.numbers())]
    memory = aligned(PART_PAGES * live.SECTOR)
    with ThreadPoolExecutor(HEADER_LANES, "kvc2-rebuild") as threads:
        for first in range(0, pages.size, PART_PAGES):
            part = pages[first : first + PART_PAGES]
            generations = found.generations[part]
            generations[slabs.read_headers(threads, part, memory) == 0] = 0  # of no block
            headers = _core.read_headers(
                memory.data, generations, shape.layout_digest, shape.payload_bytes, shape.page_size
            )
            good = headers.sound == 1
            good &= np.array([bytes(name) in alive for name in headers.namespaces], np.bool_)
            blocks = _good(headers, good)
            checksums = headers.checksums[good]
            yield encode(found.number, part[good], blocks, generations[good], checksums)


@dataclass
class _Good:
    """The rows of headers that count."""

    digests: U8
    parents: U8
    tokens: U32
    external_bytes: U8
    external_keys: U8
    extras: U8


def _good(headers: _core.Headers, good: NDArray[np.bool_]) -> _Good:
    return _Good(**{each.name: getattr(headers, each.name)[good] for each in fields(_Good)})
