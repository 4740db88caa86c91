"""Which NUMA nodes the arena lies on, and where threads run. One node is enough to see that."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import pytest

from kvc2 import errors
from kvc2.arena import Arena
from kvc2.config import CpuConfig
from kvc2.host import numa

UNIT = 1 << 20
SYS_GET_MEMPOLICY, MPOL_F_ADDR = 239, 2  # x86-64; linux/mempolicy.h


def machine(folder: Path, cpus: dict[int, str]) -> Path:
    """What Linux tells of its nodes: the CPUs of each."""
    folder.mkdir()
    (folder / "has_memory").write_text(",".join(map(str, cpus)) + "\n")
    for node, text in cpus.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(text + "\n")
    return folder


def policy_of(arena: Arena) -> tuple[int, list[int]]:
    """Mode and nodes of its memory, as the kernel has them."""
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * (numa.MASK_BITS // numa.WORD_BITS))()
    where = ctypes.c_void_p(arena.memory.ctypes.data)
    call = ctypes.CDLL(None, use_errno=True).syscall
    maximum = ctypes.c_ulong(numa.MASK_BITS)
    assert call(SYS_GET_MEMPOLICY, ctypes.byref(mode), mask, maximum, where, MPOL_F_ADDR) == 0
    return mode.value, [bit for bit in range(64) if mask[0] >> bit & 1]


def test_lists_are_read_as_linux_writes_them() -> None:
    assert numa.numbers("0-2,5\n") == [0, 1, 2, 5]
    assert numa.numbers("7") == [7]
    assert numa.numbers("\n") == []


def test_interleave_takes_all_nodes_with_memory_and_local_none(tmp_path: Path) -> None:
    two = machine(tmp_path / "two", {0: "0", 2: "1"})
    assert numa.wanted("interleave", two) == [0, 2]
    assert numa.wanted("local", two) == []
    assert numa.wanted("2", two) == [2]
    one = machine(tmp_path / "one", {0: "0-1"})
    assert numa.wanted("interleave", one) == []  # there is nothing to choose
    assert numa.wanted("interleave", tmp_path / "none") == []


@pytest.mark.parametrize("nodes", ["1", "0,1", "2-0"])
def test_a_node_that_is_not_there_is_refused_by_name(tmp_path: Path, nodes: str) -> None:
    two = machine(tmp_path / "two", {0: "0", 2: "1"})
    with pytest.raises(errors.InvalidConfig, match=rf"cpu.numa = '?{nodes}.*memory: 0, 2"):
        numa.wanted(nodes, two)


@pytest.mark.parametrize("text", ["", "all", "0,", "-1", "0 1", "off"])
def test_another_word_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidConfig, match=r"cpu.numa.*interleave, local, or nodes"):
        CpuConfig(memory_size_gb=1, numa=text)


@pytest.mark.parametrize(("nodes", "there"), [([], (0, [])), ([0], (numa.MPOL_PREFERRED, [0]))])
def test_the_kernel_knows_where_the_arena_is_to_lie(
    nodes: list[int], there: tuple[int, list[int]]
) -> None:
    arena = Arena(2 * UNIT, UNIT, nodes=nodes)
    assert policy_of(arena) == there
    arena.start()
    assert arena.wait_populated(20)
    assert arena.take(2 * UNIT) == 0
    arena.close()


def test_several_nodes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, list[int]]] = []

    class Kernel:
        def syscall(self, number: int, where: object, length: object, *rest: object) -> int:
            mode, mask = rest[0], rest[1]
            asked.append((number, mode, list(mask)))  # type: ignore[arg-type,call-overload]
            return 0

    monkeypatch.setattr(numa, "_libc", Kernel())
    assert numa.place(0, UNIT, [0, 2, 65])
    [(number, mode, mask)] = asked
    assert (number, mode) == (numa.SYS_MBIND, numa.MPOL_INTERLEAVE)
    assert mask == [0b101, 0b10, *[0] * 14]


def test_where_the_kernel_refuses_the_arena_lies_anywhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        arena = Arena(2 * UNIT, UNIT, nodes=[999])
    assert "cpu.numa: not placed: Invalid argument" in caplog.text
    arena.start()
    assert arena.wait_populated(20)
    assert arena.ready_bytes == 2 * UNIT
    arena.close()


def test_threads_run_beside_the_nodes_that_are_named(tmp_path: Path) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    two = machine(tmp_path / "two", {0: str(first), 1: "4000"})
    seen: list[set[int]] = []

    def run(nodes: str) -> None:
        numa.run_beside(nodes, two)
        child = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        child.start()
        child.join()

    for nodes in ("0", "interleave", "local", "1"):
        thread = threading.Thread(target=run, args=(nodes,))
        thread.start()
        thread.join()
    everywhere = {first, *others}
    assert seen == [{first}, everywhere, everywhere, everywhere]
