"""A gRPC channel to one daemon and the stubs of the wire; statuses become exceptions here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from kvc2 import errors
from kvc2.address import Address
from kvc2.v1 import cache_pb2

MESSAGE_BYTES_MAX = 256 << 20  # the daemon's own limit is lower, and it says so by name
HEALTH_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}
PROBE_S = 0.5
CALL_S = 5.0  # of calls that wait for nothing


def probe(address: Address) -> bool:
    """Whether something listens there; gRPC itself would keep trying and not say."""
    try:
        address.connect(PROBE_S).close()
    except OSError:
        return False
    return True


class Closed(grpc.RpcError):
    """The channel was closed between two calls: grpc itself says so by a ValueError."""


class Channel:
    """One connection. Threads may share it. `close` cancels what is under way."""

    def __init__(self, address: Address) -> None:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            # a channel's own connection: never one whose back-off an earlier daemon caused
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = grpc.insecure_channel(address.grpc_target, options)
        self._calls: dict[str, Callable[..., Any]] = {}

    def call(self, name: str, request: Any, timeout_s: float = CALL_S) -> Any:
        """The answer of Cache/`name`. Raises grpc.RpcError."""
        stub = self._calls.get(name)
        if stub is None:
            stub = self._calls[name] = self._channel.unary_unary(
                f"/kvc2.v1.Cache/{name}",
                request_serializer=getattr(cache_pb2, f"{name}Request").SerializeToString,
                response_deserializer=getattr(cache_pb2, f"{name}Response").FromString,
            )
        try:
            return stub(request, timeout=timeout_s)
        except ValueError as error:
            raise Closed(str(error)) from error

    def serves(self, timeout_s: float) -> bool:
        """Whether the daemon's health service says SERVING in time."""
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check", None, None)  # raw
        try:
            return bool(check(b"", timeout=timeout_s) == HEALTH_SERVING)
        except grpc.RpcError:
            return False

    def attach(self, requests: Iterator[cache_pb2.AttachRequest]) -> Any:
        """The Attach stream: iterate for responses, `cancel()` to break it."""
        stub = self._channel.stream_stream(
            "/kvc2.v1.Sessions/Attach",
            request_serializer=cache_pb2.AttachRequest.SerializeToString,
            response_deserializer=cache_pb2.AttachResponse.FromString,
        )
        return stub(requests)

    def close(self) -> None:
        self._channel.close()


def translated(error: grpc.RpcError) -> errors.Kvc2Error:
    """What the daemon answered, as the exception that it raised; Unreachable when none did."""
    if not isinstance(error, grpc.Call):
        return errors.Unreachable(str(error))
    kinds = dict(error.trailing_metadata() or ())
    answered = errors.of_kind(str(kinds.get(errors.ERROR_KIND)), str(error.details()))
    return answered or errors.Unreachable(f"{code(error)}: {error.details()}")


def code(error: grpc.RpcError) -> str:
    """The name of its status."""
    return str(error.code().name) if isinstance(error, grpc.Call) else "UNKNOWN"
