"""A catalogue that is damaged or gone is rebuilt from the blocks' headers: all that was there comes
back, nothing that was evicted or invalidated does."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvc2.cache.cache import Cache
from kvc2.moving.disk_writer import DiskWriter
from kvc2.tiers.disk import rebuild
from kvc2.tiers.disk.catalogue import Catalogue, Change, Full
from tests.doubles.caches import MIB, faults, on_disk, running
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE, StandIn, prompt
from tests.faults.test_disk_faults import (
    BLOCKS,
    PAGE_BYTES,
    damage_meta,
    flip_header,
    flip_payload,
    slab,
    stored,
    truncate_catalogue,
)

Harm = Callable[[Path], None]
SMALL = {"cpu_bytes": 1 * MIB, "disk_bytes": 6 * MIB, "slab_bytes": 1 << 18}


def no_catalogue(path: Path) -> None:
    shutil.rmtree(path / "catalogue")


def no_data(path: Path) -> None:
    (path / "catalogue/data.mdb").unlink()


def no_bytes(path: Path) -> None:
    (path / "catalogue/data.mdb").write_bytes(b"")


def first(path: Path) -> Path:
    return next(path.glob("slabs/*/00000000.slab"))


def headers(path: Path) -> int:
    """Pages of slabs that begin like a block's."""
    count = 0
    for file in path.glob("slabs/*/*.slab"):
        data = file.read_bytes()
        count += sum(data[at : at + 8] == b"KVC2PAGE" for at in range(0, len(data), PAGE_BYTES))
    return count


@pytest.mark.parametrize("harm", [damage_meta, truncate_catalogue, no_catalogue, no_data, no_bytes])
def test_a_lost_catalogue_is_rebuilt(tmp_path: Path, harm: Harm) -> None:
    async def run() -> None:
        await stored(tmp_path)
        harm(tmp_path)
        async with running(tmp_path) as cache:
            assert faults(cache, "catalogue_reset") == 1
            assert faults(cache, "restore_refused") == 0
            assert len(on_disk(cache)) == BLOCKS
            engine = StandIn(cache, 32)
            found = await engine.ask(prompt(1, BLOCKS))  # judges every byte
            assert found.matched_tokens == BLOCKS * PAGE_SIZE
            await engine.ask(prompt(2, BLOCKS))
            assert (await cache.flush(10)).durable_blocks == 2 * BLOCKS
            cache.index.check()
        assert (tmp_path / "catalogue.damaged").exists() == (harm is not no_catalogue)
        async with running(tmp_path) as cache:
            assert faults(cache, "catalogue_reset") == 0
            for seed in (1, 2):
                found = await StandIn(cache, 32).ask(prompt(seed, BLOCKS))
                assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def test_what_was_evicted_does_not_come_back(tmp_path: Path) -> None:
    """Its headers are still in the slab."""

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 64)
            for seed in (1, 2, 3):
                await engine.ask(prompt(seed, BLOCKS))
                await cache.flush(10)
            assert (await cache.evict("disk", 11)).evicted_blocks == 11
            left = on_disk(cache)
            assert len(left) == 3 * BLOCKS - 11
            await engine.close()  # what the cpu tier has is not asked for again
        assert headers(tmp_path) == 3 * BLOCKS
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            assert on_disk(cache) == left

    asyncio.run(run())


def test_of_pages_that_were_used_again_the_last_block_comes_back(tmp_path: Path) -> None:
    """Whatever lies in a page: an earlier block of it is none."""

    async def run() -> None:
        before = tmp_path / "before.slab"
        disk = tmp_path / "disk"
        async with running(disk, **SMALL) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            for seed in range(120):
                await engine.ask(prompt(seed, BLOCKS))
                await cache.flush(10)
                if seed == 10:
                    shutil.copy(first(disk), before)
            left = on_disk(cache)
            assert cache.counts.tier("disk").evicted > 100
        no_catalogue(disk)
        lost = tmp_path / "lost"
        shutil.copytree(disk, lost)
        async with running(disk, **SMALL) as cache:  # type: ignore[arg-type]
            assert on_disk(cache) == left
            for seed in range(120):
                await StandIn(cache, 64).ask(prompt(seed, BLOCKS))
        shutil.copy(before, first(lost))  # sound headers, of generations that are over
        async with running(lost, **SMALL) as cache:  # type: ignore[arg-type]
            assert len(on_disk(cache)) < len(left)
            assert on_disk(cache) < left
            for seed in range(120):
                await StandIn(cache, 64).ask(prompt(seed, BLOCKS))

    asyncio.run(run())


def test_what_was_invalidated_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine ends when Invalidate has answered, before a block of it was deleted."""

    async def run() -> None:
        live, cut = tmp_path / "live", tmp_path / "cut"
        async with running(live) as cache:
            engine = StandIn(cache, 64)
            other = StandIn(cache, 64, namespace=b"o" * 32)
            await engine.ask(prompt(1, BLOCKS))
            await other.ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).durable_blocks == 2 * BLOCKS
            monkeypatch.setattr(DiskWriter, "_reap", lambda self, pools: False)
            assert (await cache.invalidate([NAMESPACE])).durable
            shutil.copytree(live, cut)
            monkeypatch.undo()
        no_catalogue(cut)
        async with running(cut) as cache:
            assert len(on_disk(cache)) == BLOCKS
            engine = StandIn(cache, 64)
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 0
            other = StandIn(cache, 64, namespace=b"o" * 32)
            assert (await other.ask(prompt(1, BLOCKS))).matched_tokens == BLOCKS * PAGE_SIZE
            assert (await cache.flush(10)).durable_blocks == 2 * BLOCKS
        no_catalogue(cut)
        async with running(cut) as cache:  # the present era's
            found = await StandIn(cache, 64).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == BLOCKS * PAGE_SIZE

    asyncio.run(run())


def test_identities_come_back(tmp_path: Path) -> None:
    """Else an Invalidate by weights would not find what a rebuild brought."""
    weights = "ab" * 32
    identity = b'{"weights_digest":"%s"}' % weights.encode()

    async def run() -> None:
        async with running(tmp_path) as cache:
            await StandIn(cache, 32, identity=identity).ask(prompt(1, BLOCKS))
            assert (await cache.flush(10)).not_durable_blocks == {}
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            assert cache.namespaces.of_weights(weights) == [NAMESPACE]

    asyncio.run(run())


def test_an_era_outlives_a_catalogue_that_missed_it(tmp_path: Path) -> None:
    """An older copy of the catalogue: the list knows better."""

    async def run() -> None:
        await stored(tmp_path)
        shutil.copytree(tmp_path / "catalogue", tmp_path / "older")
        async with running(tmp_path) as cache:
            StandIn(cache, 32)
            await cache.invalidate([NAMESPACE])
        shutil.rmtree(tmp_path / "catalogue")
        (tmp_path / "older").rename(tmp_path / "catalogue")
        async with running(tmp_path) as cache:
            assert (await StandIn(cache, 32).ask(prompt(1, BLOCKS))).matched_tokens == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("harm", "kind"), [(flip_payload, "corrupt_block"), (flip_header, "restore_refused")]
)
def test_a_torn_page_is_a_miss(tmp_path: Path, harm: Harm, kind: str) -> None:
    """A body that is torn is found when it is loaded; of a header, what hangs on it is dropped."""

    async def run() -> None:
        await stored(tmp_path)
        harm(tmp_path)
        no_catalogue(tmp_path)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 4 * PAGE_SIZE
            assert faults(cache, kind) >= 1
            assert (await cache.flush(10)).durable_blocks == BLOCKS

    asyncio.run(run())


@pytest.mark.parametrize("came", [True, False])
def test_relaxed_what_never_came_to_the_disk_is_no_block(tmp_path: Path, came: bool) -> None:
    async def run() -> None:
        live, cut = tmp_path / "live", tmp_path / "cut"
        async with running(live, durability="relaxed") as cache:
            await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert await cache._background.drained(10)
            shutil.copytree(live, cut)
        if not came:
            slab(cut).write_bytes(bytes(slab(cut).stat().st_size))
        no_catalogue(cut)
        async with running(cut, durability="relaxed") as cache:
            assert len(on_disk(cache)) == (BLOCKS if came else 0)
            found = await StandIn(cache, 32).ask(prompt(1, BLOCKS))
            assert found.matched_tokens == (BLOCKS * PAGE_SIZE if came else 0)

    asyncio.run(run())


def test_a_batch_that_was_refused_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are there, and it has never been a block of the disk's."""
    commit = Catalogue.commit

    def full(self: Catalogue, change: Change) -> None:
        if change.inserts:
            raise Full("injected")
        commit(self, change)

    async def run() -> None:
        live, cut = tmp_path / "live", tmp_path / "cut"
        await stored(live)
        async with running(live) as cache:
            monkeypatch.setattr(Catalogue, "commit", full)
            engine = StandIn(cache, 32)
            await engine.ask(prompt(2, BLOCKS))
            await cache.flush(10)
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)
            await cache.evict("disk", 1)  # what was planned is taken back with the next change
            left = on_disk(cache)
            assert len(left) == BLOCKS - 1
            shutil.copytree(live, cut)
            monkeypatch.undo()
        assert headers(cut) > BLOCKS
        no_catalogue(cut)
        async with running(cut) as cache:
            assert on_disk(cache) == left

    asyncio.run(run())


def test_the_order_of_use_is_kept_across_a_rebuild(tmp_path: Path) -> None:
    def stamps(cache: Cache) -> list[list[int]]:
        found = []
        for pools in cache._pools.layouts.values():  # type: ignore[union-attr]
            found.append(cache.index.stamps(pools.disk.id).tolist())
        return sorted(found)

    async def run() -> None:
        async with running(tmp_path) as cache:
            engines = [StandIn(cache, 32, segment_bytes=size) for size in (4096, 1024)]
            for seed in (3, 1, 2):
                for engine in engines:
                    await engine.ask(prompt(seed, 2))
            await cache.flush(10)
            before = stamps(cache)
        async with running(tmp_path) as cache:
            assert stamps(cache) == before
        damage_meta(tmp_path)
        async with running(tmp_path) as cache:
            assert stamps(cache) == before
            assert len({number for row in before for number in row if number}) > 2

    asyncio.run(run())


def size_of(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def test_a_rebuild_keeps_the_bound_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged catalogue is kept: the slab that has the fewest blocks goes for it."""
    limit = 6 * MIB
    sizes: list[int] = []
    inserted = Catalogue.commit

    def noted(self: Catalogue, change: Change) -> None:
        inserted(self, change)
        sizes.append(size_of(tmp_path))

    async def run() -> None:
        async with running(tmp_path, **SMALL) as cache:  # type: ignore[arg-type]
            engine = StandIn(cache, 64)
            for seed in range(80):
                await engine.ask(prompt(seed, BLOCKS))
                await cache.flush(10)
            before = on_disk(cache)
        assert limit - (2 << 20) < size_of(tmp_path) <= limit
        damage_meta(tmp_path)
        with (tmp_path / "catalogue/data.mdb").open("ab") as file:
            file.truncate(2 << 20)
        monkeypatch.setattr(Catalogue, "commit", noted)
        async with running(tmp_path, **SMALL) as cache:  # type: ignore[arg-type]
            assert faults(cache, "catalogue_reset") == 1
            found = on_disk(cache)
            assert len(found) > len(before) / 4
            assert found <= before
        assert max(sizes) <= limit
        assert size_of(tmp_path) <= limit

    asyncio.run(run())


def test_a_rebuild_that_was_cut_short_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        """As a kill -9."""

    def cut(*_: object) -> int:
        raise Cut

    async def run() -> None:
        await stored(tmp_path)
        damage_meta(tmp_path)
        monkeypatch.setattr(rebuild, "_fill", cut)
        with pytest.raises(Cut):
            async with running(tmp_path):
                pass
        assert (tmp_path / "catalogue.new").exists()
        monkeypatch.undo()
        async with running(tmp_path) as cache:
            assert len(on_disk(cache)) == BLOCKS
        assert not (tmp_path / "catalogue.new").exists()

    asyncio.run(run())
