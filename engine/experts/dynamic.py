"""Moves experts to where the traffic wants them: a policy without threads, clocks or bytes.

    observe(counts, tokens)   after each step
    plan(now)                 between steps -> exchanges, each of them one copy to the device
    done(exchange)            when its copy has come

How often an expert will be chosen is estimated from two memories: what is usual (half forgotten
after USUAL_TOKENS) and what is recent. With a usual rate of p activations a token, and n of them
in the t tokens that are remembered as recent, the rate expected is p (n + a) / (p t + a): the mean
of a Gamma distribution around p whose shape is a, after n events in t tokens. So an expert that is
chosen often is followed within some hundred tokens, one that is chosen seldom only on much
evidence, and a new topic becomes usual in time. A rule that follows the last batch alone has no p:
it falls behind a fixed placement wherever nearly all experts are hot, since there only the seldom
ones matter.

An exchange begins when what it should serve while the recent lasts pays for its copy.
Not responsible for carrying exchanges out (moves), nor for the first placement (placement).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.experts.placement import Mask, Room, best
from engine.experts.statistics import Counts

# Chosen by benchmarks.placement's generator on seeds that it doesn't report.
RECENT_TOKENS = 60.0  # half of what is recent is forgotten after so many
USUAL_TOKENS = 6000.0
SHAPE = 24.0  # a: on so many activations the recent weighs as much as the usual
PLAN_TOKENS = 64  # as often is a plan made: sorting thousands of experts each step would cost one
LASTS_TOKENS = 256.0  # how long a difference is expected to last: a rest of a document
HYSTERESIS = 1.05  # the expert that comes is chosen so many times as often as the one that leaves


@dataclass(frozen=True)
class Exchange:
    """An expert comes to the device in the place of another, each as (layer, expert)."""

    hot: tuple[int, int]
    cold: tuple[int, int]


@dataclass(frozen=True)
class Pace:
    """`copies_per_s`: so many on the mean, and `burst` of them at once, are allowed.
    `copy_activations`: a copy takes as long as the device saves by serving so many activations."""

    copies_per_s: float
    copy_activations: float = 2.0
    burst: float = 256.0


class DynamicPlacement:
    """The policy of one model. `counts`: what is known beforehand, zeros for nothing. One thread
    calls all of it; `now` is monotonic seconds."""

    def __init__(self, room: Room, hot: Mask, counts: Counts, pace: Pace) -> None:
        self.hot = hot.copy()  # where experts lie; those that are coming are not yet in it
        self._room = room
        self._pace = pace
        self._usual = counts.copy()
        self._recent = np.zeros(counts.shape)
        self._recent_tokens = 0.0
        self._unplanned = 0  # tokens since the last plan
        self._under_way: set[Exchange] = set()
        self._copies = pace.burst  # that may begin now
        self._planned_at: float | None = None

    def observe(self, counts: Counts, tokens: int) -> None:
        """What one step chose. O(layers * experts)."""
        self._unplanned += tokens
        self._usual *= 0.5 ** (tokens / USUAL_TOKENS)
        self._usual += counts
        kept = 0.5 ** (tokens / RECENT_TOKENS)
        self._recent *= kept
        self._recent += counts
        self._recent_tokens = self._recent_tokens * kept + tokens

    def plan(self, now: float, most: int = 1 << 30) -> list[Exchange]:
        """The exchanges that begin now, at most so many, the most valuable first; often none."""
        if self._unplanned < PLAN_TOKENS:
            return []
        self._unplanned = 0
        waited = 0.0 if self._planned_at is None else now - self._planned_at
        self._planned_at = now
        self._copies = min(self._pace.burst, self._copies + waited * self._pace.copies_per_s)
        begun = self._worth()[: min(int(self._copies), most)]
        self._copies -= len(begun)
        self._under_way.update(begun)
        return begun

    def done(self, exchange: Exchange) -> None:
        """Its expert is on the device, the other no longer."""
        self._under_way.remove(exchange)
        self.hot[exchange.hot], self.hot[exchange.cold] = True, False

    def failed(self, exchange: Exchange) -> None:
        """Nothing has moved."""
        self._under_way.remove(exchange)

    def rates(self) -> Counts:
        """Activations a token that are expected of each expert."""
        sums = self._usual.sum(1, keepdims=True)
        chosen = self._recent.sum(1, keepdims=True) / max(self._recent_tokens, 1.0)
        even = np.full(self._usual.shape, 1 / self._room.experts)  # of a layer nobody has seen
        usual = np.divide(self._usual, sums, out=even, where=sums > 0) * chosen
        rates: Counts = usual * (self._recent + SHAPE) / (usual * self._recent_tokens + SHAPE)
        return rates

    def _worth(self) -> list[Exchange]:
        """The least chosen hot experts beside the most chosen cold ones, as long as it pays."""
        rates = self.rates()
        wanted = best(rates, self._room)
        still = np.ones(rates.shape, bool)
        for exchange in self._under_way:
            still[exchange.hot] = still[exchange.cold] = False
        coming, leaving = wanted & ~self.hot & still, self.hot & ~wanted & still
        in_turn = zip(_ordered(coming, -rates), _ordered(leaving, rates), strict=False)
        found = []
        for come, leave in in_turn:
            gain = (rates[come] - rates[leave]) * LASTS_TOKENS
            if gain <= self._pace.copy_activations or rates[come] < HYSTERESIS * rates[leave]:
                break
            found.append(Exchange(come, leave))
        return found


def _ordered(mask: Mask, keys: Counts) -> list[tuple[int, int]]:
    """Where the mask is true, by rising key; among equals the first."""
    places = np.argwhere(mask)[np.argsort(keys[mask], kind="stable")]
    return [(int(layer), int(expert)) for layer, expert in places]
