"""Many users at once: latency, throughput and what is prefilled, beside other servers.

Example: python -m benchmarks.serving --peers vllm,llamacpp --json build/bench/serving.json

The embedded model in bf16. Chats that share a long beginning, and prompts that share nothing, by 1
to 64 users of whom each asks again when it is answered; then requests that come by themselves at
0.5, 0.8 and 1.2 of the rate at which ours answered the most users, and the beginnings of traces.
Every load is made of new tokens, so that each server meets it with nothing of it cached; servers
take turns. An answer counts for goodput if its first token and its tokens' mean time keep
--slo-ttft-ms and --slo-token-ms. `prefill` is what was computed of the prompts over the least that
could be.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks import report, serving_peers
from benchmarks.disk_peers import Unavailable
from benchmarks.processes import Process, ProcessError, end_in_order
from benchmarks.serving_load import (
    Arrivals,
    Figures,
    Server,
    Slo,
    Tokens,
    ask,
    clock_from_now,
    closed_loop,
    least_prefilled,
    open_loop,
    poisson,
)
from engine import demo_model
from kvc2.commands import traces

PEERS = ("vllm", "llamacpp")
TOKEN_IDS = range(100, 40_000)
BLOCK = 16  # of ours; vLLM's on the CPU has more
RATES = (0.5, 0.8, 1.2)
CONTEXT = 8192
TRACE_BLOCK = 32  # tokens that stand for one of a trace's blocks
Named = tuple[str, Literal["higher", "lower"], Callable[[Figures], float]]
NAMED: dict[str, Named] = {  # of a row: the unit, what is better, and the figure
    "output": ("tokens/s", "higher", lambda f: f.output_rate),
    "goodput": ("answers/s", "higher", lambda f: f.goodput),
    "ttft_p50": ("ms", "lower", lambda f: f.ttft_p50),
    "ttft_p99": ("ms", "lower", lambda f: f.ttft_p99),
    "token_p50": ("ms", "lower", lambda f: f.token_p50),
    "token_p99": ("ms", "lower", lambda f: f.token_p99),
    "prefill": ("x least", "lower", lambda f: f.prefilled / f.least),
}


@dataclass(frozen=True)
class Grid:
    """How much is asked. `shared` tokens at the beginning of each chat, `own` behind them; `alone`:
    of a prompt that shares nothing. `turns`: of each user."""

    users: tuple[int, ...]
    shared: int
    own: int
    alone: int
    output: int
    turns: int
    open_requests: int
    trace_requests: int


WHOLE = Grid((1, 4, 16, 64), 3072, 200, 800, 100, 2, 32, 64)
QUICK = Grid((1, 4, 16), 512, 64, 256, 16, 1, 8, 8)


class Fresh:
    """Tokens that nobody has seen."""

    def __init__(self, seed: object) -> None:
        self._chance = random.Random(repr(seed))

    def tokens(self, count: int) -> Tokens:
        return tuple(self._chance.choices(TOKEN_IDS, k=count))


def talks(grid: Grid, users: int, *, sharing: bool, seed: object) -> list[list[Tokens]]:
    """Of each user its prompts. One user asks at least twice, so that something is shared."""
    fresh = Fresh(seed)
    shared = fresh.tokens(grid.shared) if sharing else ()
    own = grid.own if sharing else grid.alone
    turns = max(grid.turns, 2) if users == 1 else 1 if users > 16 else grid.turns
    return [[shared + fresh.tokens(own) for _ in range(turns)] for _ in range(users)]


@dataclass
class Cells:
    """What each server reached, by load; or why it has no figures."""

    slo: Slo
    figures: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # by server

    def add(self, name: str, server: Server, load: Callable[[], Figures]) -> None:
        if server.name in self.absent:
            return
        try:
            found = load()
        except (ProcessError, OSError, ValueError) as error:
            self.absent[server.name] = f"{name}: {error}"
            return
        self.figures.setdefault(name, {}).setdefault(server.name, []).append(found)
        said = f"{found.output_rate:.1f} tokens/s, first {found.ttft_p50:.0f} ms"
        print(f"{name}: {server.name}: {said}", file=sys.stderr, flush=True)

    def rows(self, ours: str) -> Iterator[report.Row]:
        for name, by_server in self.figures.items():
            for what, (unit, better, figure) in NAMED.items():
                if ours not in by_server:
                    continue
                peers: dict[str, report.Value] = {
                    server: float(np.median([figure(each) for each in found]))
                    for server, found in by_server.items()
                    if server != ours
                }
                for server, why in self.absent.items():
                    peers.setdefault(server, report.Absent(why))
                samples = [figure(each) for each in by_server[ours]]
                yield report.row(f"{name}_{what}", unit, better, samples, peers=peers)


def measure_closed(cells: Cells, servers: Sequence[Server], grid: Grid, repeat: int) -> None:
    for sharing in (True, False):
        for users in grid.users:
            name = f"{'shared' if sharing else 'alone'}_{users}"
            asked = talks(grid, users, sharing=sharing, seed=(name, repeat))
            least = least_prefilled([prompt for talk in asked for prompt in talk], BLOCK)
            for server in servers:
                load = partial(closed_loop, server, asked, grid.output, least, cells.slo)
                cells.add(name, server, load)


def measure_open(
    cells: Cells, servers: Sequence[Server], name: str, load: Arrivals, output: int
) -> None:
    least = least_prefilled(load.prompts, BLOCK)
    for server in servers:
        cells.add(name, server, partial(open_loop, server, load, output, least, cells.slo))


def arriving(grid: Grid, rate: float, seed: object) -> Arrivals:
    prompts = [talk[0] for talk in talks(grid, grid.open_requests, sharing=True, seed=seed)]
    return Arrivals(prompts, poisson(len(prompts), rate, random.Random(repr(seed)).getrandbits(32)))


def replayed(path: Path, grid: Grid, seconds: float, repeat: int) -> Arrivals:
    """A trace's first requests that fit the context, each of its blocks as TRACE_BLOCK tokens, in
    so many seconds. Raises InvalidConfig for a file that is none."""
    trace = traces.read(path)
    kept = [
        i
        for i in range(len(trace))
        if 0 < len(trace.request(i)) * TRACE_BLOCK < CONTEXT - grid.output - BLOCK
    ][: grid.trace_requests]
    blocks = {
        block: Fresh((path.name, repeat, block)).tokens(TRACE_BLOCK)
        for block in {int(b) for i in kept for b in trace.request(i)}
    }
    prompts = [
        tuple(token for block in trace.request(i) for token in blocks[int(block)]) for i in kept
    ]
    at = times(path, len(trace))[kept] if kept else np.empty(0)
    span = float(at[-1] - at[0]) if len(at) else 0.0
    scaled = (at - at[0]) * (seconds / span) if span else np.linspace(0, seconds, len(kept))
    return Arrivals(prompts, scaled.tolist())


def times(path: Path, count: int) -> NDArray[np.float64]:
    """[requests] seconds; of a trace that is read without them, one request each."""
    if path.name.endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            if "t" in file:
                return np.asarray(file["t"], np.float64)
    return np.arange(count, dtype=np.float64)


@dataclass
class Servers:
    """Ours first; why a peer is not there."""

    there: list[Server] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def warm(server: Server) -> None:
    """What is lazily made is made now."""
    ask(server, Fresh((server.name, "warm")).tokens(64), 4, clock_from_now())


def begun(options: argparse.Namespace, model: Path, folder: Path, stack: ExitStack) -> Servers:
    """Ours first, then the peers that start. Raises ProcessError where ours does not."""
    made = Servers()

    def begin(server: Any) -> None:
        stack.callback(server.stop)
        server.wait_ready()
        made.there.append(server)

    place = folder / "kvc2"
    place.mkdir()
    begin(serving_peers.Ours(model, place, options.threads))
    for name in options.peers:
        try:
            begin(_peer(name, options, model, folder))
        except (Unavailable, ProcessError) as error:
            made.absent[name] = str(error)
    return made


def _peer(name: str, options: argparse.Namespace, model: Path, folder: Path) -> Process:
    """Raises Unavailable."""
    venvs = options.venvs.absolute()
    if name == "vllm":
        python = serving_peers.vllm_python(venvs, options.vllm_python)
        return serving_peers.VllmServer(python, model, folder, eager=options.vllm_eager)
    program = serving_peers.llama_program(venvs, options.llama_server)
    return serving_peers.LlamaServer(program, model, folder, options.threads)


def run(options: argparse.Namespace, begun: Servers) -> Cells:
    grid, servers = QUICK if options.quick else WHOLE, begun.there
    slo = Slo(options.slo_ttft_ms / 1e3, options.slo_token_ms / 1e3)
    cells = Cells(slo, absent=begun.absent)
    ours = servers[0].name
    for server in servers:
        warm(server)
    for repeat in range(options.repeats):
        turn = [*servers[repeat % len(servers) :], *servers[: repeat % len(servers)]]
        measure_closed(cells, turn, grid, repeat)
        busiest = cells.figures.get(f"shared_{grid.users[-1]}", {}).get(ours)
        if busiest is None:
            break
        for share in RATES[1:2] if options.quick else RATES:
            load = arriving(grid, share * busiest[0].requests_rate, ("open", share, repeat))
            measure_open(cells, turn, f"open_{share}", load, grid.output)
        for path in options.trace:
            seconds = grid.trace_requests / busiest[0].requests_rate
            load = replayed(path, grid, seconds, repeat)
            measure_open(cells, turn, f"trace_{traces.name_of(path)}", load, grid.output)
    return cells


def names(text: str) -> tuple[str, ...]:
    found = tuple(each for each in text.split(",") if each)
    if unknown := set(found) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{unknown}: allowed are {', '.join(PEERS)}")
    return found


def parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__ or "", repeats=3)
    made.add_argument("--quick", action="store_true", help="a small grid, in 5 minutes")
    made.add_argument("--peers", type=names, default=(), help="vllm, llamacpp, by commas")
    made.add_argument("--venvs", type=Path, default=Path("build/peers"), help="%(default)s")
    made.add_argument("--vllm-python", type=Path, help="of an environment that has vLLM already")
    made.add_argument("--vllm-eager", action="store_true", help="don't have it compiled")
    made.add_argument("--llama-server", type=Path, help="the program, where it is there already")
    made.add_argument("--model", type=Path, help="where the embedded model lies, or is made")
    made.add_argument("--threads", type=int, default=2, help="of ours and llama.cpp (%(default)s)")
    made.add_argument(
        "--trace", type=Path, action="append", default=[], metavar="FILE", help="replay it too"
    )
    made.add_argument("--slo-ttft-ms", type=float, default=10_000.0, help="(%(default)s)")
    made.add_argument("--slo-token-ms", type=float, default=500.0, help="(%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with demo_model.console_progress() as progress:
        model = demo_model.build(options.model or demo_model.default_directory(), progress=progress)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            servers = begun(options, model, Path(folder), stack)
        except ProcessError as error:
            print(error, file=sys.stderr)
            return 1
        cells = run(options, servers)
    ours = servers.there[0].name
    report.finish("users at once", list(cells.rows(ours)), options.json)
    for name, why in cells.absent.items():
        print(f"{name} stopped: {why}", file=sys.stderr)
    return int(ours in cells.absent)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
