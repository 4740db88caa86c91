"""Sessions: epochs, fences and expiry, on a clock that the test turns."""

from __future__ import annotations

import pytest

from kvc2.cache.sessions import EXPIRY_S, JOIN_S, Session, SessionTable
from kvc2.errors import LimitReached, SessionOver
from tests.doubles.engines import NUM_PAGES, layout


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def table(clock: Clock, max_sessions: int = 4) -> SessionTable:
    return SessionTable(max_sessions=max_sessions, clock=clock)


def open_ready(sessions: SessionTable) -> Session:
    session = sessions.open("e", layout(), NUM_PAGES)
    sessions.join(session)
    return session


def test_an_epoch_is_never_used_again() -> None:
    sessions = table(Clock())
    first = open_ready(sessions)
    sessions.end(first)
    second = open_ready(sessions)
    assert second.epoch > first.epoch
    with pytest.raises(SessionOver):
        sessions.of_call(first.secret, first.epoch)
    assert sessions.of_call(second.secret, second.epoch) is second


def test_a_call_of_another_daemon_instance_is_refused() -> None:
    one, other = table(Clock()), table(Clock())
    session = open_ready(one)
    open_ready(other)
    with pytest.raises(SessionOver):
        other.of_call(session.secret, session.epoch)


def test_a_call_with_the_secret_of_another_session_or_what_stats_tells_is_refused() -> None:
    sessions = table(Clock())
    session, other = open_ready(sessions), open_ready(sessions)
    for forged in (other.secret, sessions.instance, b"", session.secret[:-1]):
        with pytest.raises(SessionOver):
            sessions.of_call(forged, session.epoch)
    assert session.secret.hex() not in repr(session)


def test_no_call_before_the_side_socket_has_joined() -> None:
    sessions = table(Clock())
    session = sessions.open("e", layout(), NUM_PAGES)
    with pytest.raises(SessionOver, match="joined"):
        sessions.of_call(session.secret, session.epoch)


def test_three_heartbeats_missed_is_expiry() -> None:
    clock = Clock()
    sessions = table(clock)
    session = open_ready(sessions)
    clock.now += EXPIRY_S - 0.1
    assert sessions.expired() == []
    sessions.heartbeat(session)
    clock.now += EXPIRY_S - 0.1
    assert sessions.expired() == []
    clock.now += 0.1
    assert sessions.expired() == [session]
    assert sessions.end(session)
    assert not sessions.end(session)
    with pytest.raises(SessionOver):
        sessions.heartbeat(session)
    with pytest.raises(SessionOver):
        sessions.of_call(session.secret, session.epoch)


def test_a_session_may_be_silent_for_as_long_as_it_has_said() -> None:
    clock = Clock()
    sessions = table(clock)
    plain, patient = open_ready(sessions), sessions.open("e", layout(), NUM_PAGES, expiry_s=30.0)
    sessions.join(patient)
    clock.now += EXPIRY_S
    assert sessions.expired() == [plain]
    clock.now += 30.0 - EXPIRY_S - 0.1
    assert sessions.expired() == [plain]
    clock.now += 0.1
    assert sessions.expired() == [plain, patient]


def test_heartbeats_do_not_keep_a_session_that_never_joins() -> None:
    clock = Clock()
    sessions = table(clock)
    session = sessions.open("e", layout(), NUM_PAGES)
    clock.now += JOIN_S
    sessions.heartbeat(session)
    assert sessions.expired() == [session]


def test_sessions_are_limited() -> None:
    sessions = table(Clock(), max_sessions=2)
    first = open_ready(sessions)
    open_ready(sessions)
    with pytest.raises(LimitReached, match="max_sessions"):
        sessions.open("e", layout(), NUM_PAGES)
    sessions.end(first)
    open_ready(sessions)
    assert len(sessions) == 2
