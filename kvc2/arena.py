"""The cpu tier's memory: one sealed memfd that only this process can write, in runs of units.

The memfd is mapped read-write first and then sealed SHRINK | GROW | FUTURE_WRITE | SEAL: whoever
gets the file descriptor can map it for reading only. A background thread faults the units in, so
that serving starts at once; a unit can be taken once it is there. Not here: which page of a slab
belongs to whom (csrc/index), and which pool a slab serves (tiers/cpu.py).

    absent -> free [faulted in]      free -> taken [take]      taken -> free [give_back]

Where the host gives shared memory no huge pages by itself (`shmem_enabled` is never, the usual
case), the same thread asks for them once all units are there: MADV_COLLAPSE moves what lies in
4 KiB pages into huge ones, in use or not. The disk then gets requests of megabytes instead of one
for each scattered page, and a copy misses the TLB less.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.host import numa
from kvc2.host.machine import available_memory_bytes
from kvc2.host.priority import step_back

LOG = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11 has no name for it
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
MFD_HUGETLB = 0x4
MADV_POPULATE_WRITE = 23  # Linux 5.14
MADV_COLLAPSE = 25  # Linux 6.1; whatever sysfs says of shmem, unless that is `deny`
HUGE_PAGE_BYTES = 2 << 20
# Memory that is left to others while units are faulted in: less would invite the OOM killer.
SPARE_BYTES = 256 << 20
TOUCH_BYTES = 64 << 20  # one step of the fallback for kernels before 5.14
COLLAPSE_BYTES = 8 << 20  # one step: about 10 ms of copying
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
ABSENT, FREE, TAKEN = 0, 1, 2
HUGETLB = "2 MiB hugetlb pages"
BeforeSeal = Callable[[int, int, int], None]

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
]


class Arena:
    """`memory_bytes` (cut to whole units of `unit_bytes`) of shared memory on these NUMA nodes
    (none: wherever the kernel puts it): at least one unit, or none at all (0). `before_seal` is
    called with the memfd, its bytes and those of a unit: who maps it then may write.

    Threads may share it: one lock inside. `memory` is [capacity_bytes] u8, writable.
    """

    def __init__(
        self,
        memory_bytes: int,
        unit_bytes: int,
        *,
        nodes: Sequence[int] = (),
        available_bytes: Callable[[], int] | None = None,
        before_seal: BeforeSeal = lambda *_: None,
    ) -> None:
        if 0 < memory_bytes < unit_bytes:
            raise errors.InvalidConfig(
                "cpu.memory_size_gb", memory_bytes / 1e9, f"at least one slab: {unit_bytes / 1e9:g}"
            )
        self.unit_bytes = unit_bytes
        self.capacity_bytes = memory_bytes // unit_bytes * unit_bytes
        self._available_bytes = available_bytes or available_memory_bytes
        self._states = np.zeros(self.capacity_bytes // unit_bytes, np.uint8)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.populated = not self.capacity_bytes  # all units that can be had are here

        def sealing(fd: int, num_bytes: int) -> None:
            before_seal(fd, num_bytes, unit_bytes)

        self.fd, self.memory, self.page_kind = _create(self.capacity_bytes, sealing)
        if nodes:
            numa.place(self.memory.ctypes.data, self.capacity_bytes, nodes)
        self.huge_bytes = 0  # that were moved into huge pages

    def start(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Begin to fault units in; `on_ready` runs on that thread after each, and at the end."""
        if self.populated:
            return
        LOG.info("arena: %d bytes on %s", self.capacity_bytes, self.page_kind)
        self._thread = threading.Thread(
            target=self._populate, args=(on_ready,), name="kvc2-arena", daemon=True
        )
        self._thread.start()

    def wait_populated(self, timeout_s: float | None = None) -> bool:
        """Blocks until the background thread is done; False when the time is over first."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Stop faulting in and close the file descriptor. The mapping goes with its last view."""
        self._stopped.set()
        self.wait_populated()
        os.close(self.fd)

    def open_for_reading(self) -> int:
        """A descriptor of its memory that can't write, whatever it is used for. The caller closes
        it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def take(self, run_bytes: int) -> int | None:
        """Offset of the first free run of so many bytes (a multiple of unit_bytes); or None."""
        units = run_bytes // self.unit_bytes
        with self._lock:
            starts = _runs(self._states == FREE, units)
            if starts.size == 0:
                return None
            first = int(starts[0])
            self._states[first : first + units] = TAKEN
            return first * self.unit_bytes

    def runs_beside(self, run_bytes: int, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offsets of the runs that would be free if the units at the offsets `taken` were given
        back. Changes nothing."""
        with self._lock:
            free = self._states == FREE
        free[taken // self.unit_bytes] = True
        return _runs(free, run_bytes // self.unit_bytes) * self.unit_bytes

    def give_back(self, offset: int, run_bytes: int) -> None:
        """A taken run is free again. ValueError when it was not taken."""
        first, units = offset // self.unit_bytes, run_bytes // self.unit_bytes
        with self._lock:
            states = self._states[first : first + units]
            if states.size != units or not (states == TAKEN).all():
                raise ValueError(f"arena: run at {offset} of {run_bytes} bytes is not taken")
            states[:] = FREE

    @property
    def ready_bytes(self) -> int:
        """Bytes faulted in so far, taken or free."""
        with self._lock:
            return int(np.count_nonzero(self._states)) * self.unit_bytes

    @property
    def short_bytes(self) -> int:
        """Bytes that were asked for and could not be had; known once it is populated."""
        return self.capacity_bytes - self.ready_bytes if self.populated else 0

    def _populate(self, on_ready: Callable[[], None]) -> None:
        for unit in range(self._states.size):
            if self._stopped.is_set():
                return
            if self._available_bytes() < self.unit_bytes + SPARE_BYTES:
                LOG.warning("arena: memory runs short, %d bytes had", unit * self.unit_bytes)
                break
            if not self._fault_in(unit * self.unit_bytes):
                LOG.warning("arena: no memory, %d bytes had", unit * self.unit_bytes)
                break
            with self._lock:
                self._states[unit] = FREE
            on_ready()
        self.populated = True
        on_ready()
        step_back()
        self._collapse()

    def _collapse(self) -> None:
        """Move what is there into huge pages, as far as the kernel has them. Nothing that a reader
        or writer would notice but for the time that one page's copying takes."""
        if self.page_kind == HUGETLB:
            return
        ready = self.ready_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        for start in range(0, ready, COLLAPSE_BYTES):
            length = min(COLLAPSE_BYTES, ready - start)
            if self._stopped.is_set():
                return
            if _libc.madvise(self.memory.ctypes.data + start, length, MADV_COLLAPSE) == 0:
                self.huge_bytes += length
            elif ctypes.get_errno() == errno.EINVAL:
                break  # not aligned, not with this kernel, or forbidden
        LOG.info("arena: %d bytes moved into huge pages", self.huge_bytes)

    def _fault_in(self, offset: int) -> bool:
        address = self.memory.ctypes.data + offset
        if _libc.madvise(address, self.unit_bytes, MADV_POPULATE_WRITE) == 0:
            return True
        if ctypes.get_errno() != 22:  # anything but EINVAL: there is no memory
            return False
        for start in range(offset, offset + self.unit_bytes, TOUCH_BYTES):
            end = min(start + TOUCH_BYTES, offset + self.unit_bytes)
            self.memory[start:end:4096] = 0
        return True


def _runs(free: NDArray[np.bool_], units: int) -> NDArray[np.int64]:
    """Where so many free units begin, lowest first."""
    if units < 1 or units > free.size:
        return np.empty(0, np.int64)
    sums = np.concatenate([[0], np.cumsum(free)])
    return np.flatnonzero(sums[units:] - sums[:-units] == units)


def _create(
    capacity_bytes: int, before_seal: Callable[[int, int], None]
) -> tuple[int, NDArray[np.uint8], str]:
    """A mapped and sealed memfd; hugetlb pages when the host has set them aside, else shmem."""
    if not capacity_bytes:
        fd = os.memfd_create("kvc2-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd, np.empty(0, np.uint8), "no pages"
    if capacity_bytes % HUGE_PAGE_BYTES == 0:
        with suppress(OSError):  # no hugetlb, or no huge pages set aside: the usual case
            fd = os.memfd_create("kvc2-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_HUGETLB)
            try:
                return fd, _map(fd, capacity_bytes, before_seal), HUGETLB
            except OSError:
                os.close(fd)
    fd = os.memfd_create("kvc2-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        mapped = _map(fd, capacity_bytes, before_seal)
    except OSError as error:
        os.close(fd)
        raise errors.StartRefused(
            f"cpu.memory_size_gb = {capacity_bytes / 1e9:g}: no address space of that size:"
            f" {error.strerror} (ulimit -v says what is allowed)"
        ) from error
    # fails on a kernel without transparent huge pages
    _libc.madvise(mapped.ctypes.data, capacity_bytes, mmap.MADV_HUGEPAGE)
    return fd, mapped, _shmem_page_kind()


def _map(
    fd: int, capacity_bytes: int, before_seal: Callable[[int, int], None]
) -> NDArray[np.uint8]:
    """At an address that huge pages can have: over the middle of a reservation, which unmaps all
    of it with the array's last view."""
    os.ftruncate(fd, capacity_bytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = np.frombuffer(mmap.mmap(-1, capacity_bytes + HUGE_PAGE_BYTES, flags), np.uint8)
    start = -reserved.ctypes.data % HUGE_PAGE_BYTES
    memory = reserved[start : start + capacity_bytes]
    access, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
    where = memory.ctypes.data
    if _libc.mmap(where, capacity_bytes, access, shared, fd, 0) != where:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    before_seal(fd, capacity_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return memory


def _shmem_page_kind() -> str:
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return "4 KiB pages"
    mode = modes.partition("[")[2].partition("]")[0]
    huge = mode in {"always", "within_size", "advise", "force"}
    return f"{'transparent huge' if huge else '4 KiB'} pages (shmem_enabled is {mode})"
