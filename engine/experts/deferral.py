"""Expert deferral: what a token's least weighed experts of a layer say is added one layer later.

    layer i        the k - n best: waited for, summed ------------------> + what i - 1 deferred
                   the n last of its routing: begun behind them              |
    attention i+1  ... and computed meanwhile                                v
    layer i + 1    the k - n best -----------------------------------------> +

The CPU computes while the device attends, so that a step is shorter (KTransformers, SOSP 2025,
doi.org/10.1145/3731569.3764843, section on expert deferral). It changes the output, and is part of
the identity. Which choices are deferred follows from the token's routing alone, not from who holds
them: so an output depends on its token still, not on the batch or the placement, and experts may
move as they do without it. The price: a hot expert among the last waits too, though it need not.
The last layer defers nothing.
"""

from __future__ import annotations

import time
from concurrent.futures import wait

import torch
from torch import Tensor

from engine.experts.hybrid import Begun, PlacedExperts
from engine.experts.router import Routing


class DeferredExperts:
    """Computes layers of `experts` in their order, the `deferred` last choices of each one late.
    A step that ended early leaves nothing to the next. One thread calls."""

    def __init__(self, experts: PlacedExperts, deferred: int) -> None:
        self._experts = experts
        self._deferred = deferred
        self._first, self._last = experts.layers[0], experts.layers[-1]
        self._late: Begun | None = None
        self.waited_s = 0.0  # for what was deferred

    def compute(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden], without what is late, and with what was."""
        if layer == self._first:
            self.drop()
        kept = routing.expert_ids.shape[1] - (self._deferred if layer != self._last else 0)
        before, self._late = self._late, None
        now, self._late = self._begin(layer, x, routing, kept)
        out = self._experts.end(now)
        if before is None:
            return out
        asked = time.perf_counter()
        late = self._experts.end(before)
        self.waited_s += time.perf_counter() - asked
        return out + late

    def drop(self) -> None:
        """What a step left that ended early. Experts may move then."""
        late, self._late = self._late, None
        if late is not None:
            wait(late.under_way)

    def _begin(
        self, layer: int, x: Tensor, routing: Routing, kept: int
    ) -> tuple[Begun, Begun | None]:
        """The first choices, and those that are late; what is streamed comes once for both."""
        late: Begun | None = None
        if self._experts.streams(x):
            whole = self._experts.begin(layer, x, routing)
            whole.wait()
            late = None if layer == self._last else whole.columns(kept, None)
            return whole.columns(0, kept), late
        now = self._experts.begin(layer, x, _columns(routing, 0, kept))
        if layer != self._last:
            # whose x and routing are the caller's, and the next layer's by then
            late = self._experts.begin(layer, x.clone(), _columns(routing, kept, None))
        return now, late


def _columns(routing: Routing, begin: int, end: int | None) -> Routing:
    ids, weights = (
        each[:, begin:end].clone(memory_format=torch.contiguous_format)
        for each in (routing.expert_ids, routing.weights)
    )
    return Routing(ids, weights)
