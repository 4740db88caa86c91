"""Copied commits in the cache: what may end while bytes are on their way, and what their blocks
live for. Nothing is lost, nothing is taken for another's, and every page comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvc2 import _core, errors
from kvc2.answers import Asked
from kvc2.cache.cache import Cache, KeyedLayout
from kvc2.cache.copied import GivenBlocks
from kvc2.config import LimitsConfig
from kvc2.layout import layer_major
from tests.doubles.caches import with_arena
from tests.doubles.in_arena import KEYED, InArena
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE, prompt

KEYS = [b"a", b"b", b"c"]
OTHER = bytes(31) + b"o"
ALL_ADOPTED = [_core.ADOPTED] * 3


def private(cache: Cache) -> int:
    """Pages of the arena that were granted and belong to no block."""
    return next(each.private_pages for each in cache.stats().tiers if each.tier == "cpu")


async def held_back(engine: InArena, copying: Callable[[], object]) -> None:
    """Calls it when the copy under way has its pages and waits for the session's memory."""
    async with engine.session.mapped_pool().demoting:
        while not private(engine.cache):
            await asyncio.sleep(0)
        copying()


def test_copies_live_as_long_as_their_namespace_says(tmp_path: Path) -> None:
    now = [1000.0]

    async def run() -> None:
        async with with_arena(tmp_path, clock=lambda: now[0]) as cache:
            engine = InArena(cache, 32, ttl_s=5)
            assert await engine.copy(prompt(1, 3)) == ALL_ADOPTED
            assert await engine.copy_keys(KEYS) == ALL_ADOPTED
            assert await engine.copy(prompt(1, 3)) == [_core.DUPLICATE] * 3
            assert await engine.copy_keys(KEYS) == [_core.DUPLICATE] * 3
            now[0] += 6
            cache.tick()
            assert (
                cache.leases.match(engine.session, engine.opened, prompt(1, 3)).matched_tokens == 0
            )
            found = cache.leases.match_keys(engine.session, engine.keyed, KEYS)
            assert found.found.tolist() == [0] * 3

    asyncio.run(run())


def test_a_copied_commit_that_comes_again_answers_the_same() -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            tokens = prompt(1, 3)
            request, _ = await engine.read(tokens)
            assert await engine.copy(tokens[: 2 * PAGE_SIZE], request) == [_core.ADOPTED] * 2
            assert await engine.copy(tokens[: 2 * PAGE_SIZE], request) == [_core.ADOPTED] * 2
            assert await engine.copy(tokens, request) == ALL_ADOPTED
            other = np.concatenate([tokens[:PAGE_SIZE], prompt(2, 3)])
            assert await engine.copy(other[: 3 * PAGE_SIZE], request) == [
                _core.ADOPTED,
                _core.REFUSED,
                _core.REFUSED,
            ]
            engine.release(request)
            assert private(cache) == 0
            await engine.read(tokens)

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
def test_no_other_namespace_takes_the_place_of_one_whose_copies_are_under_way(keys: bool) -> None:
    """Its blocks would be that one's."""

    async def run() -> None:
        limits = LimitsConfig(max_known_namespaces=2)
        async with with_arena(None, limits=limits) as cache:
            engine = InArena(cache, 32)
            of = KeyedLayout(engine.layout, opaque=keys)
            copied = engine.keyed if keys else engine.opened
            copying = asyncio.ensure_future(
                engine.copy_keys(KEYS) if keys else engine.copy(prompt(1, 3))
            )

            def another() -> None:
                for name in (OTHER, bytes(32)):  # each in the place of one that is not in use
                    cache.open_namespace(engine.session, name, b"{}", of=of)

            await held_back(engine, another)
            assert await copying == ALL_ADOPTED
            assert not copied.gone
            assert (private(cache), cache.stats().blocks) == (0, 3)

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
def test_what_is_invalidated_while_it_is_copied_is_refused(keys: bool) -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            copying = asyncio.ensure_future(
                engine.copy_keys(KEYS) if keys else engine.copy(prompt(1, 3))
            )
            async with engine.session.mapped_pool().demoting:
                while not private(cache):
                    await asyncio.sleep(0)
                await cache.invalidate([KEYED if keys else NAMESPACE])
            assert await copying == [_core.REFUSED] * 3
            assert private(cache) == 0

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
def test_a_lease_from_before_an_invalidation_takes_no_copies(keys: bool) -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            request, _ = await (engine.read_keys(KEYS) if keys else engine.read(prompt(1, 3)))
            await cache.invalidate([KEYED, NAMESPACE])
            if keys:
                assert await engine.copy_keys(KEYS, request) == [_core.REFUSED] * 3
            else:
                assert await engine.copy(prompt(1, 3), request) == [_core.REFUSED] * 3
            assert private(cache) == 0

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("leased", [False, True])
def test_what_nobody_waits_for_any_more_is_not_committed(keys: bool, leased: bool) -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            request = b""
            if leased:
                reading = engine.read_keys(KEYS) if keys else engine.read(prompt(1, 3))
                request, _ = await reading
            copying = asyncio.ensure_future(
                engine.copy_keys(KEYS, request) if keys else engine.copy(prompt(1, 3), request)
            )

            def ends() -> None:
                if leased:
                    engine.release(request)
                else:
                    copying.cancel()

            await held_back(engine, ends)
            if leased:
                assert await copying == [_core.REFUSED] * 3
            else:
                with pytest.raises(asyncio.CancelledError):
                    await copying
            while private(cache):  # the copy ends by itself
                await asyncio.sleep(0)
            assert cache.stats().blocks == 0
            assert cache.stats().leases == 0

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("at_rest", [False, True])
def test_a_session_that_ends_while_it_is_copied_from_leaves_no_pages(
    keys: bool, at_rest: bool
) -> None:
    """What an engine may have written to meanwhile is not adopted."""

    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            copying = asyncio.ensure_future(
                engine.copy_keys(KEYS) if keys else engine.copy(prompt(1, 3))
            )
            closing: list[asyncio.Future[None]] = []
            await held_back(
                engine,
                lambda: closing.append(asyncio.ensure_future(engine.close(at_rest=at_rest))),
            )
            (outcome,) = await asyncio.gather(copying, return_exceptions=True)
            await closing[0]
            assert outcome == ALL_ADOPTED if at_rest else type(outcome) is errors.SessionOver
            found = cache.stats()
            assert (private(cache), found.leases) == (0, 0)
            assert found.blocks == (3 if at_rest else 0)

    asyncio.run(run())


def test_a_namespace_that_was_let_go_of_takes_no_copies() -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            engine.session.let_go(engine.opened.id)
            with pytest.raises(errors.NotFound, match="namespace_id"):
                await engine.copy(prompt(1, 3))
            assert cache.stats().leases == 0

    asyncio.run(run())


def test_copies_of_keys_in_a_lease_become_durable(tmp_path: Path) -> None:
    async def run() -> None:
        async with with_arena(tmp_path) as cache:
            engine = InArena(cache, 32)
            await engine.copy_keys(KEYS[:1])
            request, _ = await engine.read_keys(KEYS)
            assert await engine.copy_keys(KEYS, request) == [_core.DUPLICATE, 0, 0]
            lease = engine.session.leases[request].id
            assert await cache.wait_durable(engine.session, [lease], 10)
            assert next(e for e in cache.stats().tiers if e.tier == "disk").resident_pages == 3

    asyncio.run(run())


def test_a_session_keeps_nothing_of_namespaces_that_it_has_let_go_of() -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            known = dict(engine.session.layouts)
            cache.open_namespace(engine.session, OTHER, b"{}")
            engine.session.let_go(cache.namespaces.find(OTHER).id)
            assert engine.session.layouts == known

    asyncio.run(run())


@pytest.mark.parametrize("keys", [False, True])
def test_of_two_copies_at_a_time_one_is_the_blocks_and_the_others_pages_come_back(
    keys: bool,
) -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine, other = InArena(cache, 32), InArena(cache, 32)
            copies = [
                each.copy_keys(KEYS) if keys else each.copy(prompt(1, 3))
                for each in (engine, other)
            ]
            results = await asyncio.gather(*copies)
            assert results == [ALL_ADOPTED, [_core.DUPLICATE] * 3]
            assert (private(cache), cache.stats().blocks) == (0, 3)

    asyncio.run(run())


def test_copies_of_a_lease_that_has_ended_are_refused() -> None:
    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            for keys in (False, True):
                reading = engine.read_keys(KEYS) if keys else engine.read(prompt(1, 3))
                request, _ = await reading
                lease = engine.session.leases[request]
                engine.release(request)
                blocks = GivenBlocks(
                    lease.namespace,
                    0,
                    Asked(keys=KEYS) if keys else Asked(prompt(1, 3)[: 3 * PAGE_SIZE]),
                    cache.leases.grant(engine.session, 3),
                    lease,
                )
                stored = await cache.copied.store(engine.session, blocks)
                assert stored.results.tolist() == [_core.REFUSED] * 3
                assert (private(cache), cache.stats().blocks) == (0, 0)

    asyncio.run(run())


def test_the_sessions_pool_takes_no_blocks_of_another_layout() -> None:
    """Of as many tokens, so that nothing else tells the two apart."""

    async def run() -> None:
        async with with_arena(None) as cache:
            engine = InArena(cache, 32)
            other = layer_major(2, 32, segment_bytes=512, page_size=PAGE_SIZE)
            engine.opened = cache.open_namespace(
                engine.session, OTHER, b"{}", of=KeyedLayout(other)
            )
            with pytest.raises(errors.InvalidRequest, match="place"):
                await engine.acquire(prompt(1, 3))
            with pytest.raises(errors.InvalidRequest, match="copied"):
                await engine.copy(prompt(1, 3))
            assert (private(cache), cache.stats().leases) == (0, 0)

    asyncio.run(run())
