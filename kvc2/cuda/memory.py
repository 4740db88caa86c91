"""Memory of a device that a file descriptor stands for, and host memory that the device may read.

The descriptor goes from process to process as a memfd does, and the memory lives while anybody maps
it or has one: so the daemon can still read what a killed engine has left. (Handles of the older
cuIpcGetMemHandle have no such promise.) Not here: what lies in it (layout.py), copies (mover.py).
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.cuda.driver import Gpu, ask, cu

KIND = 1  # of memory, on the wire


def _posix_fd() -> Any:
    return cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _location(gpu: Gpu, of: Any) -> None:
    of.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    of.id = gpu.ordinal


def _shareable(gpu: Gpu) -> Any:
    """Properties of an allocation on the device whose descriptor can be passed on."""
    properties = cu.CUmemAllocationProp()
    properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = _posix_fd()
    _location(gpu, properties.location)
    return properties


def whole_bytes(gpu: Gpu, num_bytes: int) -> int:
    """The same in whole units of allocation: as many in each process."""
    least = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    unit = int(ask(cu.cuMemGetAllocationGranularity, _shareable(gpu), least))
    return -(-num_bytes // unit) * unit


class Mapping:
    """An allocation in this process's addresses, `num_bytes` from `address` on. Takes the handle
    over: the mapping keeps the memory. Raises CudaFault, and then nothing is left of it."""

    def __init__(self, gpu: Gpu, handle: Any, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._size = whole_bytes(gpu, num_bytes)
        try:
            self.address = int(ask(cu.cuMemAddressReserve, self._size, 0, 0, 0))
            try:
                self._map(gpu, handle)
            except BaseException:
                ask(cu.cuMemAddressFree, self.address, self._size)
                raise
        finally:
            ask(cu.cuMemRelease, handle)

    def _map(self, gpu: Gpu, handle: Any) -> None:
        ask(cu.cuMemMap, self.address, self._size, 0, handle, 0)
        access = cu.CUmemAccessDesc()
        _location(gpu, access.location)
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            ask(cu.cuMemSetAccess, self.address, self._size, [access], 1)
        except BaseException:
            ask(cu.cuMemUnmap, self.address, self._size)
            raise

    def close(self) -> None:
        """Nothing may be under way in it."""
        ask(cu.cuMemUnmap, self.address, self._size)
        ask(cu.cuMemAddressFree, self.address, self._size)


def opened(gpu: Gpu, fd: int, num_bytes: int) -> Mapping:
    """What a descriptor of another process stands for; it stays the caller's. Raises CudaFault for
    one that stands for no such memory of this device, or for less of it."""
    return Mapping(gpu, ask(cu.cuMemImportFromShareableHandle, fd, _posix_fd()), num_bytes)


class DeviceMemory:
    """An engine's pool in the memory of a device: in the place of a memfd (client/memory.py).

    `fd` stands for it; it is offered again at each attach. `device`: the UUID. Raises CudaFault.
    """

    kind: int = KIND

    def __init__(self, num_bytes: int, ordinal: int = 0) -> None:
        gpu = Gpu(ordinal)
        self.num_bytes = num_bytes
        self.device = gpu.uuid
        handle = ask(cu.cuMemCreate, whole_bytes(gpu, num_bytes), _shareable(gpu), 0)
        try:
            self.fd = int(ask(cu.cuMemExportToShareableHandle, handle, _posix_fd(), 0))
        except BaseException:
            ask(cu.cuMemRelease, handle)
            raise
        try:
            self.mapping = Mapping(gpu, handle, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._gpu = gpu

    @property
    def address(self) -> int:
        return self.mapping.address

    def close(self) -> None:
        """Nothing may be under way in it."""
        self.mapping.close()
        os.close(self.fd)
        self._gpu.close()


class Registered:
    """Host memory that a device's copies may touch: pieces of `piece` bytes, registered with the
    driver when they are first used, since that takes 0.1 s a GB and stalls other processes. No copy
    may span two of them. Threads may share it."""

    def __init__(self, memory: NDArray[np.uint8], piece: int) -> None:
        self.piece = piece
        self._memory = memory
        self._lock = threading.Lock()
        self._there = np.zeros(-(-memory.size // piece), bool)

    @property
    def address(self) -> int:
        return int(self._memory.ctypes.data)

    def ensure(self, begins: NDArray[np.uint64], num_bytes: int) -> None:
        """Runs of num_bytes from these offsets on may be copied now. Raises CudaFault, IndexError
        for what lies outside."""
        if begins.size == 0:
            return
        ends = begins + np.uint64(num_bytes)
        if int(ends.max()) > self._memory.size:
            raise IndexError(f"{int(ends.max())} bytes of {self._memory.size}")
        piece = np.uint64(self.piece)
        first, last = begins // piece, (ends - np.uint64(1)) // piece
        wanted = np.zeros(self._there.size + 1, np.int64)
        np.add.at(wanted, first.astype(np.int64), 1)
        np.add.at(wanted, last.astype(np.int64) + 1, -1)
        with self._lock:
            missing = (np.cumsum(wanted)[:-1] > 0) & ~self._there
            for number in np.flatnonzero(missing).tolist():
                begin = number * self.piece
                length = min(self.piece, self._memory.size - begin)
                ask(cu.cuMemHostRegister, self.address + begin, length, 0)
                self._there[number] = True

    def close(self) -> None:
        """Nothing may be under way in it."""
        with self._lock:
            for number in np.flatnonzero(self._there).tolist():
                ask(cu.cuMemHostUnregister, self.address + number * self.piece)
            self._there[:] = False
