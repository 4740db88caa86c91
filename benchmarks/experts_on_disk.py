"""Experts on disk: what memory keeps, and tokens a second against mmap and the page cache.

Hit rates: routings of `benchmarks.routings` on seeds that nothing was chosen on, one request that
decodes; peers LRU, limit Belady's, which knows the future. They count what is there when a layer
begins, without reading ahead.

Serving: 16 layers of 64 experts with random weights, --gb in all, which one decoding request
chooses by those routings. Ours: the engine's store, with memory for --part of them, and no guesses.
Peer: the same kernels on the mapped file (what llama.cpp does). Each runs in a memory cgroup of the
same limit, by turns. Limit of the reads: fio (if it is installed) and plain O_DIRECT of 1 MiB, as
many at a time as the store's; the store's own reads of one and of four experts at a time, nothing
computed, and those beside serving.
Example: python -m benchmarks.experts_on_disk --gb 2 --folder DIR (on the disk to be measured)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import expert_file, report
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
    steps = [needed(Text(SEEDS + seed, shape), 256) for seed in range(repeats)]
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


BASE_BYTES = 400_000_000  # a process with torch and its buffers, beside the experts
CGROUPS = Path("/sys/fs/cgroup/memory")


def in_cgroup(limit_bytes: int, command: list[str]) -> dict[str, float] | report.Absent:
    """What the command prints, run in a memory cgroup (v1) of its own."""
    group = CGROUPS / f"kvc2-experts-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        return report.Absent(f"no memory cgroup: {error.strerror}")
    try:
        entered = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", entered, "sh", *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return report.Absent(f"exit {done.returncode}: {done.stderr[-300:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        group.rmdir()  # the process has ended


def served(folder: Path, total_bytes: float, part: float, repeats: int) -> list[report.Row]:
    path = folder / "experts.bin"
    expert_file.write(path, expert_file.size_of(total_bytes))
    places = int(part * expert_file.LAYERS * expert_file.EXPERTS)
    limit = BASE_BYTES + int(part * path.stat().st_size)
    command = [sys.executable, "-m", "benchmarks.expert_file"]
    found: dict[str, list[dict[str, float]]] = {"ours": [], "mmap": []}
    plain, fio = [], []
    alone: dict[int, list[float]] = {1: [], 4: []}
    try:
        for _ in range(repeats):
            plain.append(expert_file.plain_reads(path))
            fio.append(expert_file.fio_gb_s(path))
            for at_once, samples_of in alone.items():
                samples_of.append(expert_file.expert_reads(path, at_once))
            for way, samples in found.items():
                told = in_cgroup(limit, [*command, way, str(path), str(places)])
                if isinstance(told, report.Absent):
                    raise SystemExit(f"{way} did not run: {told.reason}")
                samples.append(told)
    finally:
        path.unlink()
        path.with_suffix(".json").unlink()
    rates = {way: [each["tokens_per_s"] for each in samples] for way, samples in found.items()}
    tokens = expert_file.WARM_TOKENS + expert_file.TOKENS
    for each in found["ours"]:
        used = each["memory_hits"] + each["memory_misses"]
        each["hit"] = 100 * each["memory_hits"] / used
        each["read"] = each["read_bytes"] / tokens * each["tokens_per_s"] / 1e9
    name = f"{total_bytes / 1e9:.0f} GB of experts, {part:.0%} in memory"
    peers = {"mmap": float(np.median(rates["mmap"]))}
    ours = found["ours"]
    limit_gb_s = float(np.median(plain))
    limits: dict[str, Any] = {"fio": expert_file.median_or_absent(fio)}

    def reads(what: str, samples: list[float]) -> report.Row:
        return report.row(
            f"{name}: reads, {what}",
            "GB/s",
            "higher",
            samples,
            limit=limit_gb_s,
            limit_name="plain O_DIRECT",
            peers=limits,
        )

    return [
        report.row(f"{name}: decode", "tokens/s", "higher", rates["ours"], peers=peers),
        report.row(f"{name}: hits", "%", "higher", [each["hit"] for each in ours]),
        *(reads(f"{at_once} at a time", samples) for at_once, samples in alone.items()),
        reads("computing and warm-up in the mean", [each["read"] for each in ours]),
    ]


def main() -> None:
    parser = report.parser(__doc__ or "", repeats=3)
    parser.add_argument("--folder", type=Path, help="where the experts lie; without it no serving")
    parser.add_argument("--gb", type=float, default=2.0, help="of experts, 10^9 bytes")
    parser.add_argument("--part", type=float, default=1 / 3, help="of them in memory")
    options = parser.parse_args()
    rows = hit_rates(options.repeats)
    if options.folder is not None:
        rows += served(options.folder, options.gb * 1e9, options.part, options.repeats)
    report.finish("Experts on disk", rows, options.json)


if __name__ == "__main__":
    main()
