"""A session with the daemon, kept alive and opened again by a thread, and calls over it.

detached -> attached [a daemon answered]    attached -> silent [no answer to heartbeats, or its
attached, silent -> detached [dead]          stream broke while its process lives]
silent -> attached [it answers again: a new session, the old one's transfers have ended]

Not here: what is called (client.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.client import channel
from kvc2.client.connection import (
    DEATH_S,
    Connection,
    EnginePool,
    NamespaceHandle,
    Over,
    Silence,
    SilentDaemon,
    without_traceback,
)
from kvc2.client.memory import ArenaView
from kvc2.client.share import Share, Sharing
from kvc2.host.address import Address
from kvc2.v1 import cache_pb2

T = TypeVar("T")
State = Literal["attached", "detached", "silent"]
BACKOFF_S_MIN = 0.05
BACKOFF_S_MAX = 1.0  # attached again within 2 s of the daemon being back
SILENT_S = 2.0  # without an answer to a heartbeat, of time in which this process ran
DETACH_S = 3.0  # the daemon may copy for two seconds first
TICK_S = 0.25  # to see that a silent daemon's process died
ORPHANS_S = 1.0  # of the heartbeats' thread
ORPHANS_A_CALL = 256
ORPHANS_MAX = 4096  # timed-out acquires to release; beyond it the session's end frees them


class Engine(Protocol):
    """What a client asks and tells its engine, on the client's thread; none may call the client.

    kept_pages() is asked right before each attach and answers the pages that the engine goes on
    using: from then on the others are the daemon's, until on_detached (dead: all are the engine's)
    or on_attached, which says what is granted to it at first. on_attach_failed: a try was in vain,
    the next one follows within a second; Unreachable has a reason, all else is the daemon's word.
    """

    def kept_pages(self) -> NDArray[np.uint32]: ...

    def on_attached(self, granted: NDArray[np.uint32]) -> None: ...

    def on_detached(self, detached: errors.Detached) -> None: ...

    def on_attach_failed(self, error: errors.Kvc2Error) -> None: ...


class Orphans:
    """Acquires that were not answered: their leases may have been opened all the same, and are
    released when the daemon answers again. Threads may share it."""

    def __init__(self) -> None:
        self._ids: deque[bytes] = deque(maxlen=ORPHANS_MAX)

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(self, request_id: bytes) -> None:
        self._ids.append(request_id)

    def clear(self) -> None:
        """The session that they were asked in is over."""
        self._ids.clear()

    def release(self, call: Callable[[Any, float], Any], connection: Connection) -> None:
        """The oldest of them, by `call`: raises what that does, and they stay."""
        ids = list(self._ids)[:ORPHANS_A_CALL]
        call(cache_pb2.ReleaseRequest(session=connection.head, request_ids=ids), ORPHANS_S)
        for _ in ids:
            self._ids.popleft()


class Keeper:
    """Keeps a session with the daemon at `address`. Threads may share it. Raises InvalidRequest for
    what is no address. Calls raise errors.Detached when there is no session, and another
    errors.Kvc2Error when the daemon refuses what was asked."""

    def __init__(self, address: str | Address, pool: EnginePool, engine: Engine) -> None:
        self._daemon = Address.of_daemon(address)
        self.last_refusal: errors.Kvc2Error | None = None
        self._engine = engine
        self._pool = pool
        self._sharing = Sharing(pool.memory)
        self._asked = False  # for the pages it keeps, in the attach under way
        self._silent = SilentDaemon(self._daemon)
        self._connection: Connection | None = None
        self._state: State = "detached"
        self._changed = threading.Condition()
        self.orphans = Orphans()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="kvc2-session", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until there is a session."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state == "attached", timeout_s)

    def close(self) -> None:
        """End the session in order. Idempotent. on_detached is not called."""
        self._closing.set()
        connection = self._connection
        if connection is not None:
            connection.wake()
        self._thread.join()
        self._sharing.close()

    def share(self) -> Share:
        """What worker processes of this engine open, to read and fill the pool and to wait for
        layers. Its sessions have the numbers of those that the engine was told of, from 1."""
        return self._sharing.share()

    @property
    def connection(self) -> Connection | None:
        """Of the session that there is, silent or not."""
        return self._connection

    # ---- calls

    def current(self, arena: ArenaView | None = None) -> Connection:
        """Of the session that there is. Raises Detached, also where `arena` is another one's."""
        connection = self._connection
        if connection is None or self._state != "attached":
            raise errors.Detached("silent" if self._state == "silent" else "dead")
        if arena is not None and connection.arena is not arena:
            raise errors.Detached("dead", "the session that this arena was of is over")
        return connection

    def call_in(
        self,
        connection: Connection,
        namespace: NamespaceHandle,
        name: str,
        request: Any,
        timeout_s: float = channel.CALL_S,
    ) -> Any:
        """One that names a namespace; the daemon lets go of those that were not used for long, and
        one that it doesn't know is opened again."""

        def named(number: int) -> None:
            request.namespace_id = number

        return self.call_named(connection, namespace, name, request, named, timeout_s)

    def call_named(
        self,
        connection: Connection,
        namespace: NamespaceHandle,
        name: str,
        request: Any,
        named: Callable[[int], None],
        timeout_s: float,
    ) -> Any:
        """The same, where `named` writes the namespace's id into the request."""

        def ask(number: int) -> Any:
            named(number)
            return self.call(connection, name, request, timeout_s)

        return self.in_namespace(connection, namespace, ask)

    def in_namespace(
        self, connection: Connection, namespace: NamespaceHandle, ask: Callable[[int], T]
    ) -> T:
        """What `ask` answers with the namespace's id."""
        try:
            return ask(self.number(connection, namespace))
        except errors.NotFound as error:
            if not str(error).startswith("namespace_id"):
                raise
        namespace.opened = (b"", 0)
        return ask(self.number(connection, namespace))

    def call(
        self,
        connection: Connection,
        name: str,
        request: Any,
        timeout_s: float = channel.CALL_S,
        *,
        retries: int = 1,
    ) -> Any:
        """One answer; a broken call is tried again once if its session still is there, which only
        idempotent rpcs may be. Raises Detached when the daemon is gone, silent or draining."""
        try:
            return connection.channel.call(name, request, timeout_s)
        except grpc.RpcError as broken:
            kept = retries > 0 and self._connection is connection
            again = kept and _may_work_again(connection, broken)
            error = None if again else raised(connection, name, broken)
        if error is not None:
            raise error
        return self.call(connection, name, request, timeout_s, retries=retries - 1)

    def number(self, connection: Connection, handle: NamespaceHandle) -> int:
        """The handle's id in this session."""
        epoch, number = handle.opened
        if epoch != connection.key:
            request = cache_pb2.OpenNamespaceRequest(
                session=connection.head,
                identity=handle.identity,
                tenant=handle.tenant,
                salt=handle.salt,
                ttl_s=handle.ttl_s,
                layout=None if handle.layout is None else handle.layout.to_proto(),
                key_mode=int(handle.opaque),
            )
            number = self.call(connection, "OpenNamespace", request).namespace_id
            handle.opened = (connection.key, number)
        return number

    # ---- the thread that keeps the session

    def _keep(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while not self._closing.is_set():
            connection = self._try_attach()
            if connection is not None:
                backoff_s = BACKOFF_S_MIN
                self._tend(connection)
                continue
            if self._state == "silent" and self._silent.is_dead():
                self._lose("dead")
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)
        self._silent.forget()

    def _try_attach(self) -> Connection | None:
        self._asked = False
        try:
            if (why := channel.absence(self._daemon)) is not None:
                raise why
            connection = Connection(self._daemon, self._pool, self._ask_kept_pages)
        except (errors.Kvc2Error, OSError) as broken:  # OSError: out of descriptors, or so
            error = broken if isinstance(broken, errors.Kvc2Error) else _failed(broken)
            without_traceback(error)
            self.last_refusal = error
            self._engine.on_attach_failed(error)
            if self._asked:  # the pages it gave away are its again, as far as they were
                reason: Literal["dead", "silent"] = "silent" if self._state == "silent" else "dead"
                self._engine.on_detached(errors.Detached(reason, f"can't attach: {error}"))
            return None
        self.last_refusal = None
        self.orphans.clear()
        self._silent.forget()
        self._sharing.begin(connection.progress, connection.arena)
        self._engine.on_attached(connection.granted)
        self._set(connection, "attached")
        return connection

    def _ask_kept_pages(self) -> NDArray[np.uint32]:
        self._asked = True
        return self._engine.kept_pages()

    def _tend(self, connection: Connection) -> None:
        """Keep the session until it is over or the client closes; then close it."""
        try:
            self._watch(connection)
            if self._closing.is_set():
                self._set(None, "detached")
                connection.detach(DETACH_S)
                return
            if connection.daemon_is_dead():
                self._lose("dead")
            elif self._state == "attached":
                self._lose("silent")
            if self._state == "silent":
                self._silent.remember(connection.processes)
        finally:
            connection.close()

    def _watch(self, connection: Connection) -> None:
        """Beat and listen; returns when the session is over, or answers after it was silent."""
        beat_at, silence = time.monotonic(), Silence()
        while not self._closing.is_set():
            turn_s = TICK_S
            if time.monotonic() >= beat_at:
                connection.send_heartbeat()
                beat_at = time.monotonic() + connection.heartbeat_s
            if self.orphans and self._state == "attached":
                turn_s += ORPHANS_S
                with contextlib.suppress(errors.Kvc2Error):
                    self.orphans.release(partial(self.call, connection, "Release"), connection)
            message = connection.receive(max(0.0, min(beat_at - time.monotonic(), TICK_S)))
            if isinstance(message, Over):
                return
            if message is not None:
                if self._state == "silent":
                    return
                silence.answered()
                continue
            silence.waited(turn_s)
            if self._state == "silent" and connection.daemon_is_dead(0):
                return
            if self._state == "attached" and silence.seconds > SILENT_S:
                self._lose("silent")

    def _lose(self, reason: Literal["dead", "silent"]) -> None:
        if self._connection is not None:
            self._connection.end_waits()
        self._set(None, "detached" if reason == "dead" else "silent")
        self._engine.on_detached(errors.Detached(reason))

    def _set(self, connection: Connection | None, state: State) -> None:
        with self._changed:
            self._connection, self._state = connection, state
            self._changed.notify_all()


def raised(connection: Connection, name: str, broken: grpc.RpcError) -> errors.Kvc2Error:
    """What a call raises that ended so."""
    error = channel.translated(broken)
    if isinstance(error, errors.Unreachable):
        late = channel.code(broken) == "DEADLINE_EXCEEDED"
        dead = connection.daemon_is_dead(0 if late else DEATH_S)
        return errors.Detached("dead" if dead else "silent", f"{name}: {error}")
    if isinstance(error, errors.SessionOver | errors.Draining):
        return errors.Detached("silent", f"{name}: {error}")
    return error


def _may_work_again(connection: Connection, broken: grpc.RpcError) -> bool:
    """A call that broke, and not for want of time."""
    lost = isinstance(channel.translated(broken), errors.Unreachable)
    return lost and channel.code(broken) != "DEADLINE_EXCEEDED" and not connection.ended


def _failed(error: OSError) -> errors.Kvc2Error:
    return errors.Unreachable(f"this process can't: {error}")
