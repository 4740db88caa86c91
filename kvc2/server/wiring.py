"""From gRPC to the handlers and back: messages, statuses, timings. No rpc's meaning is here.

Requests are parsed here and not by gRPC, which would answer bytes that are no message with UNKNOWN
and log each. Errors are answered by `refuse` and not by `abort`: gRPC keeps what that raises, with
the session and all else that it holds, until Python's cyclic collector runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grpc

from kvc2 import errors, events
from kvc2.config import LimitsConfig
from kvc2.metrics import Metrics
from kvc2.server import checks
from kvc2.server.attach import Attachments
from kvc2.server.callers import Callers, Gate
from kvc2.server.session_calls import SessionCalls
from kvc2.server.shared_calls import SharedCalls
from kvc2.server.streams import Streams
from kvc2.v1 import cache_pb2

SERVICES = ("kvc2.v1.Sessions", "kvc2.v1.Cache")
RPCS = tuple(cache_pb2.DESCRIPTOR.services_by_name["Cache"].methods_by_name)
STREAMS = ("Read", "Write")  # of the Cache service; its other rpcs are a message each way
UNARY = tuple(name for name in RPCS if name not in STREAMS)
Handler = Callable[[Any], Awaitable[Any]]
Context = grpc.aio.ServicerContext[Any, Any]
# sessions' streams, their calls under way, and admin calls: beyond it gRPC says RESOURCE_EXHAUSTED
CALLS_PER_SESSION = 64
CONNECTIONS_PER_SESSION = 4  # an engine needs one, and commands some
HANDSHAKE_MS = 10_000  # who connects and says nothing is let go
IDLE_MS = 300_000  # and who is connected and calls nothing: an engine's Attach is a call


class Calls(NamedTuple):
    """The handlers of the Cache service, and who may call them."""

    callers: Callers
    session: SessionCalls
    shared: SharedCalls
    streams: Streams

    def of(self, name: str) -> Handler:
        """The one of this rpc, which is no stream."""
        found: Handler | None = getattr(self.session, name, None)
        return found or getattr(self.shared, name)


def open_server(limits: LimitsConfig) -> grpc.aio.Server:
    """A server with every limit set; nothing is bound or registered yet."""
    size = limits.message_bytes
    options = [
        ("grpc.so_reuseport", 0),  # or a second daemon would share the port
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", CALLS_PER_SESSION + 1),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        (
            "grpc.max_allowed_incoming_connections",
            (limits.max_sessions + 1) * CONNECTIONS_PER_SESSION,
        ),
    ]
    return grpc.aio.server(
        options=options, maximum_concurrent_rpcs=(limits.max_sessions + 1) * CALLS_PER_SESSION
    )


def register(
    server: grpc.aio.Server, calls: Calls, attachments: Attachments, metrics: Metrics
) -> None:
    """Add the two services of the wire."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            answered(name, calls.of(name), metrics, calls.callers.gate(name)),
            response_serializer=getattr(cache_pb2, f"{name}Response").SerializeToString,
        )
        for name in UNARY
    }
    read, write = _streamed(calls, metrics)
    handlers["Read"] = grpc.unary_stream_rpc_method_handler(read)  # it writes bytes itself
    handlers["Write"] = grpc.stream_unary_rpc_method_handler(
        write, response_serializer=cache_pb2.WriteResponse.SerializeToString
    )
    attach = grpc.stream_stream_rpc_method_handler(
        _attach(attachments, metrics, calls.callers.gate("Attach")),
        response_serializer=cache_pb2.AttachResponse.SerializeToString,
    )
    sessions, cache = SERVICES
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(sessions, {"Attach": attach}),
            grpc.method_handlers_generic_handler(cache, handlers),
        )
    )


def answered(
    name: str, handler: Handler, metrics: Metrics, gate: Gate | None
) -> Callable[[Any, Any], Awaitable[Any]]:
    """The handler as gRPC calls it: its caller admitted, its request parsed, timed, its exceptions
    turned into statuses. What is no bytes is handed on as it is."""
    seconds = metrics.rpc_seconds.labels(name)
    ok = metrics.rpcs.labels(name, "OK")
    clock = time.perf_counter
    kind = getattr(cache_pb2, f"{name}Request")

    async def call(request: Any, context: Context) -> Any:
        started = clock()
        try:
            if gate is not None:
                gate(context)
            if isinstance(request, bytes):
                request = checks.message(kind, request)
            response = await handler(request)
        except asyncio.CancelledError:
            metrics.rpcs.labels(name, "CANCELLED").inc()
            raise
        except Exception as error:
            refuse(name, error, context, metrics)
            return None
        seconds.observe(clock() - started)
        ok.inc()
        return response

    return call


def _streamed(
    calls: Calls, metrics: Metrics
) -> tuple[Callable[[Any, Context], Awaitable[None]], Callable[[Any, Context], Awaitable[Any]]]:
    """Read and Write as gRPC calls them."""
    streams = calls.streams
    reading, writing = (calls.callers.gate(name) for name in STREAMS)

    async def read(request: bytes, context: Context) -> None:
        handler = partial(streams.Read, context)
        await answered("Read", handler, metrics, reading)(request, context)

    async def write(_: Any, context: Context) -> Any:
        return await answered("Write", streams.Write, metrics, writing)(context, context)

    return read, write


def _attach(
    attachments: Attachments, metrics: Metrics, gate: Gate | None
) -> Callable[[Any, Any], Awaitable[None]]:
    async def call(requests: Any, context: Context) -> None:
        try:
            if gate is not None:
                gate(context)
            await attachments.attach(context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refuse("Attach", error, context, metrics)
        else:
            metrics.rpcs.labels("Attach", "OK").inc()

    return call


def refuse(name: str, error: Exception, context: Context, metrics: Metrics) -> None:
    """Let the call end with the error's status when its handler has returned."""
    status = errors.status_of(error)
    metrics.rpcs.labels(name, status).inc()
    context.set_code(getattr(grpc.StatusCode, status))
    if status == "INTERNAL":
        metrics.fault("internal_error")
        events.event("internal_error", level=logging.ERROR, rpc=name, reason=repr(error))
        logging.getLogger("kvc2").debug("internal_error", exc_info=error)
        context.set_details("the daemon failed; see its log")
        return
    if status == "INVALID_ARGUMENT":
        metrics.fault("refused_request")
        events.warning("refused_request", rpc=name, reason=str(error))
    context.set_details(str(error))
    told = [(errors.ERROR_KIND, type(error).__name__)]
    if isinstance(error, errors.RateLimited):
        told.append((errors.RETRY_MS, str(math.ceil(error.retry_s * 1000))))
    context.set_trailing_metadata(tuple(told))


class LibraryServices:
    """What the generated `add_..._to_server` of gRPC's own services (health, reflection) take for a
    server: their requests are parsed here too."""

    def __init__(self, server: grpc.aio.Server, metrics: Metrics) -> None:
        self._server = server
        self._metrics = metrics

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers follow below, by their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        parsing = {name: self._parsing(name, each) for name, each in handlers.items()}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, parsing),)
        )

    def _parsing(self, name: str, handler: Any) -> Any:
        parse, write = handler.request_deserializer, handler.response_serializer
        kind = parse.__self__

        async def unary(request: bytes, context: Context) -> Any:
            try:
                message = checks.message(kind, request)
            except errors.InvalidRequest as error:
                return refuse(name, error, context, self._metrics)
            return await (handler.unary_unary or handler.unary_stream)(message, context)

        async def messages(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for request in requests:
                yield checks.message(kind, request)

        async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            try:
                async for response in handler.stream_stream(messages(requests), context):
                    yield response
            except errors.InvalidRequest as error:
                refuse(name, error, context, self._metrics)

        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(stream, response_serializer=write)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(unary, response_serializer=write)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=write)
