"""The sessions of one engine as they come and go: what each means for its pages and open leases.

Not responsible for when one begins or ends (keeper.py), nor for who owns a page in it (pages.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvc2 import errors
from kvc2.answers import NO_HINTS, U32, Hints, Media, TierTokens
from kvc2.client.health import DaemonHealth
from kvc2.client.pages import PageBook


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
    held: int = 0  # of these, the leading ones that the daemon has: none of them was refused
    refused: bool = False  # a commit was refused: nothing more is committed
    hints: Hints = NO_HINTS
    extras: Sequence[Media] = ()  # of its prompt
    ended: bool = False  # its request has been answered whole


class Sessions:
    """The page book, and the leases that are open in the session under way. The client calls the
    first four methods on its thread (keeper.Engine), any thread the others.

    One lock over both: a session that ends while a lease opens must see the lease, or the lease its
    end. `spare`: free pages that the engine keeps when a session begins.
    """

    def __init__(self, book: PageBook, spare: int, health: DaemonHealth) -> None:
        self.book = book
        self.health = health
        self._spare = spare
        self._lock = threading.Lock()
        self._open: dict[bytes, Lease] = {}

    def kept_pages(self) -> U32:
        """Pages that the engine keeps when a session begins."""
        return self.book.offer(self._spare)

    def on_attached(self, granted: U32) -> None:
        """A session begins."""
        with self._lock:
            self._open.clear()
            session = self.book.begin(granted)
        self.health.begun(session, len(granted))

    def on_detached(self, detached: errors.Detached) -> None:
        """The session is over, or one could not begin."""
        with self._lock:
            unsettled = [p for lease in self._open.values() if lease.transfer for p in lease.pages]
            self._open.clear()
            self.book.end(dead=detached.reason == "dead", unsettled=unsettled)
        self.health.ended(detached)

    def on_attach_failed(self, error: errors.Kvc2Error) -> None:
        """There is no session, and why."""
        self.health.failed(error)

    def opened(self, lease: Lease, prefix_pages: U32) -> bool:
        """The daemon has answered an acquire by this lease. False: its session is over by now, and
        the lease with it."""
        with self._lock:
            current = self.book.lend(lease.session, prefix_pages)
            if current:
                self._open[lease.request_id] = lease
        return current

    def arrived(self, leases: Sequence[Lease]) -> None:
        """All layers of their prefixes are in the pool."""
        with self._lock:
            for lease in leases:
                lease.transfer = 0

    def closed(self, leases: Sequence[Lease]) -> None:
        """Nothing reads their pages any more."""
        with self._lock:
            for lease in leases:
                self._open.pop(lease.request_id, None)
        for lease in leases:
            self.book.drop(lease.pages)

    def leases(self) -> list[Lease]:
        """Those that are open."""
        with self._lock:
            return list(self._open.values())
