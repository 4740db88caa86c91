"""The contract of GpuExecutor over a worker, an engine and a device, and every death there may be:
on the hostile driver and on a real one. Here the test is the daemon. It never calls CUDA."""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvc2.arena import Arena
from kvc2.cuda.faults import NoWorker, RefusedByWorker, WorkerLost
from kvc2.cuda.nursery import CudaHost, Nursery
from kvc2.cuda.workers import Workers
from kvc2.layout import HEADER_BYTES, layer_major
from kvc2.tiers import device
from kvc2.tiers.device import DevicePool, DeviceShare
from kvc2.tiers.executors import Executors
from kvc2.tiers.gpu import PROGRESS_STEP
from tests import ROOT
from tests.cuda.laws import engine
from tests.cuda.laws.engine import EngineProcess
from tests.cuda.laws.pools import Bytes

SEED = int(os.environ.get("KVC2_SEED", "1"))
PAGES, UNIT, UNITS = 24, 1 << 20, 4
LAYOUT = layer_major(4, PAGES, segment_bytes=4096, page_size=16)
POOL_BYTES = PAGES * LAYOUT.payload_bytes
RESCUE_S = 2.0


@dataclass
class House:
    """A daemon's end: an arena, workers, and what is shared with engines."""

    nursery: Nursery
    arena: Arena
    workers: Workers
    opened: list[DevicePool] = field(default_factory=list)
    engines: list[EngineProcess] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def engine(self, ordinal: int = 0, seed: int = SEED) -> EngineProcess:
        self.engines.append(engine.start(POOL_BYTES, seed, ordinal))
        return self.engines[-1]

    def share(self, uuid: str, memory_fd: int) -> tuple[DeviceShare, np.ndarray]:
        """And the progress word."""
        progress_fd = os.memfd_create("progress")
        os.ftruncate(progress_fd, 4096)
        word = np.frombuffer(mmap.mmap(progress_fd, 4096), "<u8", 1)
        event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.fds += [progress_fd, event_fd]
        return DeviceShare(uuid, POOL_BYTES, memory_fd, progress_fd, event_fd), word

    def pool(self, of: EngineProcess) -> tuple[DevicePool, np.ndarray, int]:
        """And its progress word and eventfd."""
        share, word = self.share(of.uuid, of.memory_fd)
        self.opened.append(DevicePool(LAYOUT, share, self.workers))
        return self.opened[-1], word, share.event_fd

    def offsets(self, count: int, seed: int = SEED) -> np.ndarray:
        """Of arena pages, in several units, none over their borders."""
        a_unit = UNIT // LAYOUT.page_bytes
        chosen = np.random.default_rng(seed).permutation(UNITS * a_unit)[:count]
        places = (chosen // a_unit) * UNIT + (chosen % a_unit) * LAYOUT.page_bytes
        return places.astype(np.uint64)

    def payload(self, offset: int) -> Bytes:
        begin = int(offset) + HEADER_BYTES
        return self.arena.memory[begin : begin + LAYOUT.payload_bytes]

    def close(self) -> None:
        for pool in self.opened:
            pool.close()
        for each in self.engines:
            each.close()
        self.workers.close()
        self.arena.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def house(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """`param`: words for the hostile driver, on which alone the test runs then."""
    if more := getattr(request, "param", ""):
        hostile_only()
        monkeypatch.setenv("HOSTILE", f"{os.environ['HOSTILE']},{more}")
    nursery = Nursery()
    arena = Arena(UNITS * UNIT, UNIT, before_seal=CudaHost(nursery).give_arena)
    random = np.random.default_rng(SEED)
    arena.memory[:] = random.integers(0, 256, arena.memory.size, np.uint8)
    made = House(nursery, arena, Workers(nursery))
    yield made
    made.close()


def page_of(pool: Bytes, page: int) -> Bytes:
    places = [(s.offset + page * s.stride, s.bytes) for s in LAYOUT.segments]
    return np.concatenate([pool[at : at + size] for at, size in places])


def pages(count: int) -> np.ndarray:
    return np.random.default_rng(SEED + 7).permutation(PAGES)[:count].astype(np.uint32)


def hostile_only() -> None:
    if "HOSTILE" not in os.environ:
        pytest.skip("a real driver: nothing may be provoked on it")


def came(house: House, pool: Bytes, of: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether pages and payloads are the same."""
    pairs = zip(of.tolist(), offsets.tolist(), strict=True)
    return all((page_of(pool, page) == house.payload(offset)).all() for page, offset in pairs)


# ---- the contract


def test_what_an_engine_computed_is_read_and_what_is_written_it_sees(house: House) -> None:
    """Into an arena that is sealed against every map that came later."""
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    offsets, first = house.offsets(16), pages(16)
    assert pool.read(first[:8], offsets[:8]).tolist() == [1] * 8
    assert came(house, engine.content(POOL_BYTES, SEED), first[:8], offsets[:8])
    pool.write(first[8:], offsets[8:], sequence=0)
    assert came(house, ours.pool(), first[8:], offsets[8:])
    with pytest.raises(PermissionError):
        mmap.mmap(house.arena.fd, UNIT)


def test_progress_rises_to_the_sequence_and_wakes_who_waits(house: House) -> None:
    ours = house.engine()
    pool, word, event_fd = house.pool(ours)
    for sequence in (7, 8):
        pool.write(pages(5), house.offsets(5), sequence=sequence)
        assert int(word[0]) == sequence * PROGRESS_STEP + LAYOUT.layers
        assert os.eventfd_read(event_fd) == LAYOUT.layers
    pool.write(pages(5), house.offsets(5), sequence=0)  # publishes nothing
    assert int(word[0]) == 8 * PROGRESS_STEP + LAYOUT.layers


def test_a_layer_is_there_when_the_engine_is_told(house: House) -> None:
    ours = house.engine()
    pool, word, _ = house.pool(ours)
    some, offsets, layer_bytes = pages(9), house.offsets(9), LAYOUT.payload_bytes // LAYOUT.layers
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(pool.write, some, offsets, sequence=1)
        layers = 0
        while layers < LAYOUT.layers:
            assert not (writing.done() and writing.exception()), writing.exception()
            layers = int(word[0]) % PROGRESS_STEP
            there, count = ours.pool(), layers * layer_bytes
            for page, offset in zip(some.tolist(), offsets.tolist(), strict=True):
                assert (page_of(there, page)[:count] == house.payload(offset)[:count]).all()


def test_engines_of_one_device_have_one_worker_and_go_one_by_one(house: House) -> None:
    first, second = house.engine(), house.engine(seed=SEED + 1)
    one, two = house.pool(first)[0], house.pool(second)[0]
    assert one.worker is two.worker
    with ThreadPoolExecutor(2) as threads:
        up = threads.submit(one.write, pages(6), house.offsets(12)[:6], sequence=1)
        down = threads.submit(two.read, pages(6), house.offsets(12)[6:])
        up.result()
        down.result()
    assert came(house, first.pool(), pages(6), house.offsets(12)[:6])
    assert came(house, second.pool(), pages(6), house.offsets(12)[6:])
    one.close()
    two.write(pages(6), house.offsets(6), sequence=1)
    assert came(house, second.pool(), pages(6), house.offsets(6))


def test_a_closed_pool_is_unmapped_and_moves_nothing(house: House) -> None:
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    pool.read(pages(3), house.offsets(3))
    assert mapped(pool) > 0
    pool.close()
    assert mapped(pool) == 0
    with pytest.raises((NoWorker, RefusedByWorker)):
        pool.read(pages(3), house.offsets(3))


def test_a_worker_keeps_nothing_of_pools_that_are_closed(house: House) -> None:
    ours = house.engine()
    stays, _, _ = house.pool(ours)
    stays.read(pages(3), house.offsets(3))

    def held() -> tuple[int, int]:
        """Descriptors, and maps of what was shared."""
        process = Path(f"/proc/{pid_of(stays.worker.pidfd)}")
        return len(os.listdir(process / "fd")), (process / "maps").read_text().count("/memfd:")

    before = held()
    for _ in range(5):
        share, _ = house.share(ours.uuid, ours.memory_fd)
        pool = DevicePool(LAYOUT, share, house.workers)
        pool.write(pages(3), house.offsets(3), sequence=1)
        pool.close()
    assert held() == before


def mapped(pool: DevicePool) -> int:
    """Maps of devices' memory in a worker, on the hostile driver; on a real one nobody knows."""
    hostile_only()
    maps = Path(f"/proc/{pid_of(pool.worker.pidfd)}/maps").read_text()
    return maps.count("/memfd:hostile-device")


def pid_of(pidfd: int) -> int:
    info = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return int(info.partition("Pid:")[2].split()[0])


def test_a_transfer_of_more_pages_than_a_datagram_holds(house: House) -> None:
    """A page is told by 12 bytes; a prompt may have a hundred thousand."""
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    with pytest.raises(RefusedByWorker, match="page 4294967295 ends"):
        pool.read(np.full(20_000, 0xFFFFFFFF, np.uint32), np.resize(house.offsets(8), 20_000))
    pool.read(pages(8), house.offsets(8))


def test_neither_daemon_nor_nursery_calls_cuda(house: House) -> None:
    pool, _, _ = house.pool(house.engine())
    pool.read(pages(1), house.offsets(1))
    nursery = int(Path(f"/proc/{pid_of(pool.worker.pidfd)}/stat").read_text().split()[3])
    for pid in (os.getpid(), nursery):
        assert "libcuda" not in Path(f"/proc/{pid}/maps").read_text()
    assert len(os.listdir(f"/proc/{nursery}/task")) == 1
    assert int(Path(f"/proc/{nursery}/stat").read_text().split()[3]) == os.getpid()


def test_what_there_is_is_found(house: House) -> None:
    ours = house.engine()
    found = house.nursery.found()
    assert ours.uuid in found.devices
    assert found.why == ""


# ---- what is refused


def test_a_descriptor_of_something_else_is_refused_by_name_and_costs_nobody_else(
    house: House,
) -> None:
    ours = house.engine()
    good, _, _ = house.pool(ours)
    fd = os.memfd_create("not a device's")
    os.ftruncate(fd, POOL_BYTES)
    share, _ = house.share(ours.uuid, fd)
    with pytest.raises(RefusedByWorker, match="cuMemImportFromShareableHandle"):
        DevicePool(LAYOUT, share, house.workers)
    os.close(fd)
    good.read(pages(3), house.offsets(3))
    assert came(house, ours.pool(), pages(3), house.offsets(3))
    assert not good.worker.dead


def test_memory_that_is_smaller_than_it_was_said_is_refused(house: House) -> None:
    ours = house.engine()
    share, _ = house.share(ours.uuid, ours.memory_fd)
    larger = DeviceShare(share.uuid, 1 << 30, share.memory_fd, share.progress_fd, share.event_fd)
    with pytest.raises(RefusedByWorker, match="cuMemMap"):
        DevicePool(LAYOUT, larger, house.workers)


def test_a_device_that_is_not_there_is_refused(house: House) -> None:
    ours = house.engine()
    share, _ = house.share("GPU-none", ours.memory_fd)
    with pytest.raises(RefusedByWorker, match="GPU-none"):
        DevicePool(LAYOUT, share, house.workers)


# ---- deaths


def test_what_a_killed_engine_left_is_rescued_in_time_and_let_go_of(house: House) -> None:
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    ours.kill()
    began = time.monotonic()
    offsets = house.offsets(PAGES)
    pool.read(np.arange(PAGES, dtype=np.uint32), offsets)
    first = engine.content(POOL_BYTES, SEED)
    assert came(house, first, np.arange(PAGES, dtype=np.uint32), offsets)
    pool.close()
    assert time.monotonic() - began < RESCUE_S
    assert mapped(pool) == 0


def test_an_engine_killed_under_a_transfer_costs_nobody_else(house: House) -> None:
    ours, other = house.engine(), house.engine(seed=SEED + 1)
    pool, _, _ = house.pool(ours)
    beside, _, _ = house.pool(other)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(pool.write, pages(12), house.offsets(12), sequence=1)
        ours.kill()
        writing.result()
    beside.read(pages(5), house.offsets(5))
    assert came(house, other.pool(), pages(5), house.offsets(5))


def test_a_killed_worker_fails_its_transfer_and_the_next_one_has_the_pool(house: House) -> None:
    ours = house.engine()
    pool, word, _ = house.pool(ours)
    first = pool.worker
    with ThreadPoolExecutor(1) as thread:
        os.kill(pid_of(first.pidfd), signal.SIGSTOP)  # so that it is under way
        writing = thread.submit(pool.write, pages(12), house.offsets(12), sequence=1)
        os.kill(pid_of(first.pidfd), signal.SIGKILL)
        with pytest.raises(WorkerLost):
            writing.result()
    assert first.dead
    pool.write(pages(12), house.offsets(12), sequence=2)
    assert int(word[0]) == 2 * PROGRESS_STEP + LAYOUT.layers
    assert came(house, ours.pool(), pages(12), house.offsets(12))


def test_a_frozen_worker_costs_its_deadline(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = house.engine()
    pool, word, _ = house.pool(ours)
    monkeypatch.setattr(device, "MOVE_S", 0.2)
    frozen = pool.worker
    os.kill(pid_of(frozen.pidfd), signal.SIGSTOP)
    with pytest.raises(WorkerLost, match=r"no answer|timed out"):
        pool.write(pages(4), house.offsets(4), sequence=1)
    assert frozen.dead
    monkeypatch.setattr(device, "MOVE_S", 20.0)
    pool.write(pages(4), house.offsets(4), sequence=2)
    assert int(word[0]) == 2 * PROGRESS_STEP + LAYOUT.layers


def test_a_worker_that_does_not_let_go_of_a_pool_is_killed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _, _ = house.pool(house.engine())
    monkeypatch.setattr(device, "CLOSE_S", 0.2)
    os.kill(pid_of(pool.worker.pidfd), signal.SIGSTOP)
    pool.close()
    assert pool.worker.dead


def test_a_killed_nursery_takes_its_workers_along_and_sessions_are_refused(house: House) -> None:
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    nursery = int(Path(f"/proc/{pid_of(pool.worker.pidfd)}/stat").read_text().split()[3])
    os.kill(nursery, signal.SIGKILL)
    assert select.select([pool.worker.pidfd], [], [], 5)[0]
    with pytest.raises(NoWorker):
        pool.read(pages(1), house.offsets(1))


def test_sessions_are_told_when_their_worker_dies(house: House) -> None:
    ours = house.engine()
    share, _ = house.share(ours.uuid, ours.memory_fd)

    async def lost() -> None:
        executors = Executors(house.arena.memory, 1, CudaHost(house.nursery))
        assert ours.uuid in (await executors.found()).devices
        told = asyncio.Event()
        pool = await executors.of_device(LAYOUT, share, told.set)
        os.kill(pid_of(pool.worker.pidfd), signal.SIGKILL)
        async with asyncio.timeout(10):
            await told.wait()
        await asyncio.to_thread(pool.close)
        await executors.close()

    asyncio.run(lost())


DAEMON = """
import socket, sys, threading, time
from tests.cuda.laws.executor_laws import *
side = socket.socket(fileno=int(sys.argv[1]))
uuid, fds, _, _ = socket.recv_fds(side, 100, 1)
nursery = Nursery()
arena = Arena(UNITS * UNIT, UNIT, before_seal=CudaHost(nursery).give_arena)
house = House(nursery, arena, Workers(nursery))
pool = DevicePool(LAYOUT, house.share(uuid.decode(), fds[0])[0], house.workers)
side.send(str(pid_of(pool.worker.pidfd)).encode())
while True:
    pool.write(pages(12), house.offsets(12), sequence=0)
"""


@pytest.mark.parametrize("frozen", [False, True], ids=["busy", "frozen"])
def test_nothing_writes_into_a_pool_after_its_daemon_was_killed(house: House, frozen: bool) -> None:
    """Its worker dies with it, though a copy is under way, and even if it hears nothing."""
    ours = house.engine()
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(b.fileno())], pass_fds=[b.fileno()], cwd=ROOT
    )
    b.close()
    a.settimeout(60)
    socket.send_fds(a, [ours.uuid.encode()], [ours.memory_fd])
    worker = os.pidfd_open(pid := int(a.recv(20)))
    if frozen:
        os.kill(pid, signal.SIGSTOP)
    daemon.kill()
    daemon.wait()
    assert select.select([worker], [], [], 5)[0], "the worker outlived its daemon"
    os.close(worker)
    first = ours.pool()
    assert (ours.pool() == first).all()
    assert not came(house, first, pages(12), house.offsets(12))  # it was another arena's


# ---- faults of the driver


def words(more: str) -> pytest.MarkDecorator:
    """What the driver of each worker is told besides; the engine's makes no such calls."""
    return pytest.mark.parametrize("house", [more], indirect=True, ids=[more])


@pytest.mark.parametrize(
    ("house", "code"),
    [(f"fail=cuMemcpy2DAsync:9:{code}", str(code)) for code in (214, 700, 719)],
    indirect=["house"],
)
def test_a_poisoned_worker_is_replaced(house: House, code: str) -> None:
    """The ninth copy of each worker fails. A layer is never told that is not there."""
    ours = house.engine()
    pool, word, _ = house.pool(ours)
    first = pool.worker
    with pytest.raises(WorkerLost, match=code):
        pool.write(pages(8), house.offsets(8), sequence=1)
    assert first.dead
    assert int(word[0]) % PROGRESS_STEP <= 1
    pool.write(pages(2), house.offsets(2), sequence=2)  # eight copies of another worker
    assert int(word[0]) == 2 * PROGRESS_STEP + LAYOUT.layers
    assert came(house, ours.pool(), pages(2), house.offsets(2))


@words("hang=cuMemcpy2DAsync:9")
def test_a_copy_that_never_ends_costs_its_deadline(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = house.engine()
    pool, _, _ = house.pool(ours)
    monkeypatch.setattr(device, "MOVE_S", 0.5)
    hung = pool.worker
    with pytest.raises(WorkerLost):
        pool.write(pages(8), house.offsets(8), sequence=1)
    assert hung.dead
    monkeypatch.setattr(device, "MOVE_S", 20.0)
    pool.write(pages(2), house.offsets(2), sequence=2)
    assert came(house, ours.pool(), pages(2), house.offsets(2))


@words("fail=cuMemHostRegister:1:2")
def test_a_fault_that_poisons_nothing_fails_its_transfer_alone(house: House) -> None:
    ours = house.engine()
    pool, word, _ = house.pool(ours)
    with pytest.raises(RefusedByWorker, match="OUT_OF_MEMORY"):
        pool.write(pages(4), house.offsets(4), sequence=1)
    assert int(word[0]) == 0
    assert not pool.worker.dead
    pool.write(pages(4), house.offsets(4), sequence=2)
    assert came(house, ours.pool(), pages(4), house.offsets(4))


@pytest.mark.parametrize(
    "house", [f"fail=cuMemUnmap:1:{code}" for code in (700, 2)], indirect=True, ids=str
)
def test_a_fault_of_letting_go_kills_the_worker(house: House) -> None:
    """Also one that poisons nothing: the pool's memory would stay taken."""
    pool, _, _ = house.pool(house.engine())
    pool.close()
    assert pool.worker.dead


@words("devices=2")
def test_each_device_has_a_worker(house: House) -> None:
    both = house.engine(0), house.engine(1, SEED + 1)
    assert both[0].uuid != both[1].uuid
    pools = [house.pool(each)[0] for each in both]
    assert pools[0].worker is not pools[1].worker
    for pool, ours in zip(pools, both, strict=True):
        pool.read(pages(4), house.offsets(4))
        assert came(house, ours.pool(), pages(4), house.offsets(4))
    share, _ = house.share(both[1].uuid, both[0].memory_fd)
    with pytest.raises(RefusedByWorker):  # the memory is another device's
        DevicePool(LAYOUT, share, house.workers)
