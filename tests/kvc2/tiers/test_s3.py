"""A bucket behind the seam: what it answers, and what that means."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

import pytest

from kvc2.host.store_url import S3Url
from kvc2.tiers.remote.s3 import S3
from kvc2.tiers.remote.store import StoreError, StoreRefused, StoreUnable
from tests.doubles.buckets import NAME, bucket
from tests.doubles.waiting import on_a_loop

DEADLINE_S = 20.0


def opened(name: str = NAME, prefix: str = "", deadline_s: float = DEADLINE_S) -> S3:
    return S3(S3Url(name, prefix), None, deadline_s)


@on_a_loop
async def test_names_lie_below_the_prefix() -> None:
    with bucket() as found:
        store = opened(prefix="hosts/of ours")
        await store.put([(b"kvc2:1:ab:cd", b"x")], 0)
        assert list(found.values) == ["hosts/of ours/kvc2:1:ab:cd"]
        await store.delete([b"kvc2:1:ab:cd"])
        assert not found.values


@on_a_loop
async def test_a_bucket_that_is_not_there_answers_no_ping_and_takes_nothing() -> None:
    with bucket():
        store = opened("another")
        with pytest.raises(StoreError, match=r"bucket|404"):
            await store.ping()
        with pytest.raises(StoreError, match="no such bucket"):
            await store.put([(b"a", b"x")], 0)


@pytest.mark.parametrize("status", [HTTPStatus.FORBIDDEN, HTTPStatus.INSUFFICIENT_STORAGE])
@on_a_loop
async def test_what_it_will_not_do_is_refused(status: HTTPStatus) -> None:
    with bucket() as found:
        found.fault = status
        with pytest.raises(StoreRefused):
            await opened().put([(b"a", b"x")], 0)


@on_a_loop
async def test_whatever_else_it_answers_is_an_error_and_tried_once() -> None:
    with bucket() as found:
        found.fault = HTTPStatus.SERVICE_UNAVAILABLE
        store = opened()
        for call in (
            store.ping(),
            store.exists([b"a"]),
            store.get([b"a"], 10),
            store.put([(b"a", b"x")], 0),
            store.delete([b"a"]),
        ):
            with pytest.raises(StoreError, match="503"):
                await call


@on_a_loop
async def test_one_that_is_frozen_or_dead_is_an_error_in_time() -> None:
    with bucket() as found:
        store = opened(deadline_s=0.3)
        found.going.clear()
        with pytest.raises(StoreError):
            await store.get([b"a"], 10)
        waiting = asyncio.create_task(opened().exists([b"a"]))
        await asyncio.sleep(0.05)
        waiting.cancel()  # as the link does
        with pytest.raises(asyncio.CancelledError):
            await waiting
    with pytest.MonkeyPatch.context() as patch, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with pytest.raises(StoreError):
            await opened().ping()


@on_a_loop
async def test_a_value_without_a_byte_is_none_and_a_time_to_live_is_not_kept() -> None:
    with bucket() as found:
        found.values["empty"] = b""
        store = opened()
        assert await store.get([b"empty"], 10) == [None]
        with pytest.raises(StoreUnable, match="time to live"):
            await store.put([(b"a", b"x")], 50)


def test_where_it_is_its_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    url = S3Url.parse("s3://bucket/a%20b/", field="url")
    assert (url.bucket, url.prefix, url.shown) == ("bucket", "a b", "s3://bucket/a b")
    assert (url.tls, url.is_local) == (True, False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert (url.tls, url.is_local) == (False, True)
