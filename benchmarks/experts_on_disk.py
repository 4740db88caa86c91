"""Experts on disk: what memory keeps of them.

Hit rates: routings of `benchmarks.routings` on seeds that nothing was chosen on, one request that
decodes; peers LRU, limit Belady's, which knows the future. They count what is there when a layer
begins, without reading ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.routings import Shape, Text
from engine.experts.store import Turns

SEEDS = 100
Needed = list[list[NDArray[np.int64]]]  # [step][layer] -> ids
POLICIES = ("ours", "lru", "belady")


def needed(text: Text, tokens: int) -> Needed:
    """What each layer of each step of one request needs, a new document every 256 tokens."""
    steps: Needed = []
    while len(steps) < tokens:
        document = text.document(text.topic((0, 1, 2)))
        for _ in range(min(256, tokens - len(steps))):
            steps.append([np.flatnonzero(layer) for layer in text.choose(document, 1)])
    return steps


def hit_rate(steps: Needed, capacity: int, policy: str) -> float:
    """Part of the experts that were in memory when their layer began."""
    keep = {"ours": Ours, "lru": Lru, "belady": Belady}[policy](steps)
    held: set[tuple[int, int]] = set()
    hits = total = 0
    for step, layers in enumerate(steps):
        for layer, ids in enumerate(layers):
            wanted = {(layer, int(each)) for each in ids}
            total += len(wanted)
            hits += len(wanted & held)
            keep.use(step, layer, ids)
            excess = len(wanted | held) - capacity
            if excess > 0:
                held -= set(keep.victims(step, layer, sorted(held - wanted), excess))
            held |= wanted
    return hits / total


class Ours:
    """The engine's."""

    def __init__(self, steps: Needed) -> None:
        layers = len(steps[0])
        experts = 1 + max(int(ids.max()) for layers_ids in steps for ids in layers_ids)
        self._turns = Turns(range(layers), (layers, experts))

    def use(self, step: int, layer: int, ids: NDArray[np.int64]) -> None:
        self._turns.use(layer, ids)

    def victims(
        self, step: int, layer: int, can: Sequence[tuple[int, int]], count: int
    ) -> list[tuple[int, int]]:
        waits = self._turns.until_use(layer, np.array(can))
        return [can[i] for i in np.argsort(-waits, kind="stable")[:count]]


class Lru:
    """The least recently used goes."""

    def __init__(self, steps: Needed) -> None:
        self._order: OrderedDict[tuple[int, int], None] = OrderedDict()

    def use(self, step: int, layer: int, ids: NDArray[np.int64]) -> None:
        for each in ids:
            self._order.pop((layer, int(each)), None)
            self._order[layer, int(each)] = None

    def victims(
        self, step: int, layer: int, can: Sequence[tuple[int, int]], count: int
    ) -> list[tuple[int, int]]:
        there = set(can)
        return [each for each in self._order if each in there][:count]


class Belady:
    """The one that is used again last goes (doi.org/10.1147/sj.52.0078)."""

    def __init__(self, steps: Needed) -> None:
        self._uses: dict[tuple[int, int], list[int]] = {}
        for step, layers in enumerate(steps):
            for layer, ids in enumerate(layers):
                for each in ids:
                    self._uses.setdefault((layer, int(each)), []).append(step)
        self._layers = len(steps[0])

    def use(self, step: int, layer: int, ids: NDArray[np.int64]) -> None:
        for each in ids:
            self._uses[layer, int(each)].pop(0)

    def victims(
        self, step: int, layer: int, can: Sequence[tuple[int, int]], count: int
    ) -> list[tuple[int, int]]:
        def next_use(each: tuple[int, int]) -> float:
            uses = self._uses[each]
            return uses[0] * self._layers + each[0] if uses else float("inf")

        return sorted(can, key=next_use, reverse=True)[:count]


def hit_rates(repeats: int) -> list[report.Row]:
    shape = Shape()
    steps = [needed(Text(SEEDS + seed, shape), 512) for seed in range(repeats)]
    rows = []
    for part in (0.1, 0.25, 0.5, 0.75):
        capacity = round(part * shape.layers * shape.experts)
        found = {p: [100 * hit_rate(each, capacity, p) for each in steps] for p in POLICIES}
        rows.append(
            report.row(
                f"experts found in memory, {part:.0%} of them fit",
                "%",
                "higher",
                found["ours"],
                limit=float(np.median(found["belady"])),
                limit_name="belady",
                peers={"lru": float(np.median(found["lru"]))},
            )
        )
    return rows


def main() -> None:
    options = report.parser(__doc__ or "", repeats=3).parse_args()
    report.finish("Experts on disk", hit_rates(options.repeats), options.json)


if __name__ == "__main__":
    main()
