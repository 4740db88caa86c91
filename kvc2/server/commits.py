"""The Commit call: blocks in a session's own pages, or copied into the arena; and until when its
answer waits.

Not here: other calls of a session (session_calls.py), and the copying (cache/copied.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import NO_PAGES, U32
from kvc2.cache.cache import Cache
from kvc2.cache.copied import GivenBlocks, WrittenBlocks
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import OpenLease, Session
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.server import checks
from kvc2.server.callers import Callers
from kvc2.v1 import cache_pb2

RESULTS = ("adopted", "duplicate", "refused", "no_room")
# Under write_policy through, a disk that is slower than this is not waited for: an engine takes a
# daemon that is 5 s late for silent.
THROUGH_S = 3.0


def paid(session: Session, blocks: GivenBlocks) -> tuple[str, int]:
    """The tenant that a commit is of, and the bytes of its payloads."""
    lease = blocks.lease
    pools = session.layouts[blocks.namespace.id] if lease is None else lease.to.pools
    return blocks.namespace.owner.tenant, blocks.count * pools.shape.payload_bytes


@dataclass(frozen=True)
class Done:
    """results: of each commit. leases: the index's, that have the blocks. opened: of these, those
    that are to be closed."""

    results: list[NDArray[np.uint8]]
    leases: list[int]
    opened: list[int]


class Commits:
    """Commits of all sessions."""

    def __init__(
        self, config: ServeConfig, cache: Cache, callers: Callers, metrics: Metrics
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._cache = cache
        self._rates = callers.rates
        self._waits = callers.waits
        self._metrics = metrics
        self._committed = [metrics.committed_blocks.labels(result) for result in RESULTS]

    def check(self, session: Session, request: cache_pb2.CommitRequest) -> list[GivenBlocks]:
        """Of the whole call, before the first is committed: a refused one has changed nothing."""
        checks.few("leases", len(request.leases), self._limits.max_leases_per_call)
        return [
            self._check(session, f"leases[{index}]", each, copied=request.copied)
            for index, each in enumerate(request.leases)
        ]

    def check_written(
        self, session: Session, field: str, commit: cache_pb2.LeaseCommit
    ) -> GivenBlocks:
        """Of blocks whose bytes come over the wire: as one that is copied, without pages."""
        if commit.pages:
            raise errors.InvalidRequest(f"{field}.pages", f"{len(commit.pages)} of them", "none")
        blocks = self._given(session, field, commit, NO_PAGES, copied=True)
        size = blocks.namespace.page_size
        if blocks.tokens.size % size:
            told, allowed = f"{blocks.tokens.size} tokens", f"{size} for each block"
            raise errors.InvalidRequest(f"{field}.tokens", told, allowed)
        return blocks

    def count(self, results: NDArray[np.uint8]) -> None:
        """Of one commit's blocks, in the daemon's metrics."""
        counts = np.bincount(results, minlength=len(RESULTS))
        for counter, count in zip(self._committed, counts, strict=True):
            counter.inc(int(count))
        if counts[2]:
            self._metrics.fault("refused_commit", int(counts[2]))

    async def run(
        self, session: Session, commits: list[GivenBlocks], request: cache_pb2.CommitRequest
    ) -> tuple[list[NDArray[np.uint8]], bool]:
        """Results of each, and whether all adopted blocks are on disk: False unless asked for.
        Raises RateLimited where no tenant of theirs may commit now; else the blocks of those that
        may not are refused."""
        taken = self._taken(session, commits)
        if all(taken):
            return await self._run(session, commits, request)
        kept = [each for each, is_taken in zip(commits, taken, strict=True) if is_taken]
        results, durable = await self._run(session, kept, request)
        for index, each in enumerate(commits):
            if not taken[index]:
                results.insert(index, np.full(each.count, _core.REFUSED, np.uint8))
                self.count(results[index])
        return results, durable

    def _taken(self, session: Session, commits: list[GivenBlocks]) -> list[bool]:
        """Which of them their tenants' rates allow: a call of each tenant, with all of its bytes.
        Raises RateLimited if none."""
        num_bytes: dict[str, int] = {}
        for each in commits:
            tenant, size = paid(session, each)
            num_bytes[tenant] = num_bytes.get(tenant, 0) + size
        late: dict[str, errors.RateLimited] = {}
        for tenant, size in num_bytes.items():
            try:
                self._rates.take(tenant, size)
            except errors.RateLimited as error:
                late[tenant] = error
        if late and len(late) == len(num_bytes):
            raise max(late.values(), key=lambda error: error.retry_s)
        return [each.namespace.owner.tenant not in late for each in commits]

    async def _run(
        self, session: Session, commits: list[GivenBlocks], request: cache_pb2.CommitRequest
    ) -> tuple[list[NDArray[np.uint8]], bool]:
        wait_s = self._durable_wait_s(request)
        if not wait_s:
            done = await self._commit(session, commits, copied=request.copied)
            self._cache.leases.close_leases(done.opened)
            return done.results, False
        commits = [replace(each, insists=True) for each in commits]
        with self._waits.one():
            done = await self._commit(session, commits, copied=request.copied)
            try:
                durable = await self._cache.wait_durable(session, done.leases, wait_s)
            finally:
                self._cache.leases.close_leases(done.opened)
        return done.results, durable

    async def settle(self, session: Session, written: WrittenBlocks) -> None:
        """Under write_policy through, what came over the wire is waited for too."""
        if self._config.write_policy == "through":
            with self._waits.one():
                await self._cache.wait_durable(session, [written.lease], THROUGH_S)

    def _durable_wait_s(self, request: cache_pb2.CommitRequest) -> float:
        """How long the answer may wait for the disk; 0: it doesn't."""
        if request.durable:
            return self._config.drain_timeout_s
        return THROUGH_S if self._config.write_policy == "through" else 0.0

    async def _commit(self, session: Session, commits: list[GivenBlocks], *, copied: bool) -> Done:
        done = Done([], [], [])
        try:
            for each in commits:
                if copied:
                    await self._copy(session, each, done)
                elif each.lease is not None:
                    result = self._cache.leases.commit(
                        session,
                        each.lease.request_id,
                        each.first_block,
                        each.asked,
                        each.pages,
                    )
                    done.results.append(result)
                    done.leases.append(each.lease.id)
        except BaseException:
            self._cache.leases.close_leases(done.opened)
            raise
        for result in done.results:
            self.count(result)
        return done

    async def _copy(self, session: Session, blocks: GivenBlocks, done: Done) -> None:
        stored = await self._cache.copied.store(session, blocks)
        done.results.append(stored.results)
        done.leases.append(stored.lease)
        if stored.opened:
            done.opened.append(stored.lease)

    def _check(
        self, session: Session, field: str, commit: cache_pb2.LeaseCommit, *, copied: bool
    ) -> GivenBlocks:
        pages = checks.component_pages(f"{field}.pages", commit.pages, session)
        blocks = self._given(session, field, commit, pages, copied=copied)
        keys, tokens, size = len(blocks.keys), blocks.tokens.size, blocks.namespace.page_size
        if keys and keys != pages.size:
            told, allowed = f"{keys} keys", f"one for each of {pages.size} pages"
            raise errors.InvalidRequest(f"{field}.keys", told, allowed)
        if not keys and tokens != pages.size * size:
            told, allowed = f"{tokens} tokens", f"{size} for each of {pages.size} pages"
            raise errors.InvalidRequest(f"{field}.tokens", told, allowed)
        return blocks

    def _given(
        self,
        session: Session,
        field: str,
        commit: cache_pb2.LeaseCommit,
        pages: U32,
        *,
        copied: bool,
    ) -> GivenBlocks:
        """What a commit names, whatever brings its bytes; how many blocks is not checked."""
        namespace, lease = self._whose(session, field, commit, copied=copied)
        first = commit.first_block
        asked = checks.asked(commit, namespace, self._limits, f"{field}.", first_block=first)
        if len(set(asked.keys)) != len(asked.keys):
            raise errors.InvalidRequest(f"{field}.keys", "a key twice", "each key once")
        blocks = GivenBlocks(namespace, first, asked, pages, lease)
        self._check_first(field, blocks)
        return blocks

    def _check_first(self, field: str, blocks: GivenBlocks) -> None:
        """Only a lease of tokens has blocks before its commit's."""
        most = 0
        if blocks.lease is not None and not blocks.keys:
            most = self._limits.max_tokens // blocks.namespace.page_size - blocks.count
        if blocks.first_block > most:
            allowed = f"0 to {most}: a prompt's blocks, and without a lease from the first on"
            raise errors.InvalidRequest(f"{field}.first_block", blocks.first_block, allowed)

    def _whose(
        self, session: Session, field: str, commit: cache_pb2.LeaseCommit, *, copied: bool
    ) -> tuple[Namespace, OpenLease | None]:
        if copied and not commit.request_id:
            return checks.namespace_id(session, commit.namespace_id), None
        request_id = checks.request_id(f"{field}.request_id", commit.request_id)
        checks.reserved(f"{field}.namespace_id", commit.namespace_id, 0)
        lease = session.leases.get(request_id)
        if lease is None:
            raise errors.NotFound(f"{field}.request_id", request_id, "an open lease")
        if lease.to.in_arena != copied:
            allowed = "an open lease in the arena" if copied else "one in the pool, or `copied`"
            raise errors.InvalidRequest(f"{field}.request_id", request_id, allowed)
        return lease.namespace, lease
