"""The Cache service: each rpc checks its fields, asks the cache, and answers.

Index calls run inline on the event loop; what waits (slower tiers, flush) is awaited. Acquire is
the one call a request waits for, so nothing in it is made per block or per token.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import (
    NO_HINTS,
    NO_PAGES,
    U32,
    Committed,
    DaemonStats,
    Explained,
    Flushed,
    HitRates,
    LeaseCommit,
    Released,
    SessionStats,
    Terms,
    TierCounts,
    TierStats,
    shorter,
)
from kvc2.cache.cache import Cache
from kvc2.cache.namespaces import Namespace, Owner
from kvc2.cache.sessions import Session
from kvc2.config import DEFAULT_TENANT, ServeConfig, listen_address
from kvc2.metrics import Metrics
from kvc2.namespace import check_layout, decode
from kvc2.server import checks
from kvc2.server.attach import Attachments
from kvc2.server.tenants import Tenants
from kvc2.v1 import cache_pb2
from kvc2.wire import packed, to_message

RESULTS = ("adopted", "duplicate", "refused")
DURABLE_WAITS_MAX = 64  # flushes and durable commits that wait at a time
# Under write_policy through, a disk that is slower than this is not waited for: an engine takes a
# daemon that is 5 s late for silent.
THROUGH_S = 3.0


class CacheCalls:
    """One daemon's handlers, named as the rpcs. They raise errors.Kvc2Error; wiring.py answers."""

    def __init__(
        self,
        config: ServeConfig,
        cache: Cache,
        attachments: Attachments,
        metrics: Metrics,
        drain: Callable[[float], Awaitable[Flushed]],
    ) -> None:
        self._config = config
        self._owner_is_known = listen_address(config.listen).path is not None
        self._limits = config.limits
        self._cache = cache
        self._attachments = attachments
        self._table = attachments.table
        self._metrics = metrics
        self._tenants = Tenants(config)
        self._drain = drain
        self._started_at = time.monotonic()
        self._durable_waits = 0
        self._acquire_deadline_s = config.acquire_deadline_ms / 1000
        tiers = ("gpu", "cpu", "disk", "remote")
        self._matched = [metrics.matched_tokens.labels(tier) for tier in tiers]
        self._committed = [metrics.committed_blocks.labels(result) for result in RESULTS]

    def _session(self, head: cache_pb2.SessionRef) -> Session:
        try:
            return self._table.of_call(head.secret, head.session_epoch)
        except errors.SessionOver:
            self._metrics.fault("fenced_call")
            raise

    def _session_or_owner(self, request: Any) -> Session | None:
        """None: the socket's owner asks, of all sessions. Raises Denied on TCP."""
        if request.HasField("session"):
            return self._session(request.session)
        if not self._owner_is_known:
            raise errors.Denied("session", "none", "one: TCP doesn't say who calls")
        return None

    async def OpenNamespace(
        self, request: cache_pb2.OpenNamespaceRequest
    ) -> cache_pb2.OpenNamespaceResponse:
        session = self._session(request.session)
        tenant = checks.text("tenant", request.tenant, checks.TENANT_BYTES_MAX)
        identity = decode(request.identity)
        check_layout(identity, session.layout)
        name = self._tenants.namespace(tenant, session.uid, request.identity, request.salt)
        ttl_s = shorter(request.ttl_s, self._tenants.ttl_s(tenant))
        quota = self._cache.quotas.number(tenant)
        owner = Owner(tenant or DEFAULT_TENANT, request.salt, quota)
        namespace = self._cache.open_namespace(session, name, request.identity, ttl_s, owner)
        if namespace.id not in session.namespaces:
            self._make_room(session, owner.tenant)
        session.namespaces.put(owner.tenant, namespace.id, namespace)
        return cache_pb2.OpenNamespaceResponse(namespace_id=namespace.id + 1)

    def _make_room(self, session: Session, tenant: str) -> None:
        """In the session's table, for a namespace of this tenant: salts are the callers' choice,
        and end neither an open lease's nor another tenant's. Raises LimitReached."""
        most = self._limits.max_namespaces
        if len(session.namespaces) < most:
            return
        used = self._cache.leased_namespaces(session)
        gone = next((each for each in session.namespaces.victims(tenant) if each not in used), None)
        if gone is None:
            raise errors.LimitReached("limits.max_namespaces", most, "have open leases")
        session.namespaces.drop(gone)

    async def Match(self, request: cache_pb2.MatchRequest) -> cache_pb2.MatchResponse:
        session = self._session(request.session)
        namespace = checks.namespace_id(session, request.namespace_id)
        tokens = checks.tokens("tokens", request.tokens, self._limits)
        return to_message(self._cache.match(session, namespace, tokens), cache_pb2.MatchResponse)

    async def Explain(self, request: cache_pb2.ExplainRequest) -> cache_pb2.ExplainResponse:
        return to_message(self._explain(request), cache_pb2.ExplainResponse)

    def _explain(self, request: cache_pb2.ExplainRequest) -> Explained:
        session = self._session_or_owner(request)
        if request.WhichOneof("what") == "request_id":
            request_id = checks.request_id("request_id", request.request_id)
            epoch = None if session is None else session.epoch
            return self._cache.explainer.of_request(request_id, epoch)
        tokens = checks.tokens("tokens", request.tokens, self._limits)
        if session is None:
            namespace = self._cache.namespaces.find(request.namespace)
        else:
            namespace = checks.namespace_id(session, request.namespace_id)
        return self._cache.explain(session, namespace, tokens)

    async def Acquire(self, request: cache_pb2.AcquireRequest) -> cache_pb2.AcquireResponse:
        session = self._session(request.session)
        if self._attachments.draining:
            raise errors.Draining("the daemon drains: no new leases")
        namespace = checks.namespace_id(session, request.namespace_id)
        request_id = checks.request_id("request_id", request.request_id)
        tokens = checks.tokens("tokens", request.tokens, self._limits)
        grant = checks.grant("grant_pages", request.grant_pages, self._limits)
        deadline_s = checks.deadline_s("deadline_ms", request.deadline_ms, self._acquire_deadline_s)
        checks.reserved("key_mode", request.key_mode, 0)
        checks.reserved("extras", request.extras, b"")
        if len(session.leases) >= self._limits.max_leases and request_id not in session.leases:
            raise errors.LimitReached("limits.max_leases", self._limits.max_leases, "are open")
        terms = Terms(grant, deadline_s, checks.hints("hints", request.hints))
        found = await self._cache.acquire(session, namespace, request_id, tokens, terms)
        self._metrics.prompt_tokens.inc(len(tokens))
        for counter, count in zip(self._matched, found.tiers, strict=True):
            if count:
                counter.inc(count)
        return to_message(found, cache_pb2.AcquireResponse)

    async def Grant(self, request: cache_pb2.GrantRequest) -> cache_pb2.GrantResponse:
        session = self._session(request.session)
        granted = self._grant(session, "pages", request.pages)
        return cache_pb2.GrantResponse(granted_pages=packed(granted))

    def _grant(self, session: Session, field: str, count: int) -> U32:
        if checks.grant(field, count, self._limits) == 0:
            return NO_PAGES
        return self._cache.grant(session, count)

    async def Commit(self, request: cache_pb2.CommitRequest) -> cache_pb2.CommitResponse:
        session = self._session(request.session)
        checks.few("leases", len(request.leases), self._limits.max_leases_per_call)
        checks.grant("grant_pages", request.grant_pages, self._limits)
        rate = checks.rate("prefill_tokens_per_s", request.prefill_tokens_per_s)
        # all are checked before the first is committed: a refused call has changed nothing
        commits = [
            self._check_commit(session, f"leases[{index}]", each)
            for index, each in enumerate(request.leases)
        ]
        if rate:
            session.prefill_rate = rate
            self._metrics.prefill_rate.labels(str(session.epoch)).set(rate)
        through = self._config.write_policy == "through"
        if request.durable or through:
            with self._waiting():
                results = self._commit(session, commits)
                wait_s = self._config.drain_timeout_s if request.durable else THROUGH_S
                leases = [each.request_id for each in commits]
                durable = await self._cache.wait_durable(session, leases, wait_s)
            self._session(request.session)  # waiting may have outlived the session
        else:
            results, durable = self._commit(session, commits), False
        granted = self._grant(session, "grant_pages", request.grant_pages)
        return to_message(Committed(results, granted, durable), cache_pb2.CommitResponse)

    def _commit(self, session: Session, commits: list[LeaseCommit]) -> list[NDArray[np.uint8]]:
        results = [
            self._cache.commit(session, each.request_id, each.first_block, each.tokens, each.pages)
            for each in commits
        ]
        for result in results:
            counts = np.bincount(result, minlength=len(RESULTS))
            for counter, count in zip(self._committed, counts, strict=False):
                counter.inc(int(count))
            if counts[2]:
                self._metrics.fault("refused_commit", int(counts[2]))
        return results

    def _check_commit(
        self, session: Session, field: str, commit: cache_pb2.LeaseCommit
    ) -> LeaseCommit:
        request_id = checks.request_id(f"{field}.request_id", commit.request_id)
        if request_id not in session.leases:
            raise errors.NotFound(f"{field}.request_id", request_id, "an open lease")
        pages = checks.pages(f"{field}.pages", commit.pages, session)
        tokens = checks.tokens(f"{field}.tokens", commit.tokens, self._limits)
        size = session.layout.page_size
        if len(tokens) != len(pages) * size:
            raise errors.InvalidRequest(
                f"{field}.tokens", f"{len(tokens)} tokens", f"{size} for each of {len(pages)} pages"
            )
        most = self._limits.max_tokens // size
        if commit.first_block + len(pages) > most:
            raise errors.InvalidRequest(
                f"{field}.first_block", commit.first_block, f"at most {most} blocks in all"
            )
        return LeaseCommit(request_id, commit.first_block, tokens, pages)

    def _waiting(self) -> _Counted:
        if self._durable_waits >= DURABLE_WAITS_MAX:
            raise errors.LimitReached("durable waits", DURABLE_WAITS_MAX, "calls wait already")
        return _Counted(self)

    async def Release(self, request: cache_pb2.ReleaseRequest) -> cache_pb2.ReleaseResponse:
        session = self._session(request.session)
        checks.few("request_ids", len(request.request_ids), self._limits.max_leases_per_call)
        checks.grant("grant_pages", request.grant_pages, self._limits)
        returned = checks.pages("returned_pages", request.returned_pages, session)
        ids = [
            checks.request_id(f"request_ids[{index}]", each)
            for index, each in enumerate(request.request_ids)
        ]
        if len(request.hints) not in (0, len(ids)):
            raise errors.InvalidRequest(
                "hints", f"{len(request.hints)} of them", f"one for each of {len(ids)} request_ids"
            )
        said = [checks.hints(f"hints[{i}]", each) for i, each in enumerate(request.hints)]
        for each, hints in zip(ids, said or [NO_HINTS] * len(ids), strict=True):
            self._cache.release(session, each, hints)
        if len(returned):
            self._cache.give_back(session, returned)
        granted = self._grant(session, "grant_pages", request.grant_pages)
        return to_message(Released(granted), cache_pb2.ReleaseResponse)

    async def Flush(self, request: cache_pb2.FlushRequest) -> cache_pb2.FlushResponse:
        deadline_s = checks.deadline_s(
            "deadline_ms", request.deadline_ms, self._config.drain_timeout_s
        )
        with self._waiting():
            return to_message(await self._cache.flush(deadline_s), cache_pb2.FlushResponse)

    async def Evict(self, request: cache_pb2.EvictRequest) -> cache_pb2.EvictResponse:
        blocks = checks.evict_blocks(request.blocks)
        found = await self._cache.evict(checks.tier(request.tier), blocks)
        return to_message(found, cache_pb2.EvictResponse)

    async def Invalidate(
        self, request: cache_pb2.InvalidateRequest
    ) -> cache_pb2.InvalidateResponse:
        what = request.WhichOneof("what")
        if what == "namespace_id":
            session = self._session(request.session)
            names = [checks.namespace_id(session, request.namespace_id).name]
        elif what == "namespace":
            names = [checks.namespace("namespace", request.namespace)]
        else:
            names = self._cache.namespaces.of_weights(request.weights_digest)
            checks.weights("weights_digest", request.weights_digest, known=bool(names))
        return to_message(await self._cache.invalidate(names), cache_pb2.InvalidateResponse)

    async def SetQuota(self, request: cache_pb2.SetQuotaRequest) -> cache_pb2.SetQuotaResponse:
        tenant = checks.text("tenant", request.tenant, checks.TENANT_BYTES_MAX)
        tier = checks.tier(request.tier)
        found = self._cache.quotas.set(tenant, tier, request.max_bytes, request.max_blocks)
        return cache_pb2.SetQuotaResponse(use=to_message(found, cache_pb2.TenantUse))

    async def Pin(self, request: cache_pb2.PinRequest) -> cache_pb2.PinResponse:
        session, namespace, tokens = self._prefix(request)
        tier = checks.tier(request.tier or "cpu")
        found = self._cache.pins.pin(session, namespace, tokens, tier=tier, hard=request.hard)
        return to_message(found, cache_pb2.PinResponse)

    async def Unpin(self, request: cache_pb2.UnpinRequest) -> cache_pb2.UnpinResponse:
        session, namespace, tokens = self._prefix(request)
        tier = checks.tier(request.tier or "cpu")
        blocks = self._cache.pins.unpin(session, namespace, tokens, tier=tier)
        return cache_pb2.UnpinResponse(blocks=blocks)

    async def Prefetch(self, request: cache_pb2.PrefetchRequest) -> cache_pb2.PrefetchResponse:
        session, namespace, tokens = self._prefix(request)
        found = await self._cache.prefetcher.prefetch(
            session,
            namespace,
            tokens,
            tier=checks.tier(request.tier or "cpu"),
            deadline_s=checks.deadline_s("deadline_ms", request.deadline_ms, 0.0),
        )
        return to_message(found, cache_pb2.PrefetchResponse)

    async def Scrub(self, request: cache_pb2.ScrubRequest) -> cache_pb2.ScrubResponse:
        scrubber = self._cache.scrubber
        if request.WhichOneof("what") == "start_mb_per_s":
            scrubber.start(request.start_mb_per_s)
        elif request.stop:
            await scrubber.stop()
        return to_message(scrubber.progress(), cache_pb2.ScrubResponse)

    def _prefix(
        self, request: cache_pb2.PinRequest | cache_pb2.UnpinRequest | cache_pb2.PrefetchRequest
    ) -> tuple[Session | None, Namespace, np.ndarray[Any, Any]]:
        """Who asks (None: the socket's owner), the namespace, and tokens in it."""
        session = self._session_or_owner(request)
        tokens = checks.tokens("tokens", request.tokens, self._limits)
        if session is None:
            return session, self._cache.namespaces.find(request.namespace), tokens
        return session, checks.namespace_id(session, request.namespace_id), tokens

    async def Stats(self, request: cache_pb2.StatsRequest) -> cache_pb2.StatsResponse:
        stats = self._cache.stats()
        leases = sum(len(each.leases) for each in self._table)
        self._metrics.leases.set(leases)
        pools = {each.session_epoch: each for each in stats.pools}
        counters = self._metrics.values()
        answer = DaemonStats(
            version=_version(),
            instance=self._table.instance.hex(),
            uptime_s=time.monotonic() - self._started_at,
            tiers=stats.tiers,
            sessions=tuple(self._session_stats(each, pools) for each in self._table),
            blocks=stats.blocks,
            holes=stats.holes,
            leases=leases,
            namespaces=stats.namespaces,
            metadata_bytes=stats.metadata_bytes,
            counters=counters,
            hit_rates=_hit_rates(stats.tiers, counters),
            hit_rate_unlimited=stats.hit_rate_unlimited,
            tenants=tuple(self._cache.quotas.uses()),
            slabs=stats.slabs,
        )
        return to_message(answer, cache_pb2.StatsResponse)

    def _session_stats(self, session: Session, pools: dict[int, TierCounts]) -> SessionStats:
        return SessionStats(
            session_epoch=session.epoch,
            engine_name=session.engine_name,
            pid=session.pid,
            leases=len(session.leases),
            seconds=self._table.seconds_open(session),
            pool=pools.get(session.epoch, TierStats()),
            prefill_tokens_per_s=session.prefill_rate,
        )

    async def Drain(self, request: cache_pb2.DrainRequest) -> cache_pb2.DrainResponse:
        deadline_s = checks.deadline_s(
            "deadline_ms", request.deadline_ms, self._config.drain_timeout_s
        )
        # shielded: a client that goes away doesn't undo a drain that has begun
        flushed = await asyncio.shield(asyncio.ensure_future(self._drain(deadline_s)))
        return cache_pb2.DrainResponse(flushed=to_message(flushed, cache_pb2.FlushResponse))

    async def Read(self, request: cache_pb2.ReadRequest) -> cache_pb2.ReadResponse:
        raise errors.Reserved("Read", None, "reserved: this version serves shared memory only")

    async def Write(self, request: cache_pb2.WriteRequest) -> cache_pb2.WriteResponse:
        raise errors.Reserved("Write", None, "reserved: this version serves shared memory only")


class _Counted:
    """One of at most DURABLE_WAITS_MAX waits, while it is entered."""

    def __init__(self, calls: CacheCalls) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        self._calls._durable_waits += 1

    def __exit__(self, *_: object) -> None:
        self._calls._durable_waits -= 1


@functools.cache
def _version() -> str:
    return importlib.metadata.version("kvc2")


def _hit_rates(tiers: tuple[TierCounts, ...], counters: dict[str, float]) -> dict[str, HitRates]:
    """Of each tier and those faster than it; the real ones from the counters."""
    asked, found = counters["prompt_tokens_total"], 0.0
    rates: dict[str, HitRates] = {}
    for each in tiers:
        found += counters[f"matched_tokens_total{{tier={each.tier}}}"]
        real = found / asked if asked else 0.0
        rates[each.tier] = HitRates(real, each.hit_rates)
    return rates
