"""A directory that an earlier version left starts warm: every block is found, byte for byte."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2.cache.cache import Cache
from kvc2.commands import cli
from kvc2.config import CpuConfig, DiskConfig
from kvc2.identity import Identity
from kvc2.namespace import decode
from kvc2.tiers.disk.catalogue import FORMAT_VERSION
from kvc2.tiers.disk.check import check
from tests.doubles.caches import MIB, running
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, layout
from tests.doubles.stand_in import StandIn
from tests.fixtures.directories import (
    StoredDirectory,
    StoredNamespace,
    StoredPrompt,
    payload_digest,
    unpack,
)

FORMATS = (1,)


@pytest.fixture(params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> StoredDirectory:
    return unpack(request.param, tmp_path)


@asynccontextmanager
async def served(stored: StoredDirectory, *, after_s: float = 0.0) -> AsyncIterator[Cache]:
    """A cache on the directory, so long after it was left."""
    async with running(
        stored.path,
        disk_bytes=stored.size_bytes,
        slab_bytes=stored.slab_bytes,
        wall=lambda: stored.wall + after_s,
    ) as cache:
        yield cache
        cache.index.check()


def version_of(stored: StoredDirectory) -> int:
    with in_meta(stored.path) as txn:
        return int.from_bytes(txn.get(b"format"), "little")


@contextmanager
def in_meta(path: Path) -> Iterator[lmdb.Transaction]:
    environment = lmdb.open(str(path / "catalogue"), max_dbs=4, map_size=64 * MIB)
    with environment.begin(db=environment.open_db(b"meta"), write=True) as txn:
        yield txn
    environment.close()


def engine_of(cache: Cache, space: StoredNamespace) -> StandIn:
    return StandIn(
        cache,
        64,
        layers=space.layers,
        segment_bytes=space.segment_bytes,
        page_size=space.page_size,
        namespace=space.name,
        identity=space.identity,
    )


async def blocks_of(engine: StandIn, prompt: StoredPrompt) -> list[str]:
    """Digests of the blocks that a request finds."""
    request, found = await engine.acquire(prompt.tokens)
    await engine.arrived(found.transfer)
    digests = [payload_digest(row) for row in engine.contents(found.prefix_pages)]
    engine.cache.leases.release(engine.session, request)
    return digests


def expected(prompt: StoredPrompt, after_s: float) -> list[str]:
    gone = prompt.dead or (prompt.ends_s and after_s >= prompt.ends_s)
    return [] if gone else list(prompt.blocks)


async def judge(stored: StoredDirectory, *, after_s: float = 0.0, lasting: bool = False) -> int:
    """Ask for every prompt (`lasting`: that has no time to live); how many blocks came.
    AssertionError for one too few, one too many, or another byte."""
    count = 0
    async with served(stored, after_s=after_s) as cache:
        for space in stored.namespaces:
            engine = engine_of(cache, space)
            for prompt in space.prompts:
                if lasting and prompt.ends_s:
                    continue
                blocks = await blocks_of(engine, prompt)
                assert blocks == expected(prompt, after_s)
                count += len(blocks)
            await engine.close()
    return count


def test_every_block_is_found_and_is_the_same(stored: StoredDirectory) -> None:
    assert asyncio.run(judge(stored)) == 31  # and so is it after the next start
    assert asyncio.run(judge(stored)) == 31


@pytest.mark.parametrize(("after_s", "blocks"), [(990, 31), (1010, 29)])
def test_a_time_to_live_goes_on(stored: StoredDirectory, after_s: int, blocks: int) -> None:
    assert asyncio.run(judge(stored, after_s=after_s)) == blocks


def test_the_check_finds_no_damage(stored: StoredDirectory) -> None:
    before = check(stored.path)
    assert (before.sound, before.unproven, before.format) == (True, 0, version_of(stored))
    assert before.verified_blocks == before.records > 0
    asyncio.run(judge(stored))
    after = check(stored.path)
    assert (after.sound, after.unproven, after.records) == (True, 0, before.records)
    assert after.format == FORMAT_VERSION


def rows_of(path: Path) -> list[tuple[bytes, bytes]]:
    environment = lmdb.open(str(path / "catalogue"), max_dbs=4, map_size=64 * MIB, readonly=True)
    with environment.begin(db=environment.open_db(b"blocks", create=False)) as txn:
        found = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
    environment.close()
    return found


def test_a_start_says_that_it_takes_the_directory_over_and_rewrites_no_record(
    stored: StoredDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    async def start() -> None:
        async with served(stored):
            pass

    before, version = rows_of(stored.path), version_of(stored)
    asyncio.run(start())
    assert f"from format {version} to {FORMAT_VERSION}" in caplog.text
    assert f"{len(before)} records" in caplog.text
    caplog.clear()
    asyncio.run(start())
    assert "format" not in caplog.text
    assert rows_of(stored.path) == before


def test_the_check_says_which_format_a_directory_has(stored: StoredDirectory) -> None:
    version = version_of(stored)
    told = CliRunner().invoke(cli.app, ["check", str(stored.path)]).output
    assert f"format {version}; the next start makes it {FORMAT_VERSION}" in told
    told = CliRunner().invoke(cli.app, ["check", "--json", str(stored.path)]).stdout
    assert json.loads(told)["format"] == version
    asyncio.run(judge(stored))
    told = CliRunner().invoke(cli.app, ["check", str(stored.path)]).output
    assert f"format {FORMAT_VERSION}\n" in told


def test_a_lost_catalogue_of_an_earlier_format_is_rebuilt_in_the_present_one(
    stored: StoredDirectory,
) -> None:
    shutil.rmtree(stored.path / "catalogue")
    assert asyncio.run(judge(stored)) == 31
    assert check(stored.path).format == FORMAT_VERSION


def test_one_that_cannot_be_taken_over_is_put_aside_with_a_word(
    stored: StoredDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    data = stored.path / "catalogue" / "data.mdb"
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(size // 2)
    assert asyncio.run(judge(stored)) == 31  # from what lies beside it
    assert "put aside and rebuilt" in caplog.text
    assert (stored.path / "catalogue.damaged" / "data.mdb").stat().st_size == size // 2


def test_what_was_stored_then_is_named_and_invalidated_by_its_weights(
    stored: StoredDirectory,
) -> None:
    """Namespaces keep the identities of version 1."""

    async def run() -> None:
        weights = json.loads(stored.namespaces[0].identity)["weights_digest"]
        async with served(stored) as cache:
            names = cache.namespaces.of_weights(weights)
            assert {each.name for each in stored.namespaces if weights in str(each.identity)} == {
                *names
            }
            assert (await cache.invalidate(names)).durable
        async with served(stored) as cache:
            engine = engine_of(cache, stored.namespaces[0])
            assert await blocks_of(engine, stored.namespaces[0].prompts[0]) == []
            await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("version", ["then", "now"])
def test_a_daemon_finds_the_blocks_by_what_an_engine_of_then_and_one_of_now_says(
    stored: StoredDirectory, tmp_path: Path, version: str
) -> None:
    config = serve_config(
        tmp_path,
        slab_bytes=stored.slab_bytes,
        cpu=CpuConfig.of_bytes(4 * MIB),
        disk=DiskConfig.of_bytes(stored.path, stored.size_bytes),
    )
    with ServedDaemon(config, cache=None) as daemon, TinyEngine(daemon.address) as engine:
        for space, prompt in stored.prompts:
            if space.page_size != layout().page_size or prompt.ends_s:
                continue
            encoded = space.identity
            if version == "now":
                known = decode(encoded)
                assert isinstance(known, Identity)
                encoded = known.encode()
            handle = engine.client.open_namespace(encoded, salt=space.salt)
            found = engine.client.match(handle, prompt.tokens)
            assert found.matched_tokens == len(expected(prompt, 0)) * space.page_size


def test_what_is_computed_again_and_what_is_new_are_stored_beside_it(
    stored: StoredDirectory,
) -> None:
    async def run() -> None:
        space = stored.namespaces[0]
        prompt = space.prompts[0]
        longer = np.concatenate([prompt.tokens[:-1], np.arange(33, dtype=np.uint32)])
        async with served(stored) as cache:
            engine = engine_of(cache, space)
            await engine.ask(longer)
            assert (await cache.flush(10)).not_durable_blocks == {}
            await engine.close()
        async with served(stored) as cache:
            engine = engine_of(cache, space)
            found = await engine.ask(longer)
            assert found.matched_tokens == (len(prompt.blocks) + 2) * space.page_size
            await engine.close()

    asyncio.run(run())
