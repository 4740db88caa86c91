"""Time to the first token of a 4k prefix from memory and from disk, with overlap and without.

Example: python -m benchmarks.overlap --repeats 7 --json build/bench/overlap.json

With: the engine computes layer i when layer i has arrived, and what of the prefix has come from
disk is copied to its pool while the rest is read. Without (in_turn.py): the engine waits for all
layers, the daemon promotes when all is loaded. The limit is the same prompt with its prefix in the
gpu tier, which nothing has to be moved for. All take turns on one engine, each with a prompt of
its own; 3,824 of 4,032 tokens are cached.

Computing the other 208 tokens takes most of that time and, on a busy machine, varies by more than
there is to save. So there are two figures more: how long the engine stood still for layers, and,
of a client without a model on a pool like the engine's, after what time a layer can be computed:
the first one with overlap, without when the last is there. A turn's figures are medians of some
hits of each kind, a difference is one turn's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.in_turn import flag, still_file
from benchmarks.processes import Daemon, Engine, Process, free_port
from benchmarks.rpc import ATTACH_TIMEOUT_S, IDENTITY, PoolOwner
from benchmarks.ttft import PAGE_SIZE, PROMPTS, TOKEN_IDS, cached_tokens
from engine import demo_model
from engine.attention.base import KvShape
from engine.config import ModelConfig
from kvc2.client import Admin, Client, LeaseCommit, PoolMemory, SessionOptions
from kvc2.layout import layer_major

PROMPT_TOKENS = PROMPTS["4k"]
EVICTED = {"cpu": ("gpu",), "disk": ("gpu", "cpu")}
OVERLAP, IN_TURN = "overlap", "in turn"
# Each mode at the beginning, in the midst and at the end of a turn, so that a load that rises or
# falls in it is the same to both.
ORDERS = (
    (OVERLAP, IN_TURN, IN_TURN, OVERLAP),
    (IN_TURN, OVERLAP, OVERLAP, IN_TURN),
)
BARE_TIMES = 4  # as many hits of the client without a model
WAIT_S = 10.0  # for a layer


@dataclass(frozen=True)
class Found:
    """Tokens of the prompt by tier, and how long it took."""

    tiers: dict[str, int]
    milliseconds: float


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


class Bare:
    """An engine's session without a model, whose pool is as its is, and one prompt in it."""

    def __init__(self, model: Path, daemon: Daemon, stack: ExitStack) -> None:
        shape = KvShape.of(ModelConfig.load(model, "auto"), PAGE_SIZE)
        random, blocks = np.random.default_rng(2), cached_tokens(PROMPT_TOKENS) // PAGE_SIZE
        pool = PoolMemory(2 * blocks * shape.page_bytes)
        stack.callback(pool.close)
        pool.map[:] = random.bytes(pool.num_bytes)  # what is all zeros may be faster
        layout = layer_major(
            shape.layers, 2 * blocks, segment_bytes=shape.segment_bytes, page_size=PAGE_SIZE
        )
        self._last_layer, self._requests = shape.layers - 1, 0
        self._client = Client(
            daemon.address,
            pool=pool,
            layout=layout,
            engine=PoolOwner(),
            options=SessionOptions("bare"),
        )
        stack.callback(self._client.close)
        if not self._client.wait_attached(ATTACH_TIMEOUT_S):
            raise RuntimeError(f"not attached: {self._client.last_refusal}\n{daemon.tail()}")
        identity = replace(
            IDENTITY, layers=shape.layers, kv_heads=shape.kv_heads, head_size=shape.head_dim
        )
        self._namespace = self._client.open_namespace(identity.encode())
        count = blocks * PAGE_SIZE
        self._tokens = random.integers(*TOKEN_IDS, count + 1, dtype=np.uint32)
        lease = self._client.acquire(self._namespace, b"first", self._tokens, grant_pages=blocks)
        commit = LeaseCommit(b"first", 0, self._tokens[:count], lease.granted_pages)
        self._client.commit([commit])
        self._client.release([b"first"])

    def ask(self, mode: str) -> Found:
        """Until a layer can be computed."""
        self._requests += 1
        request = b"%d" % self._requests
        begun = time.perf_counter()
        found = self._client.acquire(self._namespace, request, self._tokens)
        layers = [0 if mode == OVERLAP else self._last_layer, self._last_layer]
        times = []
        for layer in layers:
            if found.transfer and not self._client.wait_layer(found.transfer, layer, WAIT_S):
                raise RuntimeError(f"layer {layer} did not come")
            times.append(time.perf_counter() - begun)
        self._client.release([request])
        return Found(asdict(found.tiers), times[0] * 1e3)


class Bench:
    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        self._flag, self._still = flag(folder), still_file(folder)
        self._random = np.random.default_rng(1)
        self._daemon = InTurnDaemon(folder)
        stack.callback(self._daemon.stop)
        self._daemon.wait_ready()
        self._engine = InTurnEngine(model, folder, self._daemon.address)
        stack.callback(self._engine.stop)
        self._engine.wait_ready()
        self._bare = Bare(model, self._daemon, stack)
        self._daemon.wait_sessions(2)
        self._prefix = self._tokens(cached_tokens(PROMPT_TOKENS))

    def _tokens(self, count: int) -> list[int]:
        return [int(each) for each in self._random.integers(*TOKEN_IDS, count)]

    def turn(self, order: tuple[str, ...]) -> dict[str, float]:
        """Median milliseconds by what is measured, tier and mode."""
        found: dict[str, list[float]] = defaultdict(list)
        for tier, evicted in EVICTED.items():
            for name, ask in (("ready", self._bare.ask), ("ttft", self._ask)):
                ask(OVERLAP)  # now memory has it, whatever the other's turn has evicted
                for mode in order * (BARE_TIMES if name == "ready" else 1):
                    self._prepare(mode, evicted)
                    found[f"{name}, {tier}, {mode}"].append(self._hit_ms(ask(mode), tier))
                    if name == "ttft":
                        found[f"layers, {tier}, {mode}"].append(float(self._still.read_text()))
                self._settle()
                found[f"{name}, gpu"].append(self._hit_ms(ask(OVERLAP), "gpu"))
        return {kind: statistics.median(each) for kind, each in found.items()}

    def _hit_ms(self, found: Found, tier: str) -> float:
        if found.tiers[tier] != len(self._prefix):
            raise RuntimeError(f"{len(self._prefix)} tokens are not in {tier}: {found.tiers}")
        return found.milliseconds

    def _prepare(self, mode: str, evicted: tuple[str, ...]) -> None:
        self._settle()
        self._daemon.flush()
        self._daemon.evict(*evicted)
        if mode == OVERLAP:
            self._flag.unlink(missing_ok=True)
        else:
            self._flag.touch()

    def _settle(self) -> None:
        """An engine commits its last blocks and closes its lease after its answer."""
        admin = self._daemon.admin
        self._daemon.wait_until(lambda: admin.stats().leases == 0, "end of the last lease")

    def _ask(self, _: str) -> Found:
        """Until the first token; the mode is what the engine finds the flag to be."""
        self._still.unlink(missing_ok=True)
        fresh = PROMPT_TOKENS - len(self._prefix)
        answer = self._engine.complete(self._prefix + self._tokens(fresh), 1)
        return Found(answer.tiers, answer.seconds * 1e3)


def rows_of(found: dict[str, list[float]]) -> list[report.Row]:
    rows = []
    for name, tier in product(("ttft", "layers", "ready"), EVICTED):
        ours, other = (found[f"{name}, {tier}, {mode}"] for mode in ORDERS[0][:2])
        saved = [without - with_ for with_, without in zip(ours, other, strict=True)]
        sooner = sum(each > 0 for each in saved)
        best = statistics.median(found.get(f"{name}, gpu", [0.0]))
        rows.append(
            report.row(
                f"{name}_4k_{tier}", "ms", "lower", ours, limit=best,
                limit_name="hit in the gpu tier", peers={"in turn": statistics.median(other)},
            )
        )  # fmt: skip
        goal = f"> 0; so in {sooner} of {len(saved)} turns"
        rows.append(report.row(f"{name}_saved_4k_{tier}", "ms", "higher", saved, goal=goal))
    return rows


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    with demo_model.console_progress() as progress:
        model = demo_model.build(demo_model.default_directory(), progress=progress)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="kvc2-overlap-") as name, ExitStack() as stack:
        bench = Bench(model, Path(name), stack)
        for number in range(flags.repeats + 1):
            for kind, milliseconds in bench.turn(ORDERS[number % 2]).items():
                if number:  # the first turn only warms up
                    found[kind].append(milliseconds)
            print(f"turn {number} of {flags.repeats} done", file=sys.stderr, flush=True)
    rows = rows_of(found)
    report.finish("what overlap saves of the time to the first token", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
