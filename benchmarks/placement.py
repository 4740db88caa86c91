"""What each way to place experts serves from the device, at 10 to 90 % of them on it.

Routings are those of `benchmarks.routings` (16 layers of 64 experts, 8 chosen), on seeds that
nothing was tuned on. Traffic: `mixed`, eight requests at a time on three topics; `lone`, one at a
time; `shift`, eight, and after 8,000 tokens the three topics give way to three others.
Peers: `static`, the most chosen of a profile recorded on other documents; `last batch`, as
KTransformers updates experts: once 512 prompt tokens have come a layer holds what those chose most.
Limit: the static placement that is best in hindsight, which a dynamic one may exceed.
A copy to the device takes 5 ms and arrives a step later; a step takes 50 ms and 2 ms for each token
of a prompt. Example: python -m benchmarks.placement --ratios 0.1,0.5,0.9 --json FILE
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks import report
from benchmarks.routings import Counts, Shape, Step, Text
from engine.experts.dynamic import DynamicPlacement, Exchange, Pace
from engine.experts.placement import Mask, Room, best, share
from engine.experts.statistics import Statistics

SEEDS = 100  # and on; lower ones were for choosing constants
BEFORE, AFTER = (0, 1, 2), (3, 4, 5)  # topics
TOKENS = 8000
STEP_S, PROMPT_TOKEN_S, COPIES_PER_S = 0.05, 0.002, 200.0
UPDATE_TOKENS = 512  # of prompts, after which KTransformers' rule updates a layer
RECOVERED, WINDOW_TOKENS = 0.95, 500


class LastBatch:
    """Each layer holds its even share: what the last long prompt chose most."""

    def __init__(self, room: Room, hot: Mask) -> None:
        self.hot = hot
        self._each = round(room.hot / len(room.moe_layers))
        self._counts: Counts = np.zeros(hot.shape)
        self._tokens = 0
        self.copies = 0

    def observe(self, step: Step) -> None:
        self._counts = self._counts + step.prompt_counts
        self._tokens += step.prompt_tokens
        if self._tokens < UPDATE_TOKENS:
            return
        order = np.argsort(-self._counts, axis=1, kind="stable")[:, : self._each]
        hot = np.zeros(self.hot.shape, bool)
        np.put_along_axis(hot, order, True, axis=1)
        self.copies += int((hot & ~self.hot).sum())
        self.hot, self._counts, self._tokens = hot, np.zeros(hot.shape), 0


class Ours:
    """The engine's policy, with copies that take their time."""

    def __init__(self, room: Room, hot: Mask, profile: Counts) -> None:
        self._policy = DynamicPlacement(room, hot, profile, Pace(COPIES_PER_S))
        self._coming: list[Exchange] = []
        self._now = 0.0
        self.copies = 0

    @property
    def hot(self) -> Mask:
        return self._policy.hot

    def observe(self, step: Step) -> None:
        took = STEP_S + PROMPT_TOKEN_S * step.prompt_tokens
        self._now += took
        arrived = int(took * COPIES_PER_S)
        for exchange in self._coming[:arrived]:
            self._policy.done(exchange)
        del self._coming[:arrived]
        self._policy.observe(step.counts, step.tokens)
        begun = self._policy.plan(self._now)
        self._coming += begun
        self.copies += len(begun)


@dataclass
class Served:
    """Activations of each step, and those that the device served, by way to place."""

    tokens: list[int] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    by_way: dict[str, list[float]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    def percent(self, way: str) -> float:
        return 100 * sum(self.by_way[way]) / sum(self.total)


def serve(steps: Iterable[Step], room: Room, profile: Counts) -> Served:
    """Each way's share of the same steps; a step is served by the placement before it."""
    static = best(profile, room)
    last, ours = LastBatch(room, static), Ours(room, static, profile)
    served = Served(by_way={"static": [], "last batch": [], "ours": []})
    for step in steps:
        served.tokens.append(step.tokens)
        served.total.append(float(step.counts.sum()))
        for way, hot in zip(served.by_way, (static, last.hot, ours.hot), strict=True):
            served.by_way[way].append(float(step.counts[hot].sum()))
        last.observe(step)
        ours.observe(step)
    served.copies = {"last batch": last.copies, "ours": ours.copies}
    return served


def room_of(shape: Shape, ratio: float) -> Room:
    experts = shape.layers * shape.experts
    return Room((True,) * shape.layers, shape.experts, round(ratio * experts))


def compared(case: str, running: int, ratios: Sequence[float], repeats: int) -> list[report.Row]:
    """One row a ratio: the share that ours serves; its goal: how far ahead of the better peer ours
    is where it is the least so."""
    texts = [Text(SEEDS + seed) for seed in range(repeats)]
    profiles = [text.profile(BEFORE) for text in texts]
    steps = [list(text.steps(BEFORE, TOKENS, running)) for text in texts]
    rows = []
    for ratio in ratios:
        room = room_of(texts[0].shape, ratio)
        served = [serve(each, room, known) for each, known in zip(steps, profiles, strict=True)]
        sums = [np.sum([step.counts for step in each], axis=0) for each in steps]
        peers = ("static", "last batch")
        ahead = [each.percent("ours") - max(map(each.percent, peers)) for each in served]
        copies = [each.copies for each in served]
        rows.append(
            report.row(
                f"{case}, {ratio:.0%} on the device",
                "%",
                "higher",
                [each.percent("ours") for each in served],
                limit=float(np.median([100 * share(best(each, room), each) for each in sums])),
                limit_name="static in hindsight",
                peers={way: float(np.median([s.percent(way) for s in served])) for way in peers},
                goal=f"ahead {min(ahead):+.1f}",
            )
        )
        told = [f"{way} {np.median([each[way] for each in copies]):.0f}" for way in copies[0]]
        print(f"{case}, {ratio:.0%}: copies in {TOKENS:,} tokens: {', '.join(told)}")
    return rows


def recovery_tokens(served: Served, first: int, goal: float) -> float:
    """After how many tokens of the new topics the share of the last WINDOW_TOKENS reaches `goal`;
    the tokens there were, if it never does."""
    tokens = np.cumsum(served.tokens[first:])
    hits = np.cumsum(served.by_way["ours"][first:])
    total = np.cumsum(served.total[first:])
    for index, end in enumerate(tokens):
        begin = int(np.searchsorted(tokens, end - WINDOW_TOKENS, side="right")) - 1
        before = (hits[begin], total[begin]) if begin >= 0 else (0.0, 0.0)
        if end >= WINDOW_TOKENS and (hits[index] - before[0]) / (total[index] - before[1]) >= goal:
            return float(end)
    return float(tokens[-1])


def shifted(ratios: Sequence[float], repeats: int) -> list[report.Row]:
    texts = [Text(SEEDS + seed) for seed in range(repeats)]
    profiles = [text.profile(BEFORE) for text in texts]
    steps = [list(text.steps(BEFORE, TOKENS, 8)) for text in texts]
    later = [list(text.steps(AFTER, TOKENS, 8)) for text in texts]
    rows = []
    for ratio in ratios:
        room = room_of(texts[0].shape, ratio)
        took = []
        for known, before, after in zip(profiles, steps, later, strict=True):
            served = serve([*before, *after], room, known)
            counts = np.sum([step.counts for step in after], axis=0)
            goal = RECOVERED * share(best(counts, room), counts)
            took.append(recovery_tokens(served, len(before), goal))
        rows.append(
            report.row(
                f"shift, {ratio:.0%}: tokens until 95 % of the best static",
                "tokens",
                "lower",
                took,
                goal="<= 2,000",
            )
        )
    return rows


def recording(repeats: int) -> report.Row:
    """What counting one layer of a step of 16 tokens costs."""
    ids = torch.randint(0, 128, (16, 8))
    statistics, samples = Statistics(1, 128), []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(2000):
            statistics.record(0, ids)
        samples.append((time.perf_counter() - began) / 2000 * 1e6)
    return report.row("counting a layer's choices, 16 tokens", "us", "lower", samples)


def main() -> None:
    parser = report.parser(__doc__ or "")
    parser.add_argument("--ratios", default="0.1,0.3,0.5,0.7,0.9", help="of experts, by commas")
    options = parser.parse_args()
    ratios = [float(each) for each in options.ratios.split(",")]
    path: Path | None = options.json
    rows = compared("mixed", 8, ratios, options.repeats)
    rows += compared("lone", 1, ratios, options.repeats)
    rows += shifted(ratios, options.repeats)
    rows.append(recording(options.repeats))
    report.finish("Share of activations served by the device", rows, path)


if __name__ == "__main__":
    main()
