"""The arena: sealed memory, handed out in runs, faulted in behind a serving daemon."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from kvc2 import errors
from kvc2.arena import HUGE_PAGE_BYTES, Arena
from kvc2.moving.background import Background
from tests.doubles.caches import running
from tests.doubles.stand_in import StandIn, prompt

UNIT, MIB = 1 << 16, 1 << 20


def populated(units: int, available: int = 1 << 40) -> Arena:
    arena = Arena(units * UNIT, UNIT, available_bytes=lambda: available)
    arena.start()
    assert arena.wait_populated(20)
    return arena


def test_nobody_else_can_write_resize_or_unseal_the_arena() -> None:
    arena = populated(2)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, 2 * UNIT, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, UNIT)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    reader = mmap.mmap(arena.fd, 2 * UNIT, mmap.MAP_SHARED, mmap.PROT_READ)
    arena.memory[UNIT] = 42  # the daemon writes on, and readers see it
    assert reader[UNIT] == 42
    arena.close()


def test_runs_are_contiguous_disjoint_and_come_back() -> None:
    arena = populated(6)
    first, second, third = (arena.take(2 * UNIT) for _ in range(3))
    assert [first, second, third] == [0, 2 * UNIT, 4 * UNIT]
    assert arena.take(UNIT) is None
    arena.give_back(2 * UNIT, 2 * UNIT)
    assert arena.take(3 * UNIT) is None
    assert arena.take(2 * UNIT) == second
    with pytest.raises(ValueError):
        arena.give_back(6 * UNIT, UNIT)
    arena.close()


def test_what_is_not_faulted_in_yet_is_not_handed_out() -> None:
    arena = Arena(4 * UNIT, UNIT)
    assert arena.take(UNIT) is None
    seen: list[int] = []
    arena.start(lambda: seen.append(arena.ready_bytes))
    assert arena.wait_populated(20)
    assert seen == [UNIT, 2 * UNIT, 3 * UNIT, 4 * UNIT, 4 * UNIT]
    arena.close()


def test_what_cannot_be_had_shrinks_the_arena() -> None:
    arena = populated(4, available=0)
    assert arena.populated
    assert (arena.ready_bytes, arena.short_bytes) == (0, 4 * UNIT)
    assert arena.take(UNIT) is None
    arena.close()


def test_an_arena_of_less_than_a_slab_is_refused() -> None:
    with pytest.raises(errors.InvalidConfig, match=r"cpu\.memory_size_gb"):
        Arena(UNIT - 1, UNIT)


def test_moving_into_huge_pages_changes_no_byte_and_is_counted() -> None:
    arena = Arena(9 * MIB, UNIT, available_bytes=lambda: 1 << 40)
    before = np.random.default_rng(0).integers(0, 256, 9 * MIB, np.uint8)
    arena.memory[:] = before
    arena.start()
    assert arena.wait_populated(20)
    assert arena.memory.ctypes.data % HUGE_PAGE_BYTES == 0
    reader = mmap.mmap(arena.fd, 9 * MIB, mmap.MAP_SHARED, mmap.PROT_READ)
    assert reader[:] == before.tobytes()
    assert arena.huge_bytes in (0, 8 * MIB)  # none on a kernel that has none to give
    arena.close()


def test_memory_is_unmapped_with_the_last_view_of_it() -> None:
    arena = populated(2)
    view = arena.memory[UNIT:]
    arena.close()
    address = arena.memory.ctypes.data
    del arena
    view[:] = 1
    assert mapped(address)
    del view
    assert not mapped(address)


def mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines if "kvc2-arena" in line)
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


def test_a_flush_waits_for_the_arena_that_comes_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no memory when the copying was tried, and all of it is there when a flush asks."""
    asked, coming = threading.Event(), Background._room_is_coming

    def available_bytes() -> int:
        assert asked.wait(60)
        return 1 << 40

    async def run() -> None:
        async with running(tmp_path) as cache:

            def meanwhile(background: Background) -> bool:
                asked.set()
                assert cache._pools.arena.wait_populated(60)
                return coming(background)

            monkeypatch.setattr(Background, "_room_is_coming", meanwhile)
            await StandIn(cache, 32).ask(prompt(1, 8))
            found = await cache.flush(60)
            assert (found.durable_blocks, found.not_durable_blocks) == (8, {})

    monkeypatch.setattr("kvc2.arena.available_memory_bytes", available_bytes)
    asyncio.run(run())


def test_nothing_is_evicted_for_want_of_the_arena_that_is_still_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cpu gives up before the disk has it would not be on disk after a flush that says so."""
    units, go_on = iter(range(1 << 20)), threading.Event()

    def available_bytes() -> int:
        if next(units) > 0:
            assert go_on.wait(60)
        return 1 << 40

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine, background = StandIn(cache, 256), cache._background
            assert background is not None
            for seed in range(8):
                await engine.ask(prompt(seed, 25))
            cpu = engine.session.pool.pools.cpu.id
            while not cache.index.pool_counts(cpu).resident or not background._idle:
                background._fell_idle.clear()
                await background._fell_idle.wait()
            go_on.set()
            found = await cache.flush(60)
            assert (found.durable_blocks, found.not_durable_blocks) == (200, {})

    monkeypatch.setattr("kvc2.arena.available_memory_bytes", available_bytes)
    asyncio.run(run())
