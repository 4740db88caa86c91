"""Sessions: who is attached, under which epoch, and until when.

A session is one engine's attachment. Its epoch rises with each and is never reused in one run of
the daemon, so a completion of an earlier one can't be taken for a later one's. Its secret is told
to its engine alone: Stats tells epochs to whoever asks, and over TCP any local user may call. Not
here: the stream and the side socket (server/) and what a session's end does to pages (cache.py).

    joining -> ready [join: its pool is mapped]   joining, ready -> over [end]
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kvc2 import errors
from kvc2.layout import Layout
from kvc2.shares import SharedTable

HEARTBEAT_INTERVAL_S = 1.0
EXPIRY_S = 3.0  # three heartbeats
JOIN_S = 10.0  # for the side socket; an earlier session of the engine may have to end first
INSTANCE_BYTES = 16
SECRET_BYTES = 16

SessionState = Literal["joining", "ready", "over"]


@dataclass(eq=False)
class Session:
    """One attachment. The table makes it, the server fills `pid`, `uid` and `give_up`, and the
    cache keeps what it needs of its own in `pool` (set by Cache.open_session) and `leases`.

    `give_up` ends the attachment when the pool can't be filled any more; the engine attaches again.
    `leases` maps request_id to the index's lease id; `namespaces` the ids that this session has
    open, of each tenant, to their 32 bytes.
    """

    epoch: int
    engine_name: str
    layout: Layout
    num_pages: int
    attached_at: float
    last_heartbeat: float
    state: SessionState = "joining"
    pid: int = 0
    uid: int = -1
    pool: Any = None
    give_up: Callable[[], None] = field(default=lambda: None, repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    leases: dict[bytes, int] = field(default_factory=dict)
    namespaces: SharedTable[str, int, bytes] = field(default_factory=SharedTable)
    prefill_rate: float = 0.0  # tokens/s, as its engine measured last; 0: not known


class SessionTable:
    """The open sessions. One thread (the event loop's) uses it; `clock` is monotonic seconds."""

    def __init__(self, *, max_sessions: int, clock: Callable[[], float]) -> None:
        self.instance = secrets.token_bytes(INSTANCE_BYTES)
        self._clock = clock
        self._max_sessions = max_sessions
        self._next_epoch = 1
        self._open: dict[int, Session] = {}

    def open(self, engine_name: str, layout: Layout, num_pages: int) -> Session:
        """A new session in state joining. Raises LimitReached."""
        if len(self._open) >= self._max_sessions:
            raise errors.LimitReached(
                "limits.max_sessions", self._max_sessions, "sessions are open"
            )
        now = self._clock()
        session = Session(self._next_epoch, engine_name, layout, num_pages, now, now)
        self._next_epoch += 1
        self._open[session.epoch] = session
        return session

    def join(self, session: Session) -> None:
        """Its pool is mapped: calls may begin."""
        if session.state != "joining":
            raise errors.SessionOver(f"session {session.epoch} is {session.state}")
        session.state = "ready"
        session.last_heartbeat = self._clock()

    def end(self, session: Session) -> bool:
        """Fence it off: no call of it is served again. False when it was over already."""
        if session.state == "over":
            return False
        session.state = "over"
        del self._open[session.epoch]
        return True

    def heartbeat(self, session: Session) -> None:
        """Raises SessionOver: a thawed engine learns here that it was given up."""
        if session.state == "over":
            raise errors.SessionOver(f"session {session.epoch} has ended")
        session.last_heartbeat = self._clock()

    def of_call(self, secret: bytes, epoch: int) -> Session:
        """The ready session that a call names. Raises SessionOver for every other."""
        session = self._open.get(epoch)
        if session is None or not hmac.compare_digest(secret, session.secret):
            raise errors.SessionOver(
                f"session {epoch} is over or of another run of the daemon: attach again"
            )
        if session.state != "ready":
            raise errors.SessionOver(f"session {epoch} has not joined its side socket yet")
        return session

    def expired(self) -> list[Session]:
        """Sessions without a heartbeat for EXPIRY_S, or not joined for JOIN_S. Changes nothing."""
        now = self._clock()
        return [
            each
            for each in self._open.values()
            if (each.state == "joining" and now - each.attached_at >= JOIN_S)
            or (each.state == "ready" and now - each.last_heartbeat >= EXPIRY_S)
        ]

    def seconds_open(self, session: Session) -> float:
        return self._clock() - session.attached_at

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)
