"""Pin and Unpin, as call and as command, over a daemon in the same process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2.answers import Asked
from kvc2.cache.pins import Keeping
from kvc2.client import Admin, LeaseCommit, NamespaceHandle
from kvc2.commands import cli
from kvc2.commands.exits import FAILED
from kvc2.errors import InvalidRequest, LimitReached, NotFound
from tests.doubles.caches import running
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.doubles.stand_in import StandIn, prompt
from tests.kvc2.cache.test_life_calls import BLOCKS, TOKENS, commit
from tests.kvc2.cache.test_lives import Clock, resident

FIRST = TOKENS[:48]  # three blocks


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path), cache=None) as daemon:
        yield daemon


@pytest.fixture
def engine(served: ServedDaemon) -> Iterator[TinyEngine]:
    with TinyEngine(served.address) as engine:
        yield engine


def opened(engine: TinyEngine) -> NamespaceHandle:
    return engine.client.open_namespace(identity().encode())


def in_cpu(served: ServedDaemon) -> int:
    with Admin(served.address) as admin:
        return next(tier.resident_pages for tier in admin.stats().tiers if tier.tier == "cpu")


def evict_all(served: ServedDaemon) -> None:
    with Admin(served.address) as admin:
        admin.flush()
        admin.evict("gpu")
        admin.evict("cpu")


def test_a_hard_pin_keeps_a_prefix_when_all_else_is_evicted(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    handle = opened(engine)
    commit(engine, handle)
    with Admin(served.address) as admin:
        admin.evict("gpu")  # which copies first; a flush without a disk has nothing to wait for
    found = engine.client.pin(handle, FIRST, hard=True)
    assert (found.blocks, found.resident_blocks, found.pinned_blocks) == (3, 3, 3)
    evict_all(served)
    assert in_cpu(served) == 3
    assert engine.client.unpin(handle, FIRST) == 3
    assert engine.client.unpin(handle, FIRST) == 0
    evict_all(served)
    assert in_cpu(served) == 0


def test_a_pin_holds_for_what_comes_later_and_outlives_its_session(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine:
        handle = opened(engine)
        found = engine.client.pin(handle, FIRST, hard=True)
        assert (found.blocks, found.resident_blocks) == (3, 0)
        commit(engine, handle)
        with Admin(served.address) as admin:
            admin.flush()
    evict_all(served)
    assert in_cpu(served) == 3


def test_a_soft_pin_goes_last(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    commit(engine, handle)
    other = np.arange(1000, 1065, dtype=np.uint32)
    granted = engine.client.acquire(handle, b"other", other, grant_pages=4).granted_pages
    engine.client.commit([LeaseCommit(b"other", 0, other[:64], granted)])
    engine.client.release([b"other"])
    engine.client.pin(handle, TOKENS, hard=False)
    with Admin(served.address) as admin:
        admin.flush()
        admin.evict("gpu")
        admin.evict("cpu", 4)  # the pinned ones were used longer ago
    tiers = engine.client.match(handle, TOKENS).tiers
    assert tiers.cpu == BLOCKS * 16
    assert engine.client.match(handle, other).matched_tokens == 0


def test_more_than_its_share_can_not_be_pinned_hard(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    handle = opened(engine)
    too_many = np.zeros(100_000, np.uint32)
    for tier in ("gpu", "cpu"):
        assert engine.client.pin(handle, FIRST, tier=tier, hard=True).pinned_blocks == 3
        with pytest.raises(LimitReached, match=r"hard_pin_percent.*25"):
            engine.client.pin(handle, too_many, tier=tier, hard=True)
        assert engine.client.pin(handle, FIRST, tier=tier, hard=True).pinned_blocks == 3


def test_bad_pins_name_the_field(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    with pytest.raises(InvalidRequest, match=r"tokens.*block of 16"):
        engine.client.pin(handle, TOKENS[:15], hard=True)
    with pytest.raises(InvalidRequest, match="tier"):
        engine.client.pin(handle, FIRST, tier="moon", hard=True)
    with Admin(served.address) as admin:
        with pytest.raises(InvalidRequest, match=r"tier.*session"):
            admin.pin(FIRST, tier="gpu", hard=True)
        with pytest.raises(NotFound, match="namespace"):
            admin.pin(FIRST, hard=True, namespace=b"x" * 32)


def test_a_pin_ends_with_its_namespace(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    engine.client.pin(handle, FIRST, hard=True)
    engine.client.invalidate(handle)
    assert engine.client.unpin(handle, FIRST) == 0


def test_a_pin_ends_by_itself(tmp_path: Path) -> None:
    """At its second, and not before; what it kept may go then, without a call. The same prefix
    again has the new end, and an unpin before it is the end."""

    async def run() -> None:
        clock, tokens = Clock(), prompt(1, 3)
        async with running(tmp_path, clock=clock) as cache:
            engine = StandIn(cache, 32)
            pin = partial(cache.pins.pin, None, engine.opened)
            hour, minute = Keeping("cpu", True, 3600), Keeping("cpu", True, 60)

            async def in_cpu() -> int:
                await cache.flush(10)
                await cache.evict("gpu", 0)
                await cache.evict("cpu", 0)
                return resident(cache)["cpu"]

            async def again() -> None:
                await cache.evict("disk", 0)
                await engine.ask(tokens)

            await again()
            assert pin(Asked(tokens), hour).blocks == 3
            assert pin(Asked(tokens), minute).pinned_blocks == 3
            assert pin(Asked(prompt(2, 2)), Keeping("cpu", True)).pinned_blocks == 5
            clock.now += 59
            cache.tick()
            assert await in_cpu() == 3
            clock.now += 1
            cache.tick()
            assert await in_cpu() == 0
            assert cache.pins.unpin(None, engine.opened, Asked(tokens), tier="cpu") == 0
            assert pin(Asked(tokens), minute).pinned_blocks == 5  # without an end it is there
            assert cache.pins.unpin(None, engine.opened, Asked(tokens), tier="cpu") == 3
            assert pin(Asked(tokens), Keeping("cpu", True)).blocks == 3
            clock.now += 1 << 30
            cache.tick()
            await again()
            assert await in_cpu() == 3
            cache.index.check()

    asyncio.run(run())


def test_a_client_gives_a_pin_its_time(served: ServedDaemon, engine: TinyEngine) -> None:
    handle, index = opened(engine), served.daemon.cache.index
    engine.client.pin(handle, FIRST, hard=True, ttl_s=100)
    with Admin(served.address) as admin:
        admin.pin(TOKENS, hard=True, ttl_s=200)
    pool = next(iter(served.daemon.cache._pools.layouts.values())).cpu.id
    now = served.on_loop(served.daemon.cache.tick)
    pinned = []
    for second in (now, now + 101, now + 201):
        served.on_loop(partial(index.advance, second))
        pinned.append(served.on_loop(partial(index.pinned_blocks, pool, hard=True)))
    assert pinned == [BLOCKS, BLOCKS, 0]
    assert engine.client.unpin(handle, FIRST) == 0


def test_an_engines_soft_pin_leaves_a_hard_one(served: ServedDaemon, engine: TinyEngine) -> None:
    """A request's mark must not undo what an operator asked for."""
    handle = opened(engine)
    with Admin(served.address) as admin:
        admin.pin(TOKENS, hard=True)
    told = engine.client.pin(handle, TOKENS, hard=False, ttl_s=300, keep_stronger=True)
    assert (told.blocks, told.pinned_blocks) == (BLOCKS, 0)
    pool = next(iter(served.daemon.cache._pools.layouts.values())).cpu.id
    assert served.on_loop(partial(served.daemon.cache.index.pinned_blocks, pool, hard=True))
    engine.client.pin(handle, TOKENS, hard=False, ttl_s=300)
    assert not served.on_loop(partial(served.daemon.cache.index.pinned_blocks, pool, hard=True))


def test_a_command_pins_and_unpins(
    served: ServedDaemon, engine: TinyEngine, tmp_path: Path
) -> None:
    handle = opened(engine)
    commit(engine, handle)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(FIRST.tolist()))
    command = ["--tokens", str(prompt), "--address", served.address]
    run = CliRunner().invoke(cli.app, ["pin", *command, "--hard", "--json"])
    assert json.loads(run.stdout)["blocks"] == 3
    run = CliRunner().invoke(cli.app, ["pin", *command, "--hard", "--ttl", "3600", "--json"])
    assert json.loads(run.stdout)["pinned_blocks"] == 3
    run = CliRunner().invoke(cli.app, ["pin", *command, "--ttl", str(1 << 32)])
    assert (run.exit_code, "--ttl" in run.stderr) == (2, True)
    evict_all(served)
    assert in_cpu(served) == 3
    run = CliRunner().invoke(cli.app, ["unpin", *command])
    assert (run.exit_code, run.stdout) == (0, "3 blocks are not pinned by this any more\n")
    run = CliRunner().invoke(cli.app, ["unpin", *command])
    assert run.exit_code == FAILED
    assert "no pin of exactly these blocks" in run.stderr
