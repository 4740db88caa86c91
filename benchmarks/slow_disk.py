"""Time to the first token when the disk is slow: load or recompute, against computing everything
and against loading regardless (up to the acquire's deadline of 2 s).

94 % of a 1k-token prompt lie on disk alone, about 23 MB. The disk is throttled in the daemon's
process (slow_daemon.py). Of each speed the first request finds out how slow the disk has become;
the others know. Computed, loaded and ours take turns on one engine, each with its own prompt.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.processes import Engine, SlowDaemon
from benchmarks.slow_daemon import Mode
from engine import demo_model

SPEEDS = {"full": 0.0, "200MBps": 200e6, "20MBps": 20e6, "5MBps": 5e6}
PROMPT_TOKENS, CACHED_TOKENS = 1024, 960
TOKEN_IDS = (100, 40_000)  # of ordinary words in the demo model's vocabulary
COMPUTED, REGARDLESS = "computed", "loaded regardless"

Samples = dict[str, list[float]]  # computed, regardless, ours, first -> milliseconds


class Bench:
    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._random = np.random.default_rng(1)
        self._daemon = SlowDaemon(folder)
        stack.callback(self._daemon.stop)
        self._daemon.wait_ready()
        self._engine = Engine("engine", model, folder, kvc2=self._daemon.address)
        stack.callback(self._engine.stop)
        self._engine.wait_ready()
        self._daemon.wait_sessions(1)
        self._engine.complete(self._tokens(PROMPT_TOKENS), 1)

    def _tokens(self, count: int) -> list[int]:
        return [int(each) for each in self._random.integers(*TOKEN_IDS, count)]

    def _loaded_bytes(self) -> float:
        return self._daemon.admin.stats().counters.get(
            "transfer_bytes_total{source=disk,target=cpu}", 0.0
        )

    def one(self, mode: Mode) -> tuple[float, float]:
        """Milliseconds of computing a prompt, and of asking again when the disk alone has it."""
        Mode().write(self._folder)
        prefix = self._tokens(CACHED_TOKENS)
        fresh = PROMPT_TOKENS - CACHED_TOKENS
        cold = self._engine.complete(prefix + self._tokens(fresh), 1)
        if cold.matched_tokens:
            raise RuntimeError(f"{cold.matched_tokens} tokens matched, none expected")
        self._daemon.flush()
        self._daemon.evict("gpu", "cpu")
        mode.write(self._folder)
        hit = self._engine.complete(prefix + self._tokens(fresh), 1)
        if hit.matched_tokens != hit.tiers["disk"]:
            raise RuntimeError(f"expected all that matched on disk, found {hit.tiers}")
        return cold.seconds * 1e3, hit.seconds * 1e3

    def rest(self) -> None:
        """Until nothing is being loaded behind."""
        self._daemon.wait_until(self._is_idle, "end of the loads behind")

    def _is_idle(self) -> bool:
        cpu = next(each for each in self._daemon.admin.stats().tiers if each.tier == "cpu")
        return cpu.in_flight_pages == 0


def measure(bench: Bench, repeats: int) -> dict[str, Samples]:
    found: dict[str, Samples] = {name: defaultdict(list) for name in SPEEDS}
    for name, bytes_per_s in SPEEDS.items():
        for number in range(repeats + 1):
            cold_ms, ours_ms = bench.one(Mode(bytes_per_s))
            bench.rest()
            found[name]["first" if number == 0 else "ours"].append(ours_ms / cold_ms)
            if number:
                found[name]["ours_ms"].append(ours_ms)
                found[name][COMPUTED].append(cold_ms)
                found[name][REGARDLESS].append(bench.one(Mode(bytes_per_s, regardless=True))[1])
                bench.rest()
        print(f"{name}: done", file=sys.stderr, flush=True)
    return found


def rows_of(name: str, samples: Samples) -> list[report.Row]:
    peers = {kind: statistics.median(samples[kind]) for kind in (COMPUTED, REGARDLESS)}
    return [
        report.row(f"ttft_disk_{name}", "ms", "lower", samples["ours_ms"], peers=peers),
        report.row(
            f"against_computed_disk_{name}", "x", "lower", samples["ours"], goal="<= 1, paired"
        ),
        report.row(
            f"first_against_computed_disk_{name}",
            "x",
            "lower",
            samples["first"],
            goal="<= 1.125: it finds out",
        ),
    ]


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    with demo_model.console_progress() as progress:
        model = demo_model.build(demo_model.default_directory(), progress=progress)
    with tempfile.TemporaryDirectory(prefix="kvc2-slow-") as name, ExitStack() as stack:
        found = measure(Bench(model, Path(name), stack), flags.repeats)
    rows = [each for speed, samples in found.items() for each in rows_of(speed, samples)]
    report.finish("time to the first token, 94 % of the prompt on a slow disk", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
