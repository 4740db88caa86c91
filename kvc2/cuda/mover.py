"""Moves pages between a pool on the device and payloads in the arena, by the copy engines alone.

A kernel of this process would have to share the device with the engine's, and wait for its turn; a
copy engine doesn't. A page's rows of some layers are one cuMemcpy2DAsync (rows.py). Not here: which
pages (csrc/index), who is told (worker.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.cuda.driver import Gpu, ask, cu
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import Mapping, Registered
from kvc2.cuda.rows import Group, Rows, cut

Tell = Callable[[int], None]


@dataclass(frozen=True)
class DevicePages:
    """An engine's pool as mapped here, and how its pages lie."""

    memory: Mapping
    groups: tuple[Group, ...]


class Mover:
    """One way's copies of all pools of a device, on a stream of its own. One thread uses it. What
    it raises is a CudaFault, or an IndexError before anything is copied; nothing is under way
    then."""

    def __init__(self, gpu: Gpu, arena: Registered) -> None:
        self._gpu = gpu
        self._arena = arena
        self._stream = gpu.stream()
        self._events: list[Any] = []
        self._copy = cu.CUDA_MEMCPY2D()

    def write(
        self,
        pool: DevicePages,
        pages: NDArray[np.uint32],
        payloads: NDArray[np.uint64],
        tell: Tell | None = None,
    ) -> None:
        """Payloads at these offsets of the arena into pages, in the order of layers. `tell` is
        called with the number of layers that are there, as they come. Returns when all are."""
        self._check(pool, pages, payloads)
        try:
            for number, group in enumerate(pool.groups):
                self._queue(pool, group, pages, payloads, to_pool=True)
                ask(cu.cuEventRecord, self._event(number), self._stream)
            for number, group in enumerate(pool.groups):
                ask(cu.cuEventSynchronize, self._event(number))
                if tell is not None:
                    tell(group.layers_done)
        except BaseException:
            self._drain()
            raise

    def read(
        self, pool: DevicePages, pages: NDArray[np.uint32], payloads: NDArray[np.uint64]
    ) -> None:
        """Pages into payloads at these offsets of the arena. Returns when they are there."""
        self._check(pool, pages, payloads)
        try:
            for group in pool.groups:
                self._queue(pool, group, pages, payloads, to_pool=False)
            ask(cu.cuStreamSynchronize, self._stream)
        except BaseException:
            self._drain()
            raise

    def close(self) -> None:
        for event in self._events:
            ask(cu.cuEventDestroy, event)
        ask(cu.cuStreamDestroy, self._stream)

    def _check(
        self, pool: DevicePages, pages: NDArray[np.uint32], payloads: NDArray[np.uint64]
    ) -> None:
        """IndexError for a page that lies outside of the pool; payloads are in the arena."""
        last = int(pages.max()) if pages.size else 0
        for group in pool.groups:
            for rows in group.rows:
                end = rows.offset + last * rows.stride + (rows.height - 1) * rows.pitch + rows.width
                if end > pool.memory.num_bytes:
                    raise IndexError(f"page {last} ends at byte {end} of {pool.memory.num_bytes}")
        self._arena.ensure(payloads, sum(group.bytes for group in pool.groups))

    def _event(self, number: int) -> Any:
        if number == len(self._events):
            self._events.append(self._gpu.event())
        return self._events[number]

    def _drain(self) -> None:
        """Nothing is copied after a call that has failed."""
        with suppress(CudaFault):  # what failed first is raised
            ask(cu.cuStreamSynchronize, self._stream)

    def _queue(
        self,
        pool: DevicePages,
        group: Group,
        pages: NDArray[np.uint32],
        payloads: NDArray[np.uint64],
        *,
        to_pool: bool,
    ) -> None:
        base, arena, piece = pool.memory.address, self._arena.address, self._arena.piece
        for rows in group.rows:
            self._shape(rows, to_pool)
            places = (pages.astype(np.int64) * rows.stride).tolist()
            begins = payloads.astype(np.int64) + rows.start
            crosses = begins // piece != (begins + rows.bytes - 1) // piece
            for place, begin, several in zip(
                places, begins.tolist(), crosses.tolist(), strict=True
            ):
                if not several:
                    self._put(base + place + rows.offset, arena + begin, to_pool)
                    continue
                for part, at in cut(rows, begin, piece):
                    self._shape(part, to_pool)
                    self._put(base + place + part.offset, arena + at, to_pool)
                self._shape(rows, to_pool)

    def _shape(self, rows: Rows, to_pool: bool) -> None:
        """Of the copies that follow."""
        copy, kinds = self._copy, cu.CUmemorytype
        copy.WidthInBytes, copy.Height = rows.width, rows.height
        if to_pool:
            copy.srcMemoryType, copy.dstMemoryType = (
                kinds.CU_MEMORYTYPE_HOST,
                kinds.CU_MEMORYTYPE_DEVICE,
            )
            copy.srcPitch, copy.dstPitch = rows.width, rows.pitch
        else:
            copy.srcMemoryType, copy.dstMemoryType = (
                kinds.CU_MEMORYTYPE_DEVICE,
                kinds.CU_MEMORYTYPE_HOST,
            )
            copy.srcPitch, copy.dstPitch = rows.pitch, rows.width

    def _put(self, device: int, host: int, to_pool: bool) -> None:
        if to_pool:
            self._copy.srcHost, self._copy.dstDevice = host, device
        else:
            self._copy.srcDevice, self._copy.dstHost = device, host
        ask(cu.cuMemcpy2DAsync, self._copy, self._stream)
