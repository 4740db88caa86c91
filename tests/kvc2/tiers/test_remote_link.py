"""The daemon's end of a remote store: what it costs when the store is slow, frozen or dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvc2.metrics import Metrics, RemoteMetrics
from kvc2.tiers.remote.breaker import REST_S, REST_S_MAX, Breaker
from kvc2.tiers.remote.link import Link
from kvc2.tiers.remote.queue import KNOWN_MAX, KNOWN_S, Known, PutQueue
from kvc2.tiers.remote.store import StoreError
from tests.doubles.stores import ToldStore
from tests.doubles.waiting import on_a_loop, until

LONG_S = 20.0


@asynccontextmanager
async def linked(store: ToldStore, deadline_s: float = LONG_S) -> AsyncIterator[Link]:
    metrics = RemoteMetrics(Metrics())
    link = Link(lambda: store, metrics, deadline_s=deadline_s, patience_s=0.1)
    try:
        yield link
    finally:
        await link.close()


def test_a_breaker_rests_ever_longer_until_a_call_has_worked() -> None:
    breaker = Breaker()
    assert not breaker.closed
    assert breaker.rest_s == 0
    rests = []
    for _ in range(9):
        breaker.failed()
        rests.append(breaker.rest_s)
    assert rests[:3] == [REST_S, 2 * REST_S, 4 * REST_S]
    assert rests[-1] == REST_S_MAX
    breaker.mended()
    assert breaker.closed
    breaker.failed()
    assert breaker.rest_s == REST_S_MAX  # a ping alone proves little
    breaker.worked()
    breaker.failed()
    assert breaker.rest_s == REST_S


@on_a_loop
async def test_calls_reach_the_store() -> None:
    store = ToldStore()
    async with linked(store) as link:
        await until(lambda: link.up)
        await link.put([(b"a", b"one"), (b"b", memoryview(b"two"))], 0)
        assert await link.exists([b"a", b"x", b"b"]) == [True, False, True]
        assert await link.get([b"b", b"x"], 100) == [b"two", None]
        await link.delete([b"a"])
        assert await link.exists([b"a"]) == [False]
    assert store.calls[-1] == "close"


@on_a_loop
async def test_calls_that_fail_together_make_one_rest() -> None:
    store = ToldStore()
    async with linked(store) as link:
        await until(lambda: link.up)
        store.slow_s, store.fails = 0.05, {"get", "ping"}
        calls = [link.get([b"a"], 10) for _ in range(6)]
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, StoreError) for each in told)
        assert link._breaker.rest_s == REST_S


@on_a_loop
async def test_a_call_that_fails_is_the_last_one_until_a_ping_is_answered() -> None:
    store = ToldStore()
    async with linked(store) as link:
        await until(lambda: link.up)
        store.fails = {"get", "ping"}
        with pytest.raises(StoreError):
            await link.get([b"a"], 10)
        assert not link.up
        calls = store.calls.count("get")
        for _ in range(10):
            with pytest.raises(StoreError):
                await link.get([b"a"], 10)
        assert store.calls.count("get") == calls, "it was not left alone"
        store.fails = set()
        await until(lambda: link.up)
        assert await link.get([b"a"], 10) == [None]


@on_a_loop
async def test_every_call_has_a_deadline() -> None:
    store = ToldStore()
    store.hangs = {"exists", "get", "put", "delete"}
    async with linked(store, deadline_s=0.05) as link:
        calls = (
            lambda: link.exists([b"a"]),
            lambda: link.get([b"a"], 1),
            lambda: link.put([(b"a", b"")], 0),
            lambda: link.delete([b"a"]),
        )
        for call in calls:
            await until(lambda: link.up)
            with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
                async with asyncio.timeout(LONG_S):
                    await call()


@on_a_loop
async def test_a_call_that_was_late_and_is_answered_closes_the_breaker() -> None:
    store = ToldStore()
    async with linked(store) as link:
        await until(lambda: link.up)
        store.fails = {"ping"}
        store.slow_s = 0.2
        asking = asyncio.create_task(link.exists([b"a"]))
        await until(lambda: "exists" in store.calls)
        link.late()
        assert not link.up
        await asking
        assert link.up


@on_a_loop
async def test_a_store_that_is_dead_from_the_start_is_not_asked() -> None:
    store = ToldStore()
    store.fails = {"ping"}
    async with linked(store) as link:
        await until(lambda: "ping" in store.calls)
        with pytest.raises(StoreError):
            await link.exists([b"a"])
        assert "exists" not in store.calls


@on_a_loop
async def test_why_a_store_is_left_alone_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    store, logger = ToldStore(), logging.getLogger("kvc2")
    logger.addHandler(caplog.handler)
    try:
        store.fails = {"ping", "exists"}
        async with linked(store) as link:
            await until(lambda: store.calls.count("ping") > 1)
            store.fails = {"exists"}
            await until(lambda: link.up)
            with pytest.raises(StoreError):
                await link.exists([b"a"])
    finally:
        logger.removeHandler(caplog.handler)
    told = [each.__dict__["facts"]["why"] for each in caplog.records if each.msg == "remote_away"]
    assert told == ["ping fails", "exists fails"]


@on_a_loop
async def test_what_is_under_way_fails_with_the_links_end() -> None:
    store = ToldStore()
    store.hangs = {"get"}
    async with linked(store) as link:
        await until(lambda: link.up)
        asking = asyncio.create_task(link.get([b"a"], 1))
        await until(lambda: "get" in store.calls)
    with pytest.raises(StoreError):
        await asking


@on_a_loop
async def test_the_queue_is_bounded_and_keeps_its_order() -> None:
    queue: PutQueue[str] = PutQueue(100)
    assert queue.offer("a", 60)
    assert not queue.offer("b", 41)
    assert queue.offer("c", 40)
    assert [await queue.take(), await queue.take()] == ["a", "c"]
    assert queue.offer("d", 100)
    assert await queue.take() == "d"
    assert not len(queue)


def test_what_is_known_of_a_store_is_bounded_and_ages() -> None:
    now = [0.0]
    known = Known(lambda: now[0])
    for number in range(KNOWN_MAX + 1):
        known.add(number.to_bytes(4, "big"))
    assert (0).to_bytes(4, "big") not in known
    assert (1).to_bytes(4, "big") in known
    now[0] = KNOWN_S
    assert (1).to_bytes(4, "big") not in known
