"""The calls of a session: each checks its fields, asks the cache, and answers.

Index calls run inline on the event loop; what waits (slower tiers, the disk) is awaited. Acquire is
the one call a request waits for, so nothing in it is made per block or per token. Not here: calls
that need no session (shared_calls.py), and streams (streams.py).
"""

from __future__ import annotations

from kvc2 import errors
from kvc2.answers import (
    NO_HINTS,
    Committed,
    Components,
    Released,
    Terms,
    of_pages,
    shorter,
)
from kvc2.cache.cache import Cache, KeyedLayout
from kvc2.cache.namespaces import Namespace, Owner
from kvc2.cache.sessions import Session
from kvc2.config import DEFAULT_TENANT, ServeConfig
from kvc2.layout import Layout
from kvc2.metrics import Metrics
from kvc2.namespace import check_layout, decode
from kvc2.server import checks
from kvc2.server.attach import Attachments
from kvc2.server.callers import Callers
from kvc2.server.commits import Commits
from kvc2.server.credentials import CALLER
from kvc2.server.tenants import Tenants
from kvc2.v1 import cache_pb2
from kvc2.wire import to_message


class SessionCalls:
    """Handlers, named as the rpcs. They raise errors.Kvc2Error; wiring.py answers."""

    def __init__(
        self,
        config: ServeConfig,
        cache: Cache,
        attachments: Attachments,
        callers: Callers,
        commits: Commits,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._cache = cache
        self._attachments = attachments
        self._callers = callers
        self._commits = commits
        self._metrics = metrics
        self._tenants = Tenants(config)
        self._acquire_deadline_s = config.acquire_deadline_ms / 1000
        tiers = ("gpu", "cpu", "disk", "remote")
        self._matched = [metrics.matched_tokens.labels(tier) for tier in tiers]

    async def OpenNamespace(
        self, request: cache_pb2.OpenNamespaceRequest
    ) -> cache_pb2.OpenNamespaceResponse:
        session = self._callers.session(request.session)
        tenant = checks.text("tenant", request.tenant, checks.TENANT_BYTES_MAX)
        self._tenants.check_credential(tenant, CALLER.get())
        identity = decode(request.identity)
        of = self._keyed_layout(session, request)
        check_layout(identity, of.layout)
        name = self._tenants.namespace(
            tenant, session.uid, request.identity, request.salt, opaque=of.opaque
        )
        self._callers.rates.take(tenant or DEFAULT_TENANT)
        ttl_s = shorter(request.ttl_s, self._tenants.ttl_s(tenant))
        quota = self._cache.quotas.number(tenant)
        shared = self._tenants.shared(tenant, request.identity, request.salt, opaque=of.opaque)
        owner = Owner(tenant or DEFAULT_TENANT, request.salt, quota, shared)
        namespace = self._cache.open_namespace(session, name, request.identity, ttl_s, owner, of=of)
        if namespace.id not in session.namespaces:
            self._make_room(session, namespace, owner.tenant)
        session.namespaces.put(owner.tenant, namespace.id, namespace)
        return cache_pb2.OpenNamespaceResponse(namespace_id=namespace.id + 1)

    def _keyed_layout(
        self, session: Session, request: cache_pb2.OpenNamespaceRequest
    ) -> KeyedLayout:
        if request.key_mode > 1:
            raise errors.InvalidRequest("key_mode", request.key_mode, "0 (tokens) or 1 (keys)")
        layout = session.layout
        if request.HasField("layout"):
            layout = Layout.from_proto(request.layout)
        return KeyedLayout(layout, opaque=request.key_mode == 1)

    def _make_room(self, session: Session, namespace: Namespace, tenant: str) -> None:
        """In the session's table, for this namespace, of this tenant: salts are the callers'
        choice, and end neither an open lease's nor another tenant's. Raises LimitReached."""
        most = self._limits.max_namespaces
        if len(session.namespaces) < most:
            return
        used = self._cache.leased_namespaces(session)
        gone = next((each for each in session.namespaces.victims(tenant) if each not in used), None)
        if gone is None:
            session.let_go(namespace.id)
            raise errors.LimitReached("limits.max_namespaces", most, "have open leases")
        session.let_go(gone)

    async def Match(self, request: cache_pb2.MatchRequest) -> cache_pb2.MatchResponse:
        session = self._callers.session(request.session)
        namespace = checks.namespace_id(session, request.namespace_id)
        self._callers.take(session, namespace)
        asked = checks.asked(request, namespace, self._limits)
        if namespace.opaque:
            found = await self._cache.leases.match_keys_beyond(session, namespace, asked.keys)
        else:
            found = await self._cache.leases.match_beyond(session, namespace, asked)
        return to_message(found, cache_pb2.MatchResponse)

    async def Acquire(self, request: cache_pb2.AcquireRequest) -> cache_pb2.AcquireResponse:
        session = self._callers.session(request.session)
        if self._attachments.draining:
            raise errors.Draining("the daemon drains: no new leases")
        namespace = checks.namespace_id(session, request.namespace_id)
        self._callers.take(session, namespace)
        request_id = checks.request_id("request_id", request.request_id)
        asked = checks.asked(request, namespace, self._limits)
        grant = checks.grants(request.grants, self._limits)
        deadline_s = checks.deadline_s("deadline_ms", request.deadline_ms, self._acquire_deadline_s)
        if request.place > 1:
            raise errors.InvalidRequest("place", request.place, "0 (pool) or 1 (arena)")
        if request.skip_blocks and namespace.opaque:
            allowed = "0, for opaque keys: what the client has is not asked for"
            raise errors.InvalidRequest("skip_blocks", request.skip_blocks, allowed)
        if len(session.leases) >= self._limits.max_leases and request_id not in session.leases:
            raise errors.LimitReached("limits.max_leases", self._limits.max_leases, "are open")
        terms = Terms(
            grant,
            deadline_s,
            checks.hints("hints", request.hints),
            in_arena=request.place == 1,
            skip_blocks=request.skip_blocks,
            at_once=request.at_once,
            poll=request.poll,
        )
        leases = self._cache.leases
        if namespace.opaque:
            found = await leases.acquire_keys(session, namespace, request_id, asked.keys, terms)
        else:
            found = await leases.acquire(session, namespace, request_id, asked, terms)
        self._metrics.prompt_tokens.inc(len(asked.tokens))
        for counter, count in zip(self._matched, found.tiers, strict=True):
            if count:
                counter.inc(count)
        return to_message(found, cache_pb2.AcquireResponse)

    async def Grant(self, request: cache_pb2.GrantRequest) -> cache_pb2.GrantResponse:
        session = self._callers.session(request.session)
        self._callers.take(session)
        granted = self._grant(session, checks.grants(request.grants, self._limits))
        return to_message(Released(granted), cache_pb2.GrantResponse)

    def _grant(self, session: Session, count: int) -> Components:
        return of_pages(self._cache.leases.grant(session, count)) if count else ()

    async def Commit(self, request: cache_pb2.CommitRequest) -> cache_pb2.CommitResponse:
        session = self._callers.session(request.session)
        wanted = checks.grants(request.grants, self._limits)
        rate = checks.rate("prefill_tokens_per_s", request.prefill_tokens_per_s)
        commits = self._commits.check(session, request)
        if not commits:
            self._callers.take(session)
        if rate:
            session.prefill_rate = rate
            self._metrics.prefill_rate.labels(str(session.epoch)).set(rate)
        results, durable = await self._commits.run(session, commits, request)
        self._callers.session(request.session)  # waiting may have outlived the session
        granted = self._grant(session, wanted)
        return to_message(Committed(results, durable, granted), cache_pb2.CommitResponse)

    async def Release(self, request: cache_pb2.ReleaseRequest) -> cache_pb2.ReleaseResponse:
        session = self._callers.session(request.session)
        checks.few("request_ids", len(request.request_ids), self._limits.max_leases_per_call)
        wanted = checks.grants(request.grants, self._limits)
        returned = checks.component_pages("returned", request.returned, session)
        ids = [
            checks.request_id(f"request_ids[{index}]", each)
            for index, each in enumerate(request.request_ids)
        ]
        if len(request.hints) not in (0, len(ids)):
            raise errors.InvalidRequest(
                "hints", f"{len(request.hints)} of them", f"one for each of {len(ids)} request_ids"
            )
        said = [checks.hints(f"hints[{i}]", each) for i, each in enumerate(request.hints)]
        if not len(returned) and session.leases.keys().isdisjoint(ids):
            self._callers.take(session)  # one that lets go of something is never refused
        for each, hints in zip(ids, said or [NO_HINTS] * len(ids), strict=True):
            self._cache.leases.release(session, each, hints)
        if len(returned):
            self._cache.leases.give_back(session, returned)
        granted = self._grant(session, wanted)
        return to_message(Released(granted), cache_pb2.ReleaseResponse)
