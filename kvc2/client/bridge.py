"""An engine's bridge to the daemon: leases, commits, releases, grants, and life without it.

Not responsible for who runs next, nor for what a page holds (both the engine's), nor for who owns
which page (pages.py).

A request's way: `acquire` (the one call that a request waits for, by its future), `grow` its block
table as it grows, `commit` full blocks after a step, `release`. Commits, releases and grants run in
order on one thread (calls.py), so that a slow or silent daemon never stalls a step. Without a
session the same calls work on the engine's own pages, without hits. A fault is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import numpy as np

from kvc2 import errors
from kvc2.answers import NO_HINTS, U32, Asked, Explained, Hints, LeaseCommit, beginning
from kvc2.client.calls import BridgeConfig, CacheClient, Calls, SoftPin
from kvc2.client.client import Client
from kvc2.client.connection import SessionOptions
from kvc2.client.counters import NO_COUNTERS, Counters
from kvc2.client.health import DaemonHealth
from kvc2.client.memory import EngineMemory
from kvc2.client.namespaces import Caller
from kvc2.client.pages import PageBook
from kvc2.client.sessions import Lease, Sessions
from kvc2.client.share import Share
from kvc2.host.address import Address
from kvc2.layout import Layout

log = logging.getLogger(__name__)

WAIT_SLICE_S = 0.1  # how often a wait for a layer looks whether the session still lives
ACQUIRES_MAX = 8  # calls under way; each may wait for a disk


class PrefixLostError(Exception):
    """A promised prefix did not arrive: the requests that depend on it must be computed."""


@dataclass(frozen=True)
class Anybody:
    """A namespaces.Caller: whoever shares with all of the daemon's default tenant."""

    tenant: str = ""
    salt: bytes = b""


ANYBODY = Anybody()


class Bridge:
    """Leases for the one thread of an engine that schedules: it alone calls the methods, except
    `leases` and `health.state`, which any thread may."""

    def __init__(
        self,
        book: PageBook,
        config: BridgeConfig,
        *,
        counters: Counters = NO_COUNTERS,
        address: str | None = None,
    ) -> None:
        self.health = DaemonHealth(address, counters)
        self.book = book
        self.config = config
        self.prefill_rate = 0.0  # tokens/s, told with each commit; 0: not measured yet
        self._counters = counters
        self._sessions = Sessions(book, config.low_water, self.health)
        self._calls: Calls | None = None

    def connect(
        self,
        make_client: Callable[[Sessions], CacheClient],
        *,
        ordered: Executor,
        acquires: Executor,
    ) -> None:
        """From now on there may be sessions, which the client tells of as `keeper.Engine` says. The
        executors are closed with the bridge (see Calls)."""
        self._calls = Calls(
            make_client(self._sessions),
            self._sessions,
            self.config,
            self._counters,
            ordered=ordered,
            acquires=acquires,
        )

    def acquire(
        self,
        request_id: bytes,
        what: U32 | Asked,
        caller: Caller = ANYBODY,
        *,
        cached: bool = True,
        hints: Hints = NO_HINTS,
    ) -> Future[Lease]:
        """A lease on the longest cached prefix of some tokens, whose extras hold for its commits;
        without a session, or if not `cached`, an empty one. Never fails: a fault is a miss."""
        if cached and self._calls is not None and self.book.session:
            return self._calls.acquire(request_id, what, caller, hints)
        done: Future[Lease] = Future()
        done.set_result(Lease(request_id))
        return done

    def matched(self, what: U32 | Asked, caller: Caller = ANYBODY) -> Future[int]:
        """Tokens that a lease would match now. Changes nothing; 0 on a fault."""
        if self._calls is not None:
            return self._calls.matched(what, caller)
        done: Future[int] = Future()
        done.set_result(0)
        return done

    def announce(self, what: U32 | Asked, caller: Caller = ANYBODY) -> None:
        """A request of these tokens comes soon: what is on disk of them may come to memory now. A
        hint; what became of it shows when the lease is asked for."""
        if self._calls is not None and self.book.session:
            self._calls.announce(what, caller)

    def pin(self, pins: Sequence[SoftPin], caller: Caller = ANYBODY) -> None:
        """Have the daemon pin these prefixes softly in memory, there or not yet. A prefix that has
        a pin keeps it, if that is stronger. Each has a block at least. Without a session nothing is
        pinned; a fault is no request's concern."""
        if self._calls is not None and self.book.session and pins:
            self._calls.pin(pins, caller)

    def settled(self, lease: Lease) -> Future[int]:
        """Leading tokens of the lease that the daemon has, once what was committed is answered,
        which a silent daemon takes its time for; 0: there is no session."""
        if self._calls is not None and lease.session:
            return self._calls.settled(lease)
        done: Future[int] = Future()
        done.set_result(0)
        return done

    def explain(self, lease: Lease) -> Future[Explained | errors.Kvc2Error]:
        """Why what it found is not longer, or why that isn't told: Detached, since the session that
        served it is over or none did, or what the daemon said. Changes nothing, never fails."""
        session = self.book.session
        if self._calls is not None and session and lease.session == session:
            return self._calls.explain(lease.request_id)
        gone: Future[Explained | errors.Kvc2Error] = Future()
        gone.set_result(errors.Detached("silent" if self.book.silent else "dead"))
        return gone

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
        """What is to be called before a step reads a layer; None when all of it is there. It waits,
        and raises PrefixLostError when a layer doesn't come in time or its session is over."""
        pending = [lease for lease in leases if lease.transfer]
        if not pending or self._calls is None:
            return None
        client = self._calls.client
        # transfers of a session run first in, first out: the last one's layer implies all others'
        transfer = max(lease.transfer for lease in pending)
        sessions = {lease.session for lease in pending}

        def ready(layer: int) -> None:
            for _ in range(max(1, round(self.config.load_timeout_s / WAIT_SLICE_S))):
                if sessions != {self.book.session}:
                    raise PrefixLostError("the session is over")
                came = client.wait_layer(transfer, layer, WAIT_SLICE_S)
                if came and sessions == {self.book.session}:  # another one counts them anew
                    return
            raise PrefixLostError(f"layer {layer} of transfer {transfer} didn't arrive")

        return ready

    def arrived(self, leases: Sequence[Lease]) -> None:
        """A step has read all layers: these prefixes need no waiting any more."""
        self._sessions.arrived(leases)

    def due(self, lease: Lease, tokens: int) -> bool:
        """Whether `tokens` computed ones hold a full block that a commit would offer."""
        current = lease.session == self.book.session != 0
        return current and not lease.refused and tokens // self.config.page_size > lease.sent

    def commit(self, computed: Sequence[tuple[Lease, U32]], soon: int = 0) -> None:
        """Offer the full blocks among each lease's computed tokens to the daemon, all in one call,
        after the step that filled them. Also tops the grant up, by what is needed `soon`."""
        if self._calls is None:
            return
        session, size = self.book.session, self.config.page_size
        batch: list[tuple[Lease, LeaseCommit]] = []
        for lease, tokens in computed:
            if lease.session != session or not self.due(lease, len(tokens)):
                continue
            full = len(tokens) // size
            pages = np.array(lease.pages[lease.sent : full], np.uint32)
            new = tokens[lease.sent * size : full * size]
            begun = beginning(lease.extras, lease.sent * size, full * size)
            batch.append((lease, LeaseCommit(lease.request_id, lease.sent, new, pages, begun)))
            lease.sent = full
        if batch:
            self._calls.commit(session, batch, soon=soon, prefill_rate=self.prefill_rate)
        else:
            self._calls.top_up(soon)

    def release(self, leases: Sequence[Lease]) -> None:
        """Close leases whose pages nothing reads any more. Their private pages become free."""
        if self._calls is None or all(lease.session == 0 for lease in leases):
            for lease in leases:
                self.book.drop(lease.pages)
        else:
            self._calls.release(leases)

    def cancel(self, request_id: bytes) -> None:
        """Tell the daemon that an acquire under way is not wanted; its future still comes."""
        if self._calls is not None:
            self._calls.cancel(request_id)

    def reclaim(self, pages: int) -> bool:
        """Wait for what was released, ask for a grant if need be; whether `pages` are free then."""
        if self._calls is not None:
            try:
                self._calls.refill(pages).result(self.config.grant_timeout_s)
            except FutureTimeout:
                log.warning("the daemon didn't answer a request for %d pages in time", pages)
        return self.book.free >= pages

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was committed and released is answered. No engine has to."""
        if self._calls is not None:
            try:
                self._calls.refill(0).result(timeout_s)
            except FutureTimeout:
                return False
        return True

    def share(self) -> Share | None:
        """What worker processes of this engine open (share.py): there the sessions are numbered as
        in `Lease.session`. None: the bridge has no daemon to attach to, and no pool."""
        return None if self._calls is None else self._calls.client.share()

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until there is a session. No engine has to: without one, requests run without
        hits."""
        return self._calls is not None and self._calls.client.wait_attached(timeout_s)

    def close(self) -> None:
        """End the session in order. No other call may be under way, or follow."""
        if self._calls is not None:
            self._calls.close()

    def leases(self) -> list[Lease]:
        """Open leases of the session, for checks."""
        return self._sessions.leases()


@dataclass(frozen=True)
class Daemon:
    """Where the daemon listens, and what it is told of this engine's pool."""

    address: str | Address
    pool: EngineMemory
    layout: Layout
    engine_name: str

    def client(self, sessions: Sessions) -> Client:
        """A client that attaches in the background, and again whenever it must."""
        return Client(
            self.address,
            pool=self.pool,
            layout=self.layout,
            options=SessionOptions(self.engine_name),
            engine=sessions,
        )


def open_bridge(
    num_pages: int,
    config: BridgeConfig,
    daemon: Daemon | None = None,
    counters: Counters = NO_COUNTERS,
    prepare: Callable[[Bridge], None] = lambda _: None,
) -> Bridge:
    """A bridge over a pool of so many pages, on threads of its own; attached to the daemon if there
    is one. `prepare` is called before that: pages taken then were never the daemon's."""
    address = None if daemon is None else str(daemon.address)
    bridge = Bridge(PageBook(num_pages), config, counters=counters, address=address)
    prepare(bridge)
    if daemon is not None:
        bridge.connect(
            daemon.client,
            ordered=ThreadPoolExecutor(1, "kvc2-bridge"),
            acquires=ThreadPoolExecutor(ACQUIRES_MAX, "kvc2-acquire"),
        )
    return bridge
