"""A session that stores copies and reads in the arena, over the cache alone: KV is a function of
tokens or keys, so that every byte that comes back can be judged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvc2.answers import NOWHERE, U8, U32, Acquired, Asked, Terms
from kvc2.cache.cache import Cache, KeyedLayout
from kvc2.cache.copied import GivenBlocks, Stored
from kvc2.cache.namespaces import Namespace
from tests.doubles.stand_in import StandIn, part_of, payloads

KEYED = hashlib.sha256(b"a model whose blocks have keys").digest()


class InArena(StandIn):
    """`opened` has blocks of tokens, `keyed` those of opaque keys."""

    def __init__(self, cache: Cache, num_pages: int, *, ttl_s: int = 0) -> None:
        self.ttl_s = ttl_s
        super().__init__(cache, num_pages)

    def open(self) -> None:
        super().open()
        self.opened = self._open(self.namespace, opaque=False)
        self.keyed = self._open(KEYED, opaque=True)

    def _open(self, name: bytes, *, opaque: bool) -> Namespace:
        of = KeyedLayout(self.layout, opaque)
        return self.cache.open_namespace(self.session, name, b"{}", self.ttl_s, of=of)

    def truth(self, what: U32 | Asked) -> U8:
        """[blocks, payload_bytes]."""
        return payloads(self.namespace, what, self.layout)

    def truth_of(self, keys: Sequence[bytes]) -> U8:
        """[keys, payload_bytes]."""
        seeds = [list(hashlib.sha256(each).digest()) for each in keys]
        rows = [np.random.default_rng(each).bytes(self.layout.payload_bytes) for each in seeds]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)

    async def copy(self, what: U32 | Asked, lease: bytes = b"", first: int = 0) -> list[int] | None:
        """Results by block of the full ones from `first` on; None: the pool has no pages for
        them."""
        asked, size = Asked.of(what), self.layout.page_size
        end = len(asked.tokens) // size
        part = part_of(asked, first * size, end * size)
        pages = self._filled(self.truth(asked)[first:end])
        if pages is None:
            return None
        of = self.session.lease(lease) if lease else None
        return await self._store(GivenBlocks(self.opened, first, part, pages, of))

    async def copy_keys(self, keys: Sequence[bytes], lease: bytes = b"") -> list[int] | None:
        """Results by key; None as in `copy`."""
        pages = self._filled(self.truth_of(keys))
        if pages is None:
            return None
        of = self.session.lease(lease) if lease else None
        return await self._store(GivenBlocks(self.keyed, 0, Asked(keys=tuple(keys)), pages, of))

    def _filled(self, rows: U8) -> U32 | None:
        pages = self.cache.leases.grant(self.session, len(rows))
        if pages.size < len(rows):
            self.cache.leases.give_back(self.session, pages)
            return None
        self.fill(pages, rows)
        return pages

    async def _store(self, blocks: GivenBlocks) -> list[int]:
        """The pages are to be had again afterwards, whatever comes of it."""
        try:
            stored: Stored = await self.cache.copied.store(self.session, blocks)
        finally:
            if not self.session.life.over:
                self.cache.leases.give_back(self.session, blocks.pages)
        if stored.opened:
            self.cache.leases.close_leases([stored.lease])
        return list(stored.results.tolist())

    async def read(self, what: U32 | Asked, terms: Terms | None = None) -> tuple[bytes, Acquired]:
        """A lease in the arena; its bytes are judged."""
        request = self.request_id()
        terms = terms or Terms(0, 20.0, in_arena=True)
        found = await self.cache.leases.acquire(self.session, self.opened, request, what, terms)
        self.judge_offsets(found, self.truth(what)[found.first_block :])
        return request, found

    async def read_keys(
        self, keys: Sequence[bytes], terms: Terms | None = None
    ) -> tuple[bytes, Acquired]:
        """A lease in the arena on keys; its bytes are judged."""
        request = self.request_id()
        terms = terms or Terms(0, 20.0, in_arena=True)
        found = await self.cache.leases.acquire_keys(self.session, self.keyed, request, keys, terms)
        self.judge_offsets(found, self.truth_of(keys))
        return request, found

    def judge_offsets(self, found: Acquired, truth: U8) -> None:
        """AssertionError when a byte that was told is wrong."""
        for offset, row in zip(found.offsets, truth, strict=False):
            if offset != NOWHERE:
                assert (self._payload(int(offset)) == row).all(), "wrong bytes"

    def _payload(self, offset: int) -> NDArray[np.uint8]:
        memory = self.cache.arena.memory
        return np.frombuffer(memory, np.uint8, self.layout.payload_bytes, offset)

    def release(self, request: bytes) -> None:
        self.cache.leases.release(self.session, request)
