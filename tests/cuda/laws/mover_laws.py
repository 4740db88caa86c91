"""The laws of copies between a pool on a device and the arena: on the hostile driver, and on a real
one (`python -m pytest tests/cuda/laws/mover_laws.py` where there is a GPU)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvc2.cuda.driver import ask, cu
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import DeviceMemory, Registered, opened
from kvc2.cuda.mover import Mover
from tests.cuda.laws.pools import PIECE, SHAPES, Bench, Hostile, Shape, bench, hostile, judged

SEED = int(os.environ.get("KVC2_SEED", "1"))


@pytest.fixture(autouse=True)
def driver() -> Iterator[Hostile | None]:
    with judged() as found:
        yield found


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def made(request: pytest.FixtureRequest, driver: Hostile | None) -> Iterator[Bench]:
    made = bench(request.param, SEED)
    yield made
    made.close()


@pytest.fixture
def one(driver: Hostile | None) -> Iterator[Bench]:
    made = bench(SHAPES["layer major"], SEED)
    yield made
    made.close()


def some_pages(shape: Shape, count: int) -> np.ndarray:
    return np.random.default_rng(SEED + 1).permutation(shape.pages)[:count].astype(np.uint32)


@pytest.mark.parametrize("anywhere", [False, True], ids=["in pieces", "over their borders"])
def test_pages_go_and_come_back_and_nothing_else_is_touched(made: Bench, anywhere: bool) -> None:
    shape, pages = made.shape, some_pages(made.shape, 8)
    pool, arena = made.pool(), made.arena.copy()
    to_pool, to_arena = np.split(made.offsets(16, anywhere=anywhere, seed=SEED), 2)
    mover = Mover(made.gpu, made.registered)
    mover.write(made.pages, pages, to_pool)
    after = made.pool()
    for page, offset in zip(pages.tolist(), to_pool, strict=True):
        assert (shape.page(after, page) == made.payload(offset)).all()
    for page in set(range(shape.pages)) - set(pages.tolist()):
        assert (shape.page(after, page) == shape.page(pool, page)).all()
    mover.read(made.pages, pages, to_arena)
    for there, back in zip(to_pool, to_arena, strict=True):
        assert (made.payload(there) == made.payload(back)).all()
    touched = np.zeros(arena.size, bool)
    for offset in to_arena:
        touched[int(offset) : int(offset) + shape.payload_bytes] = True
    assert (made.arena[~touched] == arena[~touched]).all()
    mover.close()


def test_a_layer_is_there_when_it_is_told(made: Bench) -> None:
    shape, pages = made.shape, some_pages(made.shape, 7)
    offsets = made.offsets(7, seed=SEED)
    mover = Mover(made.gpu, made.registered)
    told: list[int] = []

    def tell(layers: int) -> None:
        told.append(layers)
        pool, count = made.pool(), sum(s[2] for s in shape.segments[: shape.layer_ends[layers - 1]])
        for page, offset in zip(pages.tolist(), offsets, strict=True):
            assert (shape.page(pool, page)[:count] == made.payload(offset)[:count]).all(), layers

    mover.write(made.pages, pages, offsets, tell)
    assert told == sorted(set(told))
    assert told[-1] == len(shape.layer_ends)
    assert len(told) == min(len(shape.layer_ends), len(made.pages.groups))
    mover.close()


def test_both_ways_at_once_do_not_hurt_one_another(made: Bench) -> None:
    shape = made.shape
    pages = np.random.default_rng(SEED).permutation(shape.pages).astype(np.uint32)
    up, down = pages[:4], pages[4:8]
    offsets = made.offsets(8, seed=SEED)
    before = made.pool()
    movers = Mover(made.gpu, made.registered), Mover(made.gpu, made.registered)

    def demote() -> None:
        made.gpu.use()
        for _ in range(3):
            movers[1].read(made.pages, down, offsets[4:])

    demoting = threading.Thread(target=demote)
    demoting.start()
    for _ in range(3):
        movers[0].write(made.pages, up, offsets[:4])
    demoting.join()
    after = made.pool()
    for page, offset in zip(up.tolist(), offsets[:4], strict=True):
        assert (shape.page(after, page) == made.payload(offset)).all()
    for page, offset in zip(down.tolist(), offsets[4:], strict=True):
        assert (shape.page(before, page) == made.payload(offset)).all()
    for each in movers:
        each.close()


def test_pieces_are_registered_when_they_are_used_and_once(one: Bench) -> None:
    mover = Mover(one.gpu, one.registered)
    driver = hostile()
    before = driver.calls("cuMemHostRegister") if driver else 0
    in_second = np.array([PIECE + 8192], np.uint64)
    for _ in range(2):
        mover.read(one.pages, np.array([3], np.uint32), in_second)
    if driver is not None:
        assert driver.calls("cuMemHostRegister") - before == 1
    mover.close()


def test_a_registration_that_ends_with_the_arena_is_as_long_as_that(one: Bench) -> None:
    """What follows it may be registered by others."""
    tail = Registered(one.arena[: PIECE + 8192], PIECE)
    tail.ensure(np.array([PIECE], np.uint64), 4096)
    after = Registered(one.arena[PIECE + 8192 : 2 * PIECE], PIECE)
    after.ensure(np.array([0], np.uint64), 4096)
    after.close()
    tail.close()


def test_what_lies_outside_is_refused_before_anything_is_copied(one: Bench) -> None:
    mover = Mover(one.gpu, one.registered)
    before, offsets = one.pool(), one.offsets(2)
    with pytest.raises(IndexError, match="page 24 ends"):
        mover.write(one.pages, np.array([0, one.shape.pages], np.uint32), offsets)
    with pytest.raises(IndexError):
        mover.read(one.pages, np.array([0], np.uint32), np.array([one.arena.size], np.uint64))
    assert (one.pool() == before).all()
    mover.close()


def test_no_pages_are_no_work(one: Bench) -> None:
    mover, none = Mover(one.gpu, one.registered), np.empty(0, np.uint32)
    mover.write(one.pages, none, none.astype(np.uint64))
    mover.read(one.pages, none, none.astype(np.uint64))
    mover.close()


def test_memory_of_another_mapping_is_the_same_memory(one: Bench) -> None:
    again = opened(one.gpu, one.memory.fd, one.shape.num_bytes)
    found = np.empty(one.shape.num_bytes, np.uint8)
    ask(cu.cuMemcpyDtoH, found.ctypes.data, again.address, found.nbytes)
    assert (found == one.pool()).all()
    again.close()


def test_a_descriptor_of_something_else_or_of_less_is_refused_and_nothing_is_left(
    one: Bench,
) -> None:
    fd = os.memfd_create("not a device's")
    os.ftruncate(fd, 1 << 21)
    with pytest.raises(CudaFault) as refused:
        opened(one.gpu, fd, 1 << 21)
    assert not refused.value.sticky
    os.close(fd)
    with pytest.raises(CudaFault):
        opened(one.gpu, one.memory.fd, 1 << 30)


def test_a_pool_too_large_for_the_device_is_refused_and_nothing_is_left() -> None:
    with pytest.raises(CudaFault):
        DeviceMemory(1 << 60)


def test_a_device_is_known_by_its_uuid(one: Bench) -> None:
    again = type(one.gpu).of_uuid(one.gpu.uuid)
    assert again.ordinal == one.gpu.ordinal
    again.close()
    with pytest.raises(LookupError, match="GPU-none"):
        type(one.gpu).of_uuid("GPU-none")
