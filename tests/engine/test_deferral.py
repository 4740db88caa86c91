"""Deferral: late outputs are those of the rule, whoever computed them, and of no other step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import spellings
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.experts.deferral import DeferredExperts
from engine.experts.placement import place
from engine.experts.router import Routing
from engine.kernels import grouped_experts
from engine.models import load_model
from engine.models.placed import PlacedModel
from engine.runner import Runner
from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe
from tests.engine.test_hybrid import CHOSEN, EXPERTS, HIDDEN, LAYERS, Made, Script

CHOICES = 4


class Late:
    """The rule written down plainly, over a model's layers in one place."""

    def __init__(self, made: Made, deferred: int) -> None:
        self._made, self._deferred = made, deferred
        self._late: torch.Tensor | float = 0.0

    def compute(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        kept = CHOICES - self._deferred * (layer < LAYERS - 1)
        late, self._late = self._late, 0.0
        if kept < CHOICES:
            self._late = self._plain(layer, x, routing, slice(kept, None))
        now = self._plain(layer, x, routing, slice(0, kept))
        return now + late if layer > 0 else now

    def _plain(self, layer: int, x: torch.Tensor, routing: Routing, part: slice) -> torch.Tensor:
        ids, factors = (e[:, part].contiguous() for e in (routing.expert_ids, routing.weights))
        weights = self._made.layers[layer]
        return grouped_experts(x, ids, factors, weights.gate_up, weights.down)


def routing(tokens: int) -> Routing:
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(tokens)])
    return Routing(ids, torch.rand(tokens, CHOICES).sort(descending=True).values)


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deferred", [1, 3])
def test_what_is_late_is_added_one_layer_later_wherever_experts_lie(
    opened: list[Any], dtype: torch.dtype, deferred: int
) -> None:
    """Also while they move."""
    for hot in (0, 12, 24):
        made = Made(hot, dtype, spare=3)
        opened.append(made.hybrid)
        mask = place("random", made.room, made.statistics.counts, 5)
        made.hybrid.fill(mask)
        made.hybrid.follow(Script(made.room, mask))
        ours, rule = DeferredExperts(made.hybrid, deferred), Late(made, deferred)
        for step in range(2000):
            if step >= 20 and (made.exchanges or hot != 12):  # a busy machine copies them late
                break
            made.hybrid.between_steps(float(step))
            for layer in range(LAYERS):
                tokens = 1 + 7 * (step % 5)
                x, chosen = torch.randn(tokens, HIDDEN).to(dtype), routing(tokens)
                made.statistics.record(layer, chosen.expert_ids)
                assert torch.equal(ours.compute(layer, x, chosen), rule.compute(layer, x, chosen))
        assert made.exchanges > 0 or hot != 12


def test_a_step_that_ended_early_leaves_nothing_to_the_next(opened: list[Any]) -> None:
    made = Made(12)
    opened.append(made.hybrid)
    made.hybrid.fill(place("uniform", made.room, made.statistics.counts, 0))
    ours = DeferredExperts(made.hybrid, 2)
    ours.compute(0, torch.randn(5, HIDDEN), routing(5))
    ours.compute(1, torch.randn(5, HIDDEN), routing(5))
    rule = Late(made, 2)
    for layer in range(LAYERS):
        x, chosen = torch.randn(3, HIDDEN), routing(3)
        assert torch.equal(ours.compute(layer, x, chosen), rule.compute(layer, x, chosen))


def test_a_late_expert_that_fails_fails_the_layer_that_adds_it(opened: list[Any]) -> None:
    made = Made(0)
    opened.append(made.hybrid)
    ours, compute = DeferredExperts(made.hybrid, 1), made.host.compute

    def breaks(layer: int, x: torch.Tensor, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        if ids.shape[1] == 1:
            raise RuntimeError("broken")
        compute(layer, x, ids, outputs)

    made.host.compute = breaks  # type: ignore[method-assign]
    ours.compute(0, torch.randn(2, HIDDEN), routing(2))
    with pytest.raises(RuntimeError, match="broken"):
        ours.compute(1, torch.randn(2, HIDDEN), routing(2))
    made.host.compute = compute  # type: ignore[method-assign]
    x, chosen = torch.randn(2, HIDDEN), routing(2)
    assert torch.equal(ours.compute(0, x, chosen), Late(made, 1).compute(0, x, chosen))


# a whole model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layer 1 has no experts: what layer 0 deferred comes with layer 2."""
    return make_qwen3_moe(
        tmp_path_factory.mktemp("model"),
        dtype=torch.bfloat16,
        mlp_only_layers=[1],
        num_experts_per_tok=3,
    )


def logits(placed: PlacedModel, *ends: int) -> torch.Tensor:
    """Of one prompt, in these chunks."""
    shape = KvShape.of(placed.model.config, 16)
    pool = KvPool(shape, 8, torch.zeros(8 * shape.page_bytes, dtype=torch.uint8))
    compute = placed.compute(Runner(placed.model, pool))
    tokens = [(7 * i * i + 3 * i + 1) % 128 for i in range(50)]
    for begin, end in zip((0, *ends), ends, strict=False):
        row = compute.step(Batch.of([Slice(tokens[begin:end], end, list(range(8)), True)], 16))[0]
    return row


def test_answers_depend_on_the_number_and_on_nothing_else(model_dir: Path) -> None:
    model = load_model(model_dir)
    config = EngineConfig(model=model_dir, threads=2)
    found = []
    for deferred in (0, 1, 2):
        late = replace(config, max_deferred_experts_per_token=deferred)
        rows = []
        for fields in (
            {},
            {"num_gpu_experts": 0},
            {"gpu_experts_ratio": 0.5, "enable_dynamic_expert_update": True},
        ):
            placed = PlacedModel(replace(late, **fields), model)
            rows += [logits(placed, 50), logits(placed, 20, 47, 48, 49, 50)]
            placed.close()
        assert all(torch.equal(each, rows[0]) for each in rows)
        found.append(rows[0])
    assert not any(torch.equal(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_one_expert_of_a_token_is_never_late(tmp_path: Path) -> None:
    model_dir = make_mixtral(tmp_path / "model")
    config = EngineConfig(model=model_dir, max_deferred_experts_per_token=CHOSEN)
    with pytest.raises(InvalidConfig, match=r"max_deferred_experts_per_token = 2: 0 to 1"):
        PlacedModel(config, load_model(model_dir))


def test_ktransformers_spelling_is_taken() -> None:
    assert spellings.arguments(["--kt-max-deferred-experts-per-token", "2"]) == [
        "--max-deferred-experts-per-token",
        "2",
    ]
