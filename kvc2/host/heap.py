"""What this process's C library does with memory that is freed. Not here: who takes some."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 16 << 20


def keep_freed_memory() -> None:
    """At the end of a heap, KEPT_BYTES at most. By itself glibc gives it back as soon as two
    messages of 1 MiB are freed, and the kernel clears it anew for the next ones: that takes longer
    than all else that is done to them. Does nothing where the C library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 4)  # what is smaller comes from a heap
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
