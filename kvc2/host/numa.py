"""NUMA: which of the machine's nodes the arena lies on, and where the daemon's threads run.

`cpu.numa` says it: interleave spreads the arena over all nodes that have memory, so that no node's
channels are the limit; a list of nodes keeps it there, and the daemon's threads beside it; local
leaves both to the kernel. On a machine of one node interleave and local are the same, and cost
nothing. A full node is no fault: what it can't take lies on another one.
Sources: mbind(2), set_mempolicy(2), Documentation/admin-guide/mm/numa_memory_policy.rst of Linux.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from kvc2 import errors

LOG = logging.getLogger(__name__)

SYSFS = Path("/sys/devices/system/node")
SYS_MBIND = 237  # x86-64
MPOL_PREFERRED, MPOL_INTERLEAVE = 1, 3  # linux/mempolicy.h
MASK_BITS = 1024  # as many nodes as Linux can have
WORD_BITS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def wanted(numa: str, sysfs: Path = SYSFS) -> list[int]:
    """The nodes that `cpu.numa` means on this machine; none where there is nothing to choose.
    Raises InvalidConfig for a node that is not there or has no memory."""
    there = numbers(_read(sysfs / "has_memory"))
    if numa == "local":
        return []
    if numa == "interleave":
        return there if len(there) > 1 else []
    nodes = numbers(numa)
    if not nodes or not set(nodes) <= set(there):
        known = ", ".join(map(str, there)) or "none that Linux tells of"
        raise errors.InvalidConfig("cpu.numa", numa, f"nodes that have memory: {known}")
    return nodes


def place(address: int, num_bytes: int, nodes: Sequence[int]) -> bool:
    """Pages of this mapping that are not there yet will lie on these nodes, by turns. False, and
    it is logged, where the kernel refuses: a container may forbid it."""
    mask = (ctypes.c_ulong * (MASK_BITS // WORD_BITS))()
    for node in nodes:
        mask[node // WORD_BITS] |= 1 << node % WORD_BITS
    mode = MPOL_INTERLEAVE if len(nodes) > 1 else MPOL_PREFERRED
    where, length = ctypes.c_void_p(address), ctypes.c_ulong(num_bytes)
    if _libc.syscall(SYS_MBIND, where, length, mode, mask, ctypes.c_ulong(MASK_BITS), 0) == 0:
        return True
    LOG.warning("cpu.numa: not placed: %s", os.strerror(ctypes.get_errno()))
    return False


def run_beside(numa: str, sysfs: Path = SYSFS) -> None:
    """This thread, and those that it starts, run on the nodes that `cpu.numa` lists; anywhere
    under interleave and local, and where none of their CPUs is allowed to this process."""
    if numa in {"interleave", "local"}:
        return
    cpus = {
        cpu
        for node in wanted(numa, sysfs)
        for cpu in numbers(_read(sysfs / f"node{node}" / "cpulist"))
    }
    allowed = cpus & os.sched_getaffinity(0)
    if not allowed:
        LOG.warning("cpu.numa = %s: none of the nodes' CPUs is allowed to this process", numa)
        return
    os.sched_setaffinity(0, allowed)


def cpus_by_node(sysfs: Path = SYSFS) -> list[set[int]]:
    """Of each node that has memory, the CPUs that this thread may use; nodes without any left out.
    One entry where Linux tells of no nodes."""
    allowed = os.sched_getaffinity(0)
    nodes = numbers(_read(sysfs / "has_memory"))
    found = [set(numbers(_read(sysfs / f"node{node}" / "cpulist"))) & allowed for node in nodes]
    return [cpus for cpus in found if cpus] or [set(allowed)]


def numbers(text: str) -> list[int]:
    """0-2,5 -> 0, 1, 2, 5: how Linux lists nodes and CPUs. ValueError for another text."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without NUMA
        return ""
