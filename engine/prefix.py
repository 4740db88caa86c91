"""The engine's only bridge to the daemon: leases, commits, releases, grants, and life without it.

Not responsible for who runs next (scheduler), nor for what a page holds (runner); who owns which
page is told by pages.py.

A request's way: `acquire` (on a thread of its own: the one call that a request waits for), `grow`
its block table as it grows, `commit` full blocks after a step, `release`. Commits, releases and
grants run in order on one bridge thread, so that a slow or silent daemon never stalls a step.
Without a session the same calls work on the engine's own pages, without hits. A fault is a miss.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.attachment import Attachment
from engine.metrics import EngineMetrics
from engine.pages import PageBook
from engine.prefix_calls import CacheClient, ask_why, hints_of, told
from engine.request import U32, Caller, Explanation
from kvc2 import errors
from kvc2.answers import NO_HINTS, Hints, TierTokens
from kvc2.client import Client, LeaseCommit
from kvc2.client import PoolMemory as PoolMemory
from kvc2.layout import layer_major
from kvc2.shares import SharedTable

log = logging.getLogger(__name__)

WAIT_SLICE_S = 0.1  # how often a wait for a layer looks whether the session still lives
ACQUIRES_MAX = 8  # calls under way; each may wait for a disk
NAMESPACES_MAX = 1024  # whose handles are kept, the daemon's default of a session
REFUSED = 2
ANSWERS = ("adopted", "duplicate", "refused")


class PrefixLostError(Exception):
    """A promised prefix did not arrive: the requests that depend on it must be computed."""


@dataclass
class Lease:
    """A request's block table and how far it is known to the daemon. `session` 0: private."""

    request_id: bytes
    session: int = 0
    pages: list[int] = field(default_factory=list)
    matched_tokens: int = 0
    tiers: TierTokens = field(default_factory=TierTokens)
    computing_tokens: int = 0  # right after the match: another open lease computes them now
    transfer: int = 0  # the prefix may be read when this is done; 0: now
    sent: int = 0  # leading blocks matched or sent in commits
    settled: int = 0  # of these, the ones matched or answered
    refused: bool = False  # a commit was refused: nothing more is committed
    hints: Hints = NO_HINTS
    ended: bool = False  # its request has been answered whole


@dataclass(frozen=True)
class BridgeConfig:
    """`low_water`: free pages under which the grant is topped up, `high_water`: over which pages
    are given back. `load_timeout_s`: how long a layer of a promised prefix is waited for."""

    page_size: int
    layers: int
    identity: bytes = b""
    low_water: int = 0
    high_water: int = 1 << 30
    load_timeout_s: float = 10.0
    grant_timeout_s: float = 1.0  # how long a step waits for a grant when pages ran out


class Prefix:
    """Leases for the scheduler's thread, which alone calls the methods up to `close`.

    `operations` must run in order (one thread); `acquires` may run many at once.
    """

    def __init__(
        self,
        book: PageBook,
        config: BridgeConfig,
        *,
        operations: Executor,
        acquires: Executor,
        metrics: EngineMetrics,
        address: str | None = None,
    ) -> None:
        self.attachment = Attachment(address, metrics)
        self.book = book
        self.config = config
        self._operations = operations
        self._acquires = acquires
        self._metrics = metrics
        self._client: CacheClient | None = None
        self._lock = threading.Lock()  # over the two below
        self._open: dict[bytes, Lease] = {}
        self._namespaces: SharedTable[str, Caller, Any] = SharedTable()
        self._topping_up = False
        self.prefill_rate = 0.0  # tokens/s, told with each commit; 0: not measured yet

    def connect(self, make_client: Callable[[Prefix], CacheClient]) -> None:
        """From now on there may be sessions; `make_client` wires the three callbacks below."""
        self._client = make_client(self)

    # a request's way

    def acquire(
        self,
        request_id: bytes,
        tokens: U32,
        caller: Caller,
        *,
        cached: bool = True,
        hints: Hints = NO_HINTS,
    ) -> Future[Lease]:
        """A lease on the longest cached prefix; without a session, or if not `cached`, an empty
        one. Never fails: a fault is a miss."""
        client = self._client
        if cached and client is not None and self.book.session:
            return self._acquires.submit(self._acquire, client, request_id, tokens, caller, hints)
        done: Future[Lease] = Future()
        done.set_result(Lease(request_id))
        return done

    def matched(self, tokens: U32, caller: Caller) -> Future[int]:
        """Tokens that a lease would match now. Changes nothing; 0 on a fault."""
        return self._acquires.submit(self._matched, tokens, caller)

    def announce(self, tokens: U32, caller: Caller) -> None:
        """A request of these tokens comes soon: what is on disk of them may come to memory now. A
        hint; what became of it shows when the lease is asked for."""
        if self._client is not None and self.book.session:
            self._acquires.submit(self._announce, self._client, tokens, caller)

    def explain(self, lease: Lease) -> Future[Explanation]:
        """Why what it found is not longer. Changes nothing, and never fails."""
        client, session = self._client, self.book.session
        if client is None or not session or lease.session not in (0, session):
            return told("no_daemon")
        if not lease.session:
            return told("not_served")
        return self._acquires.submit(ask_why, client, lease.request_id, lease.matched_tokens)

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Grow the block table to hold `tokens`; False, and no change, when pages are lacking."""
        lacking = -(-tokens // self.config.page_size) - len(lease.pages)
        if lacking <= 0:
            return True
        pages = self.book.take(lacking)
        if pages is None:
            return False
        lease.pages += pages
        return True

    def layer_ready(self, leases: Sequence[Lease]) -> Callable[[int], None] | None:
        """What the runner calls before it reads a layer; None when all of it is there. It waits,
        and raises PrefixLostError when a layer doesn't come in time or its session is over."""
        pending = [lease for lease in leases if lease.transfer]
        client = self._client
        if not pending or client is None:
            return None
        # transfers of a session run first in, first out: the last one's layer implies all others'
        transfer = max(lease.transfer for lease in pending)
        sessions = {lease.session for lease in pending}

        def ready(layer: int) -> None:
            for _ in range(max(1, round(self.config.load_timeout_s / WAIT_SLICE_S))):
                if sessions != {self.book.session}:
                    raise PrefixLostError("the session is over")
                if client.wait_layer(transfer, layer, WAIT_SLICE_S):
                    return
            raise PrefixLostError(f"layer {layer} of transfer {transfer} didn't arrive")

        return ready

    def arrived(self, leases: Sequence[Lease]) -> None:
        """A step has read all layers: these prefixes need no waiting any more."""
        with self._lock:
            for lease in leases:
                lease.transfer = 0

    def due(self, lease: Lease, tokens: int) -> bool:
        """Whether `tokens` computed ones hold a full block that a commit would offer."""
        current = lease.session == self.book.session != 0
        return current and not lease.refused and tokens // self.config.page_size > lease.sent

    def commit(self, computed: Sequence[tuple[Lease, U32]], soon: int = 0) -> None:
        """Offer the full blocks among each lease's computed tokens to the daemon, all in one call,
        after the step that filled them. Also tops the grant up, by what is needed `soon`."""
        session, size = self.book.session, self.config.page_size
        batch: list[tuple[Lease, LeaseCommit]] = []
        for lease, tokens in computed:
            if lease.session != session or not self.due(lease, len(tokens)):
                continue
            full = len(tokens) // size
            pages = np.array(lease.pages[lease.sent : full], np.uint32)
            new = tokens[lease.sent * size : full * size]
            batch.append((lease, LeaseCommit(lease.request_id, lease.sent, new, pages)))
            lease.sent = full
        wanted = self._wanted(soon)
        if batch:
            self._in_order(self._commit, session, batch, wanted)
        elif wanted and session and not self._topping_up:
            self._topping_up = True
            self._in_order(self._grant, wanted)

    def release(self, leases: Sequence[Lease]) -> None:
        """Close leases whose pages nothing reads any more. Their private pages become free."""
        if all(lease.session == 0 for lease in leases):
            for lease in leases:
                self.book.drop(lease.pages)
        else:  # behind their commits, whose answers say whose the pages are
            self._in_order(self._release, list(leases))

    def cancel(self, request_id: bytes) -> None:
        """Tell the daemon that an acquire under way is not wanted; its future still comes."""
        self._in_order(self._release, [Lease(request_id, self.book.session)])

    def reclaim(self, pages: int) -> bool:
        """Wait for what was released, ask for a grant if need be; whether `pages` are free then."""
        future = self._in_order(self._refill, pages)
        try:
            future.result(self.config.grant_timeout_s)
        except FutureTimeout:
            log.warning("the daemon didn't answer a request for %d pages in time", pages)
        return self.book.free >= pages

    def close(self) -> None:
        """End the session in order. No other call may be under way, or follow."""
        self._acquires.shutdown()
        self._operations.shutdown()
        if self._client is not None:
            self._client.close()

    def leases(self) -> list[Lease]:
        """Open leases of the session, for checks."""
        with self._lock:
            return list(self._open.values())

    # what the client calls, on its own thread

    def kept_pages(self) -> U32:
        """Pages that the engine keeps when a session begins."""
        return self.book.offer(self.config.low_water)

    def on_attached(self, granted: U32) -> None:
        """A session begins."""
        with self._lock:
            self._open.clear()
            session = self.book.begin(granted)
        self.attachment.begun(session, len(granted))

    def on_detached(self, detached: errors.Detached) -> None:
        """The session is over, or one could not begin."""
        with self._lock:
            unsettled = [p for lease in self._open.values() if lease.transfer for p in lease.pages]
            self._open.clear()
            self.book.end(dead=detached.reason == "dead", unsettled=unsettled)
        self.attachment.ended(detached)

    def on_attach_failed(self, error: errors.Kvc2Error) -> None:
        """There is no session, and why."""
        self.attachment.failed(error)

    # what runs on the executors

    def _in_order(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run on the bridge thread, behind what was given to it before."""
        future = self._operations.submit(call, *arguments)
        future.add_done_callback(_log_failure)
        return future

    def _acquire(
        self, client: CacheClient, request_id: bytes, tokens: U32, caller: Caller, hints: Hints
    ) -> Lease:
        session = self.book.session
        if not session:  # it ended since: an answer would be of one that isn't known here
            return Lease(request_id)
        try:
            found = client.acquire(
                self._namespace(client, caller),
                request_id,
                tokens,
                grant_pages=self._wanted(0),
                hints=hints_of(hints, ended=False),
            )
        except Exception as error:  # whatever it is, the request runs
            self._fault("acquire", error)
            self.cancel(request_id)  # it may have been opened all the same
            return Lease(request_id)
        pages = found.prefix_pages
        blocks = len(pages)
        lease = Lease(
            request_id,
            session,
            [int(page) for page in pages],
            matched_tokens=blocks * self.config.page_size,
            tiers=found.tiers,
            computing_tokens=found.computing_tokens,
            transfer=found.transfer,
            sent=blocks,
            settled=blocks,
            hints=hints,
        )
        with self._lock:  # a session that ends meanwhile must see the lease, or the lease its end
            current = self.book.lend(session, pages)
            if current:
                self._open[request_id] = lease
        if not current:
            # if a later session answered, it has the lease open. Pages that it granted stay its
            # own: which session answered isn't known, and one given back twice would be in use
            self.cancel(request_id)
            return Lease(request_id)
        self.book.granted(session, found.granted_pages)
        return lease

    def _matched(self, tokens: U32, caller: Caller) -> int:
        if self._client is None or not self.book.session:
            return 0
        try:
            namespace = self._namespace(self._client, caller)
            return self._client.match(namespace, tokens).matched_tokens
        except Exception as error:  # whatever it is, the request runs
            self._fault("match", error)
            return 0

    def _announce(self, client: CacheClient, tokens: U32, caller: Caller) -> None:
        try:
            client.prefetch(self._namespace(client, caller), tokens)
        except Exception as error:  # whatever it is, the request runs
            self._fault("prefetch", error)

    def _namespace(self, client: CacheClient, caller: Caller) -> Any:
        """The daemon's namespace of this caller. Salts are the callers' choice: the handle of one
        that was not used for long is let go of, and made again when it comes back."""
        with self._lock:
            known = self._namespaces.use(caller)
        if known is not None:
            return known
        opened = client.open_namespace(self.config.identity, caller.tenant, caller.salt)
        with self._lock:
            if len(self._namespaces) >= NAMESPACES_MAX and caller not in self._namespaces:
                self._namespaces.drop(next(self._namespaces.victims(caller.tenant)))
                self._metrics.salts_let_go.inc()
            self._namespaces.put(caller.tenant, caller, opened)
        return opened

    def _commit(self, session: int, batch: list[tuple[Lease, LeaseCommit]], wanted: int) -> None:
        client = self._client
        assert client is not None
        for _, part in batch:
            if not self.book.committing(session, part.pages.tolist()):
                return
        try:
            answer = client.commit(
                [part for _, part in batch],
                grant_pages=wanted,
                prefill_tokens_per_s=self.prefill_rate,
            )
            results = [list(each) for each in answer.results]
            self.book.granted(session, answer.granted_pages)
        except (errors.Detached, errors.Unreachable) as error:
            # whether it took effect is not known: the pages stay unsure (see pages.py)
            for lease, _ in batch:
                lease.refused = True
            self._fault("commit", error)
            return
        except errors.Kvc2Error as error:
            results = [[REFUSED] * len(part.pages) for _, part in batch]
            self._fault("commit", error)
        for (lease, part), each in zip(batch, results, strict=True):
            self.book.committed(session, part.pages.tolist(), each)
            lease.settled += len(each)
            lease.refused |= REFUSED in each
            for code, name in enumerate(ANSWERS):
                self._metrics.commits.labels(name).inc(each.count(code))

    def _release(self, leases: list[Lease]) -> None:
        with self._lock:
            for lease in leases:
                self._open.pop(lease.request_id, None)
        for lease in leases:
            self.book.drop(lease.pages)
        session = self.book.session
        known = [lease for lease in leases if session and lease.session == session]
        if not known or self._client is None:
            return
        returned = self.book.give_back(self.config.high_water)
        try:
            # what ends no session stays what acquire was told
            ended = [lease.ended and lease.hints.session_end for lease in known]
            said = [
                hints_of(lease.hints if end else NO_HINTS, ended=end)
                for lease, end in zip(known, ended, strict=True)
            ]
            answer = self._client.release(
                [lease.request_id for lease in known],
                returned=returned,
                grant_pages=self._wanted(0),
                hints=said if any(ended) else (),
            )
            self.book.granted(session, answer.granted_pages)
        except errors.Kvc2Error as error:
            self._fault("release", error)

    def _grant(self, pages: int) -> None:
        session = self.book.session
        try:
            if self._client is not None and session and pages > 0:
                self.book.granted(session, self._client.grant(pages))
        except errors.Kvc2Error as error:
            self._fault("grant", error)
        finally:
            self._topping_up = False

    def _refill(self, pages: int) -> None:
        self._grant(pages - self.book.free)

    def _wanted(self, soon: int) -> int:
        return max(0, self.config.low_water + soon - self.book.free)

    def _fault(self, call: str, error: Exception) -> None:
        self._metrics.faults.labels(call).inc()
        unknown = not isinstance(error, errors.Kvc2Error)
        log.warning("%s: %s", call, error, exc_info=unknown)


def _log_failure(future: Future[None]) -> None:
    """A bug on the bridge thread: its pages stay unsure, which is safe, but it must be seen."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("the bridge to the daemon failed", exc_info=error)


@dataclass(frozen=True)
class Daemon:
    """Where the daemon listens, and what it is told of this engine's pool."""

    address: str
    pool: PoolMemory
    num_pages: int
    segment_bytes: int
    engine_name: str

    def client(self, prefix: Prefix) -> Client:
        """A client that attaches in the background, and again whenever it must."""
        layout = layer_major(
            prefix.config.layers,
            self.num_pages,
            segment_bytes=self.segment_bytes,
            page_size=prefix.config.page_size,
        )
        return Client(
            self.address,
            pool=self.pool,
            layout=layout,
            engine_name=self.engine_name,
            engine=prefix,
        )


def open_prefix(
    book: PageBook, config: BridgeConfig, metrics: EngineMetrics, daemon: Daemon | None
) -> Prefix:
    """A bridge on threads of its own, attached to the daemon if there is one."""
    prefix = Prefix(
        book,
        config,
        operations=ThreadPoolExecutor(1, "kvc2-bridge"),
        acquires=ThreadPoolExecutor(ACQUIRES_MAX, "kvc2-acquire"),
        metrics=metrics,
        address=None if daemon is None else daemon.address,
    )
    if daemon is not None:
        prefix.connect(daemon.client)
    return prefix
