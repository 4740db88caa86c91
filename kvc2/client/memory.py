"""Memory shared with the daemon: the pool, which the engine makes, and the progress page.

Not here: what lies in the pool (layout.py) and who owns a page of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import time

import numpy as np

LAYERS_MAX = 65536  # of the progress word's low part
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
POLL_S_MAX = 0.05  # another waiter may have drained the eventfd: look at the word again by then


class PoolMemory:
    """The KV pool of one engine: a memfd that nobody can resize, mapped read-write.

    It outlives sessions: the same memory is offered again at each attach. `map` is a writable
    memoryview of num_bytes; a numpy array or torch tensor over it must be dropped before `close`.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("kvc2-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
            self._mmap = mmap.mmap(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.map = memoryview(self._mmap)

    def close(self) -> None:
        """BufferError while an array still lies over it."""
        self.map.release()
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
        self._event_fd = event_fd
        os.set_blocking(event_fd, False)
        self._over = over

    def reached(self, transfer: int, layer: int) -> bool:
        """Whether `layer` of the transfer and of all earlier ones is there. A read of one word."""
        return int(self._word[0]) >= transfer * LAYERS_MAX + layer + 1

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
