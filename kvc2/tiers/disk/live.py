"""Which page of a layout holds a block, by its generation: what headers alone can't tell.

    DIR/live/<layout digest>   a sector: Head, checksum; then [pages] little-endian u64

The header of an evicted block lies in its slab until the page is written again. So each batch says
here, before its records are committed, which generation each of its pages has from now on, 0 for
those whose records go: a rebuild (rebuild.py) takes a header only if it has the generation that its
page has here. What isn't here is lost to a rebuild, never the other way round. A start writes the
table anew from a sound catalogue. The head says what else a rebuild must know of a layout.
Not here: records (catalogue.py), headers (csrc/block).
"""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvc2 import _core, errors
from kvc2.tiers.base import U8, U32, U64, PageShape
from kvc2.tiers.disk.slab_file import Files, aligned

LOG = logging.getLogger(__name__)

SECTOR = 4096  # O_DIRECT's unit
MAGIC = b"KVC2LIVE"
VERSION = 1
# magic, version, layout's number, starts, page_size, pages a slab; payload, page and slab bytes
HEAD = struct.Struct("<8sIIQIIQQQ32s")
ROW = np.dtype("<u8")
ROW_BYTES = 2 * ROW.itemsize  # of a page: the table, and the one that replaces it
TABLE_BYTES = 4 * SECTOR  # of a table beside its rows: head and rounding, of both files
SECTORS_MAX = 256  # of one write: 1 MiB, a system call of about 0.3 ms


@dataclass(frozen=True)
class Found:
    """A table as it lies on disk."""

    number: int
    starts: int
    shape: PageShape
    generations: U64  # [pages], 0: none


def read(path: Path) -> Found | None:
    """None where it is not there or can't be what we wrote. Raises StartRefused for a version that
    this one does not know."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < SECTOR or len(data) % SECTOR or data[:8] != MAGIC:
        return None
    end = HEAD.size
    if data[end : end + 16] != _core.xxh3_128(data[:end]):
        return None
    _, version, number, starts, page_size, per_slab, payload, page, slab, digest = HEAD.unpack_from(
        data
    )
    if version != VERSION:
        raise errors.StartRefused(
            f"{path}: format {version}, this version reads {VERSION};"
            " serve it with the version that wrote it, or give another disk.path"
        )
    shape = PageShape(digest, page_size, payload, page, slab, per_slab)
    return Found(number, starts, shape, np.frombuffer(data, ROW, offset=SECTOR).astype(np.uint64))


class LiveTable:
    """One layout's table. What can't be written is deleted, and written anew with the next change:
    without a table nothing comes back. One thread, the writer's, uses it."""

    def __init__(
        self, folder: Path, number: int, shape: PageShape, files: Files, *, starts: int
    ) -> None:
        self.path = folder / shape.layout_digest.hex()
        self._files = files
        self._fd = -1  # -1: to be written anew
        self._head = np.frombuffer(_head(number, shape, starts), np.uint8)
        self._memory = self._blank(0)
        self._dirty: set[int] = set()

    @property
    def generations(self) -> U64:
        """[at least as many as there are pages] of the block in each page, 0: none."""
        return self._memory[SECTOR:].view(ROW)

    @property
    def num_bytes(self) -> int:
        return int(self._memory.size)

    def begin(self, pages: U32, generations: U64, num_pages: int) -> bool:
        """What a sound catalogue says; else as `save`."""
        before = read(self.path)
        self.close()
        self._memory = self._blank(num_pages)
        self.generations[pages] = generations
        if before is not None and np.array_equal(before.generations, self.generations):
            self._fd = self._files.open(self.path)
            self._dirty = {0}
        return self.save()

    def make_room(self, num_pages: int) -> None:
        """Room for pages, on disk too. OSError: there is none, and nothing has changed."""
        size = SECTOR + _rounded(num_pages * ROW.itemsize)
        if size <= self.num_bytes:
            return
        if self._fd >= 0:
            self._files.allocate(self._fd, size)
        memory, held = aligned(size), self.num_bytes
        memory[:held] = self._memory
        self._memory = memory
        self._dirty.update(range(held // SECTOR, size // SECTOR))

    def change(self, pages: U32, generations: U64 | int) -> None:
        """These pages hold blocks of these generations from now on (0: none)."""
        self.generations[pages] = generations
        self._dirty.update(np.unique(1 + pages // (SECTOR // ROW.itemsize)).tolist())

    def move(self, sources: U32, targets: U32) -> None:
        """Blocks have other pages. To be told twice of a move changes nothing."""
        moved = self.generations[sources] != 0
        generations = self.generations[sources[moved]].copy()
        self.change(sources[moved], 0)
        self.change(targets[moved], generations)

    def save(self) -> bool:
        """What has changed is durable when this returns, or (False) there is no table any more; one
        fdatasync, none when nothing has changed. OSError: neither could be done."""
        if self._fd < 0 and not self.generations.any() and not self.path.exists():
            return True  # it would say nothing
        try:
            if self._fd < 0:
                self._write_anew()
            elif self._dirty:
                for first, count in _stretches(sorted(self._dirty)):
                    self._write(self._fd, first, count)
                self._files.sync(self._fd)
        except OSError as error:
            LOG.warning("disk: %s: %s; without it nothing of it can be rebuilt", self.path, error)
            self.close()
            self._files.unlink(self.path)
            self._files.sync_folder(self.path.parent)
            return False
        self._dirty = set()
        return True

    def close(self) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _blank(self, num_pages: int) -> U8:
        memory = aligned(SECTOR + _rounded(num_pages * ROW.itemsize))
        memory[: self._head.size] = self._head
        return memory

    def _write_anew(self) -> None:
        aside = self.path.with_suffix(".new")
        self._files.unlink(aside)
        fd = self._files.open(aside)
        try:
            self._files.allocate(fd, self.num_bytes)
            for first, count in _stretches(list(range(self.num_bytes // SECTOR))):
                self._write(fd, first, count)
            self._files.sync(fd)
            os.replace(aside, self.path)
            for folder in (self.path.parent, self.path.parent.parent):  # ours may be new too
                self._files.sync_folder(folder)
        except OSError:
            self._files.close(fd)
            raise
        self._fd = fd

    def _write(self, fd: int, first: int, count: int) -> None:
        start, end = first * SECTOR, (first + count) * SECTOR
        put = self._files.write(fd, [self._memory.data[start:end]], start)
        if put != end - start:
            raise OSError(f"{self.path}: short write of {put} bytes")


def _head(number: int, shape: PageShape, starts: int) -> bytes:
    sizes = (shape.payload_bytes, shape.page_bytes, shape.slab_bytes)
    counts = (number, starts, shape.page_size, shape.pages_per_slab)
    head = HEAD.pack(MAGIC, VERSION, *counts, *sizes, shape.layout_digest)
    return head + _core.xxh3_128(head)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // SECTOR) * SECTOR


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """First and count of each run of numbers, of at most SECTORS_MAX."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number and found[-1][1] < SECTORS_MAX:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
