"""What is worth waiting for: bytes on their way from a slower tier, or the engine's computing.

Pure: what was measured comes in, a choice goes out. Not here: who measures the tiers (mover.py) and
the engine (its scheduler, which reports with each commit), and who acts on the choice (loading.py).

A prompt's matched blocks that the session's pool does not hold lie in runs, each in one tier. The
engine can't begin before its prefix is settled, so that k blocks brought and the rest computed take

    ready(k) = sum over the tiers of the k blocks of (queue + bytes / bandwidth)
             + (tokens of the delta + tokens of the other blocks) / prefill rate

and the best k is at the end of a run, since within one ready() is a straight line, or is what can
be brought before the acquire's deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SMOOTHING = 0.3  # weight of the newest transfer: a change of the disk shows in two or three
FULL_WEIGHT_BYTES = 1 << 20  # smaller transfers measure their fixed costs, and weigh less ...
WEIGHT_MIN = 0.1  # ... but count, where there are no others
PATIENCE_SHARE = 8  # of the computing that is saved: the price of a surprise, the estimate in it
OVERRUN_SHARE = 16  # of the same: what an estimate that takes most of that may be overrun by
LATE_S_MAX = 0.25  # what a busy machine may make of 5 ms; later than that is another speed
LATE_TIMES = 2  # the next one may be later than the latest that is remembered
LATE_FADES = 1 / 32  # of that, with each load: it is remembered for about 22 of them
PROBE_S = 1.0  # between loads that nobody waits for, from a tier that is too slow to wait for
PROBE_S_MAX = 32.0
PROBE_REST = 8  # a probe's own time is at most this part of all time
PROBE_BYTES = 8 << 20  # 8 ms of a fast disk: enough to measure it


@dataclass(frozen=True)
class Estimate:
    """What a transfer from a tier can expect."""

    bandwidth_bytes_per_s: float
    queue_s: float  # before its first byte moves
    late_s: float = 0.0  # how late it may be without being another speed, by what loads have shown

    def seconds(self, num_bytes: float) -> float:
        return self.queue_s + num_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Offer:
    """Consecutive matched blocks in one tier; `estimate` None: not measured yet, taken for free."""

    tier: str
    blocks: int
    estimate: Estimate | None


@dataclass(frozen=True)
class Choice:
    """`blocks`: how many leading ones to bring. `patience_s`: how far bringing them may overrun its
    estimate; None: as far as the caller's own deadline, since the prefill rate isn't known."""

    blocks: int
    patience_s: float | None


def choose(
    offers: Sequence[Offer],
    *,
    page_bytes: int,
    page_size: int,
    prefill_rate: float,
    deadline_s: float = math.inf,
) -> Choice:
    """The k with the least ready(k), the larger of equals, of those that come within the deadline.
    `prefill_rate`: tokens/s; 0: unknown, then all is worth it."""
    every = sum(offer.blocks for offer in offers)
    if prefill_rate <= 0:
        return Choice(every, None)
    best, best_saved, best_spent, best_late_s = 0, 0.0, 0.0, 0.0
    blocks, spent, late_s = 0, 0.0, 0.0
    queued: set[str] = set()
    for offer in offers:
        count = offer.blocks
        if offer.estimate is not None:
            block_s = page_bytes / offer.estimate.bandwidth_bytes_per_s
            spent += 0.0 if offer.tier in queued else offer.estimate.queue_s
            queued.add(offer.tier)
            late_s = max(late_s, offer.estimate.late_s)
            if spent > deadline_s:
                count = 0
            elif spent + count * block_s > deadline_s:
                count = math.floor((deadline_s - spent) / block_s)
            spent += count * block_s
        blocks += count
        saved = blocks * page_size / prefill_rate - spent
        if saved >= best_saved and spent <= deadline_s:
            best, best_saved, best_spent, best_late_s = blocks, saved, spent, late_s
        if count < offer.blocks:
            break
    return Choice(best, patience_s(best * page_size / prefill_rate, best_spent, best_late_s))


def patience_s(computing_s: float, expected_s: float, late_s: float) -> float:
    """How far bringing may overrun what is expected of it, where that saves so much computing.

    In all it may take PATIENCE_SHARE of the computing, so that a fast tier which has become slow
    costs no more than that; where most of that is expected, OVERRUN_SHARE longer. A tier that has
    been late without being slow is waited for longer, but never for longer than computing takes."""
    share = max(computing_s / PATIENCE_SHARE - expected_s, computing_s / OVERRUN_SHARE)
    return max(share, min(late_s, computing_s))


class Meter:
    """What one tier's transfers have shown: averages that forget, and when to look again.

    A transfer that is overdue tells at once, before it has ended: nothing is waited for behind it.
    The next one that ends is believed whole. A tier whose
    estimate is too slow is probed: a load that nobody waits for, at most one in PROBE_S and at most
    1 / (PROBE_REST + 1) of the time, so that a tier which has recovered is known in seconds and one
    which has not costs no request anything. One that looks fast in a probe and is overdue again
    doubles that interval, to PROBE_S_MAX at most: so often, and no more, do requests pay for it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bandwidth = 0.0
        self._queue_s = 0.0
        self._interval_s = PROBE_S
        self._probe_at = 0.0
        self._overdue = False  # a transfer that was: the next one to end decides
        self._late_s = 0.0  # of loads that were late, but not another speed; fades

    @property
    def estimate(self) -> Estimate | None:
        """None before the first transfer. Behind an overdue one the queue has no end."""
        queue_s = math.inf if self._overdue else self._queue_s
        late_s = min(LATE_TIMES * self._late_s, LATE_S_MAX)
        return Estimate(self._bandwidth, queue_s, late_s) if self._bandwidth else None

    def saw(self, num_bytes: int, seconds: float, queue_s: float) -> None:
        """A transfer has ended: it waited, then moved `num_bytes` in `seconds`."""
        if num_bytes <= 0:
            return
        found = num_bytes / max(seconds, 1e-9)
        weight = SMOOTHING * min(1.0, max(WEIGHT_MIN, num_bytes / FULL_WEIGHT_BYTES))
        if self._overdue or not self._bandwidth:
            self._bandwidth, self._queue_s, self._overdue = found, queue_s, False
        self._bandwidth += weight * (found - self._bandwidth)
        self._queue_s += weight * (queue_s - self._queue_s)
        self._rest(seconds)

    def overdue(self, num_bytes: int, seconds: float) -> None:
        """A transfer has not ended after `seconds`: the tier is no faster than that."""
        self._overdue = True
        most = num_bytes / max(seconds, 1e-9)
        self._bandwidth = min(self._bandwidth, most) if self._bandwidth else most
        self._interval_s = min(2 * self._interval_s, PROBE_S_MAX)
        self._rest(seconds)

    def on_time(self) -> None:
        """A transfer that someone waited for came within its estimate."""
        self._interval_s = PROBE_S

    def late(self, seconds: float) -> None:
        """A load for a request came so much later than its estimate (less than 0: sooner), waited
        for to its end or not. How late a tier may be is learnt only from what it pays to wait for:
        one that has become slow teaches no patience."""
        self._late_s *= 1 - LATE_FADES
        if seconds <= LATE_S_MAX:
            self._late_s = max(self._late_s, seconds)

    def may_probe(self) -> bool:
        return self._clock() >= self._probe_at

    def _rest(self, seconds: float) -> None:
        self._probe_at = self._clock() + max(self._interval_s, PROBE_REST * seconds)


Meters = Mapping[str, Meter]
