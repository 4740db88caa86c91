"""The calls that need no session: of the socket's owner, of an administrator, or of a session for
what is its own. Each checks its fields, asks the cache, and answers.

Not here: what a request needs (session_calls.py).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import time
from collections.abc import Awaitable, Callable

from kvc2.answers import (
    Asked,
    DaemonStats,
    Explained,
    Flushed,
    HitRates,
    SessionStats,
    TierCounts,
    TierStats,
)
from kvc2.cache.cache import Cache
from kvc2.cache.namespaces import Namespace
from kvc2.cache.pins import Keeping
from kvc2.cache.sessions import Session
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.server import checks
from kvc2.server.callers import Callers
from kvc2.v1 import cache_pb2
from kvc2.wire import to_message

InNamespace = (
    cache_pb2.PinRequest
    | cache_pb2.UnpinRequest
    | cache_pb2.PrefetchRequest
    | cache_pb2.ExplainRequest
)


class SharedCalls:
    """Handlers, named as the rpcs. They raise errors.Kvc2Error; wiring.py answers. `drain` begins
    the daemon's end and says what is durable then."""

    def __init__(
        self,
        config: ServeConfig,
        cache: Cache,
        callers: Callers,
        metrics: Metrics,
        drain: Callable[[float], Awaitable[Flushed]],
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._cache = cache
        self._table = callers.table
        self._callers = callers
        self._waits = callers.waits
        self._metrics = metrics
        self._drain = drain
        self._started_at = time.monotonic()

    async def Explain(self, request: cache_pb2.ExplainRequest) -> cache_pb2.ExplainResponse:
        return to_message(self._explain(request), cache_pb2.ExplainResponse)

    def _explain(self, request: cache_pb2.ExplainRequest) -> Explained:
        session = self._callers.session_or_owner(request)
        if request.WhichOneof("what") == "request_id":
            self._callers.take(session)
            request_id = checks.request_id("request_id", request.request_id)
            checks.no_extras("extras", request.extras, "they were the request's own")
            if session is None:
                return self._cache.explainer.of_request(request_id, tenants=self._callers.tenants())
            return self._cache.explainer.of_request(request_id, session.epoch)
        namespace = self._namespace(session, request)
        asked = checks.explained(request, namespace, self._limits)
        return self._cache.explain(session, namespace, asked)

    async def Flush(self, request: cache_pb2.FlushRequest) -> cache_pb2.FlushResponse:
        deadline_s = checks.deadline_s(
            "deadline_ms", request.deadline_ms, self._config.drain_timeout_s
        )
        with self._waits.one():
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
            session = self._callers.session(request.session)
            namespace = checks.namespace_id(session, request.namespace_id)
            self._callers.take(session, namespace)
            names = [namespace.name]
        elif what == "namespace":
            self._callers.administrator()
            names = [checks.namespace("namespace", request.namespace)]
        else:
            self._callers.administrator()
            names = self._cache.namespaces.of_weights(request.weights_digest)
            checks.weights("weights_digest", request.weights_digest, known=bool(names))
        return to_message(await self._cache.invalidate(names), cache_pb2.InvalidateResponse)

    async def SetQuota(self, request: cache_pb2.SetQuotaRequest) -> cache_pb2.SetQuotaResponse:
        tenant = checks.text("tenant", request.tenant, checks.TENANT_BYTES_MAX)
        tier = checks.tier(request.tier)
        found = self._cache.quotas.set(tenant, tier, request.max_bytes, request.max_blocks)
        return cache_pb2.SetQuotaResponse(use=to_message(found, cache_pb2.TenantUse))

    async def Pin(self, request: cache_pb2.PinRequest) -> cache_pb2.PinResponse:
        session, namespace, asked = self._asked(request)
        tier = checks.tier(request.tier or "cpu")
        keeping = Keeping(tier, request.hard, request.ttl_s, request.keep_stronger)
        found = self._cache.pins.pin(session, namespace, asked, keeping)
        return to_message(found, cache_pb2.PinResponse)

    async def Unpin(self, request: cache_pb2.UnpinRequest) -> cache_pb2.UnpinResponse:
        session, namespace, asked = self._asked(request)
        tier = checks.tier(request.tier or "cpu")
        blocks = self._cache.pins.unpin(session, namespace, asked, tier=tier)
        return cache_pb2.UnpinResponse(blocks=blocks)

    async def Prefetch(self, request: cache_pb2.PrefetchRequest) -> cache_pb2.PrefetchResponse:
        session, namespace, asked = self._asked(request)
        found = await self._cache.prefetcher.prefetch(
            session,
            namespace,
            asked,
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

    def _asked(
        self, request: cache_pb2.PinRequest | cache_pb2.UnpinRequest | cache_pb2.PrefetchRequest
    ) -> tuple[Session | None, Namespace, Asked]:
        """Who asks (None: no session), the namespace, and which blocks of it."""
        session = self._callers.session_or_owner(request)
        namespace = self._namespace(session, request)
        return session, namespace, checks.asked(request, namespace, self._limits)

    def _namespace(self, session: Session | None, request: InNamespace) -> Namespace:
        """The one that a call names, which is one of its tenant's."""
        if session is None:
            found = self._cache.namespaces.find(request.namespace, self._callers.tenants())
        else:
            found = checks.namespace_id(session, request.namespace_id)
        self._callers.take(session, found)
        return found

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
