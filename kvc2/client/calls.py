"""What the bridge asks of the daemon, on threads of its own: acquires many at once, the rest in
order. A fault is a miss.

Not responsible for what is asked when (bridge.py), nor for the wire (client.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from kvc2 import _core, errors
from kvc2.answers import (
    NO_HINTS,
    U32,
    Acquired,
    Asked,
    Committed,
    Explained,
    Hints,
    LeaseCommit,
    Limits,
    Matched,
    Released,
)
from kvc2.client.counters import Answer, Counters
from kvc2.client.namespaces import Caller, Namespaces
from kvc2.client.sessions import Lease, Sessions
from kvc2.client.share import Share

log = logging.getLogger(__name__)

ANSWERS: tuple[Answer, ...] = get_args(Answer)  # by what Commit's results say
Batch = Sequence[tuple[Lease, LeaseCommit]]


@dataclass(frozen=True)
class SoftPin:
    """A prefix that is to be evicted last for `ttl_s` seconds, at least one; its full blocks are
    meant. A stronger pin of it stays: a hard one, or a soft one that ends later."""

    what: U32 | Asked
    ttl_s: int


class CacheClient(Protocol):
    """What the bridge uses of client.Client; a namespace is whatever open_namespace returns."""

    def open_namespace(self, identity: bytes, tenant: str = "", salt: bytes = b"") -> Any: ...

    def acquire(
        self,
        namespace: Any,
        request_id: bytes,
        what: U32 | Asked,
        *,
        grant_pages: int = 0,
        hints: Hints = ...,
    ) -> Acquired: ...

    def commit(
        self,
        commits: Sequence[LeaseCommit],
        *,
        grant_pages: int = 0,
        prefill_tokens_per_s: float = 0.0,
    ) -> Committed: ...

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: U32,
        grant_pages: int = 0,
        hints: Sequence[Hints] = (),
    ) -> Released: ...

    def grant(self, pages: int) -> U32: ...

    def match(self, namespace: Any, what: U32 | Asked) -> Matched: ...

    def prefetch(self, namespace: Any, what: U32 | Asked) -> Any: ...

    def pin(
        self,
        namespace: Any,
        what: U32 | Asked,
        *,
        hard: bool,
        ttl_s: int = 0,
        keep_stronger: bool = False,
    ) -> Any: ...

    def explain_request(self, request_id: bytes) -> Explained: ...

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool: ...

    def wait_attached(self, timeout_s: float) -> bool: ...

    @property
    def limits(self) -> Limits: ...

    def share(self) -> Share: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class BridgeConfig:
    """`low_water`: free pages under which the grant is topped up, `high_water`: over which pages
    are given back. `load_timeout_s`: how long a layer of a promised prefix is waited for."""

    page_size: int
    identity: bytes = b""
    low_water: int = 0
    high_water: int = 1 << 30
    load_timeout_s: float = 10.0
    grant_timeout_s: float = 1.0  # how long a step waits for a grant when pages ran out


class Calls:
    """Calls of one client for the engine whose `sessions` it keeps.

    `ordered` must run what it is given in order (one thread): commits, releases and grants;
    `acquires` may run many at once. Methods return at once; only `close` waits.
    """

    def __init__(
        self,
        client: CacheClient,
        sessions: Sessions,
        config: BridgeConfig,
        counters: Counters,
        *,
        ordered: Executor,
        acquires: Executor,
    ) -> None:
        self.client = client
        self._sessions = sessions
        self._book = sessions.book
        self._config = config
        self._counters = counters
        self._ordered = ordered
        self._acquires = acquires
        self._namespaces = Namespaces(self._open_namespace, counters)
        self._topping_up = False

    # many at once

    def acquire(
        self, request_id: bytes, what: U32 | Asked, caller: Caller, hints: Hints
    ) -> Future[Lease]:
        """A lease, empty after a fault."""
        return self._acquires.submit(self._acquire, request_id, what, caller, hints)

    def matched(self, what: U32 | Asked, caller: Caller) -> Future[int]:
        """Tokens that a lease would match now; 0 after a fault."""
        return self._acquires.submit(self._matched, what, caller)

    def announce(self, what: U32 | Asked, caller: Caller) -> None:
        """Have the daemon bring to memory what it has of them on disk."""
        self._acquires.submit(self._announce, what, caller)

    def pin(self, pins: Sequence[SoftPin], caller: Caller) -> None:
        """Have the daemon evict each of them last, for its time."""
        self._acquires.submit(self._pin, pins, caller)

    def explain(self, request_id: bytes) -> Future[Explained | errors.Kvc2Error]:
        """What the daemon remembers of this acquire, or why it doesn't tell."""
        return self._acquires.submit(self._explain, request_id)

    # in order

    def commit(self, session: int, batch: Batch, *, soon: int, prefill_rate: float) -> None:
        """Offer these blocks to the daemon; a grant that is topped up comes with the answer."""
        self._submit(self._commit, session, batch, self._wanted(soon), prefill_rate)

    def top_up(self, soon: int) -> None:
        """Ask for a grant if free pages are too few for what is needed `soon`."""
        wanted = self._wanted(soon)
        if wanted and self._book.session and not self._topping_up:
            self._topping_up = True
            self._submit(self._grant, wanted)

    def release(self, leases: Sequence[Lease]) -> None:
        """Close them, behind their commits, whose answers say whose the pages are."""
        self._submit(self._release, list(leases))

    def cancel(self, request_id: bytes) -> None:
        """Close a lease that may have been opened, or may yet be."""
        self._submit(self._release, [Lease(request_id, self._book.session)])

    def refill(self, pages: int) -> Future[None]:
        """Done when all earlier calls are, and a grant was asked for if fewer `pages` are free."""
        return self._submit(lambda: self._grant(pages - self._book.free))

    def settled(self, lease: Lease) -> Future[int]:
        """`lease.held` in tokens, once all earlier calls are answered."""
        return self._ordered.submit(lambda: lease.held * self._config.page_size)

    def close(self) -> None:
        """Wait for the calls under way, then end the session in order."""
        self._acquires.shutdown()
        self._ordered.shutdown()
        self.client.close()

    # what runs on the executors

    def _submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        future = self._ordered.submit(call, *arguments)
        future.add_done_callback(_log_failure)
        return future

    def _acquire(self, request_id: bytes, what: U32 | Asked, caller: Caller, hints: Hints) -> Lease:
        session = self._book.session
        if not session:  # it ended since: an answer would be of one that isn't known here
            return Lease(request_id)
        try:
            found = self.client.acquire(
                self._namespaces.of(caller),
                request_id,
                what,
                grant_pages=self._wanted(0),
                hints=hints_of(hints, ended=False),
            )
        except Exception as error:  # whatever it is, the request runs
            self._fault("acquire", error)
            self.cancel(request_id)  # it may have been opened all the same
            return Lease(request_id)
        blocks = len(found.prefix_pages)
        lease = Lease(
            request_id,
            session,
            [int(page) for page in found.prefix_pages],
            matched_tokens=blocks * self._config.page_size,
            tiers=found.tiers,
            computing_tokens=found.computing_tokens,
            transfer=found.transfer,
            sent=blocks,
            settled=blocks,
            held=blocks,
            hints=hints,
            extras=Asked.of(what).extras,
        )
        if not self._sessions.opened(lease, found.prefix_pages):
            # if a later session answered, it has the lease open. Pages that it granted stay its
            # own: which session answered isn't known, and one given back twice would be in use
            self.cancel(request_id)
            return Lease(request_id)
        self._book.granted(session, found.granted_pages)
        return lease

    def _matched(self, what: U32 | Asked, caller: Caller) -> int:
        if not self._book.session:
            return 0
        try:
            return self.client.match(self._namespaces.of(caller), what).matched_tokens
        except Exception as error:  # whatever it is, the request runs
            self._fault("match", error)
            return 0

    def _announce(self, what: U32 | Asked, caller: Caller) -> None:
        try:
            self.client.prefetch(self._namespaces.of(caller), what)
        except Exception as error:  # whatever it is, the request runs
            self._fault("prefetch", error)

    def _pin(self, pins: Sequence[SoftPin], caller: Caller) -> None:
        for pin in pins:
            if not self._book.session:
                return
            try:
                namespace = self._namespaces.of(caller)
                self.client.pin(
                    namespace, pin.what, hard=False, ttl_s=pin.ttl_s, keep_stronger=True
                )
            except Exception as error:  # whatever it is, the request runs
                self._fault("pin", error)

    def _explain(self, request_id: bytes) -> Explained | errors.Kvc2Error:
        try:
            return self.client.explain_request(request_id)
        except errors.Kvc2Error as error:
            return error

    def _open_namespace(self, tenant: str, salt: bytes) -> Any:
        with suppress(errors.Detached):
            self._namespaces.most = self.client.limits.max_namespaces
        return self.client.open_namespace(self._config.identity, tenant, salt)

    def _commit(self, session: int, batch: Batch, wanted: int, prefill_rate: float) -> None:
        for _, part in batch:
            if not self._book.committing(session, part.pages.tolist()):
                return
        try:
            answer = self.client.commit(
                [part for _, part in batch], grant_pages=wanted, prefill_tokens_per_s=prefill_rate
            )
            results = [list(each) for each in answer.results]
            self._book.granted(session, answer.granted_pages)
        except (errors.Detached, errors.Unreachable) as error:
            # whether it took effect is not known: the pages stay unsure (see pages.py)
            for lease, _ in batch:
                lease.refused = True
            self._fault("commit", error)
            return
        except errors.Kvc2Error as error:
            results = [[_core.REFUSED] * len(part.pages) for _, part in batch]
            self._fault("commit", error)
        for (lease, part), each in zip(batch, results, strict=True):
            self._book.committed(session, part.pages.tolist(), each)
            lease.settled += len(each)
            if not lease.refused:
                lease.held += [*each, _core.REFUSED].index(_core.REFUSED)
            lease.refused |= _core.REFUSED in each
            for code, name in enumerate(ANSWERS):
                self._counters.committed(name, each.count(code))

    def _release(self, leases: Sequence[Lease]) -> None:
        self._sessions.closed(leases)
        session = self._book.session
        known = [lease for lease in leases if session and lease.session == session]
        if not known:
            return
        returned = self._book.give_back(self._config.high_water)
        # what ends no session stays what acquire was told
        ended = [lease.ended and lease.hints.session_end for lease in known]
        said = [
            hints_of(lease.hints if end else NO_HINTS, ended=end)
            for lease, end in zip(known, ended, strict=True)
        ]
        try:
            answer = self.client.release(
                [lease.request_id for lease in known],
                returned=returned,
                grant_pages=self._wanted(0),
                hints=said if any(ended) else (),
            )
            self._book.granted(session, answer.granted_pages)
        except errors.Kvc2Error as error:
            self._fault("release", error)

    def _grant(self, pages: int) -> None:
        session = self._book.session
        try:
            if session and pages > 0:
                self._book.granted(session, self.client.grant(pages))
        except errors.Kvc2Error as error:
            self._fault("grant", error)
        finally:
            self._topping_up = False

    def _wanted(self, soon: int) -> int:
        return max(0, self._config.low_water + soon - self._book.free)

    def _fault(self, call: str, error: Exception) -> None:
        self._counters.fault(call)
        unknown = not isinstance(error, errors.Kvc2Error)
        log.warning("%s: %s", call, error, exc_info=unknown)


def hints_of(said: Hints, *, ended: bool) -> Hints:
    """For the wire. A lease that is given back to be asked for again has not `ended`, and so its
    session has not either."""
    return replace(said, session_end=ended and said.session_end)


def _log_failure(future: Future[None]) -> None:
    """A bug on the ordered thread: its pages stay unsure, which is safe, but it must be seen."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("the bridge to the daemon failed", exc_info=error)
