"""The states of a session: which follow which, and what each lets happen."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import get_args

import pytest

from kvc2 import errors
from kvc2.answers import Terms
from kvc2.moving import gpu_pools
from kvc2.moving.gpu_pools import TRANSITIONS, SessionLife, SessionState
from tests.doubles.caches import running
from tests.doubles.stand_in import StandIn, prompt

STATES: tuple[SessionState, ...] = get_args(SessionState)
WAYS = {  # from joining to each state
    "joining": (),
    "ready": ("ready",),
    "broken": ("ready", "broken"),
    "silent": ("ready", "silent"),
    "at_rest": ("ready", "silent", "at_rest"),
    "closed": ("closed",),
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(STATES, STATES)))
def test_a_session_goes_from_state_to_state_as_the_table_says(
    source: SessionState, target: SessionState
) -> None:
    life = SessionLife()
    for state in WAYS[source]:
        life.become(state)
    assert life.state == source
    if target in TRANSITIONS[source]:
        life.become(target)
        assert life.state == target
    else:
        with pytest.raises(RuntimeError, match=f"{source} can't become {target}"):
            life.become(target)
        assert life.state == source


def test_the_table_in_the_text_is_the_one_that_is_checked() -> None:
    rows = re.findall(r"^    ([\w, ]+?) +-> (\w+) +\[", gpu_pools.__doc__ or "", re.MULTILINE)
    told = {(source, target) for sources, target in rows for source in sources.split(", ")}
    assert told == {(source, target) for source in STATES for target in TRANSITIONS[source]}


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_session_that_is_closed_was_at_rest_only_if_its_engine_can_not_write(
    at_rest: bool,
) -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            life, seen = engine.session.life, []

            async def asked() -> bool:
                seen.append(life.state)
                return at_rest

            async def rescued(*_: object) -> None:
                seen.append(life.state)

            cache._background.rescue = rescued  # type: ignore[method-assign]
            await cache.close_session(engine.session, asked)
            assert seen == ["silent", "at_rest"][: 1 + at_rest]
            assert life.state == "closed"

    asyncio.run(run())


def test_a_copy_waits_for_what_is_found_out_about_a_silent_session() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            pool = engine.session.mapped_pool()
            assert await pool.holds()
            known: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

            async def found() -> bool:
                return await known

            closing = asyncio.ensure_future(cache.close_session(engine.session, found))
            await asyncio.sleep(0)
            good = asyncio.ensure_future(pool.holds())
            await asyncio.sleep(0)
            assert not good.done()
            known.set_result(False)
            assert not await good
            await closing

    asyncio.run(run())


def test_an_error_while_that_is_found_out_leaves_no_copy_waiting() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            pool = engine.session.mapped_pool()

            async def fails() -> bool:
                raise OSError("injected")

            with pytest.raises(OSError, match="injected"):
                await cache.close_session(engine.session, fails)
            assert not await pool.holds()

    asyncio.run(run())


def test_a_broken_session_refuses_acquires_and_still_releases() -> None:
    async def run() -> None:
        async with running(None) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, 4))
            session, ended = engine.session, []
            session.mapped_pool().give_up = lambda: ended.append(session.epoch)
            for _ in range(2):  # transfers that were under way may fail too
                session.mapped_pool().fail()
            assert (session.state, ended) == ("broken", [session.epoch] * 2)
            with pytest.raises(errors.SessionOver, match="broken"):
                await cache.leases.acquire(
                    session, engine.opened, b"b", prompt(1, 4), Terms(0, 1.0)
                )
            cache.leases.release(session, b"b")
            assert cache.index.counts().leases == 0

    asyncio.run(run())
