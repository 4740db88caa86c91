"""Sessions: who is attached, under which epoch, until when, and the leases that are open.

A session is one engine's attachment. Its epoch rises with each and is never reused in one run of
the daemon, so a completion of an earlier one can't be taken for a later one's. Its secret is told
to its engine alone: Stats tells epochs to whoever asks, and over TCP any local user may call.

A session's states and the transitions between them: moving/gpu_pools.py. Not here: the stream and
the side socket (server/), and what a session's end does to pages (cache.py).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import Acquired
from kvc2.cache.brought import NOT_BROUGHT, Brought
from kvc2.cache.namespaces import Namespace
from kvc2.layout import Layout
from kvc2.moving.gpu_pools import GpuPool, SessionLife, SessionState
from kvc2.moving.loading import Destination
from kvc2.shares import SharedTable
from kvc2.tiers.pools import LayoutPools

HEARTBEAT_INTERVAL_S = 1.0
EXPIRY_S = 3.0  # three heartbeats
JOIN_S = 10.0  # for the side socket; an earlier session of the engine may have to end first
INSTANCE_BYTES = 16
SECRET_BYTES = 16


@dataclass(eq=False)
class OpenLease:
    """What one request holds, from its acquire until its release or its session's end.

    Laws:
    1. A lease is in its session's `leases` exactly while it is open. `Session.end_lease` ends it.
    2. While it is open, the index has the lease `id`, and an acquire of the same request_id gets
       this lease's `reply`. Once it has ended, such an acquire opens another lease.
    3. The acquire that opened it, and no one else, sets `reply`, once: to the lease's pages, or to
       nothing if the lease has ended meanwhile.
    4. `ended` is done when the lease isn't open any more. The acquire that opened it then stops
       waiting for slower tiers.
    5. The same poll number gets the same answer (`polled`); the next one gets what is there by
       then. `bringing` is what goes on meanwhile.
    6. While the remote store is waited for, `id` is a lease that only pins what this host has.
       `brought` says which blocks came from there then, `keys_brought` [n] which of its keys'.
    """

    request_id: bytes
    id: int  # the index's
    namespace: Namespace
    number: int  # the index's, of the namespace's era then
    to: Destination
    brought: Brought = NOT_BROUGHT
    keys_brought: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    poll: int = 0
    polled: Acquired | None = None
    bringing: asyncio.Task[None] | None = None
    reply: asyncio.Future[Acquired] = field(init=False)
    ended: asyncio.Future[None] = field(init=False)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reply, self.ended = loop.create_future(), loop.create_future()

    @property
    def is_open(self) -> bool:
        return not self.ended.done()

    @property
    def is_brought(self) -> bool:
        """Whether nothing of it comes any more."""
        return self.bringing is None or self.bringing.done()


@dataclass(eq=False)
class Session:
    """One attachment. The table makes it, the server fills `pid`, `uid`, `credential` (of who
    attached over TLS) and `give_up`, and the cache fills `pool` and `leases`.

    `pool` is there from Cache.open_session until the end of Cache.close_session. `give_up` ends the
    attachment when the pool can't be filled any more; the engine attaches again. `leases` are the
    open ones by request_id. `namespaces` are those that this session has open, of each tenant, by
    their ids; `layouts` has the pools that each was opened with here.
    """

    epoch: int
    engine_name: str
    layout: Layout
    num_pages: int
    attached_at: float
    last_heartbeat: float
    life: SessionLife = field(default_factory=SessionLife)
    pid: int = 0
    uid: int = -1
    credential: object = None
    pool: GpuPool | None = None
    give_up: Callable[[], None] = field(default=lambda: None, repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    leases: dict[bytes, OpenLease] = field(default_factory=dict)
    namespaces: SharedTable[str, int, Namespace] = field(default_factory=SharedTable)
    layouts: dict[int, LayoutPools] = field(default_factory=dict)
    expiry_s: float = EXPIRY_S
    prefill_rate: float = 0.0  # tokens/s, as its engine measured last; 0: not known

    @property
    def state(self) -> SessionState:
        return self.life.state

    def lose_worker(self) -> None:
        """What copies pages of its device has died: the engine knows that process alone, so that
        it must be told of the next one before that copies for it."""
        if self.pool is not None and self.life.state in ("ready", "broken"):
            self.pool.fail()

    def let_go(self, namespace_id: int) -> None:
        """Of a namespace that it has open, or was about to have."""
        self.namespaces.drop(namespace_id)
        self.layouts.pop(namespace_id, None)

    def mapped_pool(self) -> GpuPool:
        """Raises SessionOver when the session has no pool yet, or has none any more."""
        if self.pool is None:
            raise errors.SessionOver(f"session {self.epoch} has no pool: it is {self.state}")
        return self.pool

    def lease(self, request_id: bytes) -> OpenLease:
        """Raises NotFound."""
        lease = self.leases.get(request_id)
        if lease is None:
            raise errors.NotFound("request_id", request_id, "an open lease of this session")
        return lease

    def end_lease(self, request_id: bytes) -> OpenLease | None:
        """The lease that was open until now, if one was. The caller tells the index."""
        lease = self.leases.pop(request_id, None)
        if lease is not None:
            lease.ended.set_result(None)
        return lease

    def end_leases(self) -> NDArray[np.uint64]:
        """All of them. The index ends those in the session's pool with it: answers the others."""
        in_arena = [each.id for each in self.leases.values() if each.to.in_arena]
        for request_id in list(self.leases):
            self.end_lease(request_id)
        return np.array(in_arena, np.uint64)


class SessionTable:
    """The open sessions. One thread (the event loop's) uses it; `clock` is monotonic seconds."""

    def __init__(self, *, max_sessions: int, clock: Callable[[], float]) -> None:
        self.instance = secrets.token_bytes(INSTANCE_BYTES)
        self.clock = clock
        self._max_sessions = max_sessions
        self._next_epoch = 1
        self._open: dict[int, Session] = {}

    def open(
        self, engine_name: str, layout: Layout, num_pages: int, *, expiry_s: float = EXPIRY_S
    ) -> Session:
        """A new session in state joining. Raises LimitReached."""
        if len(self._open) >= self._max_sessions:
            raise errors.LimitReached(
                "limits.max_sessions", self._max_sessions, "sessions are open"
            )
        now = self.clock()
        session = Session(
            self._next_epoch, engine_name, layout, num_pages, now, now, expiry_s=expiry_s
        )
        self._next_epoch += 1
        self._open[session.epoch] = session
        return session

    def join(self, session: Session) -> None:
        """Its pool is mapped: calls may begin."""
        if session.state != "joining":
            raise errors.SessionOver(f"session {session.epoch} is {session.state}")
        session.life.become("ready")
        session.last_heartbeat = self.clock()

    def end(self, session: Session) -> bool:
        """Fence it off: no call of it is served again. False when it was already."""
        if session.life.over:
            return False
        session.life.become("closed" if session.state == "joining" else "silent")
        del self._open[session.epoch]
        return True

    def heartbeat(self, session: Session) -> None:
        """Raises SessionOver: a thawed engine learns here that it was given up."""
        if session.life.over:
            raise errors.SessionOver(f"session {session.epoch} has ended")
        session.last_heartbeat = self.clock()

    def of_call(self, secret: bytes, epoch: int) -> Session:
        """The session that a call names. Raises SessionOver for one that is over or joining."""
        session = self._open.get(epoch)
        if session is None or not hmac.compare_digest(secret, session.secret):
            raise errors.SessionOver(
                f"session {epoch} is over or of another run of the daemon: attach again"
            )
        if session.state == "joining":
            raise errors.SessionOver(f"session {epoch} has not joined its side socket yet")
        return session

    def expired(self) -> list[Session]:
        """Sessions without a heartbeat for so long as they may be (expiry_s), or not joined for
        JOIN_S. Changes nothing."""
        now = self.clock()
        return [
            each
            for each in self._open.values()
            if (
                now - each.attached_at >= JOIN_S
                if each.state == "joining"
                else now - each.last_heartbeat >= each.expiry_s
            )
        ]

    def seconds_open(self, session: Session) -> float:
        return self.clock() - session.attached_at

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)
