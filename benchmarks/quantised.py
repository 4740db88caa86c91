"""Quantised experts of the embedded model: perplexity beside bf16, and how soon an engine is ready.

Perplexity: of a fixed text (demo_prompt.md), token by token after its first, and the standard
error of its ratio to bf16's. Ready: seconds from the start of a process of `kvc2-engine serve` to
its line `serving`, medians by turns; with a file of packed experts, which the first start of all
makes.
Example: python -m benchmarks.quantised --json build/bench/quantised.json
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch import Tensor

from benchmarks import report
from benchmarks.deferral import model_and_text, parser_of_text, perplexity_row, surprise
from engine.config import ModelConfig
from engine.models import build_model
from engine.models.packed import FORMATS, expert_bytes, open_packed
from engine.models.placed import PlacedModel
from engine.settings import EngineConfig
from engine.weights import Checkpoint

MOST = {"int8": 1.01, "fp8": 1.01, "int4": 1.06}  # of bf16's perplexity


def surprise_of(directory: Path, expert_dtype: str, tokens: list[int], kept: Path) -> Tensor:
    config = ModelConfig.load(directory)
    with Checkpoint(directory, config.dtype) as checkpoint:
        packed = open_packed(config, checkpoint, expert_dtype, kept)
        model = build_model(config, checkpoint, packed)
    placed = PlacedModel(EngineConfig(model=directory), model)
    found = surprise(placed, tokens)
    placed.close()
    return found


def ready_s(directory: Path, expert_dtype: str, kept: Path) -> float:
    command = [sys.executable, "-m", "engine", "serve", "--model", str(directory), "--port", "0"]
    command += ["--expert-dtype", expert_dtype, "--expert-cache", str(kept)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
        process.terminate()
    assert line.startswith("serving"), line
    return took


def main() -> None:
    options = parser_of_text(__doc__ or "", repeats=5).parse_args()
    directory, tokens = model_and_text(options)
    config, rows = ModelConfig.load(directory), []
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        kept = Path(folder)
        plain: Tensor | None = None
        for expert_dtype in FORMATS:
            found = surprise_of(directory, expert_dtype, tokens, kept)
            plain = found if plain is None else plain
            name = f"{expert_dtype} ({expert_bytes(config, expert_dtype) / 1e6:.2f} MB an expert)"
            name, most = f"{name}: perplexity", MOST.get(expert_dtype)
            rows.append(perplexity_row(name, found, plain, "bf16", most))
            print(f"{name} {rows[-1].ours:.4f}, {rows[-1].goal}", flush=True)
        ready: dict[str, list[float]] = {each: [] for each in ("bf16", "int8", "int4", "fp8")}
        for _ in range(options.repeats):
            for expert_dtype, samples in ready.items():
                samples.append(ready_s(directory, expert_dtype, kept))
        rows += [report.row(f"{d}: ready", "s", "lower", each) for d, each in ready.items()]
    report.finish("Quantised experts", rows, options.json)


if __name__ == "__main__":
    main()
