"""What refusing brings where processes share a daemon: tokens found, bytes written, second turns.

Example: python -m benchmarks.admission --trace FILE --cpu 0.01,0.05 --disk 0,0.1 --requests 4000
`kvc2 serve` with a small cpu tier, over a small disk or none, serves several processes at once,
which replay a recorded trace by the client library (replayers.py): by turns as it refuses, with
--admission always, and with --eviction-policy lru. Sizes are shares of the trace's distinct blocks.
`not stored` is the share of missing blocks that found no page: refused, or all pages were pinned.

A second turn (2nd) is the first request that goes on from one that goes on from none. It finds its
first turn whole, or misses a block that was refused, or dropped, by what `explain` says; `found` is
the share of its first turn. Bytes are blocks times tier_hits' KV a token. `one by one` is the index
alone, without a daemon.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import replayers, report
from benchmarks.processes import Daemon
from benchmarks.tier_hits import TOKEN_BYTES
from kvc2.commands import replay, traces
from kvc2.config import ARENA_BYTES_MIN, GB
from kvc2.layout import ALIGNMENT, HEADER_BYTES

PAYLOAD_BYTES = 3 * ALIGNMENT  # of a block: little, so that many fit
PAGE_BYTES = HEADER_BYTES + PAYLOAD_BYTES
SLAB_PAGES_MIN, SLABS = 8, 16  # of the cpu tier, about
PAGES_MIN = -(-ARENA_BYTES_MIN // PAGE_BYTES)
DISK_BESIDE = 2 << 20  # bytes of a small catalogue, and a fifteenth of the pages
NOT_ADMITTED, EVICTED = "not_admitted", "evicted"
OURS = "hazard, refusing"
DAEMONS: Mapping[str, Sequence[str]] = {
    OURS: ("--admission", "worth"),
    "takes all": ("--admission", "always"),
    "lru": ("--eviction-policy", "lru"),
}


@dataclass(frozen=True)
class Sizes:
    """Shares of the trace's distinct blocks; disk 0: none."""

    cpu: float
    disk: float

    @property
    def name(self) -> str:
        return f"{self.cpu:.1%}" + (f" over {self.disk:.1%}" if self.disk else "")

    def flags(self, blocks: int) -> tuple[float, float, list[str]]:
        """GB of cpu and disk, and the size of a slab that divides the former."""
        pages = max(round(self.cpu * blocks), PAGES_MIN)
        slab = max(SLAB_PAGES_MIN, pages // SLABS)
        cpu = round(pages / slab) * slab * PAGE_BYTES
        disk = 0.0
        if self.disk:
            disk = round(self.disk * blocks) * PAGE_BYTES * 16 / 15 + DISK_BESIDE
        return cpu / GB, disk / GB, ["--slab-bytes", str(slab * PAGE_BYTES)]


def head(trace: traces.Trace, requests: int) -> traces.Trace:
    """Its first requests; 0: all."""
    count = min(requests or len(trace), len(trace))
    offsets = trace.offsets[: count + 1]
    ids = trace.ids[: offsets[-1]]
    return dataclasses.replace(
        trace,
        ids=ids,
        offsets=offsets,
        input_tokens=trace.input_tokens[:count],
        blocks=int(ids.max()) + 1 if ids.size else 0,
    )


def first_turns(trace: traces.Trace) -> NDArray[np.int64]:
    """[requests] how many blocks the first turn has, of each second turn; 0 of other requests."""
    previous = replayers.previous_turns(trace)
    second = (previous >= 0) & (previous[previous] < 0)
    return np.where(second, np.diff(trace.offsets)[previous], 0)


ROWS = {  # unit, which is better
    "found": ("%", "higher"),
    "not stored": ("%", "lower"),
    "written": ("KiB/token", "lower"),
    "cpu refused": ("blocks", "lower"),
    "cpu regretted": ("%", "lower"),
    "disk refused": ("blocks", "lower"),
    "disk regretted": ("%", "lower"),
    "2nd turns": ("", "higher"),
    "2nd: whole": ("%", "higher"),
    "2nd: was refused": ("%", "lower"),
    "2nd: was dropped": ("%", "lower"),
    "2nd: found": ("%", "higher"),
    "2nd: acquire": ("ms", "lower"),
    "2nd: acquire p99": ("ms", "lower"),
    "cpu pages": ("", "higher"),
    "disk pages": ("", "higher"),
}


def figures(
    trace: traces.Trace, served: Sequence[replayers.Served], firsts: NDArray[np.int64]
) -> dict[str, float]:
    """Of what the clients saw."""
    tokens = max(int(trace.input_tokens.sum()), 1)
    lengths = np.diff(trace.offsets)
    found = np.zeros(len(trace), np.int64)
    for each in served:
        found[each.request] = each.found
    missing = max(int((lengths - found).sum()), 1)
    second = [each for each in served if firsts[each.request]]
    count = max(len(second), 1)
    whys = [each.why for each in second]
    seconds = [each.seconds for each in second] or [0.0]
    asked = max(int(firsts.sum()), 1)
    return {
        "found": 100 * int(found.sum()) * trace.block_tokens / tokens,
        "not stored": 100 * sum(each.without for each in served) / missing,
        "2nd turns": len(second),
        "2nd: whole": 100 * whys.count("") / count,
        "2nd: was refused": 100 * whys.count(NOT_ADMITTED) / count,
        "2nd: was dropped": 100 * whys.count(EVICTED) / count,
        "2nd: found": (100 * int(np.minimum(found, firsts).sum()) / asked),
        "2nd: acquire": 1e3 * float(np.median(seconds)),
        "2nd: acquire p99": 1e3 * float(np.percentile(seconds, 99)),
    }


def counted(daemon: Daemon, trace: traces.Trace, *, disk: bool) -> dict[str, float]:
    """Of what the daemon counted. It is not flushed: that would insist on what was refused."""
    stats = daemon.admin.stats()
    counters = stats.counters

    def regretted(tier: str) -> float:
        watched = counters[f"refused_watched_total{{tier={tier}}}"]
        return 100 * counters[f"refused_regretted_total{{tier={tier}}}"] / max(watched, 1)

    found = {f"{each.tier} pages": float(each.pages) for each in stats.tiers if each.pages}
    found["cpu refused"] = counters["refused_blocks_total{tier=cpu}"]
    found["cpu regretted"] = regretted("cpu")
    if disk:
        per_block = trace.block_tokens * TOKEN_BYTES / 1024
        tokens = max(int(trace.input_tokens.sum()), 1)
        written = counters.get("transfer_blocks_total{source=cpu,target=disk}", 0)
        found["written"] = written * per_block / tokens
        found["disk refused"] = counters["refused_blocks_total{tier=disk}"]
        found["disk regretted"] = regretted("disk")
    return found


def measure(
    trace: traces.Trace, sizes: Sizes, words: Sequence[str], *, processes: int
) -> dict[str, float]:
    """One daemon's figures, by the names of ROWS."""
    cpu_gb, disk_gb, flags = sizes.flags(trace.blocks)
    firsts = first_turns(trace)
    with tempfile.TemporaryDirectory(prefix="kvc2-admission-") as name:
        daemon = Daemon(Path(name), cpu_gb=cpu_gb, disk_gb=disk_gb, flags=[*flags, *words])
        try:
            daemon.wait_ready()
            served = replayers.replay(
                daemon.address,
                trace,
                firsts.tolist(),
                processes=processes,
                payload_bytes=PAYLOAD_BYTES,
            )
            of_daemon = counted(daemon, trace, disk=disk_gb > 0)
        finally:
            daemon.stop()
    return figures(trace, served, firsts) | of_daemon


def rows_of(trace: traces.Trace, sizes: Sizes, *, processes: int, repeats: int) -> list[report.Row]:
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(repeats):
        for name, words in DAEMONS.items():
            samples[name].append(measure(trace, sizes, words, processes=processes))
    rows = []
    for row, (unit, better) in ROWS.items():
        if row not in samples[OURS][0]:
            continue
        found = {name: [each[row] for each in runs] for name, runs in samples.items()}
        if row == "found" and not sizes.disk:
            pages = round(samples[OURS][0]["cpu pages"])
            found["one by one"] = [100 * replay.hit_rate(trace, pages, replay.POLICIES[0])]
        rows.append(report.beside(f"{sizes.name}: {row}", unit, better, found, OURS))
    return rows


def main() -> int:
    parser = report.parser(__doc__ or "", repeats=1)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trace", type=Path, required=True, help="what kvc2 replay reads")
    parser.add_argument("--cpu", default="0.01,0.05", help="shares, by commas (%(default)s)")
    parser.add_argument("--disk", default="0,0.1", help="shares, 0: none (%(default)s)")
    parser.add_argument("--requests", type=int, default=0, help="the first ones; 0: all")
    parser.add_argument("--processes", type=int, default=4, help="(%(default)s)")
    options = parser.parse_args()
    trace = head(traces.read(options.trace), options.requests)
    rows: list[report.Row] = []
    for disk in map(float, options.disk.split(",")):
        for cpu in map(float, options.cpu.split(",")):
            rows += rows_of(
                trace, Sizes(cpu, disk), processes=options.processes, repeats=options.repeats
            )
    report.finish(f"{trace.name}: {options.processes} processes, a cpu tier of", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
