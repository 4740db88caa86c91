"""Memory of weights on the CPU: in huge pages, where the host grants them to private memory.

A step reads gigabytes of weights from one end to the other; with pages of 4 KiB the processor walks
the page table half a million times for one of them. Not responsible for the KV pool, which is
shared with the daemon (kvc2/client/memory), nor for what a weight means.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20  # what small weights share
OWN_BYTES = _CHUNK_BYTES // 4  # the least of a large weight
_ALIGNED = 64  # a cache line

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_chunk = torch.empty(0, dtype=torch.uint8)


def settle(weight: Tensor) -> Tensor:
    """A copy where it stays. For the loader's thread."""
    settled = empty(tuple(weight.shape), weight.dtype)
    settled.copy_(weight)
    return settled


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a weight that stays as long as the model. For the loader's thread.

    A large one has memory of its own, which goes when the last tensor over it goes or is emptied
    (`weight.data = ...`)."""
    global _chunk
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes >= OWN_BYTES:
        whole = _mapped(num_bytes)[:num_bytes].view(dtype).view(shape)
        return whole.detach()  # a view keeps what it is a view of, even when it is emptied
    if num_bytes > len(_chunk):
        _chunk = _mapped(_CHUNK_BYTES)
    taken = -(-num_bytes // _ALIGNED) * _ALIGNED
    mine, _chunk = _chunk[:num_bytes], _chunk[taken:]
    return mine.view(dtype).view(shape)


def give_up(x: Tensor) -> None:
    """The host has the whole pages of its memory back, and what it held is lost. Contiguous, and no
    memory that is shared with others. Nothing where the system refuses."""
    page = mmap.PAGESIZE
    begin = -(-x.data_ptr() // page) * page
    num_bytes = (x.data_ptr() + x.numel() * x.dtype.itemsize - begin) // page * page
    if num_bytes > 0:
        _libc.madvise(begin, num_bytes, mmap.MADV_DONTNEED)


def huge_bytes() -> int:
    """Of this process's private memory, what lies in huge pages now; 0 where nobody tells."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
    return 0


def shared_policy() -> str:
    """When the host grants huge pages to shared memory, in the kernel's word: always, within_size,
    advise (whoever asks, as the pool does), never, deny, force; unknown where nobody tells."""
    told = ""
    with suppress(OSError):
        told = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    return told.partition("[")[2].partition("]")[0] or "unknown"


def _mapped(num_bytes: int) -> Tensor:
    """uint8, from a huge page's boundary on."""
    whole = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    mapped = mmap.mmap(-1, whole + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[first : first + whole]
