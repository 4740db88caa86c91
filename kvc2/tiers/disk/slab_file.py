"""Slab files of one layout: preallocated, read and written by O_DIRECT straight from the arena.

One file a slab, `NNNNNNNN.slab`, mode 0600, in a folder of the layout. Not here: which pages are
free (csrc/index), which records are committed (catalogue.py), when to sync (disk.py).
"""

from __future__ import annotations

import copy
import errno
import logging
import mmap
import os
import re
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvc2.layout import HEADER_BYTES
from kvc2.tiers.base import U8, U32, U64, PageShape, SlabTable

LOG = logging.getLogger(__name__)

PIECES_MAX = 1024  # IOV_MAX of Linux
RUN_BYTES_MAX = 8 << 20  # one system call; larger ones gain nothing and delay a failure's report
HEADER_LANES = 16  # reads of single sectors at a time: an NVMe disk needs them to be busy
SLAB_NAME = re.compile(r"(\d{8})\.slab")


class Files:
    """The system calls on slab files, in one place: tests put faults here. `read_only`: files that
    are there are opened for reading, and nothing else is done to them."""

    def __init__(self, *, read_only: bool = False) -> None:
        self._direct = os.O_DIRECT
        self._flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT

    def open(self, path: Path) -> int:
        """Open or create for O_DIRECT; without it where the file system has none (said once)."""
        flags = self._flags | os.O_CLOEXEC
        try:
            return os.open(path, flags | self._direct, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            LOG.warning("disk: no O_DIRECT on %s: pages go through the page cache", path.parent)
            self._direct = 0
            return os.open(path, flags, 0o600)

    def allocate(self, fd: int, num_bytes: int) -> None:
        os.posix_fallocate(fd, 0, num_bytes)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Run:
    """Pages that lie one after the other in one file: one system call."""

    fd: int
    place: int  # byte offset in the file
    order: NDArray[np.int64]  # [k] which of the caller's pages, in file order
    pieces: tuple[tuple[int, int], ...]  # (arena offset, bytes), in file order


def runs(fds: NDArray[np.int64], places: U64, offsets: U64, page_bytes: int) -> Iterator[Run]:
    """The fewest calls that move pages at (fd, place) [n] from or to arena `offsets` [n]."""
    order = np.lexsort((places, fds))
    fds, places = fds[order], places[order].astype(np.int64)
    sources = offsets[order].astype(np.int64)
    joined = (np.diff(fds) == 0) & (np.diff(places) == page_bytes)
    near = joined & (np.diff(sources) == page_bytes)
    limit = max(1, min(RUN_BYTES_MAX // page_bytes, PIECES_MAX))
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    ends = np.append(starts[1:], fds.size)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        for first in range(start, end, limit):
            last = min(first + limit, end)
            cuts = np.flatnonzero(~near[first : last - 1]) + first + 1
            heads = [first, *cuts.tolist()]
            tails = [*cuts.tolist(), last]
            yield Run(
                fd=int(fds[first]),
                place=int(places[first]),
                order=order[first:last],
                pieces=tuple(
                    (int(sources[head]), (tail - head) * page_bytes)
                    for head, tail in zip(heads, tails, strict=True)
                ),
            )


class SlabFiles:
    """A PageStore over the slab files in `folder`. Slabs are added and removed by one thread at a
    time; pages may be moved by several."""

    def __init__(self, folder: Path, shape: PageShape, arena: U8, files: Files) -> None:
        self.folder = folder
        self.shape = shape
        self._arena = arena.data
        self._files = files
        self._slabs = SlabTable(shape)  # a slab's base is its file descriptor
        self.retired: set[int] = set()  # by a failed sync; what was durable in them is still read
        folder.mkdir(mode=0o700, exist_ok=True)

    def over(self, memory: U8) -> SlabFiles:
        """The same files, whose pages are read into and written from other memory."""
        found = copy.copy(self)
        found._arena = memory.data
        return found

    def stored(self) -> dict[int, Path]:
        """Slab files in the folder by number, opened or not."""
        return stored_in(self.folder)

    def numbers(self) -> list[int]:
        return self._slabs.numbers()

    def next_number(self) -> int:
        """The lowest free number: the one that Index.add_slab will take."""
        taken = set(self._slabs.numbers())
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def add(self, number: int) -> bool:
        """Open the slab's file; create it, or fill it, when it isn't whole. True if it was whole.
        OSError (ENOSPC, EMFILE): there is no such slab now, and no file left behind."""
        path = self.folder / f"{number:08d}.slab"
        fd = self._files.open(path)
        try:
            whole = self._files.size(fd) == self.shape.slab_bytes
            if not whole:
                os.ftruncate(fd, 0)  # what a short file holds can't be told from garbage
                self._files.allocate(fd, self.shape.slab_bytes)
                for folder in (self.folder, self.folder.parent):  # ours may be new too
                    self._files.sync_folder(folder)
        except OSError:
            self._files.close(fd)
            self._files.unlink(path)
            raise
        self._slabs.put(number, fd)
        return whole

    def remove(self, number: int) -> None:
        """Close and delete a slab's file, for good when this returns: its room is taken. Its pages
        must be free and their records deleted. OSError: it may come back."""
        self._files.close(self._slabs.drop(number))
        self.retired.discard(number)
        self._files.unlink(self.folder / f"{number:08d}.slab")
        self._files.sync_folder(self.folder)

    def close(self) -> None:
        for number in self.numbers():
            self._files.close(self._slabs.drop(number))

    def read(self, pages: U32, offsets: U64) -> U8:
        came = np.zeros(pages.size, np.uint8)
        for run in self._runs(pages, offsets):
            came[run.order[: self._read_run(run)]] = 1
        return came

    def write(self, pages: U32, offsets: U64) -> None:
        for run in self._runs(pages, offsets):
            self._write_run(run)

    def read_headers(self, threads: Executor, pages: U32, memory: U8) -> U8:
        """Bring each page's header sector alone into `memory`, one after the other. [n] of 1 (came)
        or 0."""
        fds, places = self._slabs.bases(pages).tolist(), self._slabs.within(pages).tolist()

        def read(i: int) -> bool:
            sector = memory.data[i * HEADER_BYTES : (i + 1) * HEADER_BYTES]
            try:
                return self._files.read(fds[i], [sector], places[i]) == HEADER_BYTES
            except OSError as error:
                LOG.warning("disk: reading %s at %d: %s", self.folder, places[i], error)
                return False

        def read_all(each: range) -> list[bool]:
            return [read(i) for i in each]

        parts = [range(first, pages.size, HEADER_LANES) for first in range(HEADER_LANES)]
        came = np.zeros(pages.size, np.uint8)
        for part, found in zip(parts, threads.map(read_all, parts), strict=True):
            came[part.start :: HEADER_LANES] = found
        return came

    def sync(self, pages: U32) -> None:
        """Make the data of these pages durable: one fdatasync a file. OSError: some are not. What
        of a slab that failed is on the disk nobody knows, and a second fdatasync would say that all
        of it is: the slab is in `retired` from then on and is never synced again."""
        failed: OSError | None = None
        for number in np.unique(pages // self.shape.pages_per_slab).tolist():
            if number in self.retired:
                failed = failed or OSError(errno.EIO, f"{self.folder}: slab {number} is retired")
                continue
            try:
                self._files.sync(self._slabs.base(number))
            except OSError as error:
                self.retired.add(number)
                failed = error
        if failed is not None:
            raise failed

    def _runs(self, pages: U32, offsets: U64) -> Iterator[Run]:
        fds, places = self._slabs.bases(pages), self._slabs.within(pages)
        return runs(fds, places, offsets, self.shape.page_bytes)

    def _buffers(self, run: Run, done: int) -> list[memoryview]:
        """The run's memory from byte `done` on."""
        buffers = []
        for offset, length in run.pieces:
            if done < length:
                buffers.append(self._arena[offset + done : offset + length])
            done = max(0, done - length)
        return buffers

    def _read_run(self, run: Run) -> int:
        """Pages that came whole, from the run's start."""
        total, done = run.order.size * self.shape.page_bytes, 0
        while done < total:
            try:
                got = self._files.read(run.fd, self._buffers(run, done), run.place + done)
            except OSError as error:
                LOG.warning("disk: reading %s at %d: %s", self.folder, run.place + done, error)
                break
            if (
                got == 0 or got % 512
            ):  # the file's end, or a torn tail that O_DIRECT can't go on from
                done += got
                break
            done += got
        return done // self.shape.page_bytes

    def _write_run(self, run: Run) -> None:
        total, done = run.order.size * self.shape.page_bytes, 0
        while done < total:
            put = self._files.write(run.fd, self._buffers(run, done), run.place + done)
            if put == 0 or put % 512:
                raise OSError(errno.EIO, f"{self.folder}: short write of {put} bytes")
            done += put


def stored_in(folder: Path) -> dict[int, Path]:
    """Slab files in a folder by number."""
    found = {}
    for path in sorted(folder.iterdir()):
        if match := SLAB_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return found


def aligned(num_bytes: int) -> U8:
    """Memory that O_DIRECT takes, zeros."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def raise_file_limit() -> None:
    """Every slab file stays open: take as many file descriptors as we are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
