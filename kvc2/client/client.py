"""The engine's end: a session kept alive and re-opened by a thread, and the calls of the wire.

detached -> attached [a daemon answered]    attached -> silent [no answer to heartbeats, or its
attached, silent -> detached [dead]          stream broke while its process lives]
silent -> attached [it answers again: a new session, the old one's transfers have ended]
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from kvc2 import answers, errors
from kvc2.client import channel
from kvc2.client.connection import (
    DEATH_S,
    Connection,
    EnginePool,
    NamespaceHandle,
    Over,
    Silence,
    SilentDaemon,
)
from kvc2.client.memory import PoolMemory
from kvc2.client.share import Share, Sharing
from kvc2.host.address import Address
from kvc2.layout import Layout
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message, packed, to_message

State = Literal["attached", "detached", "silent"]
BACKOFF_S_MIN = 0.05
BACKOFF_S_MAX = 1.0  # attached again within 2 s of the daemon being back
SILENT_S = 2.0  # without an answer to a heartbeat, of time in which this process ran
ACQUIRE_DEADLINE_S = 2.0  # the daemon's default
ACQUIRE_MARGIN_S = 1.0  # the daemon answers at its deadline; then it is silent
DETACH_S = 3.0  # the daemon may copy for two seconds first
DURABLE_S = 60.0  # a commit that waits for the disk
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


class Client:
    """A session with the daemon at `address`, attached in the background. Threads may share it.

    Raises InvalidRequest for what is no address. Calls raise errors.Detached when there is no
    session, and another errors.Kvc2Error when the daemon refuses what was asked. The pool holds
    num_bytes // layout.payload_bytes pages.
    """

    def __init__(
        self, address: str, *, pool: PoolMemory, layout: Layout, engine_name: str, engine: Engine
    ) -> None:
        self.address = address
        self._daemon = Address.of_daemon(address)
        self.last_refusal: errors.Kvc2Error | None = None
        self._engine = engine
        self._pool = EnginePool(pool, layout, engine_name, self._ask_kept_pages)
        self._sharing = Sharing(pool)
        self._asked = False  # for the pages it keeps, in the attach under way
        self._silent = SilentDaemon(self._daemon)
        self._connection: Connection | None = None
        self._state: State = "detached"
        self._changed = threading.Condition()
        self._orphans: deque[bytes] = deque(maxlen=ORPHANS_MAX)
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

    # ---- calls of a session

    def open_namespace(
        self, identity: bytes, tenant: str = "", salt: bytes = b"", *, ttl_s: int = 0
    ) -> NamespaceHandle:
        """A handle that stays good across sessions. Without one now, it is opened when needed. Its
        blocks match nobody ttl_s after their last use; 0: for ever."""
        handle = NamespaceHandle(identity, tenant, salt, ttl_s)
        with contextlib.suppress(errors.Detached):
            self._number(self._attached(), handle)
        return handle

    def _number(self, connection: Connection, handle: NamespaceHandle) -> int:
        """The handle's id in this session."""
        epoch, number = handle.opened
        if epoch != connection.key:
            request = cache_pb2.OpenNamespaceRequest(
                session=connection.head,
                identity=handle.identity,
                tenant=handle.tenant,
                salt=handle.salt,
                ttl_s=handle.ttl_s,
            )
            number = self._call(connection, "OpenNamespace", request).namespace_id
            handle.opened = (connection.key, number)
        return number

    def match(self, namespace: NamespaceHandle, tokens: NDArray[np.uint32]) -> answers.Matched:
        """The longest cached prefix. Changes nothing."""
        connection = self._attached()
        request = cache_pb2.MatchRequest(
            session=connection.head,
            tokens=packed(tokens),
        )
        answer = self._call_in(connection, namespace, "Match", request)
        return from_message(answers.Matched, answer)

    def explain(self, namespace: NamespaceHandle, tokens: NDArray[np.uint32]) -> answers.Explained:
        """What an acquire of these tokens would find now, and why not more. Changes nothing."""
        connection = self._attached()
        request = cache_pb2.ExplainRequest(
            session=connection.head,
            tokens=packed(tokens),
        )
        answer = self._call_in(connection, namespace, "Explain", request)
        return from_message(answers.Explained, answer)

    def explain_request(self, request_id: bytes) -> answers.Explained:
        """What a recent acquire of this session found, and why not more. Changes nothing."""
        connection = self._attached()
        request = cache_pb2.ExplainRequest(session=connection.head, request_id=request_id)
        return from_message(answers.Explained, self._call(connection, "Explain", request))

    def acquire(
        self,
        namespace: NamespaceHandle,
        request_id: bytes,
        tokens: NDArray[np.uint32],
        *,
        grant_pages: int = 0,
        deadline_s: float | None = None,
        hints: answers.Hints = answers.NO_HINTS,
    ) -> answers.Acquired:
        """Open a lease on the longest cached prefix; waits at most deadline_s and a margin."""
        connection = self._attached()
        request = cache_pb2.AcquireRequest(
            session=connection.head,
            request_id=request_id,
            tokens=packed(tokens),
            grants=_grants(grant_pages),
            deadline_ms=0 if deadline_s is None else max(1, round(deadline_s * 1000)),
            hints=to_message(hints, cache_pb2.Hints),
        )
        wait_s = ACQUIRE_DEADLINE_S if deadline_s is None else deadline_s
        try:
            answer = self._call_in(
                connection, namespace, "Acquire", request, wait_s + ACQUIRE_MARGIN_S
            )
        except errors.Detached:
            self._orphans.append(request_id)  # it may have been opened all the same
            raise
        return from_message(answers.Acquired, answer)

    def commit(
        self,
        commits: Sequence[answers.LeaseCommit],
        *,
        grant_pages: int = 0,
        durable: bool = False,
        prefill_tokens_per_s: float = 0.0,
    ) -> answers.Committed:
        """Make filled pages visible. Call it after the device has finished writing them. The rate
        is what the engine has measured; 0: it doesn't know."""
        connection = self._attached()
        request = cache_pb2.CommitRequest(
            session=connection.head,
            leases=[_commit(each) for each in commits],
            grants=_grants(grant_pages),
            durable=durable,
            prefill_tokens_per_s=prefill_tokens_per_s,
        )
        wait_s = DURABLE_S if durable else channel.CALL_S
        answer = self._call(connection, "Commit", request, wait_s)
        return from_message(answers.Committed, answer)

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: NDArray[np.uint32] = answers.NO_PAGES,
        grant_pages: int = 0,
        hints: Sequence[answers.Hints] = (),
    ) -> answers.Released:
        """Close leases. Call it after the device has finished reading their pages. `hints`: none,
        or one for each, in the place of acquire's where it says anything."""
        connection = self._attached()
        request = cache_pb2.ReleaseRequest(
            session=connection.head,
            request_ids=request_ids,
            returned=_pages(returned),
            hints=[to_message(each, cache_pb2.Hints) for each in hints],
            grants=_grants(grant_pages),
        )
        return from_message(answers.Released, self._call(connection, "Release", request))

    def grant(self, pages: int) -> NDArray[np.uint32]:
        """More private pages to fill, maybe fewer than asked for. Not idempotent: never retried."""
        connection = self._attached()
        request = cache_pb2.GrantRequest(session=connection.head, grants=_grants(pages))
        answer = self._call(connection, "Grant", request, retries=0)
        return from_message(answers.Released, answer).granted_pages

    def invalidate(self, namespace: NamespaceHandle) -> answers.Invalidated:
        """Kill all blocks of a namespace, in every tier. The handle stays good, for new ones."""
        connection = self._attached()
        request = cache_pb2.InvalidateRequest(session=connection.head)
        answer = self._call_in(connection, namespace, "Invalidate", request)
        return from_message(answers.Invalidated, answer)

    def pin(
        self, namespace: NamespaceHandle, tokens: answers.U32, *, tier: str = "cpu", hard: bool
    ) -> answers.PrefixPinned:
        """Keep the full blocks of `tokens` in gpu (this session's), cpu or disk, there or not:
        hard, they are never evicted; else last. A pin of cpu or disk outlives the session."""
        connection = self._attached()
        request = cache_pb2.PinRequest(
            session=connection.head,
            tokens=packed(tokens),
            tier=tier,
            hard=hard,
        )
        answer = self._call_in(connection, namespace, "Pin", request)
        return from_message(answers.PrefixPinned, answer)

    def unpin(self, namespace: NamespaceHandle, tokens: answers.U32, *, tier: str = "cpu") -> int:
        """End the pin of exactly these blocks; how many, 0: there was none."""
        connection = self._attached()
        request = cache_pb2.UnpinRequest(
            session=connection.head,
            tokens=packed(tokens),
            tier=tier,
        )
        return int(self._call_in(connection, namespace, "Unpin", request).blocks)

    def prefetch(
        self,
        namespace: NamespaceHandle,
        tokens: answers.U32,
        *,
        tier: str = "cpu",
        deadline_s: float = 0.0,
    ) -> answers.Prefetched:
        """Bring the longest cached prefix of `tokens` to cpu or gpu (this session's), without a
        lease; answers when it is there or the time is over (0: at once), and it goes on."""
        connection = self._attached()
        request = cache_pb2.PrefetchRequest(
            session=connection.head,
            tokens=packed(tokens),
            tier=tier,
            deadline_ms=round(deadline_s * 1000),
        )
        wait_s = deadline_s + channel.CALL_S
        answer = self._call_in(connection, namespace, "Prefetch", request, wait_s)
        return from_message(answers.Prefetched, answer)

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool:
        """Wait until `layer` of a transfer is in the pool: no call, no spinning. False after
        timeout_s, or when its session is over."""
        connection = self._connection
        progress = connection.progress if connection is not None else None
        return progress is not None and progress.wait(transfer, layer, timeout_s)

    def _attached(self) -> Connection:
        connection = self._connection
        if connection is None or self._state != "attached":
            raise errors.Detached("silent" if self._state == "silent" else "dead")
        return connection

    def _call_in(
        self,
        connection: Connection,
        namespace: NamespaceHandle,
        name: str,
        request: Any,
        timeout_s: float = channel.CALL_S,
    ) -> Any:
        """One that names a namespace; the daemon lets go of those that were not used for long, and
        one that it doesn't know is opened again."""
        request.namespace_id = self._number(connection, namespace)
        try:
            return self._call(connection, name, request, timeout_s)
        except errors.NotFound as error:
            if not str(error).startswith("namespace_id"):
                raise
        namespace.opened = (b"", 0)
        request.namespace_id = self._number(connection, namespace)
        return self._call(connection, name, request, timeout_s)

    def _call(
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
            error = channel.translated(broken)
            late = channel.code(broken) == "DEADLINE_EXCEEDED"
        if isinstance(error, errors.Unreachable):
            if retries and not late and not connection.ended and self._connection is connection:
                return self._call(connection, name, request, timeout_s, retries=retries - 1)
            dead = connection.daemon_is_dead(0 if late else DEATH_S)
            raise errors.Detached("dead" if dead else "silent", f"{name}: {error}")
        if isinstance(error, errors.SessionOver | errors.Draining):
            raise errors.Detached("silent", f"{name}: {error}")
        raise error

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
            connection = Connection(self._daemon, self._pool)
        except (errors.Kvc2Error, OSError) as broken:  # OSError: out of descriptors, or so
            error = broken if isinstance(broken, errors.Kvc2Error) else _failed(broken)
            self.last_refusal = error
            self._engine.on_attach_failed(error)
            if self._asked:  # the pages it gave away are its again, as far as they were
                reason: Literal["dead", "silent"] = "silent" if self._state == "silent" else "dead"
                self._engine.on_detached(errors.Detached(reason, f"can't attach: {error}"))
            return None
        self.last_refusal = None
        self._orphans.clear()
        self._silent.forget()
        self._sharing.begin(connection.progress)
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
                self._silent.remember(connection.pidfd)
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
            if self._orphans and self._state == "attached":
                turn_s += ORPHANS_S
                self._release_orphans(connection)
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

    def _release_orphans(self, connection: Connection) -> None:
        ids = list(self._orphans)[:ORPHANS_A_CALL]
        request = cache_pb2.ReleaseRequest(session=connection.head, request_ids=ids)
        with contextlib.suppress(errors.Kvc2Error):
            self._call(connection, "Release", request, ORPHANS_S)
            for _ in request.request_ids:
                self._orphans.popleft()

    def _lose(self, reason: Literal["dead", "silent"]) -> None:
        if self._connection is not None:
            self._connection.end_waits()
        self._set(None, "detached" if reason == "dead" else "silent")
        self._engine.on_detached(errors.Detached(reason))

    def _set(self, connection: Connection | None, state: State) -> None:
        with self._changed:
            self._connection, self._state = connection, state
            self._changed.notify_all()


def _failed(error: OSError) -> errors.Kvc2Error:
    return errors.Unreachable(f"this process can't: {error}")


def _pages(pages: NDArray[np.uint32]) -> list[cache_pb2.ComponentPages]:
    """Of component 0."""
    return [cache_pb2.ComponentPages(pages=packed(pages))] if len(pages) else []


def _grants(pages: int) -> list[cache_pb2.PageCount]:
    return [cache_pb2.PageCount(pages=pages)] if pages else []


def _commit(each: answers.LeaseCommit) -> cache_pb2.LeaseCommit:
    return cache_pb2.LeaseCommit(
        request_id=each.request_id,
        first_block=each.first_block,
        tokens=packed(each.tokens),
        pages=_pages(each.pages),
    )
