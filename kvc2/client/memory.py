"""Memory shared with the daemon: the pool, which the engine makes, the progress page, the arena.

Not here: what lies in the pool (layout.py) and who owns a page of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from kvc2 import _core

LAYERS_MAX = 65536  # of the progress word's low part
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
POLL_S_MAX = 0.05  # another waiter may have drained the eventfd: look at the word again by then


class EngineMemory(Protocol):
    """What a session's pool lies in: memory that a descriptor stands for. `kind` and `device` as
    the wire has them; `DeviceMemory` (kvc2/cuda/memory.py) is the other one than PoolMemory."""

    kind: int
    device: str
    fd: int
    num_bytes: int


class PoolMemory:
    """The KV pool of one engine: a memfd that nobody can resize, mapped read-write. Of 0 bytes, for
    an engine that reads the arena alone, it is nothing.

    It outlives sessions: the same memory is offered again at each attach. `map` is a writable
    memoryview of num_bytes; a numpy array or torch tensor over it must be dropped before `close`.
    """

    kind: int = 0
    device: str = ""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        if not num_bytes:
            self.fd, self.map = -1, memoryview(bytearray())
            return
        self.fd = os.memfd_create("kvc2-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
            self._mmap = mmap.mmap(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        with suppress(OSError):  # a kernel without huge pages
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        self.map = memoryview(self._mmap)

    def give_up(self, begin: int, num_bytes: int) -> None:
        """The host has these bytes' whole pages back until somebody writes there again: what they
        held is lost. Nothing where the system refuses."""
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (begin + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            with suppress(OSError):
                self._mmap.madvise(mmap.MADV_REMOVE, first, whole)

    def close(self) -> None:
        """BufferError while an array still lies over it."""
        self.map.release()
        if self.fd >= 0:
            self._mmap.close()
            os.close(self.fd)


class OverSignal:
    """Set once when a session is over; `fd` is readable from then on. Closed with its last user,
    since a descriptor closed under a waiting poll could become another file's."""

    def __init__(self, fd: int = -1) -> None:
        """Takes over an eventfd that another process may set; makes one otherwise."""
        self.fd = fd if fd >= 0 else os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # it was made
            os.close(self.fd)


class Progress:
    """How far the daemon's transfers into this session's pool have come. Threads may wait on it.

    The word rises only: transfer * 65536 + layers done, transfers strictly in order.
    """

    def __init__(self, progress_fd: int, event_fd: int, over: OverSignal) -> None:
        """Takes the descriptors over."""
        self._mmap = mmap.mmap(progress_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
        self._fd = progress_fd
        self._word = np.frombuffer(self._mmap, dtype="<u8", count=1)
        self._fence = np.frombuffer(self._mmap, dtype="<u8", count=1, offset=8)
        self._event_fd = event_fd
        os.set_blocking(event_fd, False)
        self._over = over

    def reached(self, transfer: int, layer: int) -> bool:
        """Whether `layer` of the transfer and of all earlier ones is there. A read of one word."""
        return int(self._word[0]) >= transfer * LAYERS_MAX + layer + 1

    @property
    def fenced(self) -> bool:
        """Whether the daemon has ended the session, and may have put other blocks where its leases
        were. A read of one word. A daemon that has died changes nothing any more."""
        return bool(self._fence[0])

    def wait(self, transfer: int, layer: int, timeout_s: float) -> bool:
        """False after timeout_s, or at once when the session is over."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()  # one object can't be waited on by two threads
        poll.register(self._event_fd, select.POLLIN)
        poll.register(self._over.fd, select.POLLIN)
        while not self.reached(transfer, layer):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            ready = [fd for fd, _ in poll.poll(min(left, POLL_S_MAX) * 1000)]
            if self._over.fd in ready:
                return self.reached(transfer, layer)
            if self._event_fd in ready:
                try:
                    os.eventfd_read(self._event_fd)
                except BlockingIOError:
                    continue  # another waiter was first
        return True

    @property
    def over(self) -> bool:
        """Whether the session is."""
        poll = select.poll()
        poll.register(self._over.fd, select.POLLIN)
        return bool(poll.poll(0))

    def descriptors(self) -> list[int]:
        """What another process of this engine makes the same of: word, eventfd, end of session."""
        return [self._fd, self._event_fd, self._over.fd]

    def __del__(self) -> None:
        # the last waiter holds a reference, so the descriptor can't be another file's by then
        os.close(self._event_fd)
        os.close(self._fd)


class ArenaView:
    """The daemon's cpu tier of one session, read in place. Threads may share it.

    What a lease in the arena told stays there until the lease is released or the session is over.
    So a copy counts only if the session is not over after it: each call says so. A daemon that has
    died keeps its memory until the last view of it is dropped.
    """

    def __init__(self, fd: int, num_bytes: int, progress: Progress, *, threads: int = 1) -> None:
        """Takes the descriptor over. `threads` copy at a time."""
        try:
            self._mmap = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.num_bytes = num_bytes
        self._progress = progress
        self._team = _core.ThreadTeam(threads)

    def read(self, offsets: NDArray[np.uint64], num_bytes: int, into: Buffer) -> bool:
        """Copy payloads of num_bytes, one after the other, into [n * num_bytes] writable bytes.
        False: the session is over, and what was copied may be of other blocks. IndexError for what
        lies outside of either."""
        row = np.array([[0, num_bytes, num_bytes]], np.uint64)
        return self.scatter(offsets, into, row, np.arange(offsets.size, dtype=np.uint32))

    def read_each(
        self, offsets: NDArray[np.uint64], num_bytes: int, targets: Sequence[Buffer]
    ) -> bool:
        """Copy payloads of num_bytes, each into a writable buffer of as many. Answers as `read`;
        ValueError for what doesn't fit, before anything is copied."""
        whole = memoryview(self._mmap)
        sources = [whole[begin : begin + num_bytes] for begin in offsets.tolist()]
        _core.copy_each(self._team, sources, targets)
        return not self._progress.fenced

    def scatter(
        self,
        offsets: NDArray[np.uint64],
        memory: Buffer,
        segments: NDArray[np.uint64],
        pages: NDArray[np.uint32],
    ) -> bool:
        """Copy payloads into pages of an engine's own memory, whose layout has these segments
        (`Layout.segment_table`). Answers and raises as `read`."""
        ends = np.array([len(segments)], np.uint32)
        _core.scatter(self._team, self._mmap, offsets, memory, segments, pages, layer_ends=ends)
        return not self._progress.fenced

    def descriptors(self) -> list[int]:
        """What another process of this engine makes the same of."""
        return [self._fd]

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # it was made
            os.close(self._fd)
