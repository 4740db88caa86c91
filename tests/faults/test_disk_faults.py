"""Every fault of the disk is a miss: a counter goes up, the daemon lives, no byte is wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import pytest

from kvc2 import errors
from kvc2.answers import TierTokens
from kvc2.tiers.disk.catalogue import LAYOUT
from kvc2.tiers.disk.check import check
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

BLOCKS = 8
PAGE_BYTES = 8192  # of the stand-in's default layout


async def stored(path: Path) -> None:
    """A directory with one prompt, durable."""
    async with running(path) as cache:
        await StandIn(cache, 32).ask(prompt(1, BLOCKS))
        assert (await cache.flush(60)).durable_blocks == BLOCKS


def slab(path: Path) -> Path:
    return next(path.glob("slabs/*/*.slab"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def flip_payload(path: Path) -> None:
    flip(slab(path), 4 * PAGE_BYTES + 4096 + 77)


def flip_header(path: Path) -> None:
    flip(slab(path), 4 * PAGE_BYTES + 20)


def swap_pages(path: Path) -> None:
    data = bytearray(slab(path).read_bytes())
    first, second = (slice(n * PAGE_BYTES, (n + 1) * PAGE_BYTES) for n in (4, 5))
    data[first], data[second] = data[second], data[first]
    slab(path).write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(slab(path), 4 * PAGE_BYTES + 100)


def remove(path: Path) -> None:
    slab(path).unlink()


def flip_record(path: Path) -> None:
    """The fifth block's record: its digest no longer follows from its tokens."""
    with lmdb.open(str(path / "catalogue"), max_dbs=4) as env:
        table = env.open_db(b"blocks")
        with env.begin(db=table, write=True) as txn:
            key, value = list(txn.cursor())[4]
            txn.put(key, bytes([value[0] ^ 1]) + value[1:])


@pytest.mark.parametrize(
    ("harm", "kind", "kept"),
    [
        (flip_payload, "corrupt_block", 4),
        (flip_header, "corrupt_block", 4),
        (swap_pages, "foreign_block", 4),
        (truncate, "lost_slab", 0),
        (remove, "lost_slab", 0),
        (flip_record, "restore_refused", 4),
    ],
)
def test_a_fault_is_a_miss(
    tmp_path: Path, harm: Callable[[Path], None], kind: str, kept: int
) -> None:
    async def run() -> None:
        await stored(tmp_path)
        harm(tmp_path)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            found = await engine.ask(prompt(1, BLOCKS))  # judges every byte
            assert found.matched_tokens == kept * PAGE_SIZE
            assert faults(cache, kind) >= 1
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()
        async with running(tmp_path) as cache:  # computed again, stored again
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.tiers == TierTokens(disk=BLOCKS * PAGE_SIZE)

    asyncio.run(run())


def test_a_bad_block_that_nobody_computes_again_leaves_no_record(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        flip(slab(tmp_path), 7 * PAGE_BYTES + 4096)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            request, found = await engine.acquire(prompt(1, BLOCKS))
            assert found.matched_tokens == 7 * PAGE_SIZE
            cache.leases.release(engine.session, request)
            await cache.flush(10)
        report = check(tmp_path)
        assert report.sound
        assert report.records == 7

    asyncio.run(run())


@pytest.mark.parametrize("harm", [truncate, remove], ids=["truncated", "unlinked"])
def test_a_slab_that_goes_while_it_is_served_is_a_miss(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    async def run() -> None:
        await stored(tmp_path)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            harm(tmp_path)
            found = await engine.ask(prompt(1, BLOCKS))
            whole = BLOCKS if harm is remove else 4  # an open file outlives its name
            assert found.matched_tokens == whole * PAGE_SIZE
            await engine.ask(prompt(2, BLOCKS))
            cache.index.check()

    asyncio.run(run())


class Faulty(Files):
    """`read_error` and `write_error` are raised while they are set; so is ENOSPC of a new slab."""

    read_error: int = 0
    write_error: int = 0
    full: bool = False

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.read_error:
            raise OSError(self.read_error, os.strerror(self.read_error))
        return super().read(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error))
        return super().write(fd, buffers, offset)

    def allocate(self, fd: int, num_bytes: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, num_bytes)


def test_a_read_error_is_a_miss(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        files = Faulty()
        async with running(tmp_path, files=files) as cache:
            engine = StandIn(cache, 32)
            files.read_error = errno.EIO
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 0
            assert faults(cache, "disk_read") == BLOCKS
            files.read_error = 0
            assert (await cache.flush(10)).not_durable_blocks == {}
            cache.index.check()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.EIO, "disk_write"), (errno.ENOSPC, "disk_full")]
)
def test_a_write_error_is_not_durable_and_nothing_else(
    tmp_path: Path, error: int, kind: str
) -> None:
    async def run() -> None:
        files = Faulty()
        async with running(tmp_path, files=files) as cache:
            engine = StandIn(cache, 32)
            files.write_error = error
            assert not await engine.ask_durably(prompt(1, BLOCKS))
            assert faults(cache, kind) >= 1
            # asked again: still not there
            assert not await engine.ask_durably(prompt(1, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {"error": BLOCKS}
            tried = faults(cache, "transfer_failed")
            await asyncio.sleep(0.3)
            assert faults(cache, "transfer_failed") - tried <= 1  # no hot loop
            files.write_error = 0
            assert await engine.ask_durably(prompt(1, BLOCKS))
            assert cache.stats().tiers[2].resident_pages == BLOCKS
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            await engine.ask(prompt(2, BLOCKS))
            await cache.flush(10)
            cache.index.check()
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(prompt(2, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            await engine.ask(prompt(1, BLOCKS))  # whatever is there is right

    asyncio.run(run())


def test_a_full_file_system_stops_writes_and_nothing_else(tmp_path: Path) -> None:
    async def run() -> None:
        files = Faulty()
        files.full = True
        async with running(tmp_path, files=files) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {"disk_full": BLOCKS}
            assert faults(cache, "disk_full") >= 1
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            files.full = False
            cache._background.writer.slabs.ask_again()
            assert (await cache.flush(10)).durable_blocks == BLOCKS

    asyncio.run(run())


def test_a_full_file_system_costs_other_layouts_one_slab_at_most(tmp_path: Path) -> None:
    async def run() -> None:
        files = Faulty()
        async with running(tmp_path, disk_bytes=64 * MIB, files=files) as cache:
            engine = StandIn(cache, 256, segment_bytes=4096)
            for seed in range(8):
                await engine.ask(prompt(seed, 32))
                await cache.flush(10)
            (pools,) = cache._pools.on_disk()
            held = len(pools.disk.store.slabs.numbers())
            assert held > 3
            files.full = True
            other = StandIn(cache, 64, segment_bytes=16384)
            for seed in range(4):
                await other.ask(prompt(100 + seed, 8))
                await cache.flush(0.2)
                cache._background.writer.slabs.ask_again()
            assert len(pools.disk.store.slabs.numbers()) == held - 1
            files.full = False
            cache._background.writer.slabs.ask_again()
            assert (await cache.flush(10)).not_durable_blocks == {}

    asyncio.run(run())


def test_a_small_tmpfs_that_runs_full_is_survived(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], check=False
    )
    if mounted.returncode:
        pytest.skip("this user can't mount a tmpfs; ENOSPC is injected in the test above")

    async def run() -> None:
        async with running(tmp_path, disk_bytes=64 * MIB) as cache:
            engine = StandIn(cache, 64)
            for seed in range(16):
                await engine.ask(prompt(seed, 32))
                await cache.flush(10)
            assert faults(cache, "disk_full") >= 1
            assert (await engine.ask(prompt(15, 32))).matched_tokens == 32 * PAGE_SIZE
            cache.index.check()
        async with running(tmp_path, disk_bytes=64 * MIB) as cache:
            for seed in range(16):
                await StandIn(cache, 64).ask(prompt(seed, 32))

    try:
        asyncio.run(run())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def damage_meta(path: Path) -> None:
    with (path / "catalogue/data.mdb").open("r+b") as file:
        file.write(b"\0" * 8192)


def truncate_catalogue(path: Path) -> None:
    data = path / "catalogue/data.mdb"
    os.truncate(data, data.stat().st_size - 4096)


def entry(path: Path, table: bytes, change: Callable[[bytes], bytes]) -> None:
    """Change the one entry of a table behind the daemon's back."""
    environment = lmdb.open(str(path / "catalogue"), max_dbs=4, map_size=64 * MIB)
    with environment.begin(write=True, db=environment.open_db(table)) as txn:
        ((key, value),) = list(txn.cursor())
        txn.put(key, change(bytes(value)))
    environment.close()


def of_layout(field: int, number: int) -> Callable[[bytes], bytes]:
    def change(value: bytes) -> bytes:
        numbers = list(LAYOUT.unpack(value))
        numbers[field] = number
        return LAYOUT.pack(*numbers)

    return change


@pytest.mark.parametrize(
    ("table", "change"),
    [
        (b"layouts", of_layout(1, 3)),
        (b"layouts", of_layout(2, 0)),
        (b"layouts", of_layout(2, 1 << 20)),
        (b"layouts", of_layout(3, 0)),
        (b"layouts", of_layout(4, 1)),
        (b"layouts", of_layout(5, 0)),
        (b"layouts", of_layout(5, 1 << 20)),
        (b"namespaces", lambda value: value[:4] + b"{"),
        (b"namespaces", lambda value: b"\3\0\0\0" + value[4:]),
        (b"namespaces", lambda value: value[:2]),
    ],
)
def test_sizes_and_identities_that_can_not_be_are_damage(
    tmp_path: Path, table: bytes, change: Callable[[bytes], bytes]
) -> None:
    async def run() -> None:
        await stored(tmp_path)
        entry(tmp_path, table, change)
        async with running(tmp_path) as cache:
            assert faults(cache, "catalogue_reset") == 1  # and rebuilt
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def test_a_layout_that_is_stored_with_other_sizes_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        entry(tmp_path, b"layouts", of_layout(2, 4095))  # sound, and the digest's is 4096
        async with running(tmp_path) as cache:
            with pytest.raises(errors.InvalidRequest, match="layout"):
                StandIn(cache, 32)

    asyncio.run(run())


def test_a_second_daemon_on_a_directory_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            with pytest.raises(errors.StartRefused, match="another daemon"):
                async with running(tmp_path):
                    pass
            assert (await StandIn(cache, 8).ask(prompt(1, 2))).matched_tokens == 0

    asyncio.run(run())


def test_an_unknown_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        with lmdb.open(str(tmp_path / "catalogue"), max_dbs=4) as env:
            table = env.open_db(b"meta")
            with env.begin(db=table, write=True) as txn:
                txn.put(b"format", (99).to_bytes(8, "little"))
        with pytest.raises(errors.StartRefused, match="format 99"):
            async with running(tmp_path):
                pass
        assert slab(tmp_path).exists()

    asyncio.run(run())
