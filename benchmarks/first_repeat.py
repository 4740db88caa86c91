"""TTFT of a conversation's second turn, where the cache refuses and where it takes all.

Example: python -m benchmarks.first_repeat --trace FILE --model DIR --cpu 0.01,0.05 --requests 1000
A recorded trace is replayed against `kvc2-engine serve`, whose pool holds --gpu of the distinct
blocks, over `kvc2 serve`, whose cpu tier holds --cpu of them: by turns as it refuses, with
--admission always, and with --eviction-policy lru. A block of the trace becomes a page of 16 random
tokens, the same ones wherever it comes, so that long prompts fit small models: what is found is the
trace's, the seconds are the model's. Two users send the requests in their order, each when its last
one is answered.

A second turn is a request that goes on from a first one (as in admission.py). TTFT is the whole
call for one token as its caller sees it. `whole`: all of its first turn was found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks import admission, report
from benchmarks.processes import Answer, Daemon, Engine
from engine import demo_model
from engine.attention.base import KvShape
from engine.config import ModelConfig
from kvc2.commands import traces
from kvc2.config import ARENA_BYTES_MIN, GB
from kvc2.layout import ALIGNMENT, HEADER_BYTES

PAGE_SIZE = 16
TOKEN_IDS = (100, 250)  # of one byte each, in the vocabulary of any model
USERS = 2
SLABS = 16  # of the cpu tier, about
ROWS: Mapping[str, tuple[str, Literal["higher", "lower"]]] = {  # unit, which is better
    "second turns": ("", "higher"),
    "whole": ("%", "higher"),
    "found": ("%", "higher"),
    "TTFT": ("ms", "lower"),
    "TTFT p90": ("ms", "lower"),
    "TTFT mean": ("ms", "lower"),
    "TTFT mean, all requests": ("ms", "lower"),
}


@dataclass(frozen=True)
class Sizes:
    """Pages of the engine's pool and of the cpu tier, of so many bytes of KV each."""

    gpu_pages: int
    cpu_pages: int
    page_bytes: int

    def cpu_flags(self) -> list[str]:
        """Of the daemon. A page of a slab has a header beside its KV, and is aligned."""
        page = HEADER_BYTES + -(-self.page_bytes // ALIGNMENT) * ALIGNMENT
        slab = page * max(1, self.cpu_pages // SLABS)
        total = max(round(self.cpu_pages * page / slab), -(-ARENA_BYTES_MIN // slab)) * slab
        return ["--slab-bytes", str(slab), "--cpu-memory-size-gb", str(total / GB)]


class Prompts:
    """The tokens of each request: its blocks', and one of its own, which is always computed."""

    def __init__(self, trace: traces.Trace, longest: int) -> None:
        random = np.random.default_rng(1)
        self._trace, self._pages = trace, longest // PAGE_SIZE - 1
        self._blocks = random.integers(*TOKEN_IDS, (trace.blocks, PAGE_SIZE))
        self._ends = random.integers(*TOKEN_IDS, len(trace))

    def __len__(self) -> int:
        return len(self._trace)

    def pages(self, request: int) -> int:
        return min(self._trace.request(request).size, self._pages)

    def tokens(self, request: int) -> list[int]:
        """A request that is too long for the model loses its end."""
        blocks = self._trace.request(request)[: self._pages]
        return [*self._blocks[blocks].ravel().tolist(), int(self._ends[request])]


def figures(
    prompts: Prompts, answers: Sequence[Answer], firsts: NDArray[np.int64]
) -> dict[str, float]:
    """Of what the users saw; `firsts` [requests]: blocks of the first turn; 0: no second turn."""
    second = np.flatnonzero(firsts).tolist()
    wanted = np.array([min(firsts[i], prompts.pages(i)) for i in second])
    found = np.array([answers[i].matched_tokens // PAGE_SIZE for i in second])
    ms = np.array([1e3 * answers[i].seconds for i in second])
    return {
        "second turns": len(second),
        "whole": 100 * float((found >= wanted).mean()),
        "found": 100 * float(np.minimum(found, wanted).sum() / wanted.sum()),
        "TTFT": float(np.median(ms)),
        "TTFT p90": float(np.percentile(ms, 90)),
        "TTFT mean": float(ms.mean()),
        "TTFT mean, all requests": 1e3 * float(np.mean([each.seconds for each in answers])),
    }


def measure(
    model: Path, prompts: Prompts, firsts: NDArray[np.int64], sizes: Sizes, words: Sequence[str]
) -> dict[str, float]:
    """One daemon's and its engine's figures, by the names of ROWS."""
    with tempfile.TemporaryDirectory(prefix="kvc2-first-repeat-") as name, ExitStack() as stack:
        folder = Path(name)
        daemon = Daemon(folder, disk_gb=0, flags=[*sizes.cpu_flags(), *words])
        stack.callback(daemon.stop)
        daemon.wait_ready()
        pool = ["--num-pages", str(sizes.gpu_pages), "--page-size", str(PAGE_SIZE)]
        engine = Engine("engine", model, folder, kvc2=daemon.address, flags=pool)
        stack.callback(engine.stop)
        engine.wait_ready()
        daemon.wait_sessions(1)
        with ThreadPoolExecutor(USERS) as users:
            asked = (prompts.tokens(i) for i in range(len(prompts)))
            answers = list(users.map(lambda tokens: engine.complete(tokens, 1), asked))
    return figures(prompts, answers, firsts)


def rows_of(case: str, samples: dict[str, list[dict[str, float]]]) -> list[report.Row]:
    rows = []
    for row, (unit, better) in ROWS.items():
        found = {name: [each[row] for each in runs] for name, runs in samples.items()}
        rows.append(report.beside(f"{case}: {row}", unit, better, found, admission.OURS))
    return rows


def main() -> int:
    parser = report.parser(__doc__ or "", repeats=1)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trace", type=Path, required=True, help="what kvc2 replay reads")
    parser.add_argument("--model", type=Path, help="a directory; the embedded model's by default")
    parser.add_argument("--gpu", type=float, default=0.03, help="share (%(default)s)")
    parser.add_argument("--cpu", default="0.05", help="shares, by commas (%(default)s)")
    parser.add_argument("--requests", type=int, default=300, help="the first ones (%(default)s)")
    options = parser.parse_args()
    model = options.model
    if model is None:
        with demo_model.console_progress() as progress:
            model = demo_model.build(demo_model.default_directory(), progress=progress)
    config = ModelConfig.load(model, "auto")
    page_bytes = KvShape.of(config, PAGE_SIZE).page_bytes
    trace = admission.head(traces.read(options.trace), options.requests)
    prompts, firsts = Prompts(trace, config.max_positions), admission.first_turns(trace)
    longest = max(prompts.pages(i) for i in range(len(prompts))) + 1
    rows: list[report.Row] = []
    for share in map(float, options.cpu.split(",")):
        gpu, cpu = (round(part * trace.blocks) for part in (options.gpu, share))
        if gpu < USERS * longest:
            parser.error(f"--gpu {options.gpu}: {gpu} pages, {USERS} users need {USERS * longest}")
        samples: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(options.repeats):
            for name, words in admission.DAEMONS.items():
                sizes = Sizes(gpu, cpu, page_bytes)
                samples[name].append(measure(model, prompts, firsts, sizes, words))
        rows += rows_of(f"{options.gpu:.1%} over {share:.1%}", samples)
    report.finish(f"{trace.name}: {len(trace)} requests, gpu over cpu tier of", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
