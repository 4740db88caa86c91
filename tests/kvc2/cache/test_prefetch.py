"""Prefetch: as a call of the cache in virtual time, and as rpc and command over a daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2 import _core, errors
from kvc2.answers import Asked, Prefetched, TierTokens
from kvc2.cache.prefetch import AT_ONCE_MAX
from kvc2.client import Admin, NamespaceHandle
from kvc2.commands import cli
from kvc2.errors import InvalidRequest, NotFound
from kvc2.moving.loading import Loader
from kvc2.tiers.pools import LayoutPools
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.doubles.stand_in import prompt
from tests.kvc2.cache.test_life_calls import BLOCKS, TOKENS, commit
from tests.kvc2.moving.test_load_or_recompute import BLOCKS as LONG
from tests.kvc2.moving.test_load_or_recompute import FAST, SLOW, House, in_house
from tests.kvc2.moving.test_load_or_recompute import TOKENS as LONG_TOKENS

CACHED = BLOCKS * 16
LATER_S = 1000.0


async def prefetch(
    house: House, seed: int, deadline_s: float, tier: str = "cpu", session: bool = True
) -> Prefetched:
    return await house.cache.prefetcher.prefetch(
        house.engine.session if session else None,
        house.engine.opened,
        Asked(prompt(seed, LONG)),
        tier=tier,
        deadline_s=deadline_s,
    )


def loaded(house: House) -> float:
    values = house.cache._metrics.values()
    return values.get("transfer_blocks_total{source=disk,target=cpu}", 0)


def test_what_was_prefetched_hits_in_the_faster_tier(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        found = await prefetch(house, 1, LATER_S, session=False)
        assert (found.tiers, found.coming_tokens) == (TierTokens(cpu=LONG_TOKENS), 0)
        assert (await house.engine.ask(prompt(1, LONG))).tiers == TierTokens(cpu=LONG_TOKENS)
        found = await prefetch(house, 2, LATER_S, "gpu")
        assert (found.tiers, found.coming_tokens) == (TierTokens(gpu=LONG_TOKENS), 0)
        assert (await house.engine.ask(prompt(2, LONG))).tiers == TierTokens(gpu=LONG_TOKENS)
        assert house.cache.index.counts().leases == 0
        house.cache.index.check()

    in_house(tmp_path, FAST, work)


def test_who_does_not_wait_hears_what_is_coming(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        begun = house.clock()
        found = await prefetch(house, 1, 0.0)
        assert (found.tiers, found.coming_tokens) == (TierTokens(disk=LONG_TOKENS), LONG_TOKENS)
        assert house.clock() == begun
        assert house.cache.index.counts().leases == 0
        found = await prefetch(house, 1, LATER_S)
        assert (found.tiers, found.coming_tokens) == (TierTokens(cpu=LONG_TOKENS), 0)
        assert loaded(house) == LONG

    in_house(tmp_path, SLOW, work)


def test_no_part_begins_while_a_request_waits_for_its_own(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        house.engine.session.prefill_rate = 0.0  # it waits for all of it
        asked = asyncio.create_task(house.engine.ask(prompt(1, LONG)))
        while not house.cache._mover.waited_for:
            await asyncio.sleep(0)
        under_way = house.cache._mover.loading_bytes
        behind = asyncio.create_task(prefetch(house, 2, LATER_S))
        for _ in range(100):
            await asyncio.sleep(0)
        assert house.cache._mover.loading_bytes == under_way
        await asked
        assert loaded(house) == LONG
        assert (await behind).tiers == TierTokens(cpu=LONG_TOKENS)
        assert loaded(house) == 2 * LONG

    in_house(tmp_path, 10 * SLOW, work)


def test_a_prefix_longer_than_the_pool_comes_as_far_as_there_is_room(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        assert (
            house.cache.leases.grant(house.engine.session, LONG + LONG // 2).size
            == LONG + LONG // 2
        )
        found = await prefetch(house, 2, LATER_S, "gpu")
        in_gpu = found.tiers.gpu
        assert found.coming_tokens == 0
        assert 0 < in_gpu < LONG_TOKENS
        assert sum(found.tiers) == LONG_TOKENS

    in_house(tmp_path, FAST, work)


def crowded(house: House, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Others evict all that has come, before each look for a next part; how often it was looked."""
    until_idle, looks = Loader.until_idle, [0]

    async def evicted(loader: Loader) -> None:
        await until_idle(loader)
        looks[0] += 1
        assert looks[0] < 9 * LONG, "it is never given up on"
        cpu = house.engine.session.pool.pools.cpu.id
        house.cache.index.evict(cpu, 2 * LONG)

    monkeypatch.setattr(Loader, "until_idle", evicted)
    return looks


def test_what_others_evict_as_fast_as_it_comes_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When twice what was asked for has moved, in parts of a few blocks."""

    async def work(house: House) -> None:
        await prefetch(house, 0, LATER_S)  # measures the disk
        await house.forget()
        before = loaded(house)
        crowded(house, monkeypatch)
        found = await prefetch(house, 1, LATER_S)
        assert found.coming_tokens == 0
        assert 2 * LONG <= loaded(house) - before < 2 * LONG + LONG / 4

    in_house(tmp_path, 10 * SLOW, work)


def test_who_waits_for_others_in_vain_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first block, which they bring to cpu each time, and evict."""

    async def work(house: House) -> None:
        looks, crowds = crowded(house, monkeypatch), Loader.until_idle
        wish = house.cache.prefetcher._wish(
            None, house.engine.opened, Asked(prompt(1, LONG)), "cpu"
        )

        async def others(loader: Loader) -> None:
            await crowds(loader)
            index, number = house.cache.index, wish.namespace.number
            step = index.prefetch(number, wish.pool, wish.asked.tokens, 1, touches=False)
            assert isinstance(step, _core.Transfer)
            house.cache._mover.load(wish.pools, step)

        monkeypatch.setattr(Loader, "until_idle", others)
        found = await prefetch(house, 1, LATER_S, "gpu")
        assert (found.coming_tokens, looks) == (0, [2 * LONG])
        assert loaded(house) == 2 * LONG

    in_house(tmp_path, FAST, work)


def test_only_so_many_at_once(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        for _ in range(AT_ONCE_MAX):
            await prefetch(house, 1, 0.0)
        with pytest.raises(errors.LimitReached, match=r"prefetches.*16"):
            await prefetch(house, 1, 0.0)
        assert house.cache.index.counts().leases == 0

    in_house(tmp_path, SLOW, work)


def test_a_session_that_ends_ends_its_prefetches(tmp_path: Path) -> None:
    async def work(house: House) -> None:
        await prefetch(house, 0, LATER_S)  # a part is little, now that the disk's speed is known
        found = await prefetch(house, 1, 0.0, "gpu")
        assert found.coming_tokens == LONG_TOKENS
        await house.engine.close()
        (task,) = house.cache.prefetcher._under_way
        await task
        assert loaded(house) < 2 * LONG
        house.cache.index.check()

    in_house(tmp_path, 10 * SLOW, work)


# ---- over the wire ----


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path, disk=True), cache=None) as daemon:
        yield daemon


@pytest.fixture
def engine(served: ServedDaemon) -> Iterator[TinyEngine]:
    with TinyEngine(served.address) as engine:
        yield engine


def on_disk(served: ServedDaemon, engine: TinyEngine) -> NamespaceHandle:
    """TOKENS are cached there alone."""
    handle = engine.client.open_namespace(identity().encode())
    commit(engine, handle)
    with Admin(served.address) as admin:
        assert admin.flush().not_durable_blocks == {}
        admin.evict("gpu")
        admin.evict("cpu")
    assert engine.client.match(handle, TOKENS).tiers.disk == CACHED
    return handle


def test_an_engine_and_the_owner_prefetch(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = on_disk(served, engine)
    with Admin(served.address) as admin:
        found = admin.prefetch(TOKENS, deadline_s=30.0)
    assert (found.tiers.cpu, found.tiers.disk, found.coming_tokens) == (CACHED, 0, 0)
    assert engine.client.match(handle, TOKENS).tiers.cpu == CACHED
    found = engine.client.prefetch(handle, TOKENS, tier="gpu", deadline_s=30.0)
    assert (found.tiers.gpu, found.coming_tokens) == (CACHED, 0)
    assert engine.client.acquire(handle, b"1", TOKENS).tiers.gpu == CACHED


def test_a_fault_shortens_it(served: ServedDaemon, engine: TinyEngine, tmp_path: Path) -> None:
    handle = on_disk(served, engine)

    def pools() -> LayoutPools:
        return next(iter(served.daemon.cache._pools.layouts.values()))

    page_bytes = served.on_loop(pools).shape.page_bytes
    (slab,) = (tmp_path / "disk").glob("slabs/*/*.slab")
    with slab.open("r+b") as file:
        file.seek(3 * page_bytes + 4096)
        byte = file.read(1)[0]
        file.seek(3 * page_bytes + 4096)
        file.write(bytes([byte ^ 1]))
    found = engine.client.prefetch(handle, TOKENS, deadline_s=30.0)
    assert (found.tiers.cpu, found.tiers.disk, found.coming_tokens) == (3 * 16, 0, 0)


def test_bad_prefetches_name_the_field(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = engine.client.open_namespace(identity().encode())
    for tier in ("moon", "disk"):
        with pytest.raises(InvalidRequest, match="tier"):
            engine.client.prefetch(handle, TOKENS, tier=tier)
    with pytest.raises(InvalidRequest, match="tokens"):
        engine.client.prefetch(handle, np.empty(0, np.uint32))
    with Admin(served.address) as admin:
        with pytest.raises(InvalidRequest, match=r"tier.*session"):
            admin.prefetch(TOKENS, tier="gpu")
        with pytest.raises(NotFound, match="namespace"):
            admin.prefetch(TOKENS, namespace=b"x" * 32)
        with pytest.raises(InvalidRequest, match="deadline_ms"):
            admin.prefetch(TOKENS, deadline_s=4e6)


def test_a_command_prefetches(served: ServedDaemon, engine: TinyEngine, tmp_path: Path) -> None:
    on_disk(served, engine)
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(TOKENS.tolist()))
    command = ["prefetch", "--tokens", str(file), "--deadline-s", "30", "--address", served.address]
    run = CliRunner().invoke(cli.app, command)
    assert run.stdout == "96 of 100 tokens are in cpu, 0 on disk, 0 of these on their way\n"
    run = CliRunner().invoke(cli.app, [*command, "--json"])
    assert json.loads(run.stdout)["tiers"]["cpu"] == CACHED
