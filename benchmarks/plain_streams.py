"""What Read and Write are measured against: plain gRPC streams of the same messages, to and from
memory, with no cache, no hash and no lease. Run by benchmarks/streams.py as a process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.processes import READY
from kvc2.payloads import MESSAGE_BYTES, blocks_per_message
from kvc2.v1 import cache_pb2

SOCKET = "plain.sock"


class PlainStreams(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Blocks lie one after the other in `memory`; each message is copied out of it, or into it."""

    def __init__(self, blocks: int, payload_bytes: int) -> None:
        self._blocks, self._payload_bytes = blocks, payload_bytes
        self._memory = memoryview(bytearray(blocks * payload_bytes))

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == "/plain/Read":
            return grpc.unary_stream_rpc_method_handler(
                self._read,
                request_deserializer=cache_pb2.ReadRequest.FromString,
                response_serializer=cache_pb2.ReadResponse.SerializeToString,
            )
        return grpc.stream_unary_rpc_method_handler(
            self._write,
            request_deserializer=cache_pb2.WriteRequest.FromString,
            response_serializer=cache_pb2.WriteResponse.SerializeToString,
        )

    async def _read(
        self, request: cache_pb2.ReadRequest, context: Any
    ) -> AsyncIterator[cache_pb2.ReadResponse]:
        size, several = self._payload_bytes, blocks_per_message(self._payload_bytes)
        for block in range(0, self._blocks, several):
            start, stop = block * size, min(block + several, self._blocks) * size
            for at in range(start, stop, MESSAGE_BYTES):
                end = min(at + MESSAGE_BYTES, stop)
                yield cache_pb2.ReadResponse(
                    block=block,
                    offset=at - start,
                    payload=bytes(self._memory[at:end]),
                    checksum=bytes(16 * several) if end == stop else b"",
                )

    async def _write(
        self, requests: AsyncIterator[cache_pb2.WriteRequest], context: Any
    ) -> cache_pb2.WriteResponse:
        async for each in requests:
            start = each.block * self._payload_bytes + each.offset
            self._memory[start : start + len(each.payload)] = each.payload
        return cache_pb2.WriteResponse(results=bytes(self._blocks))


async def serve(folder: Path, blocks: int, payload_bytes: int) -> None:
    server = grpc.aio.server(handlers=[PlainStreams(blocks, payload_bytes)])
    server.add_insecure_port(f"unix:{folder / SOCKET}")
    await server.start()
    print(READY, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
