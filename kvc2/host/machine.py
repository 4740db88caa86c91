"""How much memory, disk and CPU there is for this process: the machine's, or what a cgroup leaves.

Not responsible for what anybody takes of it; the engine asks here too.
"""

from __future__ import annotations

import math
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


def cpus(root: Path = Path("/")) -> int:
    """How many threads can run at the same time: the CPUs that this process may use, or as many as
    its cgroup's quota pays for, a started one counted. At least 1."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(math.ceil(each) for each in _cgroup_cpus(root))]))


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
    """(folder, limit, used) of every cgroup above this process that has a limit of memory."""
    files = {2: ("memory.max", "memory.current")}
    files[1] = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    found = []
    for version, folder in _cgroups(root, "memory"):
        limit, used = (_read_number(folder / name) for name in files[version])
        if limit is not None and used is not None:
            found.append((str(folder), limit, used))
    return found


def _cgroup_cpus(root: Path) -> list[float]:
    """The CPU time that every cgroup above this process with a quota has, in CPUs."""
    found = []
    for version, folder in _cgroups(root, "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(period) > 0:  # else "max", or -1
            found.append(int(quota) / int(period))
    return found


def _cgroups(root: Path, controller: str) -> list[tuple[int, Path]]:
    """(version, folder) of every cgroup of a controller above this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, mount = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, mount = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        # inside a container the path may not exist below the mount: then its root is our group
        folder = mount / path.strip("/")
        for each in [folder, *folder.parents]:
            found.append((version, each))
            if each == mount:
                break
    return found


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
