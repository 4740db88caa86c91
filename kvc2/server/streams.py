"""Read and Write: payloads of blocks over the wire, for clients without shared memory.

A message has at most 1 MiB of one block; its last one has the block's hash. A stream has one
message of its own in memory: gRPC's flow control says when the next one may go, or comes. What is
copied here is at most a message, on the event loop; longer hashes are made on threads. Not here:
what a block is written into (cache/copied.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from kvc2 import _core, errors
from kvc2.answers import NOWHERE
from kvc2.cache.cache import Cache
from kvc2.cache.copied import WrittenBlocks
from kvc2.cache.sessions import OpenLease, Session
from kvc2.config import LimitsConfig
from kvc2.payloads import MESSAGE_BYTES, Part, blocks_per_message, messages_of, parts_of
from kvc2.server import checks
from kvc2.server.callers import Callers, UnderWay
from kvc2.server.commits import Commits, paid
from kvc2.v1 import cache_pb2

SILENT_S = 10.0  # a client that sends nothing for longer holds neither pages nor pins
HASH_BYTES = 4 << 20  # hashed on the event loop: 0.15 ms; more on a thread

Context = grpc.aio.ServicerContext[Any, Any]


class Streams:
    """Handlers, named as the rpcs. They raise errors.Kvc2Error; wiring.py answers."""

    def __init__(
        self, limits: LimitsConfig, cache: Cache, callers: Callers, commits: Commits
    ) -> None:
        self.under_way = UnderWay("limits.max_streams", limits.max_streams)
        self._cache = cache
        self._callers = callers
        self._commits = commits

    async def Read(self, context: Context, request: cache_pb2.ReadRequest) -> None:
        session = self._callers.session(request.session)
        lease = session.lease(checks.request_id("request_id", request.request_id))
        if not lease.to.in_arena:
            allowed = "a lease in the arena"
            raise errors.InvalidRequest("request_id", request.request_id, allowed)
        with self.under_way.one(session.epoch), Life(session, lease).cancels():
            # now: a status that is sent while a message waits can't bring it along
            await context.send_initial_metadata(())
            await self._send(Sender(context, Life(session, lease)), lease, request)

    async def _send(self, sender: Sender, lease: OpenLease, request: cache_pb2.ReadRequest) -> None:
        blocks, starts = self._asked(lease, request)
        memory = self._cache.arena.memory.data
        size = lease.to.pools.shape.payload_bytes
        self._callers.rates.take(lease.namespace.owner.tenant, blocks.size * size)
        for first, end in grouped(blocks, blocks_per_message(size)):
            payloads = [memory[start : start + size] for start in starts[first:end].tolist()]
            await sender.send(int(blocks[first]), payloads)

    def _asked(
        self, lease: OpenLease, request: cache_pb2.ReadRequest
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Numbers of the blocks that are meant and there, and where each begins in the arena."""
        found = self._cache.leases.there(lease)
        first, end = found.first_block, found.first_block + found.offsets.size
        if not first <= request.first_block < end and (request.first_block or first):
            allowed = f"{first} to {end - 1}, which the lease holds"
            raise errors.InvalidRequest("first_block", request.first_block, allowed)
        most = end - request.first_block
        if request.blocks > most:
            raise errors.InvalidRequest("blocks", request.blocks, f"at most {most}, which it holds")
        numbers = request.first_block + np.arange(request.blocks or most)
        starts = found.offsets[numbers - first]
        return numbers[starts != NOWHERE], starts[starts != NOWHERE]

    async def Write(self, context: Context) -> cache_pb2.WriteResponse:
        async with Receiver(context) as receiver:
            first = await receiver.next()
            if first is None:
                raise errors.InvalidRequest("commit", "nothing", "the stream's first message")
            session = self._callers.session(first.session)
            for name in ("block", "offset", "payload", "checksum"):
                if getattr(first, name):
                    raise errors.InvalidRequest(name, getattr(first, name), "in later messages")
            with self.under_way.one(session.epoch):
                return await self._write(session, first.commit, receiver)

    async def _write(
        self, session: Session, commit: cache_pb2.LeaseCommit, receiver: Receiver
    ) -> cache_pb2.WriteResponse:
        blocks = self._commits.check_written(session, "commit", commit)
        self._callers.rates.take(*paid(session, blocks))
        life = Life(session, blocks.lease)
        with life.cancels():
            to = session.layouts[blocks.namespace.id] if life.lease is None else life.lease.to.pools
            written = self._cache.copied.written(blocks, to)
            try:
                await receive(written, receiver, life)
                receiver.wait_no_more()
                await self._commits.settle(session, written)
            except BaseException:
                self._commits.count(written.results[: written.done])
                raise
            finally:
                written.close()
        self._commits.count(written.results)
        return cache_pb2.WriteResponse(results=written.results.tobytes())


class Life:
    """Until when a stream may go on: its session's end, or its lease's."""

    def __init__(self, session: Session, lease: OpenLease | None) -> None:
        self._session = session
        self.lease = lease

    def check(self) -> None:
        """After each wait. Raises SessionOver and NotFound."""
        if self._session.life.over:
            raise errors.SessionOver(f"session {self._session.epoch} ended during the stream")
        if self.lease is not None and not self.lease.is_open:
            allowed = "an open lease: it was released during the stream"
            raise errors.NotFound("request_id", self.lease.request_id, allowed)

    @contextmanager
    def cancels(self) -> Iterator[None]:
        """What the body waits for ends with it too, and raises as `check` does: a peer that doesn't
        read, or sends nothing, may be waited for."""
        task, ended = asyncio.current_task(), False

        def end(_: object = None) -> None:
            nonlocal ended
            if task is not None and not ended:
                ended = task.cancel()

        over = self._session.life.on_over
        over.add(end)
        if self.lease is not None:
            self.lease.ended.add_done_callback(end)
        try:
            yield
        except asyncio.CancelledError:
            if not ended or task is None or task.uncancel():
                raise
            self.check()
            raise
        finally:
            over.discard(end)
            if self.lease is not None:
                self.lease.ended.remove_done_callback(end)


class Sender:
    """Sends blocks, each in messages."""

    def __init__(self, context: Context, life: Life) -> None:
        self._context = context
        self._life = life

    async def send(self, block: int, payloads: list[memoryview]) -> None:
        """A block, or several that are one message. They stay where they are while their lease is
        open; what was copied counts if it still is."""
        checksums = [await hash_of(each) for each in payloads]
        for message in messages_of(cache_pb2.ReadResponse, block, payloads, checksums):
            self._life.check()
            try:
                await self._context.write(message)
            except grpc.aio.BaseError:  # its client has gone
                raise asyncio.CancelledError from None


class Receiver:
    """Takes the messages of a Write. Raises InvalidRequest for a client that sends nothing for
    SILENT_S, or half as long again."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._patience = asyncio.timeout(1.5 * SILENT_S)

    async def __aenter__(self) -> Receiver:
        await self._patience.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._patience.__aexit__(*error)
        except TimeoutError:
            raise errors.InvalidRequest("message", "nothing", f"within {SILENT_S:g} s") from None

    async def next(self) -> cache_pb2.WriteRequest | None:
        """None: the client has ended the stream, or has gone."""
        now = self._loop.time()
        if (self._patience.when() or 0) < now + SILENT_S:  # seldom: a timer costs as much as a read
            self._patience.reschedule(now + 1.5 * SILENT_S)
        try:
            data = await self._context.read()
        except grpc.aio.BaseError:  # the server has stopped
            raise asyncio.CancelledError from None
        if not isinstance(data, bytes):
            return None
        return checks.message(cache_pb2.WriteRequest, data)

    def wait_no_more(self) -> None:
        """All has come."""
        self._patience.reschedule(None)


class Parts:
    """What the messages of a Write have of its blocks, one after the other."""

    def __init__(self, receiver: Receiver, payload_bytes: int) -> None:
        self._receiver = receiver
        self._payload_bytes = payload_bytes
        self._parts: Iterator[Part] = iter(())

    async def next(self) -> Part | None:
        """None: the stream has ended."""
        if (part := next(self._parts, None)) is not None:
            return part
        message = await self._receiver.next()
        if message is None:
            return None
        for name in ("session", "commit"):
            if message.HasField(name):
                raise errors.InvalidRequest(name, "set", "only in the first message")
        if len(message.payload) > MESSAGE_BYTES:
            told = f"{len(message.payload)} bytes"
            raise errors.InvalidRequest("payload", told, f"at most {MESSAGE_BYTES}")
        self._parts = parts_of(message, self._payload_bytes)
        return next(self._parts)


async def receive(written: WrittenBlocks, receiver: Receiver, life: Life) -> None:
    """Blocks, until all have come or there is no room. Raises InvalidRequest for a stream that ends
    before, and for one that goes on."""
    parts = Parts(receiver, written.payload_bytes)
    while not written.is_whole:
        life.check()
        page = written.begin()
        if page is None:
            return
        await receive_block(page, written.block, parts, life)
        written.commit()
    if await parts.next() is not None:
        told = f"more than {written.results.size} blocks"
        raise errors.InvalidRequest("block", told, f"{written.results.size}, as `commit` says")


async def receive_block(page: memoryview, block: int, parts: Parts, life: Life) -> None:
    """Into a page. Raises InvalidRequest unless it comes whole, in order, and as it was sent."""
    at, told = 0, b""
    while at < len(page):
        part = await parts.next()
        life.check()
        if part is None:
            raise errors.InvalidRequest("block", "nothing", f"{block}, whole: the stream ended")
        check_next(part, block, at, len(page))
        size = len(part.payload)
        page[at : at + size] = part.payload
        at, told = at + size, part.checksum
        if told and at < len(page):
            raise errors.InvalidRequest("checksum", told, "only in a block's last message")
    checksum = await hash_of(page)
    life.check()
    if told != checksum:
        allowed = f"{checksum!r}, the hash of what came as block {block}"
        raise errors.InvalidRequest("checksum", told, allowed)


def check_next(part: Part, block: int, at: int, payload_bytes: int) -> None:
    """Whether a Write goes on so at byte `at` of a block."""
    if part.block != block:
        raise errors.InvalidRequest("block", part.block, f"{block}, the next one")
    if part.offset != at:
        raise errors.InvalidRequest("offset", part.offset, f"{at}, where the last one ended")
    most = min(MESSAGE_BYTES, payload_bytes - at)
    if not 1 <= len(part.payload) <= most:
        allowed = f"1 to {most}, or whole blocks with a hash each"
        raise errors.InvalidRequest("payload", f"{len(part.payload)} bytes", allowed)


def grouped(blocks: np.ndarray[Any, Any], most: int) -> Iterator[tuple[int, int]]:
    """Where runs of at most so many successive numbers begin and end."""
    begin = 0
    for end in range(1, blocks.size + 1):
        if end == blocks.size or blocks[end] != blocks[end - 1] + 1 or end - begin == most:
            yield begin, end
            begin = end


async def hash_of(payload: memoryview) -> bytes:
    if len(payload) <= HASH_BYTES:
        return _core.xxh3_128(payload)
    return await asyncio.to_thread(_core.xxh3_128, payload)
