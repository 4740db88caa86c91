"""A scrub finds what lies spoiled on disk before a request does, and yields to requests."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvc2 import errors
from kvc2.cache.assemble import assemble
from kvc2.cache.cache import Cache
from kvc2.client import Admin
from kvc2.commands import cli
from kvc2.config import CpuConfig, DiskConfig, ServeConfig
from kvc2.metrics import Metrics
from kvc2.moving import scrub
from kvc2.moving.scrub import MB
from kvc2.tiers.disk.check import check
from tests.doubles.caches import MIB, faults, running
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt
from tests.faults.test_disk_faults import (
    BLOCKS,
    Faulty,
    flip,
    flip_header,
    flip_payload,
    stored,
    swap_pages,
    truncate,
)
from tests.kvc2.cache.test_life_calls import BLOCKS as COMMITTED
from tests.kvc2.cache.test_life_calls import commit
from tests.kvc2.moving.test_load_or_recompute import BLOCKS as LONG
from tests.kvc2.moving.test_load_or_recompute import BREAK_EVEN, FAST, PROMPTS, House, in_house
from tests.kvc2.moving.test_load_or_recompute import TOKENS as LONG_TOKENS

PAGE_BYTES = 20480  # of the house's engine


async def scrubbed(cache: Cache, mb_per_s: int = 1000) -> None:
    cache.scrubber.start(mb_per_s)
    task = cache.scrubber._task
    assert task is not None
    await asyncio.wait([task])
    assert not cache.scrubber.progress().running


@pytest.mark.parametrize(
    ("harm", "kind", "bad"),
    [
        (flip_payload, "corrupt_block", 1),
        (flip_header, "corrupt_block", 1),
        (swap_pages, "foreign_block", 2),
        (truncate, "disk_read", 4),
    ],
)
def test_a_bad_block_is_dropped_with_its_record(
    tmp_path: Path, harm: Callable[[Path], None], kind: str, bad: int
) -> None:
    async def run() -> None:
        await stored(tmp_path)
        async with running(tmp_path) as cache:
            await scrubbed(cache)
            found = cache.scrubber.progress()
            assert (found.verified_blocks, found.bad_blocks, found.passes) == (BLOCKS, 0, 1)
            harm(tmp_path)
            await scrubbed(cache)
            found = cache.scrubber.progress()
            assert (found.total_blocks, found.verified_blocks) == (BLOCKS, BLOCKS)
            assert found.bad_blocks == faults(cache, kind) == bad
            assert cache.stats().tiers[2].resident_pages == BLOCKS - bad
            cache.index.check()
            assert (await cache.flush(10)).not_durable_blocks == {}
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))  # judges every byte
            assert found.matched_tokens == 4 * PAGE_SIZE
            assert faults(cache, kind) == bad  # no load met it
            assert (await cache.flush(10)).not_durable_blocks == {}
            await scrubbed(cache)
            assert cache.scrubber.progress().bad_blocks == 0
        if harm is not truncate:  # the file itself stays short
            assert check(tmp_path).sound

    asyncio.run(run())


def test_a_read_error_drops_what_could_not_be_read(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        files = Faulty()
        async with running(tmp_path, files=files) as cache:
            files.read_error = errno.EIO
            await scrubbed(cache)
            assert cache.scrubber.progress().bad_blocks == faults(cache, "disk_read") == BLOCKS
            assert cache.stats().tiers[2].resident_pages == 0

    asyncio.run(run())


def test_pages_that_got_another_block_meanwhile_are_not_bad(tmp_path: Path) -> None:
    """The page is read after its block was evicted and another one was written there."""

    async def run() -> None:
        await stored(tmp_path)
        async with running(tmp_path) as cache:
            on_writer = cache._mover.on_writer
            engine = StandIn(cache, 32)

            async def late(work: object) -> object:
                cache._mover.on_writer = on_writer  # type: ignore[method-assign]
                await cache.evict("disk", 0)
                await engine.ask(prompt(2, BLOCKS))
                assert (await cache.flush(10)).durable_blocks == BLOCKS
                return await on_writer(work)  # type: ignore[arg-type]

            cache._mover.on_writer = late  # type: ignore[assignment,method-assign]
            await scrubbed(cache)
            assert cache.scrubber.progress().bad_blocks == 0
            assert cache.stats().tiers[2].resident_pages == BLOCKS
            assert faults(cache, "stale_page") == faults(cache, "foreign_block") == 0

    asyncio.run(run())


# ---- in virtual time ----


def test_a_pass_keeps_its_rate(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        begun = house.clock()
        await scrubbed(house.cache, 1)
        found = house.cache.scrubber.progress()
        assert found.verified_blocks == found.total_blocks == PROMPTS * LONG
        assert found.verified_bytes == PROMPTS * LONG * PAGE_BYTES
        assert found.seconds == pytest.approx(found.verified_bytes / MB, rel=0.02)
        assert found.seconds == pytest.approx(house.clock() - begun)

    in_house(tmp_path, FAST, work)


def test_a_pass_goes_on_at_another_rate_and_ends_when_told(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        scrubber = house.cache.scrubber
        scrubber.start(1)
        await asyncio.sleep(2.0)
        first = scrubber.progress()
        assert first.verified_bytes == pytest.approx(2 * MB, rel=0.1)
        scrubber.start(4)
        await asyncio.sleep(2.0)
        second = scrubber.progress()
        assert second.verified_bytes == pytest.approx(10 * MB, rel=0.1)
        await scrubber.stop()
        third = scrubber.progress()
        assert (third.running, third.passes) == (False, 0)
        await asyncio.sleep(5.0)
        assert scrubber.progress() == third

    in_house(tmp_path, FAST, work)


def test_what_a_request_waits_for_goes_first(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        await house.ready_s(0)  # measures the disk
        await house.settled()
        mover, scrubber = house.cache._mover, house.cache.scrubber
        scrubber.start(1000)
        asked = asyncio.ensure_future(house.engine.ask(prompt(1, LONG)))
        while not mover.waited_for:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # the part that was being read is over
        before = scrubber.progress().verified_blocks
        while mover.waited_for:
            assert scrubber.progress().verified_blocks <= before + 1
            await asyncio.sleep(0.01)
        assert (await asked).matched_tokens == LONG_TOKENS
        assert scrubber.progress().running
        await scrubbed(house.cache)
        assert scrubber.progress().verified_blocks == PROMPTS * LONG

    in_house(tmp_path, 4 * BREAK_EVEN, work)


def test_the_configuration_asks_for_a_pass_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scrub.AGAIN_S == 24 * 3600
    monkeypatch.setattr(scrub, "AGAIN_S", 600.0)  # what else ticks is not simulated for days

    async def work(house: House) -> None:
        scrubber = house.cache.scrubber
        scrubber.keep(1000)
        await asyncio.sleep(60)
        assert scrubber.progress().passes == 1
        await asyncio.sleep(600)
        assert scrubber.progress().passes == 2
        await scrubber.stop()
        await asyncio.sleep(2 * 600)
        assert scrubber.progress().passes == 2

    in_house(tmp_path, FAST, work)


# ---- as rpc and command ----


def test_without_a_disk_it_is_refused() -> None:
    async def run() -> None:
        async with running(None) as cache:
            with pytest.raises(errors.InvalidRequest, match="a disk tier"):
                cache.scrubber.start(0)

    asyncio.run(run())


def command(address: str, *arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["scrub", "--address", address, *arguments])
    return found.exit_code, found.output


def test_an_operator_and_a_command_scrub(tmp_path: Path) -> None:
    config = serve_config(tmp_path, disk=True)
    with (
        ServedDaemon(config, cache=None) as served,
        TinyEngine(served.address) as engine,
        Admin(served.address) as admin,
    ):
        assert admin.scrub().passes == 0
        assert "none yet" in command(served.address, "--status")[1]
        commit(engine, engine.client.open_namespace(identity().encode()))
        assert admin.flush().not_durable_blocks == {}
        code, text = command(served.address, "--mb-per-s", "500")
        assert code == 0
        assert f"{COMMITTED} of {COMMITTED} blocks verified" in text
        flip(next((tmp_path / "disk").glob("slabs/*/*.slab")), 4096 + 5)
        code, text = command(served.address, "--json")
        found = json.loads(text)
        assert code == 1
        assert (found["bad_blocks"], found["mb_per_s"], found["passes"]) == (1, 100, 2)
        assert admin.stats().counters["faults_total{kind=corrupt_block}"] == 1
        code, text = command(served.address, "--stop")
        assert code == 1
        assert text.startswith("over: ")
        with pytest.raises(errors.InvalidRequest, match="at most 1000000"):
            admin.scrub(1_000_001)


def test_a_configured_scrub_begins_with_the_daemon(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        flip_payload(tmp_path)
        disk = DiskConfig(path=tmp_path, size_gb=0.1, scrub_mb_per_s=1000)
        config = ServeConfig(cpu=CpuConfig.of_bytes(4 * MIB), disk=disk, slab_bytes=MIB)
        cache = await assemble(config, Metrics())
        try:
            while cache.scrubber.progress().passes == 0:
                await asyncio.sleep(0.001)
            assert cache.scrubber.progress().bad_blocks == faults(cache, "corrupt_block") == 1
        finally:
            await cache.stop(10)

    asyncio.run(run())


def test_a_rate_that_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidConfig, match=r"disk.scrub_mb_per_s"):
        DiskConfig(path=tmp_path, size_gb=0.1, scrub_mb_per_s=-1)
