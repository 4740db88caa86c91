"""The Attach stream and the life of a session: hello, hand-over, heartbeats, end.

A session is over when its stream ends, its process dies (pidfd) or its heartbeats stop for 3 s,
whichever is first; what then happens to its pages is the cache's (Cache.close_session).
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc

from kvc2 import errors, events
from kvc2.answers import of_pages
from kvc2.cache.cache import Cache
from kvc2.cache.sessions import HEARTBEAT_INTERVAL_S, Session, SessionTable
from kvc2.config import ServeConfig
from kvc2.cuda.faults import NoWorker, RefusedByWorker, WorkerLost
from kvc2.metrics import Metrics
from kvc2.server import checks, hello
from kvc2.server.credentials import CALLER
from kvc2.server.hello import Greeting
from kvc2.server.side import NONCE_BYTES, Expected, Handover
from kvc2.tiers.device import DeviceShare
from kvc2.tiers.executors import Executors
from kvc2.tiers.gpu import GpuExecutor
from kvc2.v1 import cache_pb2
from kvc2.wire import to_message

EXPIRY_CHECK_S = 0.25
DEATH_S = 0.5  # a killed process closes its sockets some ms before its pidfd says that it is dead
FROZEN_S = 0.05  # one look at the pidfd of an engine that fell silent
SEND_S = 1.0  # an engine that doesn't read its stream is not waited for
HELLO_S = 3.0
FIRST_GRANT_SHARE = 8  # of the pool, at most FIRST_GRANT_PAGES: the rest is better used as cache
FIRST_GRANT_PAGES = 256

Context = grpc.aio.ServicerContext[Any, Any]
# why a session ends: in order (the engine or the daemon says so), no heartbeat, a dead process, a
# broken stream, a message that is not allowed, a promotion that failed
Ending = Literal["detached", "drained", "expired", "died", "broken", "misused", "failed"]


@dataclass(eq=False)
class _Attachment:
    """A session's stream and hand-over. `ended` is done when the session shall end: it says why."""

    session: Session
    greeting: Greeting
    nonce: bytes
    context: Context
    ended: asyncio.Future[Ending]
    misuse: tuple[str, object, str] | None = None  # of InvalidRequest, raised by the stream
    handover: Handover | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    def end(self, reason: Ending) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    async def send(self, message: cache_pb2.AttachResponse) -> None:
        """Raises nothing: a stream that breaks ends the session elsewhere."""
        try:
            async with asyncio.timeout(SEND_S), self.sending:
                await self.context.write(message)
        except (
            TimeoutError,
            asyncio.InvalidStateError,
            grpc.RpcError,
            grpc.aio.UsageError,
        ) as error:
            events.warning("send_failed", epoch=self.session.epoch, reason=repr(error))


class Attachments:
    """All sessions of one daemon. Runs on the event loop."""

    def __init__(
        self, config: ServeConfig, cache: Cache, table: SessionTable, metrics: Metrics
    ) -> None:
        self._config = config
        self._cache = cache
        self._metrics = metrics
        self.table = table
        self.side_path = ""
        self.draining = False
        self._by_nonce: dict[bytes, _Attachment] = {}
        self._open: dict[int, _Attachment] = {}
        self._closing: dict[asyncio.Task[None], int] = {}  # -> pid

    # ---- the stream

    async def attach(self, context: Context) -> None:
        """The Attach rpc. Its cleanup is a task of its own: a broken stream cancels this one."""
        greeting = hello.check(await self._read_first(context), self._config)
        if greeting.device:
            hello.check_device(greeting.device, await self._cache.executors.found())
        session = self.table.open(
            greeting.engine_name, greeting.layout, greeting.num_pages, expiry_s=greeting.expiry_s
        )
        session.credential = CALLER.get()
        ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        nonce = secrets.token_bytes(NONCE_BYTES)
        attachment = _Attachment(session, greeting, nonce, context, ended)
        # by its number: a session that held its attachment would outlive both
        session.give_up = functools.partial(self._give_up, session.epoch)
        self._by_nonce[nonce] = attachment
        self._open[session.epoch] = attachment
        self._metrics.sessions.set(len(self.table))
        reader = asyncio.create_task(self._read(attachment))
        try:
            await attachment.send(self._attached(attachment))
            reason = await asyncio.shield(ended)
        except asyncio.CancelledError:
            attachment.end("broken")
            raise
        finally:
            reader.cancel()
            closing = self._close(attachment)
        if reason == "detached" and closing is not None:
            await asyncio.shield(closing)  # the engine leaves its pages alone until the stream ends
        if reason == "expired":
            raise errors.SessionOver(
                f"session {session.epoch} sent no heartbeat for {session.expiry_s:g} s"
            )
        if reason == "misused" and attachment.misuse is not None:
            raise errors.InvalidRequest(*attachment.misuse)
        if reason == "failed":
            raise errors.SessionOver(f"a transfer into the pool of session {session.epoch} failed")

    async def _read_first(self, context: Context) -> cache_pb2.AttachRequest:
        if self.draining:
            raise errors.Draining("the daemon drains: no new sessions")
        try:
            async with asyncio.timeout(HELLO_S):
                first = await context.read()
        except TimeoutError:
            raise errors.InvalidRequest("hello", "nothing", f"within {HELLO_S} s") from None
        said = first if isinstance(first, bytes) else b""  # its client has ended it
        return checks.parsed(cache_pb2.AttachRequest, said)

    def _attached(self, attachment: _Attachment) -> cache_pb2.AttachResponse:
        return cache_pb2.AttachResponse(
            attached=cache_pb2.Attached(
                secret=attachment.session.secret,
                session_epoch=attachment.session.epoch,
                nonce=attachment.nonce,
                side_socket=self.side_path,
                heartbeat_interval_ms=round(HEARTBEAT_INTERVAL_S * 1000),
                expiry_ms=round(attachment.session.expiry_s * 1000),
                wire_version=attachment.greeting.wire_version,
                limits=to_message(hello.limits(self._config), cache_pb2.Limits),
            )
        )

    async def _read(self, attachment: _Attachment) -> None:
        answer = cache_pb2.AttachResponse(heartbeat=cache_pb2.Heartbeat())
        try:
            while True:
                message = _message(await attachment.context.read())
                if message is None:
                    attachment.end("broken")
                    return
                kind = message.WhichOneof("message")
                if kind == "detach":
                    attachment.end("detached")
                    return
                if kind != "heartbeat":
                    raise errors.InvalidRequest("message", kind, "heartbeat or detach after hello")
                self.table.heartbeat(attachment.session)
                await attachment.send(answer)
        except errors.InvalidRequest as error:
            attachment.misuse = (error.field, error.value, error.allowed)
            attachment.end("misused")
        except (errors.SessionOver, grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            attachment.end("broken")

    # ---- the side socket

    def expect(self, nonce: bytes, uid: int) -> Expected:
        """What the engine with this nonce announced. Uses the nonce up. Raises Denied for the arena
        of another user's daemon."""
        attachment = self._by_nonce.pop(nonce, None)
        if attachment is None:
            raise errors.InvalidRequest("nonce", None, "the one of an Attached message, once")
        attachment.session.uid = uid
        greeting = attachment.greeting
        if not greeting.arena:
            return Expected(greeting.memory_bytes, bool(greeting.device))
        if uid != os.geteuid():
            raise errors.Denied("hello.arena", f"user {uid}", f"user {os.geteuid()}, the daemon's")
        arena_fd = self._cache.arena.open_for_reading()
        return Expected(greeting.memory_bytes, bool(greeting.device), arena_fd)

    async def join(self, nonce: bytes, handover: Handover) -> Callable[[], None]:
        """The pool is mapped: open it in the cache and say Ready. What is answered takes beats."""
        attachment = next((each for each in self._open.values() if each.nonce == nonce), None)
        if attachment is None:
            raise errors.SessionOver("the stream ended before the side socket joined")
        session, greeting = attachment.session, attachment.greeting
        # an engine that re-attaches brings the same memory: old transfers into it must have ended
        earlier = [task for task, pid in self._closing.items() if pid == handover.pid]
        if earlier:
            await asyncio.wait(earlier)
        if session.state != "joining":
            raise errors.SessionOver(f"session {session.epoch} is {session.state}")
        kept = checks.pages("hello.pools[0].kept_pages", greeting.kept_pages, session)
        session.pid, session.uid = handover.pid, handover.uid
        store = await _executor(self._cache.executors, session, handover, greeting)
        try:
            if session.state != "joining":
                raise errors.SessionOver(f"session {session.epoch} is {session.state}")
            self._cache.open_session(session, store, kept_pages=kept)
        except BaseException:
            await self._cache.executors.let_go(store)
            raise
        attachment.handover = handover
        self.table.join(session)
        first = min(greeting.num_pages // FIRST_GRANT_SHARE, FIRST_GRANT_PAGES)
        granted = of_pages(self._cache.leases.grant(session, first))
        if handover.pidfd >= 0:
            asyncio.get_running_loop().add_reader(handover.pidfd, attachment.end, "died")
        events.event(
            "attached",
            epoch=session.epoch,
            engine=session.engine_name,
            pid=session.pid,
            kept=len(kept),
        )
        ready = cache_pb2.Ready(
            granted=[to_message(each, cache_pb2.ComponentPages) for each in granted],
            arena_bytes=self._cache.arena.capacity_bytes if greeting.arena else 0,
        )
        await attachment.send(cache_pb2.AttachResponse(ready=ready))
        return functools.partial(self._beat, session)

    def _beat(self, session: Session) -> None:
        if not session.life.over:  # its engine may not know yet
            self.table.heartbeat(session)

    # ---- the end

    def _give_up(self, epoch: int) -> None:
        if (attachment := self._open.get(epoch)) is not None:
            attachment.end("failed")

    def _close(self, attachment: _Attachment) -> asyncio.Task[None] | None:
        """Fence the session off at once; its pages follow in the task, if it had any."""
        session, handover = attachment.session, attachment.handover
        joined = session.state != "joining"
        if not self.table.end(session):
            return None
        if handover is not None:
            handover.fence()  # before its leases end
        del self._open[session.epoch]
        self._by_nonce.pop(attachment.nonce, None)
        self._metrics.sessions.set(len(self.table))
        reason = attachment.ended.result() if attachment.ended.done() else "broken"
        if reason not in ("detached", "drained"):
            self._metrics.fault("session_expired" if reason == "expired" else "session_crashed")
        events.event("session_over", epoch=session.epoch, pid=session.pid, reason=reason)
        if not joined:
            return None
        task = asyncio.create_task(self._close_pages(attachment, reason))
        self._closing[task] = session.pid
        task.add_done_callback(self._closing.pop)
        return task

    async def _close_pages(self, attachment: _Attachment, reason: Ending) -> None:
        handover = attachment.handover
        assert handover is not None  # it has joined
        if handover.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(handover.pidfd)
        wait_s = {"died": DEATH_S, "broken": DEATH_S, "expired": FROZEN_S}.get(reason)
        at_rest: Callable[[], Awaitable[bool]] | None = None
        if wait_s is not None:
            at_rest = functools.partial(handover.died, wait_s)
        elif reason == "detached":
            at_rest = _said_so
        try:
            await self._cache.close_session(attachment.session, at_rest)
        finally:
            handover.close()

    def expire(self) -> None:
        """Ends sessions whose engine is frozen."""
        for session in self.table.expired():
            attachment = self._open[session.epoch]
            attachment.end("expired")
            self._close(attachment)  # now: the stream's task may wait for a frozen peer

    async def notify_drain(self) -> None:
        """Tell every session that the daemon is about to stop."""
        self.draining = True
        notice = cache_pb2.AttachResponse(drain=cache_pb2.DrainNotice())
        await asyncio.gather(*(each.send(notice) for each in list(self._open.values())))

    async def close(self) -> None:
        """End every session in order and wait until the cache has let go of their pools."""
        for each in list(self._open.values()):
            each.end("drained")
            self._close(each)
        if self._closing:
            await asyncio.wait(list(self._closing))


def _message(read: object) -> cache_pb2.AttachRequest | None:
    """What came on an Attach stream; None: its client ended it. Raises InvalidRequest."""
    return checks.message(cache_pb2.AttachRequest, read) if isinstance(read, bytes) else None


async def _executor(
    executors: Executors, session: Session, handover: Handover, greeting: Greeting
) -> GpuExecutor:
    """What moves the session's pages. Raises InvalidRequest for memory that can't be had."""
    layout = session.layout
    if not greeting.device:
        return executors.of_memory(layout, handover.memory, handover.progress, handover.event_fd)
    share = DeviceShare(
        greeting.device,
        greeting.memory_bytes,
        handover.memory_fd,
        handover.progress_fd,
        handover.event_fd,
    )
    try:
        store = await executors.of_device(layout, share, session.lose_worker)
    except (RefusedByWorker, WorkerLost, NoWorker) as error:
        raise errors.InvalidRequest(
            "pool memory", "a descriptor", f"one that {greeting.device} takes: {error}"
        ) from error
    handover.worker_fd = os.dup(store.worker.pidfd)
    return store


async def _said_so() -> bool:
    """A detach promises that the pool's pages stay as they are until the stream ends."""
    return True
