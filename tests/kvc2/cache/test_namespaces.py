"""One record for each namespace, whoever opens it; what an era's end and a full table do to it."""

from __future__ import annotations

import asyncio

import pytest

from kvc2.cache.namespaces import Owner
from kvc2.config import LimitsConfig
from kvc2.errors import LimitReached, NotFound
from tests.doubles.caches import running
from tests.doubles.stand_in import NAMESPACE, StandIn, prompt

OTHER = bytes(31) + b"o"


def test_a_namespace_has_one_record_whoever_opens_it() -> None:
    async def run() -> None:
        async with running(None) as cache:
            first, second = StandIn(cache, 32), StandIn(cache, 32)
            assert first.opened is second.opened is cache.namespaces.find(NAMESPACE)
            owner = Owner("other", b"salt")
            other = cache.open_namespace(second.session, OTHER, b"{}", 7, owner)
            assert (other.id, other.owner, other.ttl_s) == (first.opened.id + 1, owner, 7)
            assert list(cache.namespaces) == [other, first.opened]
            cache.open_namespace(first.session, NAMESPACE, b"{}")
            assert list(cache.namespaces) == [first.opened, other]  # opened last first

    asyncio.run(run())


def test_an_era_that_ends_changes_the_record_and_not_the_id() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 2))
            before = (engine.opened.id, engine.opened.number, engine.opened.era)
            await cache.invalidate([NAMESPACE])
            namespace = cache.namespaces.find(NAMESPACE)
            assert namespace is engine.opened
            assert (namespace.id, namespace.era) == (before[0], before[2] + 1)
            assert namespace.number != before[1]
            assert cache.namespaces.earlier(namespace) == before[1]

    asyncio.run(run())


def test_what_is_let_go_of_is_gone_and_opened_again_is_another_record() -> None:
    async def run() -> None:
        limits = LimitsConfig(max_known_namespaces=1)
        async with running(None, limits=limits) as cache:
            engine = StandIn(cache, 32)
            held = engine.session.namespaces
            held.put("", engine.opened.id, engine.opened)
            with pytest.raises(LimitReached):
                cache.open_namespace(engine.session, OTHER, b"{}")
            held.drop(engine.opened.id)
            other = cache.open_namespace(engine.session, OTHER, b"{}")
            assert (engine.opened.gone, other.gone) == (True, False)
            assert cache.namespaces.find(b"") is other
            with pytest.raises(NotFound, match="opened since the start"):
                cache.namespaces.find(NAMESPACE)
            again = cache.open_namespace(engine.session, NAMESPACE, b"{}")
            assert again is not engine.opened
            assert again.id > other.id

    asyncio.run(run())
