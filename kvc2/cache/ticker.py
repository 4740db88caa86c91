"""The time as the index is told it: whole seconds since the start, from 1.

Not here: the wall's time, which outlives a run (tiers/disk/recency.py).
"""

from __future__ import annotations

from collections.abc import Callable

from kvc2 import _core
from kvc2.moving.changes import Changes

TICK_S = 1.0  # while no call comes: what has expired gives its pages up


class Seconds:
    """Seconds since it was made, from 1. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_at = clock()

    def __call__(self) -> int:
        return int(self._clock() - self._started_at) + 1


class Ticker:
    """`expired` tells that some blocks have died of age."""

    def __init__(self, index: _core.Index, seconds: Seconds, expired: Changes) -> None:
        self._index = index
        self._seconds = seconds
        self._expired = expired

    def tick(self) -> int:
        """Tell the index the time: what has expired is dead. The second that it is now."""
        now = self._seconds()
        if self._index.advance(now):
            self._expired()
        return now
