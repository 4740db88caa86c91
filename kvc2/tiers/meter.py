"""What a tier's transfers have shown: how fast it is, how late, and when to look again.

Not here: who measures (moving/mover.py), and what is worth waiting for (moving/pace.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SMOOTHING = 0.3  # weight of the newest transfer: a change of the disk shows in two or three
FULL_WEIGHT_BYTES = 1 << 20  # smaller transfers measure their fixed costs, and weigh less ...
WEIGHT_MIN = 0.1  # ... but count, where there are no others
LATE_S_MAX = 0.25  # what a busy machine may make of 5 ms; later than that is another speed
LATE_TIMES = 2  # the next one may be later than the latest that is remembered
LATE_FADES = 1 / 32  # of that, with each load: it is remembered for about 22 of them
PROBE_S = 1.0  # between loads that nobody waits for, from a tier that is too slow to wait for
PROBE_S_MAX = 32.0
PROBE_BYTES = 8 << 20  # 8 ms of a fast disk: enough to measure it
PROBE_REST = 8  # a probe's own time is at most this part of all time


@dataclass(frozen=True)
class Estimate:
    """What a transfer from a tier can expect."""

    bandwidth_bytes_per_s: float
    queue_s: float  # before its first byte moves
    late_s: float = 0.0  # how late it may be without being another speed, by what loads have shown

    def seconds(self, num_bytes: float) -> float:
        return self.queue_s + num_bytes / self.bandwidth_bytes_per_s


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
