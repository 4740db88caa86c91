"""Experts in two places: tokens/s by the part that is hot, and what runs beside what.

By ratio: 4 layers of 64 experts (1024 x 512, bf16, 8 a token) with random weights, chosen by
`benchmarks.routings`, the most chosen hot; the CPU plays the device, at equal threads in all. So
nothing is gained by a hot expert here: the rows show what dividing a layer costs. Pauses: how long
steps stand still while topics change and experts move.

Timeline: two cores can't show two computations side by side. A device and a bus are declared
instead: they do the work, and answer when such a device would, which is later than this CPU is
done. The CPU's part is what it is. Printed: what each does when, and the time that all of them were
busy over the time that went by (1: one after the other). Steps of many tokens are timed with cold
experts on the CPU and streamed to the device, beside the number from which that is said to pay.
Example: python -m benchmarks.hybrid --json build/bench/hybrid.json
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.routings import Shape, Text
from engine.experts.dynamic import DynamicPlacement, Pace
from engine.experts.hybrid import (
    SPARE_PLACES,
    DeviceExecutor,
    HostExecutor,
    Place,
    PlacedExperts,
    Weights,
)
from engine.experts.placement import Room, best
from engine.experts.prefill import PrefillStream
from engine.experts.router import Routing
from engine.experts.statistics import Statistics
from engine.kernels import Choices, workbench_of

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLUMNS = 100  # of a timeline
SEED = 100


@dataclass(frozen=True)
class Sizes:
    """`layers` of `experts` of hidden x size, `chosen` a token."""

    layers: int
    experts: int
    hidden: int
    size: int
    chosen: int = 8

    def weights(self) -> dict[int, Weights]:
        torch.manual_seed(0)

        def random(*shape: int) -> Tensor:
            return (torch.randn(*shape) / math.sqrt(shape[-1])).to(torch.bfloat16)

        return {
            layer: Weights(
                random(self.experts, 2 * self.size, self.hidden),
                random(self.experts, self.hidden, self.size),
            )
            for layer in range(self.layers)
        }


@dataclass(frozen=True)
class Tokens:
    """Steps of so many tokens: rows, and each layer's choices."""

    sizes: Sizes
    text: Text

    def step(self, tokens: int) -> tuple[Tensor, list[Routing]]:
        s, document = self.sizes, self.text.document(0)
        chosen = [self.text.choose(document, 1) for _ in range(tokens)]
        ids = np.array([[np.flatnonzero(row) for row in token] for token in chosen])
        x = torch.randn(tokens, s.hidden).to(torch.bfloat16)
        weights = torch.full((tokens, s.chosen), 1 / s.chosen)
        routings = [
            Routing(torch.from_numpy(ids[:, layer].copy()), weights) for layer in range(s.layers)
        ]
        return x, routings


# ---- by ratio ----


def experts_of(
    sizes: Sizes, weights: dict[int, Weights], ratio: float, threads: int, text: Text
) -> PlacedExperts:
    hot = round(ratio * sizes.layers * sizes.experts)
    room = Room((True,) * sizes.layers, sizes.experts, hot)
    whole = hot in (0, room.total)
    device = threads if whole else max(1, threads // 2)
    host = HostExecutor(weights, Choices(workbench_of(threads if whole else threads - device)))
    shape = sizes.layers, sizes.experts
    made = PlacedExperts(
        host,
        DeviceExecutor(weights[0].weights(hot), shape, Choices(workbench_of(device))),
        Choices(workbench_of(threads)),
        statistics=Statistics(*shape),
        chosen=sizes.chosen,
    )
    made.fill(best(text.profile((0, 1, 2)), room))
    return made


def by_ratio(threads: int, repeats: int) -> list[report.Row]:
    sizes = Sizes(4, 64, 1024, 512)
    weights = sizes.weights()
    text = Text(SEED, Shape(layers=sizes.layers))
    tokens = Tokens(sizes, text)
    placed = {ratio: experts_of(sizes, weights, ratio, threads, text) for ratio in RATIOS}
    rows = []
    for count, name in ((1, "decode of 1"), (8, "decode of 8"), (256, "prefill of 256")):
        found: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
        for _ in range(repeats + 1):
            x, routings = tokens.step(count)
            for ratio, experts in placed.items():  # by turns
                began = time.perf_counter()
                for layer, routing in enumerate(routings):
                    experts.compute(layer, x, routing)
                found[ratio].append(count / (time.perf_counter() - began))
        whole = float(np.median(found[1.0][1:]))
        rows += [
            report.row(
                f"{name}, {ratio:.0%} hot",
                "tokens/s",
                "higher",
                samples[1:],
                peers={"all in one place": whole},
            )
            for ratio, samples in found.items()
        ]
    rows.append(counting(tokens, placed[0.5], sizes, repeats))
    for experts in placed.values():
        experts.close()
    return rows


def counting(tokens: Tokens, experts: PlacedExperts, sizes: Sizes, repeats: int) -> report.Row:
    """What counting the choices takes of a step of one token's experts, %."""
    statistics = Statistics(sizes.layers, sizes.experts)
    samples = []
    for _ in range(repeats + 1):
        x, routings = tokens.step(1)
        began = time.perf_counter()
        for layer, routing in enumerate(routings):
            experts.compute(layer, x, routing)
        computed = time.perf_counter()
        for layer, routing in enumerate(routings):
            statistics.record(layer, routing.expert_ids)
        samples.append(100 * (time.perf_counter() - computed) / (computed - began))
    return report.row("counting choices, of a decode's experts", "%", "lower", samples[1:])


def pauses(threads: int, repeats: int) -> list[report.Row]:
    """The longest time that steps stood still between two of them, of 400 in which topics change
    and experts move, ms: on the clock, and on a CPU, which other processes don't lengthen."""
    sizes = Sizes(4, 64, 1024, 512)
    weights, text = sizes.weights(), Text(SEED, Shape(layers=sizes.layers))
    clock, cpu, moved = [], [], 0
    for _ in range(repeats):
        statistics = Statistics(sizes.layers, sizes.experts)
        hot = sizes.layers * sizes.experts // 4
        room = Room((True,) * sizes.layers, sizes.experts, hot)
        host = HostExecutor(weights, Choices(workbench_of(threads)))
        places = weights[0].weights(hot + SPARE_PLACES)
        shape = sizes.layers, sizes.experts
        device = DeviceExecutor(places, shape, Choices(workbench_of(1)))
        sums = Choices(workbench_of(1))
        made = PlacedExperts(host, device, sums, statistics=statistics, chosen=sizes.chosen)
        known = text.profile((0,))
        made.fill(best(known, room))
        made.follow(DynamicPlacement(room, made.hot, known, Pace(1000.0)))
        took = []
        for at in range(400):
            began = time.perf_counter(), time.thread_time()
            made.between_steps(began[0])
            took.append((time.perf_counter() - began[0], time.thread_time() - began[1]))
            document = text.document(at // 100)
            chosen = [np.flatnonzero(row) for row in text.choose(document, 1)]
            for layer, row in enumerate(chosen):
                ids = torch.from_numpy(row.copy()).view(1, -1)
                statistics.record(layer, ids)
                weighed = Routing(ids, torch.full(ids.shape, 1 / sizes.chosen))
                made.compute(layer, torch.randn(1, sizes.hidden).to(torch.bfloat16), weighed)
        moved += made.state()["exchanges"]
        made.close()
        clock.append(1e3 * max(each for each, _ in took))
        cpu.append(1e3 * max(each for _, each in took))
    if not moved:
        raise SystemExit("no expert moved")
    name = f"longest pause between steps, {moved // repeats} experts moved"
    return [
        report.row(name, "ms", "lower", clock, goal="5"),
        report.row(f"{name}, CPU time", "ms", "lower", cpu, goal="5"),
    ]


# ---- the timeline ----


@dataclass
class Timeline:
    """(who, layer, begin, end) in seconds."""

    spans: list[tuple[str, int, float, float]] = field(default_factory=list)
    layer: int = 0  # that is computed now

    def add(self, who: str, layer: int, began: float) -> None:
        self.spans.append((who, layer, began, time.perf_counter()))

    def busy_over_wall(self) -> float:
        wall = max(s[3] for s in self.spans) - min(s[2] for s in self.spans)
        return sum(s[3] - s[2] for s in self.spans) / wall

    def show(self, title: str) -> str:
        first, last = min(s[2] for s in self.spans), max(s[3] for s in self.spans)
        lines = [f"{title}: {1000 * (last - first):.1f} ms, a digit is the layer"]
        for who in ("copies", "device", "cpu"):
            cells = ["."] * COLUMNS
            for name, layer, began, ended in self.spans:
                if name == who:
                    at = [int((t - first) / (last - first) * (COLUMNS - 1)) for t in (began, ended)]
                    cells[at[0] : at[1] + 1] = [str(layer % 10)] * (at[1] - at[0] + 1)
            lines.append(f"  {who:7} {''.join(cells)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Declared:
    """A device and its bus, as declared. A call takes `latency_s`, and as long as it reads experts
    or computes activations."""

    latency_s: float = 0.0005
    memory_gb_s: float = 0.5
    activation_s: float = 3e-6
    bus_gb_s: float = 0.1
    attention_s: float = 0.003


class DeviceKernels:
    """Computes, and answers when the declared device would."""

    def __init__(self, kernels: Choices, declared: Declared, timeline: Timeline) -> None:
        self._kernels, self._declared, self._timeline = kernels, declared, timeline

    def compute(self, x: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
        began, d = time.perf_counter(), self._declared
        self._kernels.compute(x, ids, gate_up, down, out)
        experts = int((torch.unique(ids) >= 0).sum())
        size = (gate_up[0].numel() + down[0].numel()) * gate_up.dtype.itemsize
        reads_s = experts * size / d.memory_gb_s / 1e9
        products_s = int((ids >= 0).sum()) * d.activation_s
        wait_until(began + d.latency_s + max(reads_s, products_s))
        self._timeline.add("device", self._timeline.layer, began)


class HostKernels:
    """The CPU's, written down."""

    def __init__(self, kernels: Choices, timeline: Timeline) -> None:
        self._kernels, self._timeline = kernels, timeline

    def compute(self, *arguments: Tensor) -> None:
        began = time.perf_counter()
        self._kernels.compute(*arguments)
        self._timeline.add("cpu", self._timeline.layer, began)


def wait_until(due: float) -> None:
    time.sleep(max(0.0, due - time.perf_counter()))


@dataclass
class Standing:
    """Experts on a declared device. `from_tokens`: of a step that is streamed."""

    sizes: Sizes
    declared: Declared
    ratio: float
    from_tokens: int
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        s, weights = self.sizes, self.sizes.weights()
        self.text = Text(SEED, Shape(layers=s.layers, experts=s.experts))
        shape, hot = (s.layers, s.experts), round(self.ratio * s.layers * s.experts)
        room = Room((True,) * s.layers, s.experts, hot)
        kernels: Any = DeviceKernels(Choices(workbench_of(1)), self.declared, self.timeline)
        cpu: Any = HostKernels(Choices(workbench_of(1)), self.timeline)
        host = HostExecutor(weights, cpu)
        plain = host.copy

        def copy(expert: Place, target: Weights, place: int) -> None:
            began = time.perf_counter()
            plain(expert, target, place)
            wait_until(began + target.expert_bytes / self.declared.bus_gb_s / 1e9)
            self.timeline.add("copies", expert[0], began)

        device = DeviceExecutor(weights[0].weights(hot + SPARE_PLACES), shape, kernels)
        self.statistics = Statistics(*shape)
        self.experts = PlacedExperts(
            host,
            device,
            Choices(workbench_of(1)),
            statistics=self.statistics,
            chosen=s.chosen,
        )
        counts = self.text.profile((0, 1, 2))
        self.experts.fill(best(counts, room))
        host.copy = copy  # type: ignore[method-assign]
        self.stream = PrefillStream(
            copy, weights[0].weights(s.experts), s.experts, kernels, self.from_tokens
        )
        self.experts.stream(self.stream)
        policy = DynamicPlacement(room, self.experts.hot, 0 * counts, Pace(1e9))
        self.experts.follow(policy)

    def step(self, tokens: int) -> float:
        """Seconds. Each layer begins with the device's attention."""
        x, routings = Tokens(self.sizes, self.text).step(tokens)
        began = time.perf_counter()
        self.experts.between_steps(began)
        for layer, routing in enumerate(routings):
            self.timeline.layer = layer
            attends = time.perf_counter()
            wait_until(attends + self.declared.attention_s)
            self.timeline.add("device", layer, attends)
            self.statistics.record(layer, routing.expert_ids)
            self.experts.compute(layer, x, routing)
        return time.perf_counter() - began


def timelines(repeats: int) -> list[report.Row]:
    sizes, declared = Sizes(6, 32, 256, 128), Declared()
    rows = []

    def shown(title: str, ratio: float, from_tokens: int, tokens: int, steps: int) -> None:
        standing = Standing(sizes, declared, ratio, from_tokens)
        busy = []
        for _ in range(repeats + 1):
            for _ in range(steps - 1):
                standing.step(tokens)
            standing.timeline.spans.clear()
            standing.step(tokens)
            busy.append(standing.timeline.busy_over_wall())
        print(standing.timeline.show(title) + "\n")
        standing.experts.close()
        rows.append(report.row(f"{title}: busy over wall", "x", "higher", busy[1:]))

    shown("decode of 64, half hot, experts move", 0.5, 1 << 30, 64, 2)
    shown("prefill of 256, a quarter hot, streamed", 0.25, 64, 256, 1)
    return rows + crossing(sizes, declared, repeats)


def crossing(sizes: Sizes, declared: Declared, repeats: int) -> list[report.Row]:
    """Steps of many tokens, their cold experts on the CPU and streamed."""
    rows, rule = [], 0
    cpu = Standing(sizes, declared, 0.25, 1 << 30)
    streamed = Standing(sizes, declared, 0.25, 1)
    for tokens in (16, 64, 256, 1024):
        pairs = [(cpu.step(tokens), streamed.step(tokens)) for _ in range(repeats + 1)][1:]
        on_cpu = float(np.median([a for a, _ in pairs]))
        rows.append(
            report.row(
                f"{tokens} tokens, cold experts streamed",
                "ms",
                "lower",
                [1000 * b for _, b in pairs],
                peers={"on the CPU": 1000 * on_cpu},
            )
        )
    measured = streamed.stream.measured
    measured.host_tokens = cpu.stream.measured.host_tokens
    measured.host_s = cpu.stream.measured.host_s
    rule = measured.pays_from(0.75 * sizes.experts) or 0
    print(f"streaming is said to pay from {rule} tokens of a step on\n")
    cpu.experts.close()
    streamed.experts.close()
    return rows


def main() -> None:
    parser = report.parser(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2, help="in all (%(default)s)")
    parts_of = ("ratio", "pauses", "timeline")
    parser.add_argument("--only", choices=parts_of, help="one part of it")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[report.Row]]] = {
        "ratio": lambda: by_ratio(options.threads, options.repeats),
        "pauses": lambda: pauses(options.threads, options.repeats),
        "timeline": lambda: timelines(options.repeats),
    }
    wanted = [options.only] if options.only else list(parts)
    report.finish("Hybrid experts", [r for part in wanted for r in parts[part]()], options.json)


if __name__ == "__main__":
    main()
