"""What lies beside the catalogue so that it can be rebuilt: generations by page, names. It never
says of a dead block that it is there, whatever can not be written or read."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvc2 import _core, errors
from kvc2.tiers.disk import live
from kvc2.tiers.disk.catalogue import Catalogue, Change
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import faults, is_slab, on_disk, running
from tests.doubles.stand_in import StandIn, prompt
from tests.faults.test_disk_faults import (
    BLOCKS,
    flip,
    slab,
    stored,
)
from tests.faults.test_rebuild import Harm, no_catalogue


def test_generations_are_durable_before_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon ends right after a commit of deletes, and its catalogue is lost."""
    live_path, cut = tmp_path / "live", tmp_path / "cut"
    commit = Catalogue.commit

    def copied(self: Catalogue, change: Change) -> None:
        commit(self, change)
        if change.deletes and not cut.exists():
            shutil.copytree(live_path, cut)

    async def run() -> None:
        await stored(live_path)
        async with running(live_path) as cache:
            monkeypatch.setattr(Catalogue, "commit", copied)
            assert (await cache.evict("disk", 3)).evicted_blocks == 3
            left = on_disk(cache)
            monkeypatch.undo()
        no_catalogue(cut)
        async with running(cut) as cache:
            assert on_disk(cache) == left

    asyncio.run(run())


class Beside(Files):
    """While `failing`, nothing can be written but slabs."""

    failing = False

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.failing and not is_slab(fd):
            raise OSError(errno.EIO, "failing")
        return super().write(fd, buffers, offset)


def test_where_generations_can_not_be_written_nothing_comes_back(tmp_path: Path) -> None:
    """And everything is durable all the same; it comes back once they can."""

    async def run() -> None:
        live_path, files = tmp_path / "live", Beside()
        first_cut, second_cut = tmp_path / "1", tmp_path / "2"
        await stored(live_path)
        async with running(live_path, files=files) as cache:
            files.failing = True
            assert (await cache.evict("disk", 3)).evicted_blocks == 3
            engine = StandIn(cache, 32)
            await engine.ask(prompt(2, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
            assert faults(cache, "disk_write") >= 1
            shutil.copytree(live_path, first_cut)
            files.failing = False
            await engine.ask(prompt(3, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
            left = on_disk(cache)
            assert len(left) == 3 * BLOCKS - 3
            shutil.copytree(live_path, second_cut)
        for cut, expected in ((first_cut, set()), (second_cut, left)):
            no_catalogue(cut)
            async with running(cut) as cache:
                assert on_disk(cache) == expected

    asyncio.run(run())


@pytest.mark.parametrize("name", ["live/*", "namespaces"])
def test_without_proof_nothing_comes_back(tmp_path: Path, name: str) -> None:
    async def run() -> None:
        await stored(tmp_path)
        (file,) = tmp_path.glob(name)
        flip(file, 40)
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            assert on_disk(cache) == set()
            engine = StandIn(cache, 32)
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 0
            assert (await cache.flush(10)).durable_blocks == BLOCKS

    asyncio.run(run())


@pytest.mark.parametrize("name", ["live/*", "namespaces"])
def test_what_is_damaged_beside_a_sound_catalogue_is_written_anew(
    tmp_path: Path, name: str
) -> None:
    async def run() -> None:
        await stored(tmp_path)
        (file,) = tmp_path.glob(name)
        flip(file, 40)
        async with running(tmp_path):
            pass
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            assert len(on_disk(cache)) == BLOCKS

    asyncio.run(run())


def as_of_version(file: Path, version: int, head_bytes: int) -> bytes:
    """A sound file of that version; its checksum comes after the head, or (0) at the end."""
    data = bytearray(file.read_bytes())
    data[8] = version
    end = head_bytes or len(data) - 16
    data[end : end + 16] = _core.xxh3_128(bytes(data[:end]))
    file.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize(("name", "head"), [("live/*", live.HEAD.size), ("namespaces", 0)])
@pytest.mark.parametrize("harm", [no_catalogue, lambda path: None], ids=["lost", "sound"])
def test_an_unknown_version_beside_is_refused_and_left_alone(
    tmp_path: Path, name: str, head: int, harm: Harm
) -> None:
    """Also where the catalogue, which would say so, is gone."""

    async def run() -> None:
        await stored(tmp_path)
        (file,) = tmp_path.glob(name)
        data = as_of_version(file, 99, head)
        harm(tmp_path)
        with pytest.raises(errors.StartRefused, match="format 99"):
            async with running(tmp_path):
                pass
        assert slab(tmp_path).exists()
        assert file.read_bytes() == data
        as_of_version(file, 1, head)
        async with running(tmp_path) as cache:
            assert len(on_disk(cache)) == BLOCKS

    asyncio.run(run())


def test_what_nothing_names_is_deleted_at_a_start(tmp_path: Path) -> None:
    async def run() -> None:
        await stored(tmp_path)
        orphans = [tmp_path / "live" / ("ab" * 32), tmp_path / "slabs" / ("ab" * 32) / "0.slab"]
        orphans += [slab(tmp_path).parent / "00000007.slab"]  # short
        for each in orphans:
            each.parent.mkdir(exist_ok=True)
            each.write_bytes(bytes(4096))
        async with running(tmp_path) as cache:
            assert len(on_disk(cache)) == BLOCKS
            assert not any(each.exists() for each in orphans)

    asyncio.run(run())


def test_generations_of_a_rebuilt_directory_are_new_ones(tmp_path: Path) -> None:
    """A count of starts that began again could give a page the generation that it had before."""

    async def run() -> None:
        for _ in range(3):
            await stored(tmp_path)
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            await StandIn(cache, 32).ask(prompt(2, BLOCKS))
            await cache.flush(10)
            (pools,) = cache._pools.on_disk()
            _, records = cache.index.residents(pools.disk.id, 0, 1 << 20)
            assert np.unique(records.generations >> np.uint64(32)).size == 2
            assert records.generations.max() >> np.uint64(32) > 3

    asyncio.run(run())
