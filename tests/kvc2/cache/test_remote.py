"""Hosts that share a remote store: a prefix computed on one is served by another, byte by byte, and
whatever the store does is a miss at worst."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc2.answers import Acquired, Asked, Hints, Media, Terms
from kvc2.cache.cache import Cache
from kvc2.config import LimitsConfig
from kvc2.errors import SessionOver
from kvc2.tiers.remote.codec import Sealer
from tests.doubles.caches import faults
from tests.doubles.shared_hosts import SharingEngine, host, remote_of
from tests.doubles.stand_in import PAGE_SIZE, prompt
from tests.doubles.stores import ServerProcess, ToldStore
from tests.doubles.waiting import on_a_loop, until

BLOCKS = 12
TOKENS = BLOCKS * PAGE_SIZE
HEADER_EXTRAS = slice(248, 280)


def counter(cache: Cache, name: str) -> float:
    return cache._metrics.values()[name]


def from_remote(found: Acquired) -> int:
    return found.tiers.remote // PAGE_SIZE


async def put_by_another(folder: Path, store: ToldStore | str, *seeds: int) -> None:
    """A host computes these prompts, puts them, and is gone."""
    async with host(folder / "other", store) as cache:
        engine = SharingEngine(cache)
        for seed in seeds:
            await engine.put(prompt(seed, BLOCKS))


@asynccontextmanager
async def second_host(
    folder: Path, store: ToldStore | str, *seeds: int, **flags: Any
) -> AsyncIterator[tuple[Cache, SharingEngine]]:
    """And its engine, where another host has put these prompts."""
    await put_by_another(folder, store, *seeds)
    async with host(folder / "b", store, **flags) as cache:
        yield cache, SharingEngine(cache)


@on_a_loop
async def test_what_one_host_computed_another_serves(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        await put_by_another(tmp_path, server.url, 1)
        assert len(server.names()) == BLOCKS
        async with host(tmp_path / "b", server.url) as cache:
            engine = SharingEngine(cache)
            found = await engine.fetched(prompt(1, BLOCKS))
            assert from_remote(found) == BLOCKS
            assert found.matched_tokens == TOKENS
            again = await engine.ask(prompt(1, BLOCKS))
            assert from_remote(again) == 0
            assert again.matched_tokens == TOKENS
            cache.index.check()


@on_a_loop
async def test_a_block_is_put_at_its_second_use(tmp_path: Path) -> None:
    store = ToldStore()
    async with host(tmp_path, store) as cache:
        engine = SharingEngine(cache)
        await engine.ask(prompt(1, BLOCKS))
        await engine.demoted()
        await until(lambda: remote_of(cache).idle)
        assert not store.values
        await engine.ask(prompt(1, BLOCKS))
        await until(lambda: len(store.values) == BLOCKS)
        calls = len(store.calls)
        await engine.ask(prompt(1, BLOCKS))
        await until(lambda: remote_of(cache).idle)
        assert len(store.calls) == calls, "it was asked for again"


@on_a_loop
async def test_the_prefix_goes_on_past_what_the_disk_holds(tmp_path: Path) -> None:
    store, whole = ToldStore(), prompt(1, BLOCKS)
    await put_by_another(tmp_path, store, 1)
    there, store.values = store.values, {}
    async with host(tmp_path / "b", store) as cache:
        engine = SharingEngine(cache)
        await engine.ask(whole[: 4 * PAGE_SIZE + 1])
        await engine.demoted()
        await cache.evict("gpu", 0)
        await cache.evict("cpu", 0)
        store.values = there
        found = await engine.ask(whole)
        assert found.tiers.disk == 4 * PAGE_SIZE
        assert from_remote(found) == BLOCKS - 4


@on_a_loop
async def test_match_tells_what_the_store_has_and_brings_nothing(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        leases, whole = cache.leases, prompt(1, BLOCKS)
        found = await leases.match_beyond(engine.session, engine.opened, whole)
        assert found.matched_tokens == found.tiers.remote == TOKENS
        assert "get" not in store.calls
        none = await leases.match_beyond(engine.session, engine.opened, prompt(2, BLOCKS))
        assert none.matched_tokens == 0


@on_a_loop
async def test_an_image_is_part_of_what_is_put_and_found(tmp_path: Path) -> None:
    store, tokens = ToldStore(), prompt(1, BLOCKS)
    images = [Media(5 * PAGE_SIZE + 1, 3, hashlib.sha256(each).digest()) for each in (b"a", b"b")]
    seen, other = (Asked(tokens, extras=(each,)) for each in images)
    async with host(tmp_path / "a", store) as cache:
        engine = SharingEngine(cache)
        for _ in range(2):
            request, _ = await engine.compute(seen)
            cache.leases.release(engine.session, request)
            await engine.demoted()
        await until(lambda: len(store.values) == BLOCKS)
    told = [any(value[HEADER_EXTRAS]) for value in store.values.values()]
    assert told.count(True) == 1  # the header of the block in which it begins
    async with host(tmp_path / "b", store) as cache:
        engine = SharingEngine(cache)
        for asked, blocks in ((other, 5), (seen, BLOCKS)):
            request, found = await engine.compute(asked)  # judges
            cache.leases.release(engine.session, request)
            assert found.matched_tokens == blocks * PAGE_SIZE


@on_a_loop
async def test_what_the_client_has_is_not_fetched_for_it(tmp_path: Path) -> None:
    store, whole = ToldStore(), prompt(1, BLOCKS)
    async with second_host(tmp_path, store, 1) as (cache, engine):
        for skipped, gets in ((BLOCKS, 0), (BLOCKS - 1, 1)):
            terms = Terms(0, 20.0, in_arena=True, skip_blocks=skipped)
            await cache.leases.acquire(engine.session, engine.opened, b"one", whole, terms)
            cache.leases.release(engine.session, b"one")
            assert store.calls.count("get") == gets


@on_a_loop
async def test_a_prefetch_brings_what_the_store_has(tmp_path: Path) -> None:
    store, whole = ToldStore(), prompt(1, BLOCKS)
    async with second_host(tmp_path, store, 1) as (cache, engine):
        asked = Asked(whole[: BLOCKS * PAGE_SIZE])
        told = await cache.prefetcher.prefetch(
            None, engine.opened, asked, tier="cpu", deadline_s=20.0
        )
        assert told.tiers.cpu == TOKENS
        found = await engine.ask(whole)
        assert (found.tiers.cpu, from_remote(found)) == (TOKENS, 0)
        assert not cache.index.counts().leases


@on_a_loop
async def test_explain_names_the_store(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        request, _ = await engine.acquire(prompt(1, BLOCKS))
        told = cache.explainer.of_request(request, None)
        assert [tuple(each) for each in told.runs] == [("remote", BLOCKS)]


@on_a_loop
async def test_whoever_asks_for_what_comes_already_waits_for_it(tmp_path: Path) -> None:
    store = ToldStore()
    await put_by_another(tmp_path, store, 1)
    gets_before = store.calls.count("get")
    async with host(tmp_path / "b", store) as cache:
        first, second = SharingEngine(cache), SharingEngine(cache)
        store.slow_s = 0.05
        found = await asyncio.gather(first.ask(prompt(1, BLOCKS)), second.ask(prompt(1, BLOCKS)))
        assert [each.matched_tokens for each in found] == [TOKENS] * 2
        assert store.calls.count("get") - gets_before == 1
        cache.index.check()


# ---- whatever the store does ----


@on_a_loop
async def test_no_spoiled_value_is_served(tmp_path: Path) -> None:
    """As an engine meets it: the bytes of every answer are judged."""
    store = ToldStore()
    await put_by_another(tmp_path, store, 1)
    random, sound = np.random.default_rng(3), dict(store.values)
    for number in range(12):
        store.values = dict(sound)
        victim = sorted(sound)[int(random.integers(BLOCKS))]
        spoiled = bytearray(sound[victim])
        spoiled[int(random.integers(len(spoiled)))] ^= 1 << int(random.integers(8))
        cut = (bytes(spoiled), bytes(spoiled[:-1]), sound[victim] + b"x", b"", sound[min(sound)])
        store.values[victim] = cut[number % len(cut)]
        if store.values[victim] == sound[victim]:
            continue
        async with host(tmp_path / f"b{number}", store, disk_bytes=8 << 20) as cache:
            found = await SharingEngine(cache).ask(prompt(1, BLOCKS))  # judges
            assert from_remote(found) < BLOCKS
            empty = number % len(cut) == cut.index(b"")  # nothing that could be read
            assert faults(cache, "remote_bad_block") == (0 if empty else 1)
            await until(lambda: remote_of(cache).idle)
            assert not cache.index.pool_counts(cache._pools.ids("cpu")[0]).private
            await until(partial(_gone, store, victim))


def _gone(store: ToldStore, name: bytes) -> bool:
    return name not in store.values


@on_a_loop
async def test_what_is_no_value_at_all_is_mended(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        await put_by_another(tmp_path, server.url, 1)
        spoiled = server.names()[5]
        server.call(b"DEL", spoiled)
        server.call(b"RPUSH", spoiled, b"an item")
        async with host(tmp_path / "b", server.url) as cache:
            engine = SharingEngine(cache)
            assert from_remote(await engine.ask(prompt(1, BLOCKS))) < BLOCKS
            await until(lambda: spoiled not in server.names())
            await engine.put(prompt(1, BLOCKS))
            assert len(server.names()) == BLOCKS
            assert server.call(b"TYPE", spoiled) == b"string"


@on_a_loop
async def test_what_can_t_be_judged_keeps_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        monkeypatch.setattr(Sealer, "open", fail)
        assert (await engine.ask(prompt(1, BLOCKS))).matched_tokens == 0
        await until(lambda: remote_of(cache).idle)
        assert cache.index.pool_counts(engine.opened.pools.cpu.id).private == 0
        assert faults(cache, "internal_error") == 1


@on_a_loop
async def test_what_another_secret_put_is_neither_found_nor_believed(tmp_path: Path) -> None:
    store = ToldStore()
    await put_by_another(tmp_path, store, 1)
    async with host(tmp_path / "b", store) as cache:
        engine = SharingEngine(cache, secret=b"another secret, of other hosts")
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == 0
        await engine.put(prompt(1, BLOCKS))
        assert len(store.values) == 2 * BLOCKS
    async with host(tmp_path / "c", store) as cache:  # what they put, under the names of ours
        engine, names, values = (
            SharingEngine(cache),
            list(store.values),
            list(store.values.values()),
        )
        store.values = dict(zip(names, values[BLOCKS:] + values[:BLOCKS], strict=True))
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == 0
        assert faults(cache, "remote_bad_block") == 1


@on_a_loop
async def test_what_was_invalidated_is_not_found_in_the_store(tmp_path: Path) -> None:
    store = ToldStore()
    async with host(tmp_path, store) as cache:
        engine = SharingEngine(cache)
        await engine.put(prompt(1, BLOCKS))
        await cache.invalidate([engine.namespace])
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == 0
    async with host(tmp_path, store) as cache:  # a restart knows it
        found = await SharingEngine(cache).ask(prompt(2, BLOCKS))
        await cache.evict("disk", 0)
        found = await SharingEngine(cache).ask(prompt(1, BLOCKS))
        assert from_remote(found) == 0


@on_a_loop
async def test_a_value_that_went_between_exists_and_get_ends_the_prefix(tmp_path: Path) -> None:
    store = ToldStore()
    await put_by_another(tmp_path, store, 1)
    gone = sorted(store.values)[5]

    def evict(call: str) -> None:
        if call == "get":
            store.values.pop(gone, None)

    store.before = evict
    async with host(tmp_path / "b", store) as cache:
        found = await SharingEngine(cache).ask(prompt(1, BLOCKS))
        assert from_remote(found) < BLOCKS
        assert faults(cache, "remote_error") == 0


@on_a_loop
async def test_a_dead_store_costs_once(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with second_host(tmp_path, server.url, 1, patience_ms=100) as (cache, engine):
            server.kill()
            for seed in range(1, 6):
                found = await engine.ask(prompt(seed, BLOCKS))
                assert found.matched_tokens == 0
            assert faults(cache, "remote_error") + faults(cache, "remote_late") == 1
            server.start()
            await until(lambda: remote_of(cache).link.up)


@on_a_loop
async def test_a_frozen_store_costs_once_and_is_used_again(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with second_host(tmp_path, server.url, 1, patience_ms=100) as (cache, engine):
            server.freeze()
            for seed in range(2, 7):
                found = await engine.ask(prompt(seed, BLOCKS))
                assert found.matched_tokens == 0
            assert faults(cache, "remote_late") == 1
            server.thaw()
            await until(lambda: remote_of(cache).link.up)
            await engine.ask(prompt(1, BLOCKS))
            later = prompt(1, BLOCKS)
            await until(lambda: cache.leases.match(engine.session, engine.opened, later))


@on_a_loop
async def test_a_store_that_freezes_between_exists_and_get_costs_once(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, 2, patience_ms=100) as (cache, engine):
        store.hangs, store.fails = {"get"}, {"ping"}
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == 0
        assert faults(cache, "remote_late") == 1
        calls = len([each for each in store.calls if each != "ping"])
        await engine.ask(prompt(2, BLOCKS))
        assert len([each for each in store.calls if each != "ping"]) == calls


@on_a_loop
async def test_a_short_deadline_says_nothing_of_the_store(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, patience_ms=5000) as (cache, engine):
        store.slow_s = 0.05
        ask = (engine.session, engine.opened, b"one", prompt(1, BLOCKS))
        found = await cache.leases.acquire(*ask, Terms(0, 0.001))
        assert found.matched_tokens == 0
        assert remote_of(cache).link.up
        assert faults(cache, "remote_late") == 0


@on_a_loop
async def test_what_the_engine_computes_sooner_is_not_waited_for(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, 2, 3) as (cache, engine):
        store.before = lambda call: setattr(store, "slow_s", 0.1 if call == "get" else 0.0)
        assert from_remote(await engine.ask(prompt(1, BLOCKS))) == BLOCKS  # not measured before
        engine.session.prefill_rate = 1e9
        found = await engine.ask(prompt(2, BLOCKS))
        assert found.matched_tokens == 0
        assert counter(cache, "recomputed_tokens_total{why=slower}") == TOKENS
        engine.session.prefill_rate = 1.0
        await until(lambda: remote_of(cache).idle)
        assert from_remote(await engine.ask(prompt(3, BLOCKS))) == BLOCKS


@on_a_loop
async def test_a_store_that_answers_others_is_busy_not_silent(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, patience_ms=200) as (cache, engine):
        store.before = lambda call: setattr(store, "slow_s", 0.8 if call == "get" else 0.0)

        async def others() -> None:
            while True:
                await remote_of(cache).link.exists([b"of another prompt"])
                await asyncio.sleep(0.01)

        asking = asyncio.create_task(others())
        found = await engine.ask(prompt(1, BLOCKS))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert found.matched_tokens == TOKENS
        assert faults(cache, "remote_late") == 0


@on_a_loop
async def test_what_comes_too_late_for_a_request_is_there_for_the_next(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, patience_ms=50) as (cache, engine):
        store.hangs = {"ping"}
        store.before = lambda call: setattr(store, "slow_s", 0.4 if call == "get" else 0.0)
        request, found = await engine.acquire(prompt(1, BLOCKS))
        assert found.matched_tokens == 0
        await until(lambda: remote_of(cache).idle)
        cache.leases.release(engine.session, request)
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == TOKENS


@on_a_loop
async def test_blocks_are_dropped_when_the_queue_is_full(tmp_path: Path) -> None:
    store = ToldStore()
    async with host(tmp_path, store, queue_mb=1, cpu_bytes=8 << 20) as cache:
        engine = SharingEngine(cache)
        prompts = [prompt(seed, BLOCKS) for seed in range(20)]
        for each in prompts:
            await engine.ask(each)
            await engine.demoted()
        await until(lambda: remote_of(cache).idle)
        store.hangs = {"exists"}  # of the first batch: nothing leaves the queue
        for each in prompts:
            request, found = await engine.acquire(each[:-1])  # all is held: nothing is fetched
            assert found.matched_tokens == 11 * PAGE_SIZE
            cache.leases.release(engine.session, request)
            await until(lambda: not cache.index.counts().transfers)
        assert counter(cache, "remote_not_put_blocks_total{why=queue_full}") > 0


@on_a_loop
async def test_a_store_that_is_full_is_read_all_the_same(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        store.refuses = {"put"}
        await engine.put(prompt(2, BLOCKS))
        assert counter(cache, "remote_not_put_blocks_total{why=store_refused}") == BLOCKS
        assert from_remote(await engine.ask(prompt(1, BLOCKS))) == BLOCKS
        puts = store.calls.count("put")
        await engine.put(prompt(3, BLOCKS))
        assert store.calls.count("put") == puts, "it was asked again at once"


@on_a_loop
async def test_a_time_to_live_goes_with_the_value(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with host(tmp_path / "a", server.url) as cache:
            engine = SharingEngine(cache)
            for _ in range(2):
                await engine.ask(prompt(1, BLOCKS), Hints(ttl_s=100))
                await engine.demoted()
            await until(lambda: remote_of(cache).idle)
            lives = [int(server.call(b"TTL", name)) for name in server.names()]
            assert len(lives) == BLOCKS
            assert all(0 < each <= 100 for each in lives)


# ---- a lease while its fetch is under way ----


@on_a_loop
async def test_a_request_that_is_released_meanwhile_answers_with_nothing(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        store.hangs = {"get"}
        asking = asyncio.create_task(engine.acquire(prompt(1, BLOCKS)))
        await until(lambda: store.calls.count("get") > 0 and engine.session.leases)
        (request,) = engine.session.leases
        cache.leases.release(engine.session, request)
        _, found = await asking
        assert found.matched_tokens == 0
        assert cache.index.counts().leases == 0
        store.hangs = set()
        remote_of(cache).link.late()


@on_a_loop
async def test_the_same_request_twice_gets_one_lease(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        store.slow_s = 0.05
        terms = Terms(0, 20.0)
        found = await asyncio.gather(
            *(
                cache.leases.acquire(
                    engine.session, engine.opened, b"one", prompt(1, BLOCKS), terms
                )
                for _ in range(2)
            )
        )
        assert found[0] is found[1]
        assert found[0].matched_tokens == TOKENS
        cache.leases.release(engine.session, b"one")
        await until(lambda: remote_of(cache).idle)
        assert cache.index.counts().leases == 0


@on_a_loop
async def test_a_session_may_end_meanwhile(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1, deadline_ms=300) as (cache, engine):
        store.hangs = {"get"}
        asking = asyncio.create_task(engine.acquire(prompt(1, BLOCKS)))
        await until(lambda: engine.session.leases and store.calls.count("get") > 0)
        await engine.close(at_rest=True)
        with pytest.raises(SessionOver):
            await asking
        await until(lambda: remote_of(cache).idle)
        assert cache.index.counts().leases == 0
        cache.index.check()


@on_a_loop
async def test_what_comes_for_a_namespace_that_is_over_is_no_others(tmp_path: Path) -> None:
    """Its number in the index is another namespace's by then."""
    store, limits = ToldStore(), LimitsConfig(max_known_namespaces=1)
    await put_by_another(tmp_path, store, 1)
    async with host(tmp_path / "b", store, limits=limits) as cache:
        engine, whole = SharingEngine(cache), prompt(1, BLOCKS)
        store.before = lambda call: setattr(store, "slow_s", 0.3 if call == "get" else 0.0)
        terms = Terms(0, 20.0, at_once=True)
        await cache.leases.acquire(engine.session, engine.opened, b"one", whole, terms)
        cache.leases.release(engine.session, b"one")
        await until(lambda: store.calls.count("get") > 0)
        other = cache.open_namespace(engine.session, bytes(31) + b"o", engine.identity)
        assert engine.opened.gone
        assert other.number == engine.opened.number
        await until(lambda: remote_of(cache).idle)
        found = cache.leases.match(engine.session, other, whole)
        assert found.matched_tokens == 0


@pytest.mark.parametrize("call", ["exists", "get"])
@on_a_loop
async def test_a_caller_that_goes_away_may_ask_again(tmp_path: Path, call: str) -> None:
    store = ToldStore()
    await put_by_another(tmp_path, store, 1)
    async with host(tmp_path / "b", store) as cache:
        engine, terms = SharingEngine(cache), Terms(0, 20.0)
        store.slow_s = 0.1
        ask = (engine.session, engine.opened, b"one", prompt(1, BLOCKS), terms)
        asking = asyncio.create_task(cache.leases.acquire(*ask))
        await until(lambda: call in store.calls)
        await asyncio.sleep(0.01)  # it waits for that
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await cache.leases.acquire(*ask)
        cache.leases.release(engine.session, b"one")
        await until(lambda: remote_of(cache).idle)
        assert cache.index.counts().leases == 0


@on_a_loop
async def test_a_poll_does_not_wait_and_the_next_lease_has_it(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, 1) as (cache, engine):
        store.slow_s = 0.05
        terms = Terms(0, 20.0, at_once=True)
        found = await cache.leases.acquire(
            engine.session, engine.opened, b"one", prompt(1, BLOCKS), terms
        )
        assert found.matched_tokens == 0
        cache.leases.release(engine.session, b"one")
        await until(lambda: store.calls.count("get") > 0 and remote_of(cache).idle)
        found = await engine.ask(prompt(1, BLOCKS))
        assert found.matched_tokens == TOKENS
