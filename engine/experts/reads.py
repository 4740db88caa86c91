"""Reads experts from their files: O_DIRECT, in blocks of which many are under way at a time.

    begin(expert)   gate, up, down -> blocks of up to 1 MiB -> threads, each its own buffer -> place
                    a tensor's last block checks its digest; the last of all ends the future

A disk needs several reads at a time to be as fast as it can, and what a layer waits for is often
one expert: so its blocks are read at once, not one after the other. Each tensor must have the
digest that it had when serving began. Not responsible for which experts are read (store).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.extents import Extent

log = logging.getLogger(__name__)

# Blocks at a time, and their size: with more, or larger ones, no disk that was measured is faster.
READERS = 8
BLOCK_BYTES = 1 << 20
SECTOR = 4096  # O_DIRECT's unit


class ExpertReadError(EngineError):
    """An expert can't be read, or isn't what it was when serving began."""


@dataclass(frozen=True)
class Part:
    """A tensor, and where in memory it goes: contiguous, of as many bytes."""

    extent: Extent
    into: Tensor


class Reader:
    """Reads what lies in open files, from any thread. Opens them anew, past the page cache where
    the file system allows that."""

    def __init__(self, fds: Iterable[int]) -> None:
        self._files = {fd: _reopened(fd) for fd in set(fds)}
        self._threads = ThreadPoolExecutor(READERS, "kvc2-expert-reader")
        self._own = threading.local()
        self.read_bytes = 0  # about: threads add without a lock

    def begin(self, parts: Iterable[Part]) -> Future[None]:
        """Begins to read all of these. When the future has ended, well or with ExpertReadError,
        nobody writes to their memory any more."""
        reading = _Reading(self, [_PartRead(each) for each in parts])
        for part, first, end in reading.blocks():
            self._threads.submit(reading.block, part, first, end)
        return reading.future

    def close(self) -> None:
        """What has been begun is read to its end or dropped: its future may never end."""
        self._threads.shutdown(cancel_futures=True)
        for fd in self._files.values():
            os.close(fd)

    def bytes_of(self, extent: Extent, first: int, end: int) -> memoryview:
        """What lies from `first`, a multiple of the sector, up to `end`: at most a block, valid
        until this thread's next call. Raises ExpertReadError."""
        buffer, done = self._buffer(), 0
        while first + done < end:
            wanted = -(-(end - first - done) // SECTOR) * SECTOR
            into = buffer[done : done + wanted]
            try:
                got = os.preadv(self._files[extent.fd], [into], first + done)
            except OSError as error:
                raise ExpertReadError(f"{extent.name} can't be read: {error.strerror}") from error
            done += got
            if got == 0 or (got % SECTOR and first + done < end):
                raise ExpertReadError(f"{extent.name} can't be read: its file has become shorter")
        self.read_bytes += done
        return buffer[: end - first]

    def _buffer(self) -> memoryview:
        """This thread's, which O_DIRECT takes."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        return self._own.buffer  # type: ignore[no-any-return]


class _PartRead:
    """A part of which blocks are still missing."""

    def __init__(self, part: Part) -> None:
        self.extent = part.extent
        self.memory: NDArray[np.uint8] = part.into.view(torch.uint8).view(-1).numpy()
        begin, end = part.extent.begin, part.extent.begin + part.extent.num_bytes
        first = begin // SECTOR * SECTOR
        count = -(-(end - first) // BLOCK_BYTES)  # of one size: what waits for all waits for one
        size = -(-(end - first) // (count * SECTOR)) * SECTOR
        self.blocks = [(each, min(each + size, end)) for each in range(first, end, size)]
        self.left = len(self.blocks)

    def put(self, first: int, found: memoryview) -> None:
        """A block that lies from `first` on in the file."""
        skip = max(0, self.extent.begin - first)
        to = first + skip - self.extent.begin
        self.memory[to : to + len(found) - skip] = np.frombuffer(found[skip:], np.uint8)

    def check(self) -> None:
        """All of it is there. Raises ExpertReadError."""
        if xxhash.xxh3_128(self.memory.data).hexdigest() != self.extent.digest():
            raise ExpertReadError(f"{self.extent.name} was written since serving began")


class _Reading:
    """One call of `begin`."""

    def __init__(self, reader: Reader, parts: list[_PartRead]) -> None:
        self.future: Future[None] = Future()
        self._reader = reader
        self._parts = parts
        self._lock = threading.Lock()
        self._left = sum(each.left for each in parts)
        self._error: Exception | None = None

    def blocks(self) -> list[tuple[_PartRead, int, int]]:
        return [(each, *block) for each in self._parts for block in each.blocks]

    def block(self, part: _PartRead, first: int, end: int) -> None:
        """Reads one, unless another has failed."""
        try:
            if self._error is None:
                part.put(first, self._reader.bytes_of(part.extent, first, end))
            with self._lock:
                part.left -= 1
                whole = part.left == 0 and self._error is None
            if whole:
                part.check()
        except Exception as error:
            self._error = self._error or error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and self._error is not None:
            self.future.set_exception(self._error)
        elif last:
            self.future.set_result(None)


def _reopened(fd: int) -> int:
    """The same file, even if its name is another's by now."""
    path, flags = f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        log.warning("no O_DIRECT where the experts lie: reads go through the page cache")
        return os.open(path, flags)
