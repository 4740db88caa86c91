"""Payloads of blocks over the wire, for a client without shared memory: read and write.

Not here: leases, which `Client` opens and releases, and shared memory (memory.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from kvc2 import _core, answers, errors
from kvc2.client.asking import extras_of
from kvc2.client.client import Client
from kvc2.client.connection import NamespaceHandle
from kvc2.client.keeper import raised
from kvc2.payloads import blocks_per_message, messages_of, parts_of
from kvc2.v1 import cache_pb2
from kvc2.wire import packed

STREAM_S = 60.0  # how long a stream may take


class Streams:
    """Of a client's session. Threads may share it. The client's pool may have 0 bytes, and the
    arena need not be asked for. Raises as the client's own calls."""

    def __init__(self, client: Client) -> None:
        self._keeper = client._keeper  # its calls go over the same session

    def read(
        self,
        request_id: bytes,
        into: NDArray[np.uint8],
        *,
        first_block: int = 0,
        blocks: int = 0,
        timeout_s: float = STREAM_S,
    ) -> answers.U32:
        """Payloads of a lease in the arena into rows of `into` [n, payload_bytes], from block
        first_block of its prompt (with keys: from that key) on; blocks 0: all that it holds.
        Answers [k] the numbers of the blocks that lie in the first k rows. A block that came
        damaged, or a key that isn't there, is left out. Raises NotFound for a lease that is
        released meanwhile: what came until then doesn't count."""
        connection = self._keeper.current()
        request = cache_pb2.ReadRequest(
            session=connection.head, request_id=request_id, first_block=first_block, blocks=blocks
        )
        try:
            stream = connection.channel.read(request, timeout_s)
            try:
                return np.array(_received(stream, into), np.uint32)
            finally:
                stream.cancel()
        except grpc.RpcError as broken:
            error = raised(connection, "Read", broken)
        raise error

    def write(
        self,
        namespace: NamespaceHandle,
        commit: answers.LeaseCommit,
        payloads: Sequence[Buffer],
        *,
        timeout_s: float = STREAM_S,
    ) -> answers.U8:
        """Store a payload for each block of a commit, whose `pages` don't count. Of a lease in the
        arena, or, without a request_id, of a prompt of the namespace from its first block on.
        Answers [n] as a copied commit: 0 adopted, 1 duplicate, 2 refused, 3 no room. When it
        raises, leading blocks may be stored all the same."""
        message = cache_pb2.LeaseCommit(
            request_id=commit.request_id,
            first_block=commit.first_block,
            tokens=packed(commit.tokens),
            extras=extras_of(commit.extras),
        )
        return self._write(namespace, message, payloads, timeout_s)

    def write_keys(
        self,
        namespace: NamespaceHandle,
        keys: Sequence[bytes],
        payloads: Sequence[Buffer],
        *,
        timeout_s: float = STREAM_S,
    ) -> answers.U8:
        """The same, each payload as the block of an opaque key."""
        return self._write(namespace, cache_pb2.LeaseCommit(keys=keys), payloads, timeout_s)

    def _write(
        self,
        namespace: NamespaceHandle,
        commit: cache_pb2.LeaseCommit,
        payloads: Sequence[Buffer],
        timeout_s: float,
    ) -> answers.U8:
        connection = self._keeper.current()

        def ask(number: int) -> answers.U8:
            commit.namespace_id = 0 if commit.request_id else number
            first = cache_pb2.WriteRequest(session=connection.head, commit=commit)
            try:
                answer = connection.channel.write(_messages(first, payloads), timeout_s)
            except grpc.RpcError as broken:
                error = raised(connection, "Write", broken)
            else:
                return np.frombuffer(answer.results, np.uint8)
            raise error

        return self._keeper.in_namespace(connection, namespace, ask)


def _received(stream: Iterable[Any], into: NDArray[np.uint8]) -> list[int]:
    """Blocks that came whole, one a row, in order."""
    rows, payload_bytes = len(into), into.shape[1]
    memory = into.data.cast("B") if into.size else memoryview(b"")
    blocks: list[int] = []
    at = 0
    for part in (part for message in stream for part in parts_of(message, payload_bytes)):
        if len(blocks) == rows:
            raise errors.InvalidRequest("into", f"{rows} rows", "one for each block that comes")
        end = at + len(part.payload)
        if part.offset != at or end > payload_bytes or (part.checksum and end < payload_bytes):
            told = f"rows of {payload_bytes} bytes"
            raise errors.InvalidRequest("into", told, "rows of the layout's payload_bytes")
        start = len(blocks) * payload_bytes
        memory[start + at : start + end] = part.payload
        at = end
        if part.checksum:
            at = 0
            if _core.xxh3_128(memory[start : start + payload_bytes]) == part.checksum:
                blocks.append(part.block)
    return blocks


def _messages(first: cache_pb2.WriteRequest, payloads: Sequence[Buffer]) -> Iterator[bytes]:
    yield first.SerializeToString()
    block = first.commit.first_block
    for each in _grouped([memoryview(each).cast("B") for each in payloads]):
        checksums = [_core.xxh3_128(payload) for payload in each]
        yield from messages_of(cache_pb2.WriteRequest, block, each, checksums)
        block += len(each)


def _grouped(payloads: list[memoryview]) -> Iterator[list[memoryview]]:
    """Of one size, and so many as go into one message; at least one."""
    for size, alike in itertools.groupby(payloads, len):
        while group := list(itertools.islice(alike, blocks_per_message(size))):
            yield group
