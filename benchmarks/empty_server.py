"""The floor that an Acquire is measured against: a gRPC server whose handler does nothing, and a
raw unix socket that answers each message with one byte. Run by benchmarks/rpc.py as a process.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.processes import READY
from kvc2.v1 import cache_pb2

GRPC_SOCKET, RAW_SOCKET = "empty.sock", "raw.sock"
RAW_BYTES_MAX = 1 << 20


class EmptyAcquire(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Parses the request, as any handler must, and answers an empty message."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method != "/kvc2.v1.Cache/Acquire":
            return None

        async def acquire(
            request: cache_pb2.AcquireRequest, context: Any
        ) -> cache_pb2.AcquireResponse:
            return cache_pb2.AcquireResponse()

        return grpc.unary_unary_rpc_method_handler(
            acquire,
            request_deserializer=cache_pb2.AcquireRequest.FromString,
            response_serializer=cache_pb2.AcquireResponse.SerializeToString,
        )


def answer_bytes(listener: socket.socket) -> None:
    """Serves one connection: each message is 4 bytes of length, little-endian, then as many."""
    connection, _ = listener.accept()
    buffer = bytearray(RAW_BYTES_MAX)
    with connection:
        while head := connection.recv(4, socket.MSG_WAITALL):
            length = int.from_bytes(head, "little")
            connection.recv_into(buffer, length, socket.MSG_WAITALL)
            connection.sendall(b"\0")


async def serve(folder: Path) -> None:
    options = [("grpc.max_receive_message_length", 64 << 20)]
    server = grpc.aio.server(options=options, handlers=[EmptyAcquire()])
    server.add_insecure_port(f"unix:{folder / GRPC_SOCKET}")
    await server.start()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / RAW_SOCKET))
    listener.listen()
    threading.Thread(target=answer_bytes, args=(listener,), daemon=True).start()
    print(READY, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
