"""How blocks' lives end: what is invalidated is gone from every tier, and for good."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvc2 import _core, errors
from kvc2.answers import Hints, TierTokens
from kvc2.cache.cache import Cache
from tests.doubles.caches import running
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE, StandIn, payloads, prompt

OTHER = bytes(32)


def resident(cache: Cache) -> dict[str, int]:
    return {each.tier: each.resident_pages for each in cache.stats().tiers}


def test_what_is_invalidated_is_gone_from_every_tier_and_the_rest_stays(tmp_path: Path) -> None:
    async def run() -> None:
        tokens = prompt(1, 6)
        async with running(tmp_path) as cache:
            engine, other = StandIn(cache, 32), StandIn(cache, 32, namespace=OTHER)
            await engine.ask(tokens)
            await other.ask(tokens)
            await cache.flush(10)
            assert resident(cache) == {"gpu": 12, "cpu": 12, "disk": 12}
            found = await cache.invalidate([NAMESPACE])
            assert (found.namespaces, found.blocks, found.durable) == (1, 6, True)
            assert cache.leases.match(engine.session, engine.opened, tokens).matched_tokens == 0
            await cache.flush(10)
            assert resident(cache) == {"gpu": 6, "cpu": 6, "disk": 6}
            cache.index.check()
            assert (await other.ask(tokens)).matched_tokens == 6 * PAGE_SIZE
            # the engine goes on under the number that it has
            assert (await engine.ask(tokens)).matched_tokens == 0
            assert (await engine.ask(tokens)).matched_tokens == 6 * PAGE_SIZE
        async with running(tmp_path) as cache:
            assert (await StandIn(cache, 32).ask(tokens)).tiers == TierTokens(
                0, 0, 6 * PAGE_SIZE, 0
            )

    asyncio.run(run())


def test_a_crash_after_the_answer_does_not_bring_it_back(tmp_path: Path) -> None:
    """Nor a second one, when the records of the first era are gone."""

    async def run() -> None:
        tokens = prompt(1, 6)
        disk, crashed = tmp_path / "disk", tmp_path / "crashed"
        async with running(disk) as cache:
            await StandIn(cache, 32).ask(tokens)
            await cache.flush(10)
            assert (await cache.invalidate([NAMESPACE])).durable
            shutil.copytree(disk, crashed)
        for _ in range(2):
            async with running(crashed) as cache:
                engine = StandIn(cache, 32)
                assert cache.leases.match(engine.session, engine.opened, tokens).matched_tokens == 0

    asyncio.run(run())


def test_an_open_lease_keeps_its_pages_and_commits_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        tokens = prompt(1, 6)
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(tokens[: 4 * PAGE_SIZE + 1])
            request, found = await engine.acquire(tokens, grant=2)
            await cache.invalidate([NAMESPACE])
            await cache.flush(10)
            truth = payloads(NAMESPACE, tokens, engine.layout)
            assert (engine.contents(found.prefix_pages) == truth[:4]).all()
            assert resident(cache) == {"gpu": 4, "cpu": 0, "disk": 0}
            rest = tokens[4 * PAGE_SIZE : 6 * PAGE_SIZE]
            result = cache.leases.commit(engine.session, request, 4, rest, found.granted_pages)
            assert result.tolist() == [_core.REFUSED] * 2
            cache.leases.release(engine.session, request)
            await cache.flush(10)
            assert resident(cache) == {"gpu": 0, "cpu": 0, "disk": 0}

    asyncio.run(run())


def test_namespaces_are_found_by_their_weights_also_those_of_an_earlier_run(tmp_path: Path) -> None:
    async def run() -> None:
        tokens = prompt(1, 4)
        async with running(tmp_path) as cache:
            for seed, name in enumerate([NAMESPACE, OTHER]):
                identity = json.dumps({"weights_digest": f"{seed:064x}"}).encode()
                engine = StandIn(cache, 32, namespace=name, identity=identity)
                await engine.ask(tokens)
            await cache.flush(10)
            names = cache.namespaces.of_weights(f"{1:064x}")
            assert names == [OTHER]
        async with running(tmp_path) as cache:
            assert cache.namespaces.of_weights(f"{1:064x}") == names
            assert cache.namespaces.of_weights(f"{7:064x}") == []
            assert (await cache.invalidate(names)).blocks == 4
            with pytest.raises(errors.NotFound):
                await cache.invalidate([b"?" * 32])

    asyncio.run(run())


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_has_expired_matches_nobody_and_gives_its_pages_up(tmp_path: Path) -> None:
    """A request's own time to live, counted from its last use; the stem that another one keeps
    stays."""

    async def run() -> None:
        clock, tokens = Clock(), prompt(1, 6)
        stem = tokens[: 2 * PAGE_SIZE + 1]
        async with running(tmp_path, clock=clock) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(tokens, Hints(ttl_s=60))
            await engine.ask(stem)
            await cache.flush(10)
            clock.now += 59
            assert cache.leases.match(engine.session, engine.opened, tokens).matched_tokens == 24
            await engine.ask(tokens, Hints(ttl_s=60))
            clock.now += 59
            assert cache.leases.match(engine.session, engine.opened, tokens).matched_tokens == 24
            clock.now += 1
            assert cache.leases.match(engine.session, engine.opened, tokens).matched_tokens == 8
            await cache.flush(10)
            assert resident(cache) == {"gpu": 2, "cpu": 2, "disk": 2}
            assert (await engine.ask(tokens)).matched_tokens == 8
            cache.index.check()

    asyncio.run(run())


def test_a_release_that_fails_leaves_the_lease_to_be_released() -> None:
    """What it holds would be pinned for as long as the daemon lives."""

    async def run() -> None:
        clock = Clock()
        async with running(None, clock=clock) as cache:
            engine = StandIn(cache, 32)
            request, _ = await engine.compute(prompt(1, 6))
            pool = engine.session.mapped_pool().id
            assert cache.index.pool_counts(pool).pinned == 6
            clock.now = float("nan")
            with pytest.raises(ValueError, match="NaN"):
                cache.leases.release(engine.session, request)
            clock.now = 1001.0
            cache.leases.release(engine.session, request)
            assert cache.index.pool_counts(pool).pinned == 0

    asyncio.run(run())


def test_the_shorter_of_a_namespaces_and_a_requests_time_to_live_counts() -> None:
    async def run() -> None:
        clock = Clock()
        async with running(None, clock=clock) as cache:
            engine = StandIn(cache, 32)
            cache.open_namespace(engine.session, NAMESPACE, b"{}", 10)
            for seed, ttl_s in enumerate([0, 5, 50]):
                await engine.ask(prompt(seed, 2), Hints(ttl_s=ttl_s))
            for seconds, left in [(4, [8, 8, 8]), (2, [8, 0, 8]), (4, [0, 0, 0])]:
                clock.now += seconds
                found = [
                    cache.leases.match(engine.session, engine.opened, prompt(i, 2))
                    for i in range(3)
                ]
                assert [each.matched_tokens for each in found] == left

    asyncio.run(run())


def test_a_session_that_ends_leaves_first_and_priority_last() -> None:
    async def run() -> None:
        async with running(None, gpu_only=True) as cache:
            engine = StandIn(cache, 12)
            await engine.ask(prompt(1, 4), Hints(priority=1))
            await engine.ask(prompt(2, 4))
            await engine.ask(prompt(3, 4), Hints(session_end=True))

            def left() -> list[int]:
                found = [
                    cache.leases.match(engine.session, engine.opened, prompt(i, 4))
                    for i in (1, 2, 3)
                ]
                return [each.matched_tokens // PAGE_SIZE for each in found]

            for blocks, kept in [(4, [4, 4, 0]), (3, [4, 1, 0]), (2, [3, 0, 0])]:
                await cache.evict("gpu", blocks)
                assert left() == kept

    asyncio.run(run())


def test_without_a_disk_or_an_arena_it_is_gone_too() -> None:
    async def run() -> None:
        tokens = prompt(1, 4)
        for gpu_only in (False, True):
            async with running(None, gpu_only=gpu_only) as cache:
                engine = StandIn(cache, 32)
                await engine.ask(tokens)
                assert (await cache.invalidate([NAMESPACE])).blocks == 4
                await cache.flush(10)
                assert sum(resident(cache).values()) == 0
                assert (await engine.ask(tokens)).matched_tokens == 0
                assert np.sum(cache.index.stamps(engine.session.pool.id) > 0) == 4

    asyncio.run(run())
