"""From gRPC to the handlers and back: serializers, statuses, timings. No rpc's meaning is here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvc2 import errors, events
from kvc2.config import LimitsConfig
from kvc2.metrics import Metrics
from kvc2.server.attach import Attachments
from kvc2.server.calls import CacheCalls
from kvc2.v1 import cache_pb2

SERVICES = ("kvc2.v1.Sessions", "kvc2.v1.Cache")
UNARY = (
    "OpenNamespace",
    "Match",
    "Explain",
    "Acquire",
    "Grant",
    "Commit",
    "Release",
    "Flush",
    "Evict",
    "Invalidate",
    "Pin",
    "Unpin",
    "SetQuota",
    "Prefetch",
    "Scrub",
    "Stats",
    "Drain",
)
Handler = Callable[[Any], Awaitable[Any]]
# sessions' streams, their calls under way, and admin calls: beyond it gRPC says RESOURCE_EXHAUSTED
CALLS_PER_SESSION = 64


def open_server(limits: LimitsConfig) -> grpc.aio.Server:
    """A server with every limit set; nothing is bound or registered yet."""
    size = limits.message_bytes
    options = [
        ("grpc.so_reuseport", 0),  # or a second daemon would share the port
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", CALLS_PER_SESSION + 1),
    ]
    return grpc.aio.server(
        options=options, maximum_concurrent_rpcs=(limits.max_sessions + 1) * CALLS_PER_SESSION
    )


def register(
    server: grpc.aio.Server, calls: CacheCalls, attachments: Attachments, metrics: Metrics
) -> None:
    """Add the two services of the wire."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            answered(name, getattr(calls, name), metrics),
            request_deserializer=getattr(cache_pb2, f"{name}Request").FromString,
            response_serializer=getattr(cache_pb2, f"{name}Response").SerializeToString,
        )
        for name in UNARY
    }
    handlers["Read"] = grpc.unary_stream_rpc_method_handler(
        answered("Read", calls.Read, metrics),
        request_deserializer=cache_pb2.ReadRequest.FromString,
        response_serializer=cache_pb2.ReadResponse.SerializeToString,
    )
    handlers["Write"] = grpc.stream_unary_rpc_method_handler(
        answered("Write", calls.Write, metrics),
        request_deserializer=cache_pb2.WriteRequest.FromString,
        response_serializer=cache_pb2.WriteResponse.SerializeToString,
    )
    attach = grpc.stream_stream_rpc_method_handler(
        _attach(attachments, metrics),
        request_deserializer=cache_pb2.AttachRequest.FromString,
        response_serializer=cache_pb2.AttachResponse.SerializeToString,
    )
    sessions, cache = SERVICES
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(sessions, {"Attach": attach}),
            grpc.method_handlers_generic_handler(cache, handlers),
        )
    )


def answered(name: str, handler: Handler, metrics: Metrics) -> Callable[[Any, Any], Awaitable[Any]]:
    """The handler as gRPC calls it: timed, its exceptions turned into statuses."""
    seconds = metrics.rpc_seconds.labels(name)
    ok = metrics.rpcs.labels(name, "OK")
    clock = time.perf_counter

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started = clock()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            metrics.rpcs.labels(name, "CANCELLED").inc()
            raise
        except Exception as error:
            await refuse(name, error, context, metrics)
        seconds.observe(clock() - started)
        ok.inc()
        return response

    return call


def _attach(attachments: Attachments, metrics: Metrics) -> Callable[[Any, Any], Awaitable[None]]:
    async def call(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            await attachments.attach(context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await refuse("Attach", error, context, metrics)
        metrics.rpcs.labels("Attach", "OK").inc()

    return call


async def refuse(
    name: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any], metrics: Metrics
) -> None:
    """End the call with the error's status. Always raises."""
    status = errors.status_of(error)
    metrics.rpcs.labels(name, status).inc()
    if status == "INTERNAL":
        metrics.fault("internal_error")
        events.event("internal_error", level=logging.ERROR, rpc=name, reason=repr(error))
        logging.getLogger("kvc2").debug("internal_error", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "the daemon failed; see its log")
    if status == "INVALID_ARGUMENT":
        metrics.fault("refused_request")
    kind = ((errors.ERROR_KIND, type(error).__name__),)
    await context.abort(getattr(grpc.StatusCode, status), str(error), kind)
