"""How much memory and disk there is for this process: the machine's, or what a cgroup leaves of it.

Not responsible for what anybody takes of it; the engine asks here too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

GB = 1_000_000_000


@dataclass(frozen=True)
class Room:
    """`total_bytes` can never be exceeded by anybody in it; `available_bytes` are free now."""

    owner: str  # whose it is, as an error names it
    total_bytes: int
    available_bytes: int

    def __str__(self) -> str:
        return f"{self.owner} has {self.total_bytes / GB:.3f} GB"


def memory(root: Path = Path("/")) -> Room:
    """The machine's memory, without swap; or that of the cgroup (v2, v1) with the lowest limit.
    `root` is for tests."""
    text = (root / "proc/meminfo").read_text()
    owner, total = "this machine", _kilobytes(text, "MemTotal")
    available = _kilobytes(text, "MemAvailable")
    for folder, limit, used in _cgroup_limits(root):
        if limit < total:
            owner, total = f"the cgroup {folder}", limit
        available = min(available, max(limit - used, 0))
    return Room(owner, total, available)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What this process could still take."""
    return memory(root).available_bytes


def disk(path: Path, own: Path) -> Room:
    """The file system that holds `path`, or that will once the path exists. What lies below the
    folder `own` counts as available: looks at each file there. Raises OSError."""
    place, facts = _file_system(path)
    available = facts.f_bavail * facts.f_frsize + _taken(own)
    return Room(f"the file system of {place}", facts.f_blocks * facts.f_frsize, available)


def file_system_bytes(path: Path) -> int:
    """The size of the file system that holds `path`, or will. Raises OSError."""
    _, facts = _file_system(path)
    return facts.f_blocks * facts.f_frsize


def _file_system(path: Path) -> tuple[Path, os.statvfs_result]:
    while True:
        try:
            return path, os.statvfs(path)
        except FileNotFoundError:
            path = path.parent


def _taken(folder: Path) -> int:
    """Bytes of the file system that the files below `folder` take."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:  # removed meanwhile
                continue
    return found


def _kilobytes(meminfo: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _cgroup_limits(root: Path) -> list[tuple[str, int, int]]:
    """(folder, limit, used) of every cgroup above this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # inside a container the path may not exist below the mount: then its root is our group
        folder = mount / path.strip("/")
        for each in [folder, *folder.parents]:
            limit, used = (_read_number(each / name) for name in names)
            if limit is not None and used is not None:
                found.append((str(each), limit, used))
            if each == mount:
                break
    return found


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
