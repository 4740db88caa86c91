"""The sequences that compute, by arrival, and the pages that their next tokens need.

When pages run out, those that are held back (`spare`) and those that the daemon gives back come
first; then the youngest gives its own up and is computed again later, so that the oldest always
advances. Not responsible for who joins (admission) and which of them a step computes (scheduler).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from engine.metrics import EngineMetrics
from engine.prefix import Bridge
from engine.sequence import Sequence

RECLAIM_PAUSE_S = 0.05  # between two requests for pages that were not granted


class Running:
    """The scheduler's thread calls all of it. `clock` is monotonic seconds. `put_back`: takes a
    sequence that has no pages any more; it is younger than all running, older than all waiting."""

    def __init__(
        self,
        put_back: Callable[[Sequence], None],
        *,
        bridge: Bridge,
        metrics: EngineMetrics,
        clock: Callable[[], float],
        starve_s: float,
    ) -> None:
        self._put_back = put_back
        self._bridge = bridge
        self._metrics = metrics
        self._clock = clock
        self._starve_s = starve_s
        self._sequences: list[Sequence] = []
        self._reclaim_at = 0.0
        self.spare: Callable[[int], bool] = lambda _: False  # frees pages that are held back

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._sequences

    def join(self, sequences: Iterable[Sequence]) -> None:
        """Each has a lease."""
        self._sequences = sorted([*self._sequences, *sequences], key=lambda s: s.order)

    def leave(self, sequence: Sequence) -> None:
        """Its pages go back, whether it ran or not."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        if sequence.lease is not None:
            self._bridge.release([sequence.lease])
            sequence.lease = None

    def set_back(self, sequence: Sequence) -> None:
        """It leaves, and is computed again from what is cached by then."""
        self.leave(sequence)
        sequence.computed = 0
        self._put_back(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """The same, for the sake of others."""
        self._metrics.preemptions.inc()
        self.set_back(sequence)

    def make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for its next `count` tokens, if need be those of younger ones. False: not in this
        step."""
        lease, tokens = sequence.lease, sequence.computed + count
        assert lease is not None
        while not self._bridge.grow(lease, tokens):
            if self._reclaim(-(-tokens // self._bridge.config.page_size) - len(lease.pages)):
                continue
            victim = self._sequences[-1]
            if victim is sequence:
                return False
            self.preempt(victim)
            self._reclaim_at = 0.0
        sequence.starved_since = None
        return True

    def starved(self, sequence: Sequence) -> bool:
        """It found no room, and nobody is younger. Beside others it just waits for them; alone, not
        for ever."""
        if len(self._sequences) > 1:
            return False
        now = self._clock()
        if sequence.starved_since is None:
            sequence.starved_since = now
        return now - sequence.starved_since > self._starve_s

    def _reclaim(self, pages: int) -> bool:
        now = self._clock()
        if now >= self._reclaim_at:
            if self._bridge.reclaim(pages):
                return True
            self._reclaim_at = now + RECLAIM_PAUSE_S
        return self.spare(pages)
