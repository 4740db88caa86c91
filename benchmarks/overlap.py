"""Time to the first token of a 4k prefix from memory and from disk, with overlap and without.

Example: python -m benchmarks.overlap --repeats 7 --json build/bench/overlap.json

With: the engine computes layer i when layer i has arrived, and what of the prefix has come from
disk is copied to its pool while the rest is read. Without (in_turn.py): the engine waits for all
layers, the daemon promotes when all is loaded. The limit is the same prompt with its prefix in the
gpu tier, which nothing has to be moved for. All take turns on one engine, each with a prompt of
its own; 3,824 of 4,032 tokens are cached.
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
from benchmarks.in_turn import flag
from benchmarks.processes import Daemon, Engine, Process, free_port
from benchmarks.ttft import PROMPTS, TOKEN_IDS, cached_tokens
from engine import demo_model
from kvc2.client import Admin

PROMPT_TOKENS = PROMPTS["4k"]
EVICTED = {"cpu": ("gpu",), "disk": ("gpu", "cpu")}
MODES = ("overlap", "in turn")
FLUSHES_MAX = 5


class InTurnDaemon(Daemon):
    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder / 'kvc2.sock'}"
        command = [sys.executable, "-m", "benchmarks.in_turn", "daemon", str(folder)]
        Process.__init__(self, "kvc2", command, folder)
        self.admin = Admin(self.address)


class InTurnEngine(Engine):
    def __init__(self, model: Path, folder: Path, address: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "benchmarks.in_turn", "engine", str(folder), "serve"]
        command += ["--model", str(model), "--port", str(self.port), "--kvc2", address]
        Process.__init__(self, "engine", command, folder)


class Bench:
    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        self._flag = flag(folder)
        self._random = np.random.default_rng(1)
        self._daemon = InTurnDaemon(folder)
        stack.callback(self._daemon.stop)
        self._daemon.wait_ready()
        self._engine = InTurnEngine(model, folder, self._daemon.address)
        stack.callback(self._engine.stop)
        self._engine.wait_ready()
        self._daemon.wait_sessions(1)
        self._engine.complete(self._tokens(PROMPT_TOKENS), 1)

    def _tokens(self, count: int) -> list[int]:
        return [int(each) for each in self._random.integers(*TOKEN_IDS, count)]

    def turn(self, order: tuple[str, ...]) -> dict[str, float]:
        """Milliseconds by tier and mode, of one prefix, and of its hit in the gpu tier."""
        cached = cached_tokens(PROMPT_TOKENS)
        prefix, times = self._tokens(cached), {}
        self._engine.complete(prefix, 1)
        times["gpu"] = self._hit(prefix, "gpu")
        for tier, evicted in EVICTED.items():
            for mode in order:
                self._flush()
                self._daemon.evict(*evicted)
                if mode == "overlap":
                    self._flag.unlink(missing_ok=True)
                else:
                    self._flag.touch()
                times[f"{tier}, {mode}"] = self._hit(prefix, tier)
        return times

    def _flush(self) -> None:
        """An engine may commit its last blocks after its answer: those are flushed by the next."""
        for _ in range(FLUSHES_MAX):
            if not any(self._daemon.admin.flush(60.0).not_durable_blocks.values()):
                return
        self._daemon.flush()

    def _hit(self, prefix: list[int], tier: str) -> float:
        fresh = PROMPT_TOKENS - len(prefix)
        answer = self._engine.complete(prefix + self._tokens(fresh), 1)
        if answer.tiers[tier] != len(prefix):
            raise RuntimeError(f"expected {len(prefix)} tokens in {tier}, found {answer.tiers}")
        return answer.seconds * 1e3


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    with demo_model.console_progress() as progress:
        model = demo_model.build(demo_model.default_directory(), progress=progress)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="kvc2-overlap-") as name, ExitStack() as stack:
        bench = Bench(model, Path(name), stack)
        for number in range(flags.repeats + 1):
            for kind, milliseconds in bench.turn(MODES[:: 1 if number % 2 else -1]).items():
                if number:  # the first turn only warms up
                    found[kind].append(milliseconds)
            print(f"turn {number} of {flags.repeats} done", file=sys.stderr, flush=True)
    rows = []
    for tier in EVICTED:
        ours, other = found[f"{tier}, overlap"], found[f"{tier}, in turn"]
        saved = [without - with_ for with_, without in zip(ours, other, strict=True)]
        rows.append(
            report.row(
                f"ttft_4k_{tier}", "ms", "lower", ours,
                limit=statistics.median(found["gpu"]), limit_name="hit in the gpu tier",
                peers={"in turn": statistics.median(other)},
            )
        )  # fmt: skip
        rows.append(
            report.row(f"saved_4k_{tier}", "ms", "higher", saved, goal="> 0, paired, one prompt")
        )
    report.finish("what overlap saves of the time to the first token", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
