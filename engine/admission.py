"""Who waits, and for what: arrival -> a place in the batch -> a lease on its cached prefix.

Tenants take turns (turns); within one it is first come, first served. A prompt whose next tokens
another request computes now gives its lease back, waits for those commits for a bounded time, and
then hits them, so that identical prompts that come together are prefilled once. Not
responsible for what a step computes (scheduler).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection
from collections.abc import Sequence as Many

import numpy as np

from engine.metrics import EngineMetrics
from engine.prefix import Bridge, Lease, SoftPin, explain
from engine.sequence import Sequence
from engine.turns import Turns

RATE_UNMEASURED = 200.0  # tokens/s before the first prefill: slow, so that waits are long enough
WAIT_SLACK = 1.5  # of the estimate, since the other one shares its steps with others
WAIT_LEAST_S = 0.5
WAIT_MAX_S = 60.0
ANNOUNCED_MAX = 4  # of those that wait, the next ones: what comes too early is evicted again
POLL_S = 0.05  # between two matches for a prefix that another engine computes


class Admission:
    """Sequences that don't run yet. The scheduler's thread calls all of it; nothing here blocks."""

    def __init__(
        self,
        *,
        bridge: Bridge,
        max_running: int,
        metrics: EngineMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._bridge = bridge
        self._max_running = max_running
        self._metrics = metrics
        self._clock = clock
        self.turns = Turns()
        self.waiting: list[Sequence] = []  # by arrival
        self.acquiring: list[Sequence] = []
        self.deferred: list[Sequence] = []
        self._cancelled: list[Sequence] = []  # their leases are released when they come

    def __len__(self) -> int:
        return len(self.waiting) + len(self.acquiring) + len(self.deferred) + len(self._cancelled)

    def put(self, sequence: Sequence) -> None:
        """Queue it by arrival: one that was set back is older than those that wait."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """It is no longer wanted. Not here: no change."""
        for group in (self.waiting, self.deferred):
            if sequence in group:
                group.remove(sequence)
        if sequence in self.acquiring:
            self.acquiring.remove(sequence)
            self._cancelled.append(sequence)
            self._bridge.cancel(sequence.lease_id())

    def started(self, running: Collection[Sequence], rate: float | None) -> list[Sequence]:
        """Those that have their lease now and join the `running` ones; asks for further leases.
        `rate`: measured prefill, tokens/s."""
        ready = self._collect(running, rate)
        self._end_waits(running)
        active = [*running, *ready]
        self.turns.wants(each.tenant for each in (*active, *self._coming(), *self.waiting))
        queue = self.turns.sorted(self.waiting, [*active, *self._coming()])
        while queue and self._places(active) > 0 and self._has_room(queue[0], active):
            self.waiting.remove(queue[0])
            self._acquire(queue[0])
            queue = self.turns.sorted(self.waiting, [*active, *self._coming()])
        self._announce(queue)
        return ready

    def yielding(self, running: Collection[Sequence]) -> list[Sequence]:
        """Who gives its place to a tenant that has none, where no place is free."""
        if self._places(running) > 0:
            return []
        coming = {each.tenant for each in self._coming()}
        return self.turns.yielding([s for s in self.waiting if s.tenant not in coming], running)

    def _coming(self) -> list[Sequence]:
        return [*self.acquiring, *self.deferred]

    def _announce(self, queue: Many[Sequence]) -> None:
        """Those that have no place yet find in memory what is on disk now."""
        for sequence in queue[:ANNOUNCED_MAX]:
            if sequence.cached and not sequence.announced:
                sequence.announced = True
                self._bridge.announce(sequence.array(), sequence.request.caller)

    def _places(self, active: Collection[Sequence]) -> int:
        return self._max_running - len(active) - len(self.acquiring) - len(self.deferred)

    def _has_room(self, sequence: Sequence, active: Collection[Sequence]) -> bool:
        """Whether its tokens fit beside what is held and what the others have yet to compute;
        alone, it always may try."""
        others = [*active, *self.acquiring, *self.deferred]
        if not others:
            return True
        size = self._bridge.config.page_size
        coming = -(-(len(sequence.tokens) + 1) // size)
        for other in others:
            held = len(other.lease.pages) if other.lease else 0
            coming += max(0, -(-(len(other.tokens) + 1) // size) - held)
        return self._bridge.book.counts().held + coming <= self._bridge.book.capacity()

    # leases

    def _acquire(self, sequence: Sequence) -> None:
        sequence.attempts += 1
        sequence.acquiring = self._bridge.acquire(
            sequence.lease_id(),
            sequence.array(),
            sequence.request.caller,
            cached=sequence.cached,
            hints=sequence.request.hints,
        )
        self.acquiring.append(sequence)

    def _collect(self, running: Collection[Sequence], rate: float | None) -> list[Sequence]:
        ready: list[Sequence] = []
        for sequence in [s for s in self._cancelled if s.acquiring and s.acquiring.done()]:
            self._cancelled.remove(sequence)
            self._bridge.release([_take_lease(sequence)])
        for sequence in [s for s in self.acquiring if s.acquiring and s.acquiring.done()]:
            self.acquiring.remove(sequence)
            lease = _take_lease(sequence)
            if self._should_wait(sequence, lease):
                self._defer(sequence, lease, [*running, *ready], rate)
            else:
                if sequence.request.explain and sequence.counts(lease):
                    sequence.explanation = explain(self._bridge, lease)
                if not sequence.begun:
                    self._pin(sequence)
                sequence.begin(lease)
                ready.append(sequence)
        return ready

    def _pin(self, sequence: Sequence) -> None:
        """What its caller wants kept, of which a part may be computed yet."""
        size, request = self._bridge.config.page_size, sequence.request
        pins = [pin for pin in request.pins if pin.num_tokens >= size]
        soft = [SoftPin(request.tokens[: pin.num_tokens], pin.ttl_s) for pin in pins]
        self._bridge.pin(soft, request.caller)

    # waiting for a prefix that another request computes now

    def _should_wait(self, sequence: Sequence, lease: Lease) -> bool:
        if lease.computing_tokens < self._bridge.config.page_size:
            return False
        return sequence.wait_until is None or self._clock() < sequence.wait_until

    def _defer(
        self, sequence: Sequence, lease: Lease, running: Collection[Sequence], rate: float | None
    ) -> None:
        """Give the lease back, so that nobody takes this one for the one that computes."""
        if sequence.wait_until is None:
            estimate = lease.computing_tokens / (rate or RATE_UNMEASURED)
            bound = min(WAIT_MAX_S, WAIT_SLACK * estimate + WAIT_LEAST_S)
            sequence.wait_until = self._clock() + bound
            self._metrics.waits.inc()
        size = self._bridge.config.page_size
        sequence.wait_tokens = lease.matched_tokens + lease.computing_tokens
        sequence.wait_for, common = _computing(sequence, running)
        if sequence.wait_for is not None:
            if common // size * size <= lease.matched_tokens:
                sequence.wait_for = None
            else:
                sequence.wait_tokens = min(sequence.wait_tokens, common // size * size)
        self._bridge.release([lease])
        self.deferred.append(sequence)

    def _end_waits(self, running: Collection[Sequence]) -> None:
        for sequence in [s for s in self.deferred if self._wait_is_over(s, running)]:
            self.deferred.remove(sequence)
            sequence.wait_for = sequence.matching = None
            self._acquire(sequence)

    def _wait_is_over(self, sequence: Sequence, running: Collection[Sequence]) -> bool:
        now = self._clock()
        if sequence.wait_until is None or now >= sequence.wait_until:
            return True
        other = sequence.wait_for
        if other is not None:
            if other not in running or other.lease is None or other.lease.refused:
                return True
            return other.lease.settled * self._bridge.config.page_size >= sequence.wait_tokens
        if sequence.matching is None:
            if now < sequence.match_at:
                return False
            sequence.match_at = now + POLL_S
            sequence.matching = self._bridge.matched(sequence.array(), sequence.request.caller)
        if not sequence.matching.done():
            return False
        matched, sequence.matching = sequence.matching.result(), None
        return matched >= sequence.wait_tokens


def _take_lease(sequence: Sequence) -> Lease:
    assert sequence.acquiring is not None
    lease, sequence.acquiring = sequence.acquiring.result(), None
    return lease


def _computing(sequence: Sequence, running: Collection[Sequence]) -> tuple[Sequence | None, int]:
    """The running one that shares the longest beginning, and how many tokens that is."""
    mine = sequence.array()
    best: tuple[Sequence | None, int] = (None, 0)
    for other in running:
        if other.request.caller != sequence.request.caller or not other.cached:
            continue
        theirs = other.array(len(mine))
        differs = np.flatnonzero(mine[: len(theirs)] != theirs)
        common = int(differs[0]) if len(differs) else len(theirs)
        if common > best[1]:
            best = (other, common)
    return best
