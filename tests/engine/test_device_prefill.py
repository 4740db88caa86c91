"""Prefill on the device: cold experts that are streamed there give the bits that they always give,
whatever memory there is for them and whatever became of an earlier step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.experts.hybrid import HostExecutor, Place, Weights
from engine.experts.placement import place
from engine.experts.prefill import Measured, PrefillStream
from engine.kernels import Choices, workbench_of
from engine.models import build_model
from engine.models.placed import PlacedModel
from engine.settings import EngineConfig
from engine.weights import Checkpoint
from kvc2.errors import InvalidConfig
from tests.doubles.checkpoints import make_mixtral
from tests.engine.test_hybrid import EXPERTS, LAYERS, Broken, Made, Script, logits

FROM_TOKENS = 10


class Streamed(Made):
    """Experts of which `places` fit on the device beside the hot ones. The CPU is broken where a
    step is the device's."""

    def __init__(self, hot: int, places: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(hot, dtype)
        self.mask = place("random", self.room, self.statistics.counts, 5)
        self.hybrid.fill(self.mask)
        self.copies: list[Place] = []
        self.stream = PrefillStream(
            self.copy,
            self.layers[0].weights(places),
            EXPERTS,
            Choices(workbench_of(1)),
            FROM_TOKENS,
        )
        self.hybrid.stream(self.stream)

    def copy(self, expert: Place, target: Weights, at: int) -> None:
        self.copies.append(expert)
        HostExecutor.copy(self.host, expert, target, at)

    def prefill(self, tokens: int) -> bool:
        kernels: Any = self.host._kernels
        self.host._kernels = Broken()  # type: ignore[assignment]
        try:
            return all(self.step(tokens, layer) for layer in range(LAYERS))
        finally:
            self.host._kernels = kernels


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hot", [0, 12])
@pytest.mark.parametrize("places", [1, 3, EXPERTS, 40])
def test_streamed_experts_change_no_bit(
    opened: list[Any], dtype: torch.dtype, hot: int, places: int
) -> None:
    made = Streamed(hot, places, dtype)
    opened.append(made.hybrid)
    for tokens in (FROM_TOKENS, 40, 17):
        assert made.prefill(tokens)
    assert made.hybrid.state()["prefill"]["places"] == places
    assert 0 < made.stream.measured.copied <= 3 * (LAYERS * EXPERTS - hot)


def test_a_step_below_the_threshold_is_the_cpus(opened: list[Any]) -> None:
    made = Streamed(6, EXPERTS)
    opened.append(made.hybrid)
    assert all(made.step(FROM_TOKENS - 1, layer) for layer in range(LAYERS))
    assert made.copies == []


def test_experts_that_move_between_streamed_steps_change_no_bit(opened: list[Any]) -> None:
    made = Streamed(12, 4)
    opened.append(made.hybrid)
    made.hybrid.follow(Script(made.room, made.mask))
    for now in range(300):
        made.hybrid.between_steps(float(now))
        tokens = FROM_TOKENS - 1 + now % 3
        assert all(made.step(tokens, layer) for layer in range(LAYERS))
        if made.exchanges > 20:
            break
    assert made.exchanges > 20
    assert made.copies


class Waits:
    """Kernels that wait for something to have happened elsewhere."""

    def __init__(self, kernels: Any, what: threading.Event) -> None:
        self._kernels, self._what = kernels, what

    def compute(self, *arguments: Any) -> None:
        assert self._what.wait(30)
        self._kernels.compute(*arguments)


def test_a_layer_is_copied_while_the_one_before_is_computed(opened: list[Any]) -> None:
    """Else the first layer would never be done."""
    made = Streamed(0, 2 * EXPERTS)
    opened.append(made.hybrid)
    next_layer = threading.Event()

    def copy(expert: Place, target: Weights, at: int) -> None:
        if expert[0] == 1:
            next_layer.set()
        HostExecutor.copy(made.host, expert, target, at)

    made.stream._copy = copy
    made.stream._kernels = Waits(made.stream._kernels, next_layer)  # type: ignore[assignment]
    assert made.prefill(30)


def test_a_copy_that_fails_fails_the_step_that_needs_it_and_no_other(opened: list[Any]) -> None:
    made = Streamed(0, 3)
    opened.append(made.hybrid)
    plain = made.copy

    def fails(expert: Place, target: Weights, at: int) -> None:
        if expert[0] == 1:
            raise OSError("the bus is gone")
        plain(expert, target, at)

    made.stream._copy = fails
    assert made.step(40, 0)
    with pytest.raises(OSError, match="the bus is gone"):
        made.step(40, 1)
    made.stream._copy = plain
    assert made.prefill(40)
    assert made.prefill(12)


def test_a_step_that_ended_early_leaves_its_places_to_the_next(opened: list[Any]) -> None:
    made = Streamed(0, 2)
    opened.append(made.hybrid)
    for _ in range(5):
        assert made.step(20, 0)  # and its other layers never come
    assert made.prefill(20)
    assert made.step(3, 0)  # no prefill: what was begun is given up


@pytest.mark.parametrize(
    "fields",
    [
        {"num_gpu_experts": 0},
        {"gpu_experts_ratio": 0.5, "enable_dynamic_expert_update": True},
        {"gpu_experts_ratio": 1.0},
        {"gpu_experts_ratio": 0.3, "expert_memory_gb": 8.5 * 3 * 96 * 48 * 4 / 1e9},
        {"gpu_experts_ratio": 0.5, "max_deferred_experts_per_token": 1},
    ],
    ids=str,
)
def test_a_model_answers_as_it_does_without(tmp_path: Path, fields: dict[str, Any]) -> None:
    model_dir = make_mixtral(tmp_path / "model", torch.bfloat16, num_local_experts=8)

    def answer(**more: Any) -> torch.Tensor:
        config = EngineConfig(model=model_dir, threads=2, **more)
        read = ModelConfig.load(model_dir)
        on_disk = config.expert_memory_gb is not None
        with Checkpoint(model_dir, read.dtype, experts_on_disk=on_disk) as checkpoint:
            model = build_model(read, checkpoint)
            placed = PlacedModel(config, model)
        found = logits(model, placed)
        state = placed.state()
        placed.close()
        if "gpu_prefill_token_threshold" in more and fields.get("gpu_experts_ratio") != 1.0:
            assert state["prefill"]["copied"] > 0
        return found

    late = fields.get("max_deferred_experts_per_token", 0)
    plain = answer(max_deferred_experts_per_token=late)
    assert torch.equal(answer(**fields, gpu_prefill_token_threshold=8), plain)


def test_it_pays_where_the_cpu_takes_as_long_as_the_copies() -> None:
    measured = Measured(copied=10, copy_s=0.05)
    assert measured.pays_from(64) is None
    measured.host_tokens, measured.host_s = 200, 0.4  # 2 ms a token; a layer's copies take 320
    assert measured.pays_from(64) == 160


def test_without_cold_experts_there_is_nothing_to_stream() -> None:
    with pytest.raises(InvalidConfig, match="gpu_prefill_token_threshold"):
        EngineConfig(model=Path("/"), gpu_prefill_token_threshold=8)
