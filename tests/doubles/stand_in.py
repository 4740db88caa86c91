"""An engine's side of a session without an engine or a wire: a sealed pool, and KV that is a
function of the tokens, so that every byte that comes back can be judged."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import mmap
import os
import struct

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.answers import Acquired, Asked, Hints, Terms, beginning
from kvc2.cache.cache import Cache
from kvc2.cache.sessions import Session
from kvc2.layout import Layout, layer_major
from kvc2.tiers.gpu import PROGRESS_STEP

U32 = NDArray[np.uint32]
PAGE_SIZE = 4
NO_HINTS = Hints()
NAMESPACE = hashlib.sha256(b"a model and a tenant").digest()


def shared(num_bytes: int) -> mmap.mmap:
    """A sealed memfd, mapped; its file descriptor is closed."""
    fd = os.memfd_create("pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    mapped = mmap.mmap(fd, num_bytes)
    os.close(fd)
    return mapped


def payloads(namespace: bytes, what: U32 | Asked, layout: Layout) -> NDArray[np.uint8]:
    """[blocks, payload_bytes] the KV of each full block: all of its prefix decides every byte."""
    asked, rows = Asked.of(what), []
    for block, key in enumerate(_core.chain_keys(namespace, asked.tokens, layout.page_size)):
        seen = beginning(asked.extras, 0, (block + 1) * layout.page_size)
        seed = list(bytes(key) + (hashlib.sha256(repr(seen).encode()).digest() if seen else b""))
        rows.append(np.random.default_rng(seed).bytes(layout.payload_bytes))
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), layout.payload_bytes)


def prompt(seed: int, blocks: int, page_size: int = PAGE_SIZE) -> U32:
    """Tokens of `blocks` full blocks and one more token (a match never takes the last one)."""
    found = np.random.default_rng(seed).integers(0, 50_000, blocks * page_size + 1)
    return found.astype(np.uint32)


def part_of(asked: Asked, first: int, end: int) -> Asked:
    """Tokens [first, end), and what begins in them."""
    return Asked(asked.tokens[first:end], extras=beginning(asked.extras, first, end))


def _tell(told: asyncio.Future[None]) -> None:
    if not told.done():
        told.set_result(None)


class StandIn:
    """One session of `cache`, of `num_pages` pages."""

    epochs = 0

    def __init__(
        self,
        cache: Cache,
        num_pages: int,
        *,
        layers: int = 2,
        segment_bytes: int = 1024,
        page_size: int = PAGE_SIZE,
        namespace: bytes = NAMESPACE,
        identity: bytes = b"{}",
    ) -> None:
        StandIn.epochs += 1
        self.cache = cache
        self.layout = layer_major(
            layers, num_pages, segment_bytes=segment_bytes, page_size=page_size
        )
        self.namespace, self.identity = namespace, identity
        self.memory = shared(num_pages * self.layout.payload_bytes)
        self.pool = np.frombuffer(self.memory, np.uint8)
        self.progress = shared(4096)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.session = Session(StandIn.epochs, "stand-in", self.layout, num_pages, 0.0, 0.0)
        self.requests = 0
        self.open()

    def open(self) -> None:
        store = self.cache.executors.of_memory(
            self.layout, self.memory, self.progress, self.event_fd
        )
        self.cache.open_session(self.session, store, kept_pages=np.empty(0, np.uint32))
        self.session.life.become("ready")
        self.opened = self.cache.open_namespace(self.session, self.namespace, self.identity)

    async def close(self, *, at_rest: bool = False) -> None:
        async def known() -> bool:
            return at_rest

        await self.cache.close_session(self.session, known)
        os.close(self.event_fd)

    def request_id(self) -> bytes:
        self.requests += 1
        return self.requests.to_bytes(4, "big")

    async def acquire(
        self,
        what: U32 | Asked,
        grant: int = 0,
        deadline_s: float = 20.0,
        hints: Hints = NO_HINTS,
    ) -> tuple[bytes, Acquired]:
        request = self.request_id()
        found = await self.cache.leases.acquire(
            self.session, self.opened, request, what, Terms(grant, deadline_s, hints)
        )
        return request, found

    async def arrived(self, transfer: int) -> None:
        """Waits until the progress word says that all layers of `transfer` are there."""
        target = transfer * PROGRESS_STEP + self.layout.layers
        loop = asyncio.get_running_loop()
        while transfer and struct.unpack_from("<Q", self.progress)[0] < target:
            told: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self.event_fd, _tell, told)
            try:
                async with asyncio.timeout(10):
                    await told
                os.eventfd_read(self.event_fd)
            finally:
                loop.remove_reader(self.event_fd)

    def segments(self) -> NDArray[np.uint64]:
        return self.layout.segment_table()

    def fill(self, pages: U32, rows: NDArray[np.uint8]) -> None:
        """What prefill does: the KV of one block a page."""
        for page, row in zip(pages.tolist(), rows, strict=True):
            start = 0
            for offset, stride, length in self.segments().tolist():
                place = offset + page * stride
                self.pool[place : place + length] = row[start : start + length]
                start += length

    def contents(self, pages: U32) -> NDArray[np.uint8]:
        """[pages, payload_bytes] what lies there."""
        rows = [
            np.concatenate(
                [
                    self.pool[offset + page * stride : offset + page * stride + length]
                    for offset, stride, length in self.segments().tolist()
                ]
            )
            for page in pages.tolist()
        ]
        return np.array(rows, np.uint8).reshape(len(rows), self.layout.payload_bytes)

    def judge(self, what: U32 | Asked, found: Acquired) -> NDArray[np.uint8]:
        """[blocks, payload_bytes] the truth. AssertionError when a byte of the prefix is wrong."""
        truth = payloads(self.namespace, what, self.layout)
        held = found.prefix_pages.size
        assert (self.contents(found.prefix_pages) == truth[:held]).all(), "wrong bytes"
        return truth

    async def ask(self, tokens: U32, hints: Hints = NO_HINTS) -> Acquired:
        """A whole request: take the prefix and judge its bytes, compute and commit the rest,
        release. AssertionError when a byte is wrong."""
        request, found = await self.compute(tokens, hints)
        self.cache.leases.release(self.session, request)
        return found

    async def ask_durably(self, tokens: U32) -> bool:
        """A whole request; whether all of its blocks were on disk, within 10 s, at its end."""
        request, _ = await self.compute(tokens)
        durable = await self.cache.wait_durable(self.session, [self.session.leases[request].id], 10)
        self.cache.leases.release(self.session, request)
        return durable

    async def compute(self, what: U32 | Asked, hints: Hints = NO_HINTS) -> tuple[bytes, Acquired]:
        """A request up to its release."""
        size, asked = self.layout.page_size, Asked.of(what)
        blocks = len(asked.tokens) // size
        request, found = await self.acquire(asked, grant=blocks, hints=hints)
        await self.arrived(found.transfer)
        truth = self.judge(asked, found)
        held = found.prefix_pages.size
        count = min(blocks - held, found.granted_pages.size)
        pages = found.granted_pages[:count]
        self.fill(pages, truth[held : held + count])
        rest = part_of(asked, held * size, (held + count) * size)
        result = self.cache.leases.commit(self.session, request, held, rest, pages)
        assert not (result == _core.REFUSED).any()
        if found.granted_pages.size > count:
            self.cache.leases.give_back(self.session, found.granted_pages[count:])
        return request, found
