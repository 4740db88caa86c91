"""A cache in memory with the signatures of kvc2.cache.Cache: obviously right, one tier, no bytes.

The server's tests run over it and over the real one. It keeps what was committed by (namespace,
tokens so far) and hands out pages from a set; eviction, transfers and time are not its concern.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import (
    Acquired,
    Asked,
    CacheStats,
    Evicted,
    Flushed,
    Hints,
    Matched,
    TenantUse,
    Terms,
    TierCounts,
    TierTokens,
    of_pages,
)
from kvc2.cache.cache import KeyedLayout
from kvc2.cache.namespaces import Namespace, Owner
from kvc2.cache.sessions import OpenLease, Session
from kvc2.config import ServeConfig
from kvc2.cuda.nursery import Found
from kvc2.metrics import Metrics
from kvc2.moving.loading import Destination
from kvc2.tiers.disk.records import NamespaceEntry

U32 = NDArray[np.uint32]


@dataclass
class Pool:
    free: set[int]
    private: set[int]
    resident: dict[tuple[bytes, bytes], int]
    progress: mmap.mmap
    event_fd: int


class FakeQuotas:
    def number(self, tenant: str) -> int:
        return 0

    def uses(self) -> list[TenantUse]:
        return []


class FakeNamespaces:
    def of_weights(self, weights: str) -> list[bytes]:
        return []


@dataclass
class FakeStore:
    progress: Any
    event_fd: int

    def close(self) -> None:
        pass


class FakeExecutors:
    def of_memory(self, layout: Any, memory: Any, progress: Any, event_fd: int) -> FakeStore:
        return FakeStore(progress, event_fd)

    async def let_go(self, store: FakeStore) -> None:
        store.close()

    async def found(self) -> Found:
        return Found({}, "a fake")


class FakeCache:
    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.quotas = FakeQuotas()
        self.executors = FakeExecutors()
        self.namespaces = FakeNamespaces()
        self.sessions: list[Session] = []
        self.closed: list[tuple[int, bool]] = []
        self.names: list[bytes] = []
        self.leases = self
        self.fail: BaseException | None = None

    @classmethod
    async def opened(cls, config: ServeConfig, metrics: Metrics) -> FakeCache:
        return cls(config, metrics)

    def leased_namespaces(self, session: Session) -> set[int]:
        return {each.id for each in session.leases.values()}

    async def stop(self, deadline_s: float) -> Flushed:
        return Flushed(0, {})

    def open_session(self, session: Session, store: FakeStore, *, kept_pages: U32) -> None:
        kept = set(kept_pages.tolist())
        free = set(range(session.num_pages)) - kept
        session.pool = Pool(free, kept, {}, store.progress, store.event_fd)
        self.sessions.append(session)

    async def close_session(
        self, session: Session, at_rest: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        session.leases.clear()
        self.sessions.remove(session)
        self.closed.append((session.epoch, at_rest is not None and await at_rest()))

    def open_namespace(
        self,
        session: Session,
        name: bytes,
        identity: bytes,
        ttl_s: int,
        owner: Owner,
        *,
        of: KeyedLayout | None = None,
    ) -> Namespace:
        if name not in self.names:
            self.names.append(name)
        number = self.names.index(name)
        pools: Any = SimpleNamespace(shape=session.layout)  # nothing lies below
        size = session.layout.page_size
        entry = NamespaceEntry(size, identity)
        return Namespace(number, name, entry, owner, 0, number, pools)

    def _prefix(self, session: Session, namespace: Namespace, tokens: U32) -> list[int]:
        size, pages = session.layout.page_size, []
        for end in range(size, (len(tokens) - 1) // size * size + 1, size):
            key = (self.names[namespace.id], tokens[:end].tobytes())
            if key not in session.pool.resident:
                break
            pages.append(session.pool.resident[key])
        return pages

    def match(self, session: Session, namespace: Namespace, asked: Asked) -> Matched:
        count = len(self._prefix(session, namespace, asked.tokens)) * session.layout.page_size
        return Matched(count, TierTokens(gpu=count))

    async def match_beyond(self, session: Session, namespace: Namespace, asked: Asked) -> Matched:
        """There is nothing beyond it."""
        return self.match(session, namespace, asked)

    async def acquire(
        self,
        session: Session,
        namespace: Namespace,
        request_id: bytes,
        asked: Asked,
        terms: Terms,
    ) -> Acquired:
        if self.fail is not None:
            raise self.fail
        pages = self._prefix(session, namespace, asked.tokens)
        to = Destination(session.pool, namespace.pools)
        session.leases[request_id] = OpenLease(request_id, 0, namespace, 0, to)
        session.pool.__dict__.setdefault("tokens", {})[request_id] = asked.tokens.copy()
        count = len(pages) * session.layout.page_size
        return Acquired(
            count,
            TierTokens(gpu=count),
            held=of_pages(np.array(pages, np.uint32)),
            granted=of_pages(self.grant(session, terms.grant_pages)),
        )

    def grant(self, session: Session, pages: int) -> U32:
        taken = sorted(session.pool.free)[:pages]
        session.pool.free -= set(taken)
        session.pool.private |= set(taken)
        return np.array(taken, np.uint32)

    def commit(
        self, session: Session, request_id: bytes, first_block: int, asked: Asked, pages: U32
    ) -> NDArray[np.uint8]:
        size, tokens = session.layout.page_size, asked.tokens
        namespace = session.leases[request_id].namespace
        whole = session.pool.__dict__["tokens"][request_id][: first_block * size]
        results = []
        for index, page in enumerate(pages.tolist()):
            whole = np.concatenate([whole, tokens[index * size : (index + 1) * size]])
            key = (self.names[namespace.id], whole.astype("<u4").tobytes())
            if page not in session.pool.private:
                results.append(0 if session.pool.resident.get(key) == page else 2)
            elif key in session.pool.resident:
                results.append(1)
            else:
                session.pool.resident[key] = page
                session.pool.private.remove(page)
                results.append(0)
        return np.array(results, np.uint8)

    def close_leases(self, leases: list[int]) -> None:
        """There are no copied commits here."""
        assert not leases

    def release(self, session: Session, request_id: bytes, said: Hints | None = None) -> None:
        session.leases.pop(request_id, None)

    def give_back(self, session: Session, pages: U32) -> None:
        if not set(pages.tolist()) <= session.pool.private:
            raise errors.InvalidRequest("returned", pages.tolist(), "pages granted")
        session.pool.private -= set(pages.tolist())
        session.pool.free |= set(pages.tolist())

    async def wait_durable(self, session: Session, requests: list[bytes], wait_s: float) -> bool:
        return False

    async def flush(self, deadline_s: float) -> Flushed:
        blocks = sum(len(each.pool.resident) for each in self.sessions)
        return Flushed(0, {"no_disk": blocks} if blocks else {})

    async def evict(self, tier: str, blocks: int) -> Evicted:
        count = 0
        for each in self.sessions if tier == "gpu" else []:
            count += len(each.pool.resident)
            each.pool.free |= set(each.pool.resident.values())
            each.pool.resident.clear()
        return Evicted(count, count)

    def stats(self) -> CacheStats:
        pools = tuple(
            TierCounts(
                "gpu",
                each.num_pages * each.layout.payload_bytes,
                each.num_pages,
                len(each.pool.free),
                len(each.pool.private),
                len(each.pool.resident),
                session_epoch=each.epoch,
            )
            for each in self.sessions
        )
        blocks = sum(each.resident_pages for each in pools)
        return CacheStats(pools[:1], pools, blocks, 0, 0, 0, 0, 0.0, ())
