"""Serves a checkpoint that is far larger than memory, beside the same kernels on the mapped file.

The embedded model with --experts a layer instead of 8: the same embeddings and attention, experts
that are its own times random factors, and random routers, orthogonal to the mean of what they see
(else nearly all tokens choose the same few, and what is used of the file fits in memory, which
--plain-routers shows). What the most chosen quarter serves is printed: OLMoE's is 52 %
(benchmarks.routings). 51 of them are 8.2 GB.

Each way runs in a memory cgroup (v1) of --limit-gb: ours, `serve --expert-memory-gb`; peer, experts
computed in place on the mapped checkpoint by the page cache, which is what llama.cpp does. Both
answer the same prompts greedily, and their tokens must be equal. A first answer warms up; the
second is measured. Limit of the reads: fio (if it is installed) and plain O_DIRECT of 1 MiB, as
many at a time as the store's.

Example: python -m benchmarks.large_checkpoint --folder DIR (on the disk to be measured; its 8 GB
are removed in the end, unless --keep)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import deferral, expert_file, experts_on_disk, report
from engine import demo_model
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.experts.grouped import MoeLayer
from engine.experts.router import Routing
from engine.http.tokenizer import Tokenizer
from engine.models import load_model
from engine.runner import Runner

HEADER_ALIGN = 4096
PROMPTS = ("A short story about a lighthouse.", "Why is the sky blue? Explain it to a child.")
TOKENS = 48


# ---- the checkpoint ----


def write(source: Path, target: Path, experts: int, *, plain_routers: bool = False) -> None:
    """A directory of one safetensors file, whose experts lie as a mapping computes on them: of each
    layer gate and up of all experts by turns, then down of all. plain_routers: merely random."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and path.name not in ("config.json", demo_model.MARKER):
            if not path.name.startswith("model.safetensors"):
                shutil.copy(path, target)
        elif path.suffix in (".model", ".jinja", ".txt"):
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    config["num_local_experts"] = experts
    (target / "config.json").write_text(json.dumps(config))
    means = router_inputs(source)
    if plain_routers:
        means = {layer: torch.zeros_like(mean) for layer, mean in means.items()}
    layers = [
        _Layer(source, config, layer, experts, means[layer])
        for layer in range(config["num_hidden_layers"])
    ]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in [*_shared(source), *(each for layer in layers for each in layer.names())]:
        num_bytes = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGN)
    with (target / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in _shared(source):
            file.write(_bytes(_read(source, name)))
        for layer in layers:
            for data in layer.tensors():
                file.write(_bytes(data))
        file.flush()
        os.fsync(file.fileno())


class _Layer:
    """One layer's tensors, in the order of the file."""

    def __init__(
        self, source: Path, config: Mapping[str, Any], layer: int, experts: int, mean: Tensor
    ) -> None:
        self._mean = mean / mean.norm().clamp(min=1e-12)  # zeros stay: nothing is taken away
        self._source, self._experts, self._layer = source, experts, layer
        self._of_source = demo_model.RECIPE.experts
        hidden, size = config["hidden_size"], config["intermediate_size"]
        self._shapes = {"w1": (size, hidden), "w3": (size, hidden), "w2": (hidden, size)}
        self._prefix = f"model.layers.{layer}.block_sparse_moe"
        self._hidden = hidden

    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{self._prefix}.gate.weight", (self._experts, self._hidden)
        for expert in range(self._experts):
            for part in ("w1", "w3"):
                yield f"{self._prefix}.experts.{expert}.{part}.weight", self._shapes[part]
        for expert in range(self._experts):
            yield f"{self._prefix}.experts.{expert}.w2.weight", self._shapes["w2"]

    def tensors(self) -> Iterator[Tensor]:
        """An expert of the source times a random factor a row."""
        random = torch.Generator().manual_seed(self._layer)
        router = torch.randn(self._experts, self._hidden, generator=random) / self._hidden**0.5
        yield (router - torch.outer(router @ self._mean, self._mean)).to(torch.bfloat16)
        for parts in (("w1", "w3"), ("w2",)):
            own = {
                (expert, part): _read(
                    self._source, f"{self._prefix}.experts.{expert}.{part}.weight"
                )
                for expert in range(self._of_source)
                for part in parts
            }
            for expert in range(self._experts):
                for part in parts:
                    weight = own[expert % self._of_source, part]
                    factor = 1 + 0.05 * torch.randn(len(weight), 1, generator=random)
                    yield weight * factor.to(torch.bfloat16)


def router_inputs(source: Path) -> dict[int, Tensor]:
    """The mean of what each layer's router sees of a text, float32 [hidden]."""
    model, seen = load_model(source), {}

    def watching(layer: int, moe: MoeLayer) -> MoeLayer:
        def router(x: Tensor) -> Routing:
            seen[layer] = x.float().mean(0)
            return moe.router(x)

        return replace(moe, router=router)  # type: ignore[arg-type]

    layers = tuple(
        replace(each, feed_forward=watching(index, each.feed_forward))  # type: ignore[arg-type]
        for index, each in enumerate(model.layers)
    )
    device = replace(model.device, fused=False)  # each router is called by itself
    watched = replace(model, layers=layers, device=device)
    tokens = Tokenizer(source).encode(deferral.TEXT.read_text(), 1 << 20)[:256]
    shape, pages = KvShape.of(model.config, 16), list(range(16))
    memory = torch.zeros(len(pages) * shape.page_bytes, dtype=torch.uint8)
    runner = Runner(watched, KvPool(shape, len(pages), memory))
    runner.step(Batch.of([Slice(tokens, len(tokens), pages, True)], 16))
    return seen


def _weight_map(source: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((source / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    return found


def _read(source: Path, name: str) -> Tensor:
    with safe_open(source / _weight_map(source)[name], "pt") as file:
        found: Tensor = file.get_tensor(name)
        return found


def _shared(source: Path) -> list[tuple[str, tuple[int, ...]]]:
    """All but the experts and routers."""
    found = []
    for name in sorted(_weight_map(source)):
        if "block_sparse_moe" not in name:
            with safe_open(source / _weight_map(source)[name], "pt") as file:
                found.append((name, tuple(file.get_slice(name).get_shape())))
    return found


def _bytes(data: Tensor) -> memoryview:
    return data.contiguous().view(torch.uint8).numpy().data


# ---- one way, in a process of its own ----


def serve_once(way: str, model: Path, expert_gb: float) -> dict[str, Any]:
    """Answers the prompts; seconds and reads of the last one."""
    from fastapi.testclient import TestClient

    from engine.models import placed
    from engine.serve import assemble
    from engine.settings import EngineConfig

    if way == "mmap":
        placed._host = _mapped(model)
    config = EngineConfig(
        model=model, kv_memory_gb=0.1, expert_memory_gb=expert_gb, chunk_size=64, threads=2
    )
    engine = assemble(config)
    told: dict[str, Any] = {"tokens": []}
    with TestClient(engine.app) as client:
        for prompt in PROMPTS:
            before = engine.experts.state(), _read_bytes(), time.perf_counter()
            body = {"model": config.model_name, "prompt": prompt, "max_tokens": TOKENS}
            body |= {"temperature": 0, "ignore_eos": True, "kvc2": {"details": True}}
            answer = client.post("/v1/completions", json=body).json()
            took = time.perf_counter() - before[2] - answer["kvc2"]["ttft_ms"] / 1000
            told["tokens"] += [each["token_id"] for each in answer["kvc2"]["tokens"]]
            told["tokens_per_s"] = (TOKENS - 1) / took
            told["ttft_s"] = answer["kvc2"]["ttft_ms"] / 1000
            seconds = time.perf_counter() - before[2]
            told["read_gb_s"] = (_read_bytes() - before[1]) / seconds / 1e9
            told["read_gb"] = (_read_bytes() - before[1]) / 1e9
            state = engine.experts.state()
            counts = {
                name: state.get(f"memory_{name}", 0) - before[0].get(f"memory_{name}", 0)
                for name in ("hits", "late", "misses")
            }
            told["hit_rate"] = counts["hits"] / max(1, sum(counts.values()))
    ordered = np.sort(engine.experts.statistics.counts.reshape(-1))[::-1]
    told["quarter"] = float(ordered[: len(ordered) // 4].sum() / ordered.sum())
    engine.bridge.close()
    engine.experts.close()
    return told


def _read_bytes() -> int:
    """What this process made the disk read."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def _mapped(model: Path) -> Any:
    """In the place of the store: the same kernels on the mapped file."""
    from engine.experts.hybrid import HostExecutor, Weights

    whole = np.memmap(model / "model.safetensors", np.uint8, "c")

    def host(config: Any, _: Any, layers: Any, kernels: Any, *most: Any) -> HostExecutor:
        found = {}
        for index, moe in layers.items():
            stored = moe.experts
            count, rows = len(stored.experts), 2 * stored.size

            def view(begin: int, *shape: int) -> Tensor:
                data = whole[begin : begin + int(np.prod(shape)) * 2]
                return torch.from_numpy(data).view(torch.bfloat16).view(shape)

            gate, _, down = stored.experts[0]
            found[index] = Weights(
                view(gate.begin, count, rows, stored.hidden),
                view(down.begin, count, stored.hidden, stored.size),
            )
        return HostExecutor(found, kernels)

    return host


# ---- both ways ----


def measure(options: argparse.Namespace, model: Path) -> list[report.Row]:
    limit = int(options.limit_gb * 1e9)
    command = [sys.executable, "-m", "benchmarks.large_checkpoint", "--one"]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "mmap": []}
    plain, fio = [], []
    for _ in range(options.repeats):
        for way, samples in found.items():
            one = [*command, way, "--folder", str(model), "--expert-gb", str(options.expert_gb)]
            told = experts_on_disk.in_cgroup(limit, one)
            if isinstance(told, report.Absent):
                raise SystemExit(f"{way} did not run: {told.reason}")
            print(way, {k: v for k, v in told.items() if k != "tokens"}, flush=True)
            samples.append(told)
        plain.append(expert_file.plain_reads(model / "model.safetensors"))
        fio.append(expert_file.fio_gb_s(model / "model.safetensors"))
    answers = [each["tokens"] for samples in found.values() for each in samples]
    if any(each != answers[0] for each in answers):
        raise SystemExit("the ways gave different tokens")
    ours, mapped = found["ours"], found["mmap"]

    def row(name: str, unit: str, key: str, scale: float = 1.0, **more: Any) -> report.Row:
        peer = float(np.median([each[key] for each in mapped])) * scale
        samples = [each[key] * scale for each in ours]
        better = "lower" if key == "read_gb" else "higher"
        return report.row(name, unit, better, samples, peers={"mmap": peer} | more)  # type: ignore[arg-type]

    size = (model / "model.safetensors").stat().st_size / 1e9
    name = f"{size:.1f} GB in {options.limit_gb} GB, {options.expert_gb} GB of experts"
    peers = {"plain O_DIRECT": float(np.median(plain)), "fio": expert_file.median_or_absent(fio)}
    return [
        row(f"{name}: decode", "tokens/s", "tokens_per_s"),
        row("in memory when their layer began", "%", "hit_rate", 100),
        row("read for an answer", "GB", "read_gb"),
        row("reads, computing in the mean", "GB/s", "read_gb_s", **peers),
        row("the most chosen quarter of the experts serves", "%", "quarter", 100),
    ]


def main() -> None:
    parser = report.parser(__doc__ or "", repeats=3)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is made")
    parser.add_argument("--model", type=Path, help="the embedded model's directory")
    parser.add_argument("--experts", type=int, default=51, help="a layer (%(default)s)")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="of memory (%(default)s)")
    parser.add_argument("--expert-gb", type=float, default=2.3, help="of it (%(default)s)")
    plain = "merely random: most tokens choose the same few experts"
    parser.add_argument("--plain-routers", action="store_true", help=plain)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--one", choices=("ours", "mmap"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(serve_once(options.one, options.folder, options.expert_gb)))
        return
    kind = "-plain" if options.plain_routers else ""
    model = options.folder / f"demo-{options.experts}{kind}"
    if not model.exists():
        with demo_model.console_progress() as progress:
            given = options.model or demo_model.default_directory()
            source = options.model or demo_model.build(given, progress=progress)
        write(source, model, options.experts, plain_routers=options.plain_routers)
    try:
        rows = measure(options, model)
    finally:
        if not options.keep:
            shutil.rmtree(model)
    report.finish("A checkpoint larger than memory", rows, options.json)


if __name__ == "__main__":
    main()
