"""A gRPC channel to one daemon and the stubs of the wire; statuses become exceptions here."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from kvc2 import errors
from kvc2.host.address import Address
from kvc2.host.token_file import TokenFile
from kvc2.v1 import cache_pb2

MESSAGE_BYTES_MAX = 256 << 20  # the daemon's own limit is lower, and it says so by name
HEALTH_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}
PROBE_S = 0.5
CALL_S = 5.0  # of calls that wait for nothing


def absence(address: Address) -> errors.Unreachable | None:
    """Why nothing can be reached there; None: something listens. gRPC itself would keep trying and
    not say."""
    try:
        address.connect(PROBE_S).close()
    except OSError as error:
        return absence_of(address, error)
    return None


def absence_of(address: Address, error: OSError) -> errors.Unreachable:
    """Why connecting failed so."""
    at = address.path
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return errors.Unreachable(f"no such socket: {at}", "no_socket")
        case socket.gaierror():
            return errors.Unreachable(f"no such host: {address.host}", "no_socket")
        case PermissionError():
            return errors.Unreachable(f"{at}: no permission{_owner(at)}", "no_permission")
        case ConnectionRefusedError():
            if at is not None and not at.is_socket():
                return errors.Unreachable(f"{at} is no socket", "no_socket")
            return errors.Unreachable("nobody listens there (any more)", "nobody_listens")
        case TimeoutError() | BlockingIOError():
            return errors.Unreachable("a connection is not accepted in time", "no_answer")
    if error.errno == errno.EPROTOTYPE:
        return errors.Unreachable(f"{at} is a socket of another type", "not_kvc2")
    return errors.Unreachable(str(error))


def _owner(path: Path | None) -> str:
    """As far as it can be seen."""
    try:
        owner = path.lstat().st_uid if path is not None else os.geteuid()
    except OSError:
        return ": it is below another user's folder"
    return "" if owner == os.geteuid() else f": it is another user's, of id {owner}"


def probe(address: Address) -> bool:
    """Whether something listens there."""
    return absence(address) is None


class Closed(grpc.RpcError):
    """The channel was closed between two calls: grpc itself says so by a ValueError."""


class Channel:
    """One connection. Threads may share it. `close` cancels what is under way. The files of TLS are
    read when it is made, and the bearer token's too, which is read again when it changes; raises
    InvalidRequest for those that can't be used."""

    def __init__(self, address: Address) -> None:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            # a channel's own connection: never one whose back-off an earlier daemon caused
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        self._tls = address.tls is not None
        if address.tls is None:
            self._channel = grpc.insecure_channel(address.grpc_target, options)
        else:
            pems = address.tls.read()
            credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.certificate)
            self._channel = grpc.secure_channel(address.grpc_target, credentials, options)
        token_file = address.token_file
        self._token = None if token_file is None else TokenFile(token_file)
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
        return self._begun(stub, request, timeout_s)

    def read(self, request: cache_pb2.ReadRequest, timeout_s: float) -> Any:
        """The Read stream: iterate for responses, `cancel()` to stop it."""
        stub = self._channel.unary_stream(
            "/kvc2.v1.Cache/Read",
            request_serializer=cache_pb2.ReadRequest.SerializeToString,
            response_deserializer=cache_pb2.ReadResponse.FromString,
        )
        return self._begun(stub, request, timeout_s)

    def write(self, messages: Iterator[bytes], timeout_s: float) -> cache_pb2.WriteResponse:
        """The answer to the Write stream of these WriteRequests. Raises grpc.RpcError."""
        stub = self._channel.stream_unary(
            "/kvc2.v1.Cache/Write",
            request_serializer=None,  # bytes already
            response_deserializer=cache_pb2.WriteResponse.FromString,
        )
        return self._begun(stub, messages, timeout_s)  # type: ignore[no-any-return]

    def _begun(self, stub: Any, request: Any, timeout_s: float) -> Any:
        try:
            return stub(request, timeout=timeout_s, metadata=self._headers())
        except ValueError as error:
            raise Closed(str(error)) from error

    def _headers(self) -> tuple[tuple[str, str], ...]:
        return () if self._token is None else self._token.headers()

    def serves(self, timeout_s: float) -> bool:
        """Whether the daemon's health service says SERVING in time."""
        return self.absence(timeout_s) is None

    def absence(self, timeout_s: float) -> errors.Unreachable | None:
        """Why it doesn't; None: it does."""
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check", None, None)  # raw
        try:
            if check(b"", timeout=timeout_s) == HEALTH_SERVING:
                return None
        except grpc.RpcError as error:
            if code(error) == "DEADLINE_EXCEEDED":
                return errors.Unreachable("the daemon doesn't answer", "no_answer")
            if code(error) == "UNAVAILABLE" and self._tls:
                return errors.Unreachable(f"no connection with TLS: {_handshake(error)}", "refused")
            if code(error) == "UNAVAILABLE" and "HTTP/2" not in str(error):
                return errors.Unreachable("the connection broke")  # it has just ended
            told = f"what listens there is no kvc2 daemon ({code(error)})"
            return errors.Unreachable(told, "not_kvc2")
        return errors.Unreachable("the daemon starts or drains", "not_serving")

    def attach(self, requests: Iterator[cache_pb2.AttachRequest]) -> Any:
        """The Attach stream: iterate for responses, `cancel()` to break it."""
        stub = self._channel.stream_stream(
            "/kvc2.v1.Sessions/Attach",
            request_serializer=cache_pb2.AttachRequest.SerializeToString,
            response_deserializer=cache_pb2.AttachResponse.FromString,
        )
        return stub(requests, metadata=self._headers())

    def close(self) -> None:
        self._channel.close()


def _handshake(error: grpc.RpcError) -> str:
    """Why one failed, as far as this end was told."""
    told = str(error.details()) if isinstance(error, grpc.Call) else str(error)
    if "Socket closed" in told or "reset" in told:
        return "the daemon ended it, as it does where it doesn't believe a certificate"
    return told.partition("Tls handshake failed ")[2] or told


def translated(error: grpc.RpcError) -> errors.Kvc2Error:
    """What the daemon answered, as the exception that it raised; Unreachable when none did."""
    if not isinstance(error, grpc.Call):
        return errors.Unreachable(str(error))
    kinds = dict(error.trailing_metadata() or ())
    answered = errors.of_kind(str(kinds.get(errors.ERROR_KIND)), str(error.details()))
    if isinstance(answered, errors.RateLimited):
        answered.retry_s = int(kinds.get(errors.RETRY_MS) or 0) / 1000
    return answered or errors.Unreachable(f"{code(error)}: {error.details()}")


def code(error: grpc.RpcError) -> str:
    """The name of its status."""
    return str(error.code().name) if isinstance(error, grpc.Call) else "UNKNOWN"
