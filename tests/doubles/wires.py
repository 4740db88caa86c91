"""A session spoken by hand: raw gRPC and a raw side socket, to send what the client never would."""

from __future__ import annotations

import array
import fcntl
import os
import queue
import socket
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from kvc2.host.tls import TlsFiles
from kvc2.v1 import cache_pb2
from tests.doubles.engines import NUM_PAGES, POOL_BYTES, identity, layout

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ANSWER_S = 10.0
POOL_FIELDS = set(cache_pb2.Pool.DESCRIPTOR.fields_by_name)


def u32(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def pages(array: bytes) -> list[cache_pb2.ComponentPages]:
    """A u32 array of pages of component 0."""
    return [cache_pb2.ComponentPages(pages=array)]


def grants(count: int) -> list[cache_pb2.PageCount]:
    return [cache_pb2.PageCount(pages=count)]


def granted(answer: Any) -> bytes:
    """The pages that an answer grants, as the wire has them."""
    return b"".join(each.pages for each in answer.granted)


def memfd(size: int = POOL_BYTES, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def hello(**changes: Any) -> cache_pb2.AttachRequest:
    values: dict[str, Any] = {
        "engine_name": "raw",
        "wire_version": 2,
    }
    pool: dict[str, Any] = {
        "parts": 1,
        "layout": layout().to_proto(),
        "num_pages": NUM_PAGES,
        "memory_bytes": POOL_BYTES,
    }
    of_pool = {name: changes.pop(name) for name in list(changes) if name in POOL_FIELDS}
    values["pools"] = [cache_pb2.Pool(**{**pool, **of_pool})]
    return cache_pb2.AttachRequest(hello=cache_pb2.Hello(**{**values, **changes}))


def status_of(error: grpc.RpcError) -> tuple[str, str]:
    assert isinstance(error, grpc.Call)
    return error.code().name, str(error.details())


class Wire:
    """One connection. `attach` and `join` open a session; `call` sends any request of the wire,
    with `headers`, which may be changed."""

    def __init__(
        self, address: str, tls: TlsFiles | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.headers = tuple(headers)
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            pems = tls.read()
            credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.certificate)
            self._channel = grpc.secure_channel(address, credentials, options)
        self._outbox: queue.SimpleQueue[cache_pb2.AttachRequest | None] = queue.SimpleQueue()
        self.head = cache_pb2.SessionRef()
        self.namespace_id = 0

    def call(self, rpc: str, request: Any) -> Any:
        stub = self._channel.unary_unary(
            f"/kvc2.v1.Cache/{rpc}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(cache_pb2, f"{rpc}Response").FromString,
        )
        return stub(request, timeout=ANSWER_S, metadata=self.headers)

    def refusal(self, rpc: str, request: Any) -> tuple[str, str]:
        """The status and the words with which a call is refused."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(rpc, request)
        return status_of(caught.value)

    def send(self, message: cache_pb2.AttachRequest | None) -> None:
        self._outbox.put(message)

    def attach(self, first: cache_pb2.AttachRequest | None = None) -> cache_pb2.Attached:
        stub = self._channel.stream_stream(
            "/kvc2.v1.Sessions/Attach",
            request_serializer=cache_pb2.AttachRequest.SerializeToString,
            response_deserializer=cache_pb2.AttachResponse.FromString,
        )
        self.send(first or hello())
        outbox = iter(self._outbox.get, None)
        self.stream = stub(outbox, timeout=ANSWER_S, metadata=self.headers)
        attached = next(self.stream).attached
        self.head = cache_pb2.SessionRef(
            secret=attached.secret, session_epoch=attached.session_epoch
        )
        return attached

    def side(self, attached: cache_pb2.Attached, nonce: bytes, fds: list[int]) -> bytes:
        """The side socket's answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
            side.settimeout(ANSWER_S)
            side.connect(attached.side_socket)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            side.sendmsg([nonce], rights)
            answer, received, _, _ = socket.recv_fds(side, 600, 4)
            for fd in [*fds, *received]:
                os.close(fd)
            return answer

    def open(self, **changes: Any) -> Wire:
        """A ready session with a namespace."""
        attached = self.attach()
        assert self.side(attached, attached.nonce, [memfd()]) == b"ok"
        assert next(self.stream).WhichOneof("message") == "ready"
        self.open_namespace(**changes)
        return self

    def open_namespace(self, **changes: Any) -> int:
        """Its id, which is then `namespace_id`."""
        values = {"session": self.head, "identity": identity().encode(), **changes}
        request = cache_pb2.OpenNamespaceRequest(**values)
        self.namespace_id = self.call("OpenNamespace", request).namespace_id
        return self.namespace_id

    def stream_refusal(self, first: cache_pb2.AttachRequest) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.attach(first)
        return status_of(caught.value)

    def close(self) -> None:
        self.send(None)
        self._channel.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
