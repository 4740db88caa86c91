"""The machine's own limits, for the run that is compared with them: bytes copied, bytes read.

Not our code's: numpy's copy of cold memory, and plain O_DIRECT reads of a file just written.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np

READ_BYTES = 8 << 20  # of one read; larger ones are no faster on an NVMe disk
PAGE_BYTES = 4096


class Probe:
    """Moves `bytes_moved` bytes; `file` is made on the disk in question."""

    def __init__(self, bytes_moved: int, file: Path) -> None:
        self._bytes = -(-bytes_moved // PAGE_BYTES) * PAGE_BYTES
        self._source = np.frombuffer(mmap.mmap(-1, self._bytes), np.uint8)
        self._target = mmap.mmap(-1, self._bytes)
        self._source[:] = 1
        self._file = file
        file.write_bytes(self._source.data)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def copy_s(self) -> float:
        """Seconds of one copy in memory."""
        begin = time.perf_counter()
        np.copyto(np.frombuffer(self._target, np.uint8), self._source)
        return time.perf_counter() - begin

    def read_s(self) -> float:
        """Seconds of reading them past the page cache, one request after the other."""
        descriptor = os.open(self._file, os.O_RDONLY | os.O_DIRECT)
        try:
            begin = time.perf_counter()
            for start in range(0, self._bytes, READ_BYTES):
                part = memoryview(self._target)[start : start + READ_BYTES]
                if os.preadv(descriptor, [part], start) != len(part):
                    raise OSError(f"{self._file}: a short read at {start}")
            return time.perf_counter() - begin
        finally:
            os.close(descriptor)
