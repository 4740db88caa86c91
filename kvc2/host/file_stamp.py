"""Whether a file is still the one that was read: what digests of large files are kept by.

A stamp is a file's path, device, inode, size, time of its last write and time of its last change.
That last one is the kernel's own: whoever writes a file, replaces it or sets its times back changes
it. Times are as coarse as the clock that sets them: keep nothing of a file whose stamp is not
settled. Not responsible for a file system that lies, nor for a disk that decays.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_COARSE_NS = 2_000_000_000  # the coarsest clock of a file system that is in use


@dataclass(frozen=True)
class Stamp:
    """Of a file as it is now: an open one, or what is at a path."""

    path: str
    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path, fd: int) -> Stamp:
        return cls._of(str(path.resolve()), os.fstat(fd))

    @classmethod
    def at(cls, path: Path) -> Stamp:
        """Raises OSError."""
        return cls._of(str(path), path.stat())

    @classmethod
    def _of(cls, path: str, s: os.stat_result) -> Stamp:
        return cls(path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """A later write would have another stamp."""
        return time.time_ns() - max(self.written_ns, self.changed_ns) > _COARSE_NS
