"""The server of the engine's HTTP: uvicorn's, with limits to its connections and their waits.

It accepts connections itself: asyncio's own loop, when descriptors run out, logs once for each
connection that it may accept at a time and then listens as many times over. Beyond the limit the
connection that has idled longest makes room; where none idles, a few more are let in, which get
/health and /metrics, so that a supervisor is answered, and 503 for anything else.

Not responsible for one connection's time (connection), nor for answers (app).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.http.connection import ClientLimits, Connection, Phase
from engine.http.errors import ApiError
from kvc2.errors import InvalidConfig

log = logging.getLogger(__name__)

SPARE_CONNECTIONS = 16  # beyond the limit, for /health and /metrics
SPARE_PATHS = frozenset({"/health", "/metrics"})
SPARE_TIMEOUT_S = 2.0
OWN_DESCRIPTORS = 128  # files, maps, the daemon's: what a process needs beside its connections
TICK_S = 0.5  # how late an overdue connection may be noticed
RETRY_S = 0.2  # after descriptors ran out
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server(uvicorn.Server):
    """Serves `app` on what listens already, which it closes, until `should_exit` or a signal."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: ClientLimits,
        *,
        stop_s: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                without_smuggling(without_hang_ups(app)),
                http="h11",
                ws="none",
                log_config=None,  # its lines go where all of this process go
                log_level="warning",
                timeout_keep_alive=limits.idle_timeout_s,  # type: ignore[arg-type]  # also floats
                timeout_graceful_shutdown=stop_s,
            )
        )
        self._listener = listener
        self._limits = limits
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # it listens to none of its own
        self._listener.setblocking(False)
        self._tasks = [asyncio.create_task(each) for each in (self._accept(), self._watch())]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._listener.close()
        await super().shutdown()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    log.warning("connections wait to be accepted: %s", error.strerror)
                    self._end_idle()
                    await asyncio.sleep(RETRY_S)
                continue  # or it hung up before it was accepted
            await self._admit(accepted)

    async def _admit(self, accepted: socket.socket) -> None:
        most, number = self._limits.max_connections, len(self.server_state.connections)
        full = number >= most
        if full:
            log.warning("all %d connections are in use", most)
        if number >= most + SPARE_CONNECTIONS:
            accepted.close()
            return
        spare = full and not self._end_idle()
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: self._connection(spare), accepted)
        except OSError:  # it hung up already
            accepted.close()

    def _connection(self, spare: bool) -> Connection:
        limits = self._limits
        if spare:
            short = min(SPARE_TIMEOUT_S, limits.header_timeout_s)
            limits = replace(limits, header_timeout_s=short, body_timeout_s=short)
        connection = Connection(
            self.config, self.server_state, self.lifespan.state, limits=limits, clock=self._clock
        )
        if spare:
            connection.app = only_spare_paths(connection.app)
        return connection

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _end_idle(self) -> bool:
        """Close the connection that has idled longest; whether there was one."""
        idle = [each for each in self._connections() if each.phase is Phase.idle]
        if not idle:
            return False
        min(idle, key=lambda each: each.since).shutdown()
        return True

    async def _watch(self) -> None:
        """End what is overdue, as long as the server runs."""
        limits = self._limits
        tick = min(TICK_S, limits.header_timeout_s, limits.body_timeout_s, limits.write_timeout_s)
        while True:
            await asyncio.sleep(tick)
            for each in self._connections():
                each.end_if_overdue()


def without_hang_ups(app: ASGIApp) -> ASGIApp:
    """`app`, for which a client that hangs up in the middle of its body is no error."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except ClientDisconnect:
            log.debug("a client hung up before its body was whole")

    return answer


def only_spare_paths(app: ASGIApp) -> ASGIApp:
    """`app` for SPARE_PATHS, 503 for all others; the connection ends with the answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in SPARE_PATHS:
            await app(scope, receive, _closing(send))
        else:
            text = "all connections are in use; try again later"
            error = ApiError(503, text, code="too_many_connections")
            await error.response()(scope, receive, _closing(send))

    return answer


def without_smuggling(app: ASGIApp) -> ASGIApp:
    """`app`; the connection ends with the answer to a request that says its body's end in two ways.
    Another server on the way may have read the other one (RFC 9112, 6.1)."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        both = {b"content-length", b"transfer-encoding"} <= names
        await app(scope, receive, _closing(send) if both else send)

    return answer


def _closing(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return closing


def fit_descriptors(max_connections: int) -> int:
    """How many connections this process may have descriptors for, at most `max_connections`; its
    soft limit is raised for them. Raises InvalidConfig if there is none for any."""
    beside = OWN_DESCRIPTORS + SPARE_CONNECTIONS
    needed = max_connections + beside
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(needed, soft)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return max_connections
    if soft <= beside:
        mend = f"this process may open {soft} files (ulimit -n), and needs {beside} beside them"
        raise InvalidConfig("max_connections", max_connections, mend)
    log.warning(
        "max_connections = %d: this process may open %d files (ulimit -n), which leaves %d",
        max_connections,
        soft,
        soft - beside,
    )
    return soft - beside
