"""What the hostile driver provokes, and a real one must not be asked to: faults of calls, pitches
beyond its limits, mistakes. Each test is in a process of its own (test_laws.py), since a poisoned
context is for life."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal

import numpy as np
import pytest

from kvc2.cuda.driver import ask, cu
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import DeviceMemory
from kvc2.cuda.mover import DevicePages, Mover
from kvc2.cuda.rows import groups
from tests.cuda.laws.pools import SHAPES, Bench, Hostile, bench, hostile

PAGES = np.arange(6, dtype=np.uint32)


@pytest.fixture
def driver() -> Hostile:
    found = hostile()
    if found is None:
        pytest.skip("a real driver: nothing may be provoked on it")
    return found


@pytest.fixture
def one(driver: Hostile) -> Bench:
    return bench(SHAPES["layer major"])


@pytest.mark.parametrize("code", [214, 700, 719])
def test_a_poisoned_context_fails_every_call_and_tells_no_layer(
    one: Bench, driver: Hostile, code: int
) -> None:
    mover, told = Mover(one.gpu, one.registered), []
    driver.words(f"late_us=200,fail=cuMemcpy2DAsync:9:{code}")
    for _ in range(2):
        with pytest.raises(CudaFault) as failed:
            mover.write(one.pages, PAGES, one.offsets(6), told.append)
        assert failed.value.sticky
        assert failed.value.code == code
    assert told == []


@pytest.mark.parametrize("call", ["cuEventSynchronize:2", "cuEventRecord:3"])
def test_layers_told_before_a_fault_are_there(one: Bench, driver: Hostile, call: str) -> None:
    mover, told = Mover(one.gpu, one.registered), []
    driver.words(f"fail={call}:700")
    with pytest.raises(CudaFault):
        mover.write(one.pages, PAGES, one.offsets(6), told.append)
    assert told in ([], [1])


@pytest.mark.parametrize("way", ["write", "read"])
def test_nothing_is_under_way_after_a_call_that_failed(
    one: Bench, driver: Hostile, way: str
) -> None:
    """A fault of one call leaves the context whole, and what was queued before goes on."""
    mover = Mover(one.gpu, one.registered)
    driver.words("late_us=20000,fail=cuMemcpy2DAsync:3:1")
    with pytest.raises(CudaFault) as failed:
        getattr(mover, way)(one.pages, PAGES, one.offsets(6))
    assert not failed.value.sticky
    one.close()  # unmaps what copies would touch
    assert "pending" not in driver.report()


def test_what_failed_once_works_again(one: Bench, driver: Hostile) -> None:
    mover, offsets = Mover(one.gpu, one.registered), one.offsets(6)
    driver.words("fail=cuMemHostRegister:1:2")
    with pytest.raises(CudaFault, match="OUT_OF_MEMORY"):
        mover.write(one.pages, PAGES, offsets)
    mover.write(one.pages, PAGES, offsets)
    pool = one.pool()
    for page, offset in zip(PAGES.tolist(), offsets, strict=True):
        assert (one.shape.page(pool, page) == one.payload(offset)).all()


@pytest.mark.parametrize("most", [4096, 24 * 4096 - 1, 24 * 4096])
def test_no_pitch_is_beyond_the_devices(one: Bench, driver: Hostile, most: int) -> None:
    """A pool whose rows lie further apart is copied row by row."""
    driver.words(f"max_pitch={most}")
    rows = groups(one.shape.segments, one.shape.layer_ends, one.gpu.max_pitch)
    pages, offsets = DevicePages(one.memory.mapping, rows), one.offsets(6)
    Mover(one.gpu, one.registered).write(pages, PAGES, offsets)
    pool = one.pool()
    for page, offset in zip(PAGES.tolist(), offsets, strict=True):
        assert (one.shape.page(pool, page) == one.payload(offset)).all()
    assert driver.calls("cuMemcpy2DAsync") == 6 * (8 if most < 24 * 4096 else 4)


FAILING = {
    "cuMemCreate": 1,
    "cuMemExportToShareableHandle": 1,
    "cuMemAddressReserve": 1,
    "cuMemMap": 1,
    "cuMemSetAccess": 1,
}


@pytest.mark.parametrize("name", FAILING)
def test_a_pool_that_can_not_be_made_leaves_nothing(driver: Hostile, name: str) -> None:
    ask(cu.cuInit, 0)
    driver.words(f"fail={name}:1:2")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CudaFault, match="OUT_OF_MEMORY"):
        DeviceMemory(1 << 20)
    assert "ranges 0 pinned 0 handles 0" in driver.report()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_host_that_reads_device_memory_dies(one: Bench) -> None:
    if (child := os.fork()) == 0:
        faulthandler.disable()
        ctypes.string_at(one.memory.address, 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_a_fork_has_no_driver(one: Bench) -> None:
    if (child := os.fork()) == 0:
        status = cu.cuMemGetInfo()[0]
        os._exit(int(status))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


MISTAKES = {
    "host memory that is not in one registration": lambda b, m: (
        b.registered.ensure(b.offsets(6), b.shape.payload_bytes),
        ask(cu.cuMemHostUnregister, b.registered.address),
        m.read(b.pages, PAGES, b.offsets(6)),
    ),
    "without a context": lambda b, m: (
        ask(cu.cuCtxSetCurrent, 0),
        m.read(b.pages, PAGES, b.offsets(6)),
    ),
    "work pending": lambda b, m: (
        b.registered.ensure(b.offsets(6), b.shape.payload_bytes),
        m._queue(b.pages, b.pages.groups[0], PAGES, b.offsets(6), to_pool=True),
        b.memory.close(),
    ),
    "on a default stream": lambda b, m: (
        setattr(m, "_stream", cu.CUstream(0)),
        m.read(b.pages, PAGES, b.offsets(6)),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(one: Bench, driver: Hostile, name: str) -> None:
    mover = Mover(one.gpu, one.registered)
    driver.words("late_us=20000")
    with contextlib.suppress(CudaFault):
        MISTAKES[name](one, mover)
    assert name in driver.report()


def test_reading_before_waiting_gives_no_bytes_by_luck(one: Bench, driver: Hostile) -> None:
    mover, offsets = Mover(one.gpu, one.registered), one.offsets(6)
    before = one.arena.copy()
    driver.words("late_us=20000")
    one.registered.ensure(offsets, one.shape.payload_bytes)
    for group in one.pages.groups:
        mover._queue(one.pages, group, PAGES, offsets, to_pool=False)
    pool = one.pool()

    def came() -> bool:
        pairs = zip(PAGES.tolist(), offsets, strict=True)
        return all((one.shape.page(pool, page) == one.payload(at)).all() for page, at in pairs)

    assert not came()
    mover._drain()
    assert came()
    assert not (one.arena == before).all()
