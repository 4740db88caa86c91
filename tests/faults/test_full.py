"""No room left, for real: another process fills the file system, the catalogue's map is full,
memory can't be had. What fits is kept and served, the rest is a miss, the daemon lives."""

from __future__ import annotations

import asyncio
import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from kvc2 import errors
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8
SIZES = {"slab_bytes": 1 << 18, "disk_bytes": 64 * MIB, "cpu_bytes": 8 * MIB}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this user can't mount a tmpfs; test_disk_faults.py injects ENOSPC")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder: Path) -> Path:
    """Somebody else's file takes all that is left."""
    other = folder / "somebody's"
    with other.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096):
            write_until_full(file, bytes(size))
    return other


def write_until_full(file: FileIO, data: bytes) -> None:
    try:
        while True:
            file.write(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


async def hits(engine: StandIn, seed: int) -> int:
    return (await engine.ask(prompt(seed, BLOCKS))).matched_tokens // PAGE_SIZE


def slabs_in(folder: Path) -> int:
    return len(list(folder.glob("slabs/*/*.slab")))


def test_a_disk_that_somebody_else_fills(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves on in the room that it has: what is new takes the place of what is old, and is
    durable. A daemon can start; when there is room again more is kept."""
    monkeypatch.setattr("kvc2.moving.disk_slabs.FULL_RETRY_S", 0.0)

    async def run() -> None:
        disk, known, more = small / "disk", range(4), range(100, 140)
        async with running(disk, **SIZES) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            for seed in known:
                await hits(engine, seed)
            assert (await cache.flush(10)).not_durable_blocks == {}
            slabs = slabs_in(disk)
            kept = (disk / "catalogue" / "data.mdb").stat().st_blocks * 512
            assert (
                kept >= cache._pools.tiers.disks[0].catalogue.bytes_max
            )  # for the records of these slabs
            other = fill(small)
            for seed in more:
                assert await engine.ask_durably(prompt(seed, BLOCKS))
            assert (await cache.flush(10)).durable_blocks < len(more) * BLOCKS
            assert slabs_in(disk) == slabs
            assert faults(cache, "disk_full") >= 1
            cache.index.check()
        async with running(disk, **SIZES) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            assert await hits(engine, more[-1]) == BLOCKS
            assert await engine.ask_durably(prompt(more[0], BLOCKS))
            assert slabs_in(disk) == slabs
            other.unlink()
            for seed in more:
                assert await engine.ask_durably(prompt(seed, BLOCKS))
            assert (await cache.flush(10)).durable_blocks >= len(more) * BLOCKS
            assert slabs_in(disk) > slabs
            cache.index.check()
        async with running(disk, **SIZES) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            assert [await hits(engine, seed) for seed in more] == [BLOCKS] * len(more)

    asyncio.run(run())


def test_a_directory_that_can_not_be_made_is_refused_with_a_word(small: Path) -> None:
    async def run() -> None:
        fill(small)
        with pytest.raises(errors.StartRefused, match="disk"):
            async with running(small / "disk", **SIZES):  # type: ignore[arg-type]
                pass

    asyncio.run(run())


def test_a_place_that_can_hold_no_directory_is_refused_with_a_word() -> None:
    async def run() -> None:
        with pytest.raises(errors.StartRefused, match=r"disk\.path: /proc/nowhere"):
            async with running(Path("/proc/nowhere")):
                pass

    asyncio.run(run())


def test_a_catalogue_whose_map_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if records took more room than was thought: the map is bounded, so `disk.size_gb` is. What
    is durable stays, nothing else is said to be, and evictions make room again."""
    monkeypatch.setattr("kvc2.tiers.disk.tier.room_bytes", lambda shape: 0)
    size = 512  # tokens a block: the largest records

    async def run() -> None:
        sizes = {"slab_bytes": 1 << 18, "disk_bytes": 32 * MIB, "cpu_bytes": 8 * MIB}
        async with running(tmp_path, **sizes) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64, page_size=size)
            kept = []
            for seed in range(200):
                await engine.ask(prompt(seed, BLOCKS, size))
                if (await cache.flush(10)).not_durable_blocks:
                    break
                kept.append(seed)
            assert faults(cache, "disk_full") >= 1
            assert len(kept) > 10
            assert (
                cache._pools.tiers.disks[0].catalogue.file_bytes()
                <= cache._pools.tiers.disks[0].catalogue.bytes_max
            )
            await engine.ask(prompt(1000, BLOCKS, size))
            found = await engine.ask(prompt(1000, BLOCKS, size))
            assert found.matched_tokens == BLOCKS * size
            cache.index.check()
        async with running(tmp_path, **sizes) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64, page_size=size)
            for seed in kept:
                found = await engine.ask(prompt(seed, BLOCKS, size))
                assert found.matched_tokens == BLOCKS * size
            await cache.evict("disk", 10 * BLOCKS)
            await engine.ask(prompt(2000, BLOCKS, size))
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()

    asyncio.run(run())


def test_memory_that_runs_short_is_a_smaller_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for three slabs of eight: what lacks is counted, nothing waits for it."""
    left = iter([1 << 40] * 3)
    monkeypatch.setattr("kvc2.arena.available_memory_bytes", lambda: next(left, 0))

    async def run() -> None:
        async with running(tmp_path, cpu_bytes=8 * MIB) as cache:
            await asyncio.to_thread(cache._pools.arena.wait_populated, 30)
            engine = StandIn(cache, 64)
            for seed in range(60):  # 480 blocks, and three slabs have room for 384
                await engine.ask(prompt(seed, BLOCKS))
                assert await hits(engine, seed) == BLOCKS
                assert (await cache.flush(10)).not_durable_blocks == {}
            assert faults(cache, "arena_short") == 1
            assert cache._pools.arena.ready_bytes == 3 * MIB
            assert await hits(engine, 0) == BLOCKS  # it lies on disk
            cache.index.check()

    asyncio.run(run())


def test_a_daemon_under_a_limit_of_memory_is_refused_with_a_word(tmp_path: Path) -> None:
    """A limit of the process, set by the system: no traceback."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    command = [sys.executable, "-m", "kvc2", "serve", "--cpu-memory-size-gb", "4"]
    command += ["--listen", f"unix:{tmp_path / 'kvc2.sock'}"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cpu.memory_size_gb = 3.9" in done.stderr
    assert "Traceback" not in done.stderr
