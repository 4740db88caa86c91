"""Expert deferral: what it costs in perplexity, beside the time that it saves.

Perplexity: of a fixed text (demo_prompt.md), token by token after its first, under the model as it
is and with --max-deferred-experts-per-token. Time: decode steps of that model's experts, all of
them the CPU's, where a layer's attention is a device's that answers after --attention-ms: the CPU
is free meanwhile. The embedded model has two experts a token, so that one of them is as much as can
be late: half of each layer's sum, where a model of eight would defer two or three of the least.
Example: python -m benchmarks.deferral --json build/bench/deferral.json
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from engine import demo_model
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.experts.deferral import DeferredExperts
from engine.experts.hybrid import PlacedExperts
from engine.http.tokenizer import Tokenizer
from engine.models import load_model
from engine.models.base import Model
from engine.models.placed import PlacedModel, moe_layers
from engine.runner import Runner
from engine.settings import EngineConfig

TEXT = Path(__file__).with_name("demo_prompt.md")
PAGE, CHUNK = 16, 128


def surprise(placed: PlacedModel, tokens: list[int]) -> Tensor:
    """Negative log-likelihoods of each token after the first, float64 [tokens - 1], in nats."""
    shape = KvShape.of(placed.model.config, PAGE)
    pages = list(range(-(-len(tokens) // PAGE)))
    memory = torch.zeros(len(pages) * shape.page_bytes, dtype=torch.uint8)
    runner = placed.compute(Runner(placed.model, KvPool(shape, len(pages), memory)))
    found = []
    for begin in range(0, len(tokens) - 1, CHUNK):
        end = min(begin + CHUNK, len(tokens) - 1)
        batch = Batch.of([Slice(tokens[begin:end], end, pages, True)], PAGE)
        rows = runner.step(replace(batch, logits_rows=torch.arange(end - begin)))
        wanted = torch.tensor(tokens[begin + 1 : end + 1])
        found.append(-rows.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
    return torch.cat(found)


def perplexity(surprises: Tensor) -> float:
    return math.exp(float(surprises.mean()))


def perplexity_row(
    case: str, surprises: Tensor, plain: Tensor, plain_name: str, most: float | None = None
) -> report.Row:
    """Beside the perplexity of the same tokens under `plain`. The ratio's standard error is that
    of the mean of the differences, token by token."""
    differences = surprises - plain
    ratio = perplexity(differences)
    error = ratio * float(differences.std()) / math.sqrt(len(differences))
    goal = f"{ratio:.4f} +- {error:.4f} of {plain_name}'s over {len(differences)} tokens"
    if most is not None:
        goal += f"; at most {most}"
    found = [perplexity(surprises)]
    limit = perplexity(plain)
    return report.row(case, "", "lower", found, limit=limit, limit_name=plain_name, goal=goal)


def decode_s(
    model: Model, experts: PlacedExperts, deferred: int, x: Tensor, wait_s: float
) -> float:
    """Seconds of one step: each layer's attention answers after `wait_s`."""
    layers = moe_layers(model)
    compute = DeferredExperts(experts, deferred).compute if deferred else experts.compute
    routings = {layer: moe.router(x) for layer, moe in layers.items()}
    began = time.perf_counter()
    for layer, routing in routings.items():
        time.sleep(wait_s)
        compute(layer, x, routing)
    return time.perf_counter() - began


def parser_of_text(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The flags of what runs a model over the text."""
    parser = report.parser(description, repeats=repeats)
    parser.add_argument("--model", type=Path, help="a directory; without it the embedded model")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the text (all)")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def model_and_text(options: argparse.Namespace) -> tuple[Path, list[int]]:
    """The model's directory, made where there is none, and the text's tokens. Sets the threads."""
    with demo_model.console_progress() as progress:
        target = options.model or demo_model.default_directory()
        directory = options.model or demo_model.build(target, progress=progress)
    torch.set_num_threads(options.threads)
    tokens = Tokenizer(directory).encode(TEXT.read_text(), 1 << 20)[: options.tokens]
    return directory, tokens


def main() -> None:
    parser = parser_of_text(__doc__ or "", repeats=7)
    parser.add_argument("--attention-ms", type=float, default=1.0, help="a layer (%(default)s)")
    options = parser.parse_args()
    directory, tokens = model_and_text(options)
    model = load_model(directory)
    plain = EngineConfig(model=directory, threads=options.threads, num_gpu_experts=0)
    rows, plainly = [], torch.zeros(0)
    for deferred in range(model.config.experts_per_token):
        placed = PlacedModel(replace(plain, max_deferred_experts_per_token=deferred), model)
        found = surprise(placed, tokens)
        plainly = found if not deferred else plainly
        placed.close()
        name = f"{deferred} of {model.config.experts_per_token} experts late: perplexity"
        rows.append(perplexity_row(name, found, plainly, "without deferral"))
    placed = PlacedModel(plain, model)
    assert placed.experts is not None
    wait_s = options.attention_ms / 1000
    for count in (1, 4):
        x = torch.randn(count, model.config.hidden_size).to(model.config.dtype)
        samples: dict[int, list[float]] = {n: [] for n in range(model.config.experts_per_token)}
        for _ in range(options.repeats + 1):  # the first one warms up
            for deferred, found_s in samples.items():
                found_s.append(decode_s(model, placed.experts, deferred, x, wait_s))
        ms = {deferred: [1000 * s for s in each[1:]] for deferred, each in samples.items()}
        without = sorted(ms[0])[len(ms[0]) // 2]
        for deferred, each in ms.items():
            name = f"{deferred} late: {count} tokens, attention {options.attention_ms} ms a layer"
            rows.append(report.row(name, "ms", "lower", each, peers={"none late": without}))
    placed.close()
    report.finish("Expert deferral", rows, options.json)


if __name__ == "__main__":
    main()
