"""Hashes of a checkpoint's tensors, kept so that a later start need not read what it doesn't use.

    {"version", "files": [stamp of each], "hashes": {tensor: xxh3_128 of its bytes}}
    xxh3_128 of that line

A stamp is a file's path, device, inode, size, time of its last write and time of its last change.
That last one is the kernel's own: whoever writes a file, replaces it or sets its times back changes
it. Times are as coarse as the clock that sets them, so that nothing is kept of files that were
changed just before they were opened. Not responsible for reading tensors, nor for the check of a
sample of them (weights): a file system may lie, or a disk decay.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)

_VERSION = 1
_COARSE_NS = 2_000_000_000  # the coarsest clock of a file system that is in use


@dataclass(frozen=True)
class Stamp:
    """Of an open file, as of `taken_ns`."""

    path: str
    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path, fd: int) -> Stamp:
        s = os.fstat(fd)
        return cls(str(path.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """A later write would have another stamp."""
        return time.time_ns() - max(self.written_ns, self.changed_ns) > _COARSE_NS


def save(path: Path, stamps: Sequence[Stamp], hashes: Mapping[str, str]) -> None:
    """Logs what prevents it."""
    told = {"version": _VERSION, "files": [astuple(s) for s in stamps], "hashes": dict(hashes)}
    line = json.dumps(told).encode()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n")
        beside.replace(path)
    except OSError as error:
        log.warning("digests are not kept: %s", error)
        with suppress(OSError):
            beside.unlink()


def load(path: Path, stamps: Sequence[Stamp]) -> dict[str, str] | None:
    """The hashes of files with these stamps; None for others, or where the file is damaged."""
    try:
        line, seal, _ = path.read_bytes().split(b"\n")
        if xxhash.xxh3_128_hexdigest(line).encode() != seal:
            raise ValueError("it is damaged")
        told = json.loads(line)
        if told["version"] != _VERSION:
            return None
        if [Stamp(*each) for each in told["files"]] != list(stamps):
            return None
        return {str(name): str(digest) for name, digest in told["hashes"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("digests in %s are taken anew: %s", path, error)
        return None


def drop(path: Path) -> None:
    """What was kept there is wrong."""
    with suppress(OSError):
        path.unlink()
