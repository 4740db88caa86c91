"""A disk that fails now and then, that hangs, and whose catalogue somebody else keeps open: what is
in memory is served as ever, no byte is wrong, what fails is counted."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import MIB, faults, folder_in_memory, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8
FAILING = 0.01  # of operations


class NowAndThen(Files):
    """One operation of a hundred is EIO: which ones of each kind, the seed says, in whatever order
    the threads come."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        kinds = ("open", "allocate", "read", "write", "sync")
        self._chances = {kind: random.Random(f"{seed} {kind}") for kind in kinds}
        self._lock = threading.Lock()
        self.failed = 0
        self.sound = False

    def _draw(self, kind: str) -> None:
        with self._lock:
            if not self.sound and self._chances[kind].random() < FAILING:
                self.failed += 1
                raise OSError(errno.EIO, f"{kind} failed now and then")

    def open(self, path: Path) -> int:
        self._draw("open")
        return super().open(path)

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._draw("allocate")
        super().allocate(fd, num_bytes)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._draw("read")
        return super().read(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._draw("write")
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._draw("sync")
        super().sync(fd)


async def live_with_it(folder: Path, seed: int, rounds: int, *, in_step: bool) -> None:
    """`in_step`: the same each time, since nothing is under way while the next request comes."""
    chance, files = random.Random(seed), NowAndThen(seed)
    slabs = {"slab_bytes": 1 << 16, "disk_bytes": 6 * MIB, "cpu_bytes": 1 * MIB}
    async with running(folder, files=files, **slabs) as cache:  # type: ignore[arg-type]
        engine = StandIn(cache, 64)
        for number in range(rounds):
            await engine.ask(prompt(number, BLOCKS))
            if in_step:
                await cache.flush(10)
            again = await engine.ask(prompt(number, BLOCKS))
            assert again.matched_tokens == BLOCKS * PAGE_SIZE  # memory doesn't mind
            await engine.ask(prompt(chance.randrange(number + 1), BLOCKS))
            if number % 4 == 3:
                await cache.evict("gpu", 0)
                await cache.evict("cpu", 0)
        assert files.failed > 0
        counted = sum(faults(cache, kind) for kind in ("disk_read", "disk_write", "disk_full"))
        assert counted > 0
        cache.index.check()
        files.sound = True
        await cache.flush(10)
        await engine.ask(prompt(rounds, BLOCKS))
        assert (await cache.flush(10)).not_durable_blocks == {}
        print(f"{files.failed} operations failed, {counted} faults counted")
    async with running(folder, **slabs) as cache:  # type: ignore[arg-type]
        engine = StandIn(cache, 64)
        last = await engine.ask(prompt(rounds, BLOCKS))
        assert last.matched_tokens == BLOCKS * PAGE_SIZE
        for number in range(rounds):
            await engine.ask(prompt(number, BLOCKS))
        cache.index.check()


def test_a_disk_that_fails_now_and_then_costs_hits_and_nothing_else() -> None:
    with folder_in_memory() as folder:
        asyncio.run(live_with_it(folder, 1, 150, in_step=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_disk_that_fails_now_and_then_for_long(seed: int) -> None:
    with folder_in_memory() as folder:
        asyncio.run(live_with_it(folder, seed, 400, in_step=False))


class Hanging(Files):
    """Reads and writes wait at the gate while it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def _wait(self) -> None:
        if not self.gate.is_set():
            self.waiting.set()
        assert self.gate.wait(60)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        return super().read(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        return super().write(fd, buffers, offset)


@pytest.mark.parametrize("way", ["reads", "writes"])
def test_memory_hits_wait_for_no_disk_that_hangs(tmp_path: Path, way: str) -> None:
    async def run() -> None:
        files = Hanging()
        async with running(tmp_path, files=files) as cache:
            engine, other = StandIn(cache, 64), StandIn(cache, 64)
            await engine.ask(prompt(1, BLOCKS))
            await cache.flush(10)
            if way == "reads":
                await cache.evict("gpu", 0)
                await cache.evict("cpu", 0)
            await engine.ask(prompt(2, BLOCKS))
            await cache.flush(10)
            files.gate.clear()
            hangs = asyncio.create_task(other.ask(prompt(1 if way == "reads" else 3, BLOCKS)))
            await asyncio.to_thread(files.waiting.wait, 30)
            try:
                for _ in range(20):
                    found = await engine.ask(prompt(2, BLOCKS))
                    assert found.matched_tokens == BLOCKS * PAGE_SIZE
                    assert not files.gate.is_set()
                assert hangs.done() == (way == "writes")
            finally:
                files.gate.set()
            await hangs
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()

    asyncio.run(run())


READER = """
import lmdb, sys
environment = lmdb.open(sys.argv[1], readonly=True, max_dbs=4)
txn = environment.begin()
print("reads", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "late"])
def test_a_reader_of_the_catalogue_costs_room_until_it_is_gone(tmp_path: Path, end: str) -> None:
    """A page that an open reader may see is not used again, so the catalogue fills up. A killed
    reader is found and forgotten; a living one is waited for."""

    async def churn(engine: StandIn, seed: int) -> None:
        for number in range(80):
            await engine.ask(prompt(seed + number, BLOCKS))
            await engine.cache.flush(5)

    async def run() -> None:
        sizes = {"slab_bytes": 1 << 16, "disk_bytes": 3 * MIB, "cpu_bytes": 1 * MIB}
        async with running(tmp_path, **sizes) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            await engine.ask(prompt(1, BLOCKS))
            await cache.flush(10)
            reader = subprocess.Popen(
                [sys.executable, "-c", READER, tmp_path / "catalogue"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            try:
                assert reader.stdout is not None
                assert reader.stdout.readline() == b"reads\n"
                if end == "killed":
                    reader.kill()
                    reader.wait()
                await churn(engine, 1000)
            finally:
                reader.kill()
                reader.communicate()
            await churn(engine, 2000)
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()
        async with running(tmp_path, **sizes) as cache:  # type: ignore[arg-type]
            found = await StandIn(cache, 64).ask(prompt(2079, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())
