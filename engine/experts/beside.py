"""Cold experts beside a device that isn't the CPU: it computes the hot ones in one grouped product,
the CPU the cold ones at the same time.

    device         router | hot choices, summed . . . . . . . . . | + | ...
                          v                                       ^
    side stream           rows, ids, weights |              | sums
                                             v              ^
    host                                     cold choices, summed

Each sums its own choices, so that no more than rows cross the bus. Their numerics differ: a token's
output depends on who holds its experts, which stays as it is while this serves. The stream calls
the host, so that nobody waits within a step, and a graph can hold it; what the host finds out of
turn is told behind the step. Not responsible for which experts are hot (placement).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.experts.hybrid import Source, Spent, Weights
from engine.experts.placement import Mask
from engine.experts.router import Routing
from engine.experts.statistics import Statistics
from engine.graphs import Moment, SideStream
from engine.kernels import Choices
from engine.layers import some_experts


class Pinned:
    """What crosses the bus, for the largest step. One layer's at a time."""

    def __init__(self, side: SideStream, x: tuple[int, int], chosen: int, dtype: torch.dtype):
        tokens = x[0]
        self.x, self.sums = side.pinned(x, dtype), side.pinned(x, dtype)
        self.ids = side.pinned((tokens, chosen), torch.int64)
        self.weights = side.pinned((tokens, chosen), torch.float32)


class BesideDevice:
    """All layers' experts of one model. One thread computes, within `step`.

    `places`: room on the device for the hot ones, in the order of `hot`. `pinned`: for the largest
    step. `spent`: by the host in every step, by the device in those that no graph holds, since a
    replay shows no moment within it.
    """

    def __init__(
        self,
        host: Source,
        places: Weights,
        hot: Mask,
        *,
        side: SideStream,
        sums: Choices,
        pinned: Pinned,
    ) -> None:
        self.host = host
        self.hot = hot
        self.spent = Spent()
        self._places = places
        self._side = side
        self._sums = sums
        self._pinned = pinned
        self._rows = 0  # of the step, without those that pad it
        self._failed: Exception | None = None
        self._cold: dict[int, int] = {}  # choices of the step, by layer
        self._took: dict[int, tuple[Moment, Moment]] = {}  # the device, for hot ones
        self._work = {at: functools.partial(self._compute_cold, at) for at in host.layers}
        table, everyone = torch.full(hot.shape, -1), torch.arange(hot.shape[1])
        for place, (layer, index) in enumerate(np.argwhere(hot).tolist()):
            host.copy((layer, index), places, place)
            table[layer, index] = place
        self._place_of = table.to(places.down.device)
        self._cold_id = everyone.where(torch.from_numpy(~hot), -1)  # itself, or -1

    @contextmanager
    def step(self, rows: int) -> Iterator[None]:
        """Around a step of so many rows. Raises what failed on the host, when nothing of it is
        under way."""
        self._rows, self._failed = rows, None
        self._cold, self._took = {}, {}
        try:
            yield
        finally:
            self._side.wait()
        if self._failed is not None:
            raise self._failed
        for layer, (began, ended) in self._took.items():
            self.spent.device_s += self._side.seconds(began, ended)
            hot = rows * self._pinned.ids.shape[1] - self._cold.get(layer, 0)
            self.spent.device_activations += hot

    def compute(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden], the weighed sum over each token's experts."""
        if self.hot[layer].all():
            return self._timed_hot(layer, x, routing)
        side, mine, tokens = self._side, self._pinned, len(x)
        cold = torch.empty_like(x)
        side.fork()
        side.copy(x, mine.x[:tokens])
        side.copy(routing.expert_ids, mine.ids[:tokens])
        side.copy(routing.weights, mine.weights[:tokens])
        side.call(self._work[layer])
        side.copy(mine.sums[:tokens], cold)
        hot = self._timed_hot(layer, x, routing) if self.hot[layer].any() else None
        side.join()
        return cold if hot is None else hot + cold

    def state(self, seen: Statistics) -> dict[str, Any]:
        """As PlacedExperts tells it, of what was counted."""
        counts = seen.counts
        served, all_of = (counts * self.hot).sum(1), counts.sum(1)
        layers = [
            {
                "layer": layer,
                "hot": np.flatnonzero(self.hot[layer]).tolist(),
                "device_share": round(float(served[layer] / max(all_of[layer], 1.0)), 4),
            }
            for layer in sorted(self.host.layers)
        ]
        return {
            "by_layer": layers,
            "hot": int(self.hot.sum()),
            "device_share": round(float(served.sum() / max(counts.sum(), 1.0)), 4),
            "exchanges": 0,
            "failed_copies": 0,
            "expert_bytes": self._places.expert_bytes,
        }

    def close(self) -> None:
        self.host.close()

    def _timed_hot(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """What is captured is computed once before, with all that a first call makes: that is no
        time of a step."""
        began = self._side.mark()
        made = self._compute_hot(layer, x, routing)
        ended = self._side.mark()
        if began is not None and ended is not None:
            self._took[layer] = began, ended
        else:
            self._took.pop(layer, None)
        return made

    def _compute_hot(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        places = self._place_of[layer][routing.expert_ids]
        return some_experts(x, places, routing.weights, self._places.gate_up, self._places.down)

    def _compute_cold(self, layer: int) -> None:
        """On the stream's thread: of what lies in pinned memory, back there."""
        rows, mine = self._rows, self._pinned
        try:
            with torch.inference_mode():
                began = time.perf_counter()
                ids = self._cold_id[layer][mine.ids[:rows]]
                x, weights = mine.x[:rows], mine.weights[:rows]
                outputs = torch.zeros(*ids.shape, x.shape[1])
                self.host.compute(layer, x, ids, outputs)
                mine.sums[:rows].copy_(self._sums.sum(outputs, weights, x.dtype))
                self.spent.host_s += time.perf_counter() - began
                self._cold[layer] = int((ids >= 0).sum())
                self.spent.host_activations += self._cold[layer]
        except Exception as error:  # nobody is there to be told now
            self._failed = self._failed or error
