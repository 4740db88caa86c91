"""The gpu tier: a session's pool, and the two ways its pages come and go.

`GpuExecutor` is the contract. `SharedMemoryPool` is the stand-in's executor: the engine's pool is a
memfd mapped here, and csrc/copy moves pages. The other one is device.py's.
"""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from kvc2 import _core
from kvc2.host.priority import step_back
from kvc2.layout import Layout
from kvc2.tiers.base import U8, U32, U64, PageStore, payload_offsets

PROGRESS_STEP = 1 << 16  # progress word = sequence * PROGRESS_STEP + layers done


class GpuExecutor(PageStore, Protocol):
    """A PageStore that also tells the engine how far a transfer is."""

    def write(self, pages: U32, offsets: U64, *, sequence: int = 0) -> None:
        """Layer by layer; after each the progress word is sequence * 65536 + layers done. Calls
        of one pool come one after the other, `sequence` rising; 0 publishes nothing."""

    def close(self) -> None:
        """Let go of the engine's memory, which can be unmapped then. Nothing is called later."""


class Copier:
    """csrc/copy with one team of threads that one call at a time may use. behind: nobody waits for
    its copies, so its threads yield the CPU."""

    def __init__(self, threads: int, *, behind: bool = False) -> None:
        with ThreadPoolExecutor(1, initializer=step_back if behind else None) as starts:
            self._team = starts.submit(_core.ThreadTeam, threads).result()
        self._lock = threading.Lock()

    def gather(self, pool: GpuMemory, pages: U32, arena: U8, offsets: U64) -> None:
        with self._lock:
            _core.gather(self._team, pool.memory.data, pool.segments, pages, arena.data, offsets)

    def scatter(self, pool: GpuMemory, pages: U32, arena: U8, offsets: U64, sequence: int) -> None:
        with self._lock:
            _core.scatter(
                self._team,
                arena.data,
                offsets,
                pool.memory.data,
                pool.segments,
                pages,
                layer_ends=pool.layer_ends,
                progress=pool.progress if sequence else None,
                progress_base=sequence * PROGRESS_STEP,
                event_fd=pool.event_fd if sequence else -1,
            )


class GpuMemory:
    """An engine's pool as mapped here, and where its progress is told."""

    def __init__(
        self, layout: Layout, memory: mmap.mmap, progress: mmap.mmap, event_fd: int
    ) -> None:
        self.memory = np.frombuffer(memory, np.uint8)
        self.progress = memoryview(progress)[:8]  # the word; the rest of the page is free
        self.event_fd = event_fd
        self.segments = layout.segment_table()
        self.layer_ends = layout.layer_ends()

    def close(self) -> None:
        """Drop the views: a map can't be closed while one lies over it."""
        self.memory = np.empty(0, np.uint8)
        self.progress.release()


class SharedMemoryPool:
    """A GpuExecutor over memory shared with the engine. Promotions and demotions have a team of
    threads each, so that neither waits for the other's batch."""

    def __init__(self, memory: GpuMemory, arena: U8, promoter: Copier, demoter: Copier) -> None:
        self._memory = memory
        self._arena = arena
        self._promoter = promoter
        self._demoter = demoter

    def read(self, pages: U32, offsets: U64) -> U8:
        self._demoter.gather(self._memory, pages, self._arena, payload_offsets(offsets))
        return np.ones(pages.size, np.uint8)

    def write(self, pages: U32, offsets: U64, *, sequence: int = 0) -> None:
        self._promoter.scatter(self._memory, pages, self._arena, payload_offsets(offsets), sequence)

    def close(self) -> None:
        self._memory.close()
