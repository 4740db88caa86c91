"""What `kvc2 stats` says of caches of other sizes, against an exact replay of each size.

The estimator (csrc/index/reuse_curve.h) sees a trace once; the replay is an LRU cache that is
touched tail first, one run for each capacity: 1 to 50 % of the trace's distinct blocks, and no
limit. Beside it the other way to sample a tree, whole paths by their first block, at the rate that
ours came to.
A row is the mean over the capacities of the absolute error of the token hit rate, in points.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from kvc2 import _core

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
BY_HEAD = "paths sampled by their head"
NO_LIMIT_BLOCKS = 1 << 40  # more than any trace has


@dataclass(frozen=True)
class Trace:
    """Requests as paths of block numbers; `tokens` are those of whole prompts."""

    name: str
    page_size: int
    blocks: int
    paths: list[NDArray[np.int64]]
    tokens: NDArray[np.int64]


def load(path: Path, most: int | None) -> Trace:
    """A *.kvt.npz: a request is the path of block `anchor` (-1: none) and `n_new` new blocks."""
    stored = np.load(path)
    paths: list[NDArray[np.int64]] = []
    owners: list[int] = []  # by block: the request that made it
    depths: list[int] = []
    for anchor, count in zip(stored["anchor"][:most], stored["n_new"][:most], strict=True):
        head = paths[owners[anchor]][: depths[anchor] + 1] if anchor >= 0 else np.empty(0, np.int64)
        fresh = np.arange(len(owners), len(owners) + count)
        owners += [len(paths)] * int(count)
        depths += range(head.size, head.size + int(count))
        paths.append(np.concatenate([head, fresh]))
    tokens = stored["input"][:most].astype(np.int64)
    name = path.name.removesuffix(".kvt.npz")
    return Trace(name, int(stored["block_size"]), len(owners), paths, tokens)


def exact(trace: Trace, capacity: int) -> float:
    """Token hit rate of an LRU cache of `capacity` blocks: a hit needs all blocks before it."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for path in trace.paths:
        blocks = path.tolist()
        hits += next((at for at, block in enumerate(blocks) if block not in kept), len(blocks))
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hits * trace.page_size / float(trace.tokens.sum())


def keys_of(trace: Trace, seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (trace.blocks, 16), dtype=np.uint8)


def estimated(
    trace: Trace, seed: int, capacities: Sequence[int]
) -> tuple[list[float], _core.ReuseCurve]:
    curve, keys = _core.ReuseCurve(), keys_of(trace, seed)
    for path, tokens in zip(trace.paths, trace.tokens.tolist(), strict=True):
        curve.access(keys[path], trace.page_size, tokens)
        curve.catch_up()
    return [curve.hit_rate(each * trace.page_size) for each in capacities], curve


def estimated_by_head(
    trace: Trace, seed: int, capacities: Sequence[int], rate: float
) -> list[float]:
    """The same from all blocks of the paths whose first block is in the sample."""
    curve, keys = _core.ReuseCurve(sample_max=1 << 22), keys_of(trace, seed)
    chosen = np.random.default_rng(seed).random(trace.blocks) < rate
    for path, tokens in zip(trace.paths, trace.tokens.tolist(), strict=True):
        if path.size and chosen[path[0]]:
            curve.access(keys[path], trace.page_size, tokens)
            curve.catch_up()
    return [curve.hit_rate(round(each * trace.page_size * rate)) for each in capacities]


def rows_of(trace: Trace, repeats: int) -> list[report.Row]:
    """Each repeat has other keys, and so samples other blocks."""
    capacities = [*(max(1, round(share * trace.blocks)) for share in SHARES), NO_LIMIT_BLOCKS]
    truth = np.array([exact(trace, each) for each in capacities])
    ours, heads, worst = [], [], []
    for seed in range(1, repeats + 1):
        found, curve = estimated(trace, seed, capacities)
        errors = np.abs(np.array(found) - truth) * 100
        other = np.array(estimated_by_head(trace, seed, capacities, curve.rate))
        ours.append(float(errors.mean()))
        worst.append(float(errors.max()))
        heads.append(float(np.abs(other - truth).mean() * 100))
    print(f"{trace.name}: rate {curve.rate:.3f}, {curve.metadata_bytes >> 10} KiB", file=sys.stderr)
    peers = {BY_HEAD: float(np.median(heads))}
    return [
        report.row(f"mean_error_{trace.name}", "points", "lower", ours, peers=peers),
        report.row(f"largest_error_{trace.name}", "points", "lower", worst),
    ]


def main() -> int:
    parser = report.parser(__doc__ or "")
    parser.add_argument("--traces", type=Path, required=True, help="folder of *.kvt.npz")
    parser.add_argument("--requests", type=int, help="of each trace, the first so many (all)")
    flags = parser.parse_args()
    files = sorted(flags.traces.glob("*.kvt.npz"))
    if not files:
        parser.error(f"--traces {flags.traces}: no *.kvt.npz in it")
    rows = [row for path in files for row in rows_of(load(path, flags.requests), flags.repeats)]
    report.finish("hit rate at other sizes, estimated against replayed", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
