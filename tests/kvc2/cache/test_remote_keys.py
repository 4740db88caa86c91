"""Blocks of opaque keys in a store that hosts share: what one host's engine put another's reads,
key by key, and whatever the store does is a miss at worst."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc2.answers import NOWHERE, Acquired, Asked, Hints, Terms
from kvc2.cache.cache import Cache, KeyedLayout
from kvc2.cache.namespaces import Namespace, Owner
from kvc2.client import Objects, open_objects
from kvc2.foreign_identity import Foreign
from tests.doubles.caches import faults
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.in_arena import KEYED, InArena
from tests.doubles.shared_hosts import SECRET, config_of, host, remote_of, shared_by
from tests.doubles.stores import ServerProcess, ToldStore
from tests.doubles.waiting import on_a_loop, until, wait_until

KEYS = [b"k", b"x" * 64, b"\0", b"\0\0", *(b"key %d" % each for each in range(4))]
CPU, DISK, REMOTE = 2, 3, 4
WAIT_S = 20.0


class SharingKeys(InArena):
    """Its namespaces are shared by the hosts with this secret."""

    def __init__(self, cache: Cache, *, secret: bytes = SECRET) -> None:
        self.secret = secret
        super().__init__(cache, 64)

    def _open(self, name: bytes, *, opaque: bool) -> Namespace:
        owner, of = Owner(shared=shared_by(self.secret, name)), KeyedLayout(self.layout, opaque)
        self.cache.namespaces._opened.pop(name, None)  # opened anew, with an owner
        return self.cache.open_namespace(self.session, name, b"{}", 0, owner, of=of)

    async def ask_keys(self, keys: Sequence[bytes], terms: Terms | None = None) -> Acquired:
        """A request for them, whose bytes are judged."""
        request, found = await self.read_keys(keys, terms)
        self.release(request)
        return found

    async def put_keys(self, keys: Sequence[bytes]) -> None:
        """Stores them, uses them again, and waits until what goes to the store is there."""
        await self.copy_keys(keys)
        await self.ask_keys(keys)
        await until(lambda: remote_of(self.cache).idle)

    async def match(self, keys: Sequence[bytes]) -> list[int]:
        found = await self.cache.leases.match_keys_beyond(self.session, self.keyed, keys)
        return list(found.found.tolist())


@asynccontextmanager
async def second_host(
    folder: Path, store: ToldStore | str, keys: Sequence[bytes] = KEYS, **flags: Any
) -> AsyncIterator[tuple[Cache, SharingKeys]]:
    """And its engine, where another host has put these keys, and is gone."""
    async with host(folder / "other", store) as cache:
        await SharingKeys(cache).put_keys(keys)
    async with host(folder / "b", store, **flags) as cache:
        yield cache, SharingKeys(cache)


def test_what_one_hosts_objects_put_anothers_read(tmp_path: Path) -> None:
    """By the client that the adapters of LMCache and SGLang use."""
    identity, size = Foreign("test", "w", {"page_size": 1}).encode(), 10_000
    rows = np.random.default_rng(1).integers(0, 256, (len(KEYS), size), np.uint8)

    def serving(folder: Path, url: str) -> ServedDaemon:
        folder.mkdir()
        remote = config_of(folder, url, patience_ms=10_000)
        return ServedDaemon(serve_config(folder, disk=True, remote=remote), cache=None)

    def opened(served: ServedDaemon) -> Objects:
        objects = open_objects(served.address, identity, size, staging_bytes=8 * size)
        assert objects.client.wait_attached(WAIT_S), objects.client.last_refusal
        wait_until(lambda: remote_of(served.daemon.cache).link.up)
        return objects

    with ServerProcess(tmp_path) as server:
        with serving(tmp_path / "a", server.url) as a:
            objects = opened(a)
            assert objects.put_from(KEYS, rows).all()
            assert not server.names()
            assert objects.get_into(KEYS, np.zeros_like(rows)).all()
            wait_until(lambda: len(server.names()) == len(KEYS))
            objects.close()
        with serving(tmp_path / "b", server.url) as b:
            objects, into = opened(b), np.zeros_like(rows)
            asked = [KEYS[3], b"absent", KEYS[0]]
            assert objects.exists(asked).tolist() == [True, False, True]
            assert objects.get_into(asked, into[:3]).tolist() == [True, False, True]
            np.testing.assert_array_equal(into[[0, 2]], rows[[3, 0]])
            token, locked = objects.lock(KEYS)
            assert locked.all()
            server.kill()
            assert objects.get_into(KEYS, into).all()  # from memory
            np.testing.assert_array_equal(into, rows)
            objects.unlock(token)
            objects.close()


@on_a_loop
async def test_keys_come_each_for_itself_and_are_then_here(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, KEYS[:5]) as (cache, engine):
        await engine.copy_keys(KEYS[6:])
        asked = [KEYS[0], b"absent", KEYS[6], KEYS[3], KEYS[0]]
        assert await engine.match(asked) == [REMOTE, 0, CPU, REMOTE, REMOTE]
        assert "get" not in store.calls
        found = await engine.ask_keys(asked)
        assert found.found.tolist() == [REMOTE, 0, CPU, REMOTE, REMOTE]
        assert (found.offsets != NOWHERE).tolist() == [True, False, True, True, True]
        assert found.tiers.remote == 3 * engine.keyed.page_size
        again = await engine.ask_keys(asked)
        assert again.found.tolist() == [CPU, 0, CPU, CPU, CPU]
        assert again.tiers.remote == 0
        cache.index.check()


@on_a_loop
async def test_a_key_is_put_at_its_second_use(tmp_path: Path) -> None:
    store = ToldStore()
    async with host(tmp_path, store) as cache:
        engine = SharingKeys(cache)
        await engine.copy_keys(KEYS)
        await engine.match(KEYS)  # no use
        await until(lambda: remote_of(cache).idle)
        assert not store.values
        await engine.ask_keys(KEYS[:3])
        await until(lambda: len(store.values) == 3)
        await until(lambda: remote_of(cache).idle)
        calls = len(store.calls)
        await engine.ask_keys([*KEYS[:3], KEYS[0]])
        await until(lambda: remote_of(cache).idle)
        assert len(store.calls) == calls, "it was asked for again"
        await engine.ask_keys(KEYS)
        await until(lambda: len(store.values) == len(KEYS))


@on_a_loop
async def test_putting_makes_no_key_warmer(tmp_path: Path) -> None:
    """A put comes whenever it comes: what the index knows of uses must not hang on it."""
    store = ToldStore()
    async with host(tmp_path, store) as cache:
        engine = SharingKeys(cache)
        await engine.copy_keys(KEYS)
        store.slow_s = 0.2
        await engine.ask_keys(KEYS[:4])
        cpu = engine.keyed.pools.cpu.id
        stamps = cache.index.stamps(cpu).tolist()
        assert not store.values
        await until(lambda: len(store.values) == 4 and remote_of(cache).idle)
        assert cache.index.stamps(cpu).tolist() == stamps


@on_a_loop
async def test_a_key_on_disk_is_not_fetched(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        await engine.copy_keys(KEYS)
        await cache.flush(10)
        await cache.evict("cpu", 0)
        found = await engine.ask_keys(KEYS)
        assert found.found.tolist() == [DISK] * len(KEYS)
        assert "get" not in store.calls


@on_a_loop
async def test_what_was_invalidated_is_not_found_in_the_store(tmp_path: Path) -> None:
    store = ToldStore()
    async with host(tmp_path, store) as cache:
        engine = SharingKeys(cache)
        await engine.put_keys(KEYS)
        await cache.invalidate([KEYED])
        assert await engine.match(KEYS) == [0] * len(KEYS)
        assert not (await engine.ask_keys(KEYS)).found.any()
    async with host(tmp_path, store) as cache:  # a restart knows it
        assert await SharingKeys(cache).match(KEYS) == [0] * len(KEYS)


@on_a_loop
async def test_what_another_secret_put_is_neither_found_nor_believed(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, _):
        other = SharingKeys(cache, secret=b"another secret, of other hosts")
        assert await other.match(KEYS) == [0] * len(KEYS)
        ours = sorted(store.values)
        await other.put_keys(KEYS)
        theirs = sorted(set(store.values) - set(ours))
        assert len(theirs) == len(KEYS)
    swapped = zip(ours, theirs, strict=True)
    store.values = {mine: store.values[their] for mine, their in swapped}
    async with host(tmp_path / "c", store) as cache:
        assert not (await SharingKeys(cache).ask_keys(KEYS)).found.any()
        assert faults(cache, "remote_bad_block") == len(KEYS)


@on_a_loop
async def test_a_spoiled_value_is_a_miss_of_its_key_alone(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        names, sound = sorted(store.values), dict(store.values)
        flipped = bytearray(sound[names[0]])
        flipped[5000] ^= 1
        store.values[names[0]] = bytes(flipped)
        store.values[names[3]] = sound[names[4]]
        del sound[names[0]], sound[names[3]]
        found = await engine.ask_keys(KEYS)  # judges
        assert np.count_nonzero(found.found == REMOTE) == len(KEYS) - 2
        assert faults(cache, "remote_bad_block") == 2
        await until(lambda: remote_of(cache).idle)
        await until(lambda: set(store.values) == set(sound))  # the next put mends them
        assert cache.index.pool_counts(engine.keyed.pools.cpu.id).private == 0
        await engine.copy_keys(KEYS)
        await engine.ask_keys(KEYS)
        await until(lambda: len(store.values) == len(KEYS))


@on_a_loop
async def test_a_value_that_went_between_exists_and_get_is_a_miss_of_its_key_alone(
    tmp_path: Path,
) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        gone = sorted(store.values)[2]
        store.before = lambda call: store.values.pop(gone, None) if call == "get" else None
        found = await engine.ask_keys(KEYS)
        assert np.count_nonzero(found.found == REMOTE) == len(KEYS) - 1
        assert faults(cache, "remote_error") == faults(cache, "remote_bad_block") == 0


@on_a_loop
async def test_whoever_asks_for_what_comes_already_waits_for_it(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, first):
        second, gets = SharingKeys(cache), store.calls.count("get")
        store.slow_s = 0.05
        found = await asyncio.gather(first.ask_keys(KEYS[:6]), second.ask_keys(KEYS[2:6]))
        assert [int(np.count_nonzero(each.found)) for each in found] == [6, 4]
        assert store.calls.count("get") - gets == 1
        await until(lambda: remote_of(cache).idle)
        assert cache.index.counts().leases == 0
        cache.index.check()


@on_a_loop
async def test_a_frozen_store_costs_once(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, patience_ms=100) as (cache, engine):
        store.hangs = {"exists", "get", "ping"}
        for _ in range(3):
            assert not (await engine.ask_keys(KEYS)).found.any()
            assert await engine.match(KEYS) == [0] * len(KEYS)
        assert faults(cache, "remote_late") == 1
        assert store.calls.count("exists") <= 3  # two of the host that put


@on_a_loop
async def test_a_store_that_freezes_between_exists_and_get_costs_once(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store, patience_ms=100) as (cache, engine):
        store.hangs, store.fails = {"get"}, {"ping"}
        for _ in range(2):
            assert not (await engine.ask_keys(KEYS)).found.any()
        assert faults(cache, "remote_late") == 1


@on_a_loop
async def test_a_prefetch_brings_keys(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        asked = Asked(keys=[KEYS[5], b"absent", KEYS[1]])
        await cache.prefetcher.prefetch(None, engine.keyed, asked, tier="cpu", deadline_s=20.0)
        found = cache.leases.match_keys(engine.session, engine.keyed, KEYS).found
        assert np.flatnonzero(found == CPU).tolist() == [1, 5]
        assert not cache.index.counts().leases


@on_a_loop
async def test_a_poll_does_not_wait_and_the_next_lease_has_it(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        store.slow_s = 0.05
        found = await engine.ask_keys(KEYS, Terms(0, 20.0, in_arena=True, at_once=True))
        assert not found.found.any()
        await until(lambda: store.calls.count("get") > 0 and remote_of(cache).idle)
        assert (await engine.ask_keys(KEYS)).found.all()


@on_a_loop
async def test_a_request_that_is_released_meanwhile_answers_with_nothing(tmp_path: Path) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        store.hangs = {"get"}
        asking = asyncio.create_task(engine.read_keys(KEYS))
        await until(lambda: store.calls.count("get") > 0 and engine.session.leases)
        (request,) = engine.session.leases
        engine.release(request)
        _, found = await asking
        assert found.matched_tokens == 0
        assert cache.index.counts().leases == 0
        store.hangs = set()
        remote_of(cache).link.late()


@pytest.mark.parametrize("call", ["exists", "get"])
@on_a_loop
async def test_a_caller_that_goes_away_may_ask_again(tmp_path: Path, call: str) -> None:
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        store.slow_s, seen = 0.1, store.calls.count(call)
        terms = Terms(0, 20.0, in_arena=True)
        ask = partial(
            cache.leases.acquire_keys, engine.session, engine.keyed, b"one", [*KEYS, b"x"], terms
        )
        asking = asyncio.create_task(ask())
        await until(lambda: store.calls.count(call) > seen)
        await asyncio.sleep(0.01)  # it waits for that
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        again = await ask()
        assert again.found.size == len(KEYS) + 1
        engine.release(b"one")
        await until(lambda: remote_of(cache).idle)
        assert cache.index.counts().leases == 0


@on_a_loop
async def test_what_comes_for_a_namespace_that_is_over_is_no_others(tmp_path: Path) -> None:
    """Its number in the index is another namespace's by then."""
    store = ToldStore()
    async with second_host(tmp_path, store) as (cache, engine):
        store.before = lambda call: setattr(store, "slow_s", 0.3 if call == "get" else 0.0)
        await engine.ask_keys(KEYS, Terms(0, 20.0, in_arena=True, at_once=True))
        await until(lambda: store.calls.count("get") > 0)
        await cache.invalidate([KEYED])
        await until(lambda: remote_of(cache).idle)
        here = cache.leases.match_keys(engine.session, engine.keyed, KEYS).found
        assert not here.any()


@on_a_loop
async def test_a_time_to_live_goes_with_the_value(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with host(tmp_path / "a", server.url) as cache:
            engine = SharingKeys(cache)
            await engine.copy_keys(KEYS)
            await engine.ask_keys(KEYS, Terms(0, 20.0, Hints(ttl_s=100), in_arena=True))
            await until(lambda: remote_of(cache).idle)
            lives = [int(server.call(b"TTL", name)) for name in server.names()]
            assert len(lives) == len(KEYS)
            assert all(0 < each <= 100 for each in lives)


@on_a_loop
async def test_more_keys_than_there_is_room_for_are_a_miss_of_the_last(tmp_path: Path) -> None:
    """A quarter of the arena may be on its way."""
    store, many = ToldStore(), [b"%d" % each for each in range(48)]
    async with host(tmp_path / "a", store) as cache:
        await SharingKeys(cache).put_keys(many)
    async with host(tmp_path / "b", store, cpu_bytes=1 << 20, slab_bytes=1 << 18) as cache:
        engine = SharingKeys(cache)
        found = await engine.ask_keys(many)
        there = np.flatnonzero(found.found == REMOTE).tolist()
        assert 0 < len(there) < len(many)
        assert there == list(range(len(there)))
        cache.index.check()
