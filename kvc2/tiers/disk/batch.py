"""Blocks on their way from arena pages to disk pages, in batches, by a few threads.

A batch may be begun while the one before it is synced and committed: its parts wait behind that
one's, so that the disk always has something to write. Not here: what makes a batch durable, and in
which order batches are (disk.py).
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from kvc2 import _core
from kvc2.host.priority import step_back
from kvc2.tiers.base import U8, U32, U64, part_of
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.slab_file import SlabFiles

WRITE_THREADS = 4  # some parts' checksums are computed, or wait for a core, while others go out
WRITE_PART_BYTES = 8 << 20


@dataclass(frozen=True)
class WriteBatch:
    """Blocks on their way from arena pages to disk pages. `calm` is set while nobody waits for a
    load: parts that aren't begun yet wait for it, all together for at most `patience_s`."""

    pool: DiskPool
    pages: U32
    offsets: U64
    records: _core.Records
    calm: threading.Event | None = None
    patience_s: float = 0.0


class Writing:
    """A batch that was begun. `before`: the one that the index took for stored when it planned this
    one, and that may fail yet. `durable`: its blocks are, records included."""

    def __init__(self, batch: WriteBatch, before: Writing | None) -> None:
        self.batch = batch
        self.before = before
        self.durable = False
        self.parts: list[Future[U8]] = []
        self._patient_until: float | None = None  # from its first part on
        self._lock = threading.Lock()

    def calm_down(self) -> None:
        """Wait for the loads that are under way, while there is patience left."""
        if self.batch.calm is None:
            return
        with self._lock:
            if self._patient_until is None:
                self._patient_until = time.monotonic() + self.batch.patience_s
        self.batch.calm.wait(max(0.0, self._patient_until - time.monotonic()))

    def written(self) -> U8:
        """[n, 16] checksums of the payloads, when none of its parts is being written any more, also
        when one failed: its pages may be free afterwards. OSError: not all of it was written."""
        wait(self.parts)
        return np.concatenate([each.result() for each in self.parts])


class Writers:
    """The threads. Those that sync don't wait behind what is still to be written."""

    def __init__(self, arena: U8) -> None:
        self._arena = arena
        self._writers = ThreadPoolExecutor(WRITE_THREADS, "kvc2-write", initializer=step_back)
        self._syncers = ThreadPoolExecutor(WRITE_THREADS, "kvc2-sync", initializer=step_back)

    def begin(self, batch: WriteBatch, before: Writing | None) -> Writing:
        """Its parts are written behind those of batches that were begun before."""
        writing, count = Writing(batch, before), batch.pages.size
        step = max(1, WRITE_PART_BYTES // batch.pool.shape.page_bytes)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            writing.parts.append(self._writers.submit(self._write, writing, part))
        return writing

    def sync(self, slabs: SlabFiles, pages: U32) -> None:
        """As SlabFiles.sync, all files at once: a flush is waited for, not worked on."""
        numbers = pages // slabs.shape.pages_per_slab
        parts = [pages[numbers == number] for number in np.unique(numbers)]
        running = [self._syncers.submit(slabs.sync, part) for part in parts]
        wait(running)
        for each in running:
            each.result()

    def close(self) -> None:
        """Waits for what was begun."""
        self._writers.shutdown()
        self._syncers.shutdown()

    def _write(self, writing: Writing, part: slice) -> U8:
        """[k, 16] checksums of the payloads."""
        writing.calm_down()
        batch = writing.batch
        shape, offsets = batch.pool.shape, batch.offsets[part]
        checksums = _core.encode_headers(
            self._arena.data,
            offsets,
            part_of(batch.records, part),
            shape.layout_digest,
            shape.payload_bytes,
        )
        batch.pool.slabs.write(batch.pages[part], offsets)
        return checksums
