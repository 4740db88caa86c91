"""A session's pool in the memory of a CUDA device: the second `GpuExecutor`.

The daemon calls no CUDA. A worker process does (kvc2/cuda), to which the engine's descriptor is
passed on; it is kept here too, so that a worker that was lost is followed by one that has the pool
again: what a dead engine left is rescued then all the same.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from dataclasses import dataclass, field

import numpy as np

from kvc2.cuda.faults import NoWorker, RefusedByWorker, WorkerLost
from kvc2.cuda.messages import Message, Pages, PoolShape, What
from kvc2.cuda.workers import WorkerProcess, Workers
from kvc2.layout import Layout
from kvc2.tiers.base import U8, U32, U64, payload_offsets
from kvc2.tiers.gpu import PROGRESS_STEP

LOG = logging.getLogger(__name__)

OPEN_S = 30.0  # the first pool of a device also makes its context
CLOSE_S = 3.0  # then the worker is killed: a device's memory must not stay taken
MOVE_S = 10.0  # for a copy, beside what its bytes take: on a starved host a worker may wait so ...
MOVE_BYTES_PER_S = 500e6  # ... at a hundredth of the bus, a first use of slabs included


@dataclass(frozen=True)
class DeviceShare:
    """What an engine shares with its pool in a device's memory; the descriptors stay the caller's,
    and the pool has its own of them."""

    uuid: str
    memory_bytes: int
    memory_fd: int
    progress_fd: int
    event_fd: int


@dataclass(eq=False)
class _Kept:
    """Our own descriptors, for a worker to come."""

    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class DevicePool:
    """A GpuExecutor. Opened when it is made: raises RefusedByWorker, WorkerLost or NoWorker.
    `worker`: that it was opened in at first, whose death ends the session."""

    _numbers = itertools.count(1)

    def __init__(self, layout: Layout, share: DeviceShare, workers: Workers) -> None:
        self._number = next(self._numbers)
        self._payload_bytes = layout.payload_bytes
        self._workers = workers
        self._uuid = share.uuid
        self._shape = PoolShape(
            share.memory_bytes,
            tuple((each.offset, each.stride, each.bytes) for each in layout.segments),
            tuple(layout.layer_ends().tolist()),
        )
        self._lock = threading.Lock()  # over the two below
        self._kept = _Kept()
        self._worker: WorkerProcess | None = None  # that has the pool
        try:
            for fd in (share.memory_fd, share.progress_fd, share.event_fd):
                self._kept.fds.append(os.dup(fd))
            self.worker = self._opened()
        except BaseException:
            self._kept.close()
            raise

    def _opened(self) -> WorkerProcess:
        """The worker that has the pool: another one where the last has died. Raises as the
        constructor."""
        with self._lock:
            if self._worker is None or self._worker.dead:
                if not self._kept.fds:
                    raise NoWorker("the pool is closed")
                worker = self._workers.of(self._uuid)
                body = self._shape.packed()
                worker.call(Message(What.OPEN, self._number, 0, body, self._kept.fds), OPEN_S)
                self._worker = worker
            return self._worker

    def read(self, pages: U32, offsets: U64) -> U8:
        """Raises what `write` does: none of the pages came then."""
        self._move(What.READ, pages, offsets, 0)
        return np.ones(pages.size, np.uint8)

    def write(self, pages: U32, offsets: U64, *, sequence: int = 0) -> None:
        """Raises RefusedByWorker, WorkerLost or NoWorker: any of the pages may be torn then, but
        what was told of layers is true."""
        self._move(What.WRITE, pages, offsets, sequence * PROGRESS_STEP)

    def close(self) -> None:
        """Blocks, for CLOSE_S at most."""
        with self._lock:
            worker, self._worker = self._worker, None
            self._kept.close()
        if worker is None or worker.dead:
            return
        try:
            worker.call(Message(What.CLOSE, self._number), CLOSE_S)
        except (RefusedByWorker, WorkerLost) as error:
            LOG.warning("a pool on %s was not let go of in order: %s", self._uuid, error)
            worker.kill()  # which lets go of it

    def _move(self, what: What, pages: U32, offsets: U64, base: int) -> None:
        body = Pages(pages, payload_offsets(offsets)).packed()
        timeout_s = MOVE_S + pages.size * self._payload_bytes / MOVE_BYTES_PER_S
        self._opened().call(Message(what, self._number, base, body), timeout_s)
