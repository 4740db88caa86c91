"""Experts in two places: where one lies, and that it moves, changes no bit of any output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import _kernels
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.experts.dynamic import DynamicPlacement, Exchange, Pace
from engine.experts.hybrid import DeviceExecutor, HostExecutor, Place, PlacedExperts, Weights
from engine.experts.placement import Room, place
from engine.experts.router import Routing
from engine.experts.statistics import Statistics
from engine.kernels import Choices, grouped_experts, workbench_of
from engine.models import load_model
from engine.models.base import Model
from engine.models.placed import PlacedModel
from engine.runner import Runner
from engine.settings import EngineConfig
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe

LAYERS, EXPERTS, CHOSEN, HIDDEN, SIZE = 3, 8, 2, 48, 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Script(DynamicPlacement):
    """Wants exchanges at random, as many as there is room for, whatever was chosen."""

    def __init__(self, room: Room, hot: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        super().__init__(room, hot, np.zeros(hot.shape), Pace(1e9))
        self._random = np.random.default_rng(1)

    def plan(self, now: float, most: int = 1) -> list[Exchange]:
        busy = {place for each in self._under_way for place in (each.hot, each.cold)}
        come, leave = (
            [
                tuple(at)
                for at in self._random.permutation(np.argwhere(mask))
                if tuple(at) not in busy
            ]
            for mask in (~self.hot, self.hot)
        )
        begun = [Exchange(*pair) for pair in zip(come[:most], leave[:most], strict=False)]
        self._under_way.update(begun)
        return begun


class Made:
    """A model's experts with random weights, in both forms."""

    def __init__(
        self, hot: int, dtype: torch.dtype = torch.float32, spare: int = 2, copies: Any = None
    ) -> None:
        torch.manual_seed(0)
        self.layers = {
            layer: Weights(
                (torch.randn(EXPERTS, 2 * SIZE, HIDDEN) / 4).to(dtype),
                (torch.randn(EXPERTS, HIDDEN, SIZE) / 4).to(dtype),
            )
            for layer in range(LAYERS)
        }
        self.dtype = dtype
        self.statistics = Statistics(LAYERS, EXPERTS)
        self.host = HostExecutor(self.layers, Choices(workbench_of(1)))
        if copies is not None:
            self.host.copy = copies  # type: ignore[method-assign]
        weights = self.layers[0].weights(hot + spare)
        self.device = DeviceExecutor(weights, (LAYERS, EXPERTS), Choices(workbench_of(1)))
        self.room = Room((True,) * LAYERS, EXPERTS, hot)
        self.hybrid = PlacedExperts(
            self.host,
            self.device,
            Choices(workbench_of(2)),
            statistics=self.statistics,
            chosen=CHOSEN,
        )

    @property
    def exchanges(self) -> int:
        return int(self.hybrid.state()["exchanges"])

    def step(self, tokens: int, layer: int = 0) -> bool:
        """One layer of a step: whether it has the bits of all experts in one place."""
        x = torch.randn(tokens, HIDDEN).to(self.dtype)
        ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
        routing = Routing(ids, torch.rand(tokens, CHOSEN))
        self.statistics.record(layer, ids)
        weights = self.layers[layer]
        plain = grouped_experts(x, ids, routing.weights, weights.gate_up, weights.down)
        return torch.equal(self.hybrid.compute(layer, x, routing), plain)


@pytest.fixture
def opened() -> Iterator[list[PlacedExperts]]:
    """What a test puts here is closed in the end."""
    made: list[PlacedExperts] = []
    yield made
    for each in made:
        each.close()


@DTYPES
@pytest.mark.parametrize("hot", [0, 1, 12, 24])
def test_where_an_expert_lies_changes_no_bit(
    opened: list[PlacedExperts], dtype: torch.dtype, hot: int
) -> None:
    made = Made(hot, dtype)
    opened.append(made.hybrid)
    made.hybrid.fill(place("random", made.room, made.statistics.counts, 5))
    assert all(made.step(tokens, layer) for tokens in (1, 5, 40) for layer in range(LAYERS))


@DTYPES
def test_experts_that_move_under_load_change_no_bit(
    opened: list[PlacedExperts], dtype: torch.dtype
) -> None:
    made = Made(12, dtype, spare=3)
    opened.append(made.hybrid)
    hot = place("uniform", made.room, made.statistics.counts, 0)
    made.hybrid.fill(hot)
    made.hybrid.follow(Script(made.room, hot))
    for now in range(2000):
        made.hybrid.between_steps(float(now))
        assert made.step(1 + now % 7, now % LAYERS)
        assert made.hybrid.hot.sum() == 12
        if made.exchanges > 100:
            break
    assert made.exchanges > 100
    assert made.hybrid.state()["failed_copies"] == 0


class Meeting:
    """Kernels that wait for the other executor to have begun."""

    def __init__(self, kernels: Choices, both: threading.Barrier) -> None:
        self._kernels, self._both = kernels, both

    def compute(self, *arguments: Any) -> None:
        self._both.wait(timeout=30)
        self._kernels.compute(*arguments)


def test_both_executors_run_at_the_same_time(opened: list[PlacedExperts]) -> None:
    """Else neither of them would ever begin."""
    made = Made(12)
    opened.append(made.hybrid)
    made.hybrid.fill(place("uniform", made.room, made.statistics.counts, 0))
    both = threading.Barrier(2)
    made.host._kernels = Meeting(made.host._kernels, both)  # type: ignore[assignment]
    made.device._kernels = Meeting(made.device._kernels, both)  # type: ignore[assignment]
    assert made.step(60)


def test_a_step_waits_for_no_copy_and_a_failed_one_moves_nothing(
    opened: list[PlacedExperts],
) -> None:
    released, fails = threading.Event(), threading.Event()

    def copy(expert: Place, target: Weights, at: int) -> None:
        if fails.is_set():
            released.wait(30)
            raise OSError("gone")
        HostExecutor.copy(made.host, expert, target, at)

    made = Made(12, copies=copy)
    opened.append(made.hybrid)
    hot = place("uniform", made.room, made.statistics.counts, 0)
    made.hybrid.fill(hot)
    fails.set()
    made.hybrid.follow(Script(made.room, hot))
    for now in range(20):  # the copies that were begun at once hang all the time
        made.hybrid.between_steps(float(now))
        assert made.step(3)
    assert np.array_equal(made.hybrid.hot, hot)
    released.set()
    while made.hybrid.state()["failed_copies"] < 10:  # their places are free again, and tried again
        made.hybrid.between_steps(0.0)
    assert np.array_equal(made.hybrid.hot, hot)
    assert made.step(9)


class Broken:
    """Kernels that fail."""

    def compute(self, *_: Any) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("which", ["host", "device"])
def test_a_failed_executor_fails_the_step_and_the_next_one_runs(
    opened: list[PlacedExperts], which: str
) -> None:
    made = Made(12)
    opened.append(made.hybrid)
    made.hybrid.fill(place("uniform", made.room, made.statistics.counts, 0))
    executor: Any = getattr(made, which)
    kernels, executor._kernels = executor._kernels, Broken()
    with pytest.raises(RuntimeError, match="broken"):
        made.step(40)
    executor._kernels = kernels
    assert made.step(40)


class Unlike(Made):
    """Its device computes by another instruction set: other bits."""

    def __init__(self, hot: int) -> None:
        super().__init__(hot)
        self.device._kernels = Choices(_kernels.Workbench("portable", 1))
        self.device.numerics, self.host.numerics = "portable", "best"

    def expected(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each sums its own choices."""
        total, weights = torch.zeros_like(x), self.layers[0]
        for kernels, mine in (
            (self.host._kernels, ~self.hybrid.hot[0]),
            (self.device._kernels, self.hybrid.hot[0]),
        ):
            ids = routing.expert_ids.masked_fill(~torch.from_numpy(mine)[routing.expert_ids], -1)
            outputs = torch.zeros(*ids.shape, HIDDEN)
            kernels.compute(x, ids, weights.gate_up, weights.down, outputs)
            total = total + Choices(workbench_of(1)).sum(outputs, routing.weights, x.dtype)
        return total


@pytest.mark.skipif(_kernels.instruction_sets() == ["portable"], reason="one set: equal bits")
def test_executors_with_unlike_numerics_sum_their_own_choices(opened: list[PlacedExperts]) -> None:
    made = Unlike(12)
    opened.append(made.hybrid)
    assert made.hybrid.numerics == "portable:best"
    made.hybrid.fill(place("random", made.room, made.statistics.counts, 5))
    for tokens in (1, 40):
        x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, CHOSEN)
        ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
        routing = Routing(ids, weights)
        found = made.hybrid.compute(0, x, routing)
        assert torch.equal(found, made.expected(x, routing))
        assert torch.equal(made.hybrid.end(made.hybrid.begin(0, x, routing)), found)
        one = Routing(ids[:1], weights[:1])  # a row's bits are its own here too
        assert torch.equal(made.hybrid.compute(0, x[:1], one), found[:1])


def test_the_share_of_the_device_is_told_by_layer(opened: list[PlacedExperts]) -> None:
    made = Made(EXPERTS)
    opened.append(made.hybrid)
    made.hybrid.fill(place("front-loading", made.room, made.statistics.counts, 0))
    made.step(10, 0)
    made.step(10, 1)
    made.hybrid.between_steps(0.0)
    state = made.hybrid.state()
    assert [each["device_share"] for each in state["by_layer"]] == [1.0, 0.0, 0]
    assert state["by_layer"][0]["hot"] == list(range(EXPERTS))
    assert state["device_share"] == 0.5


# a whole model


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"mixtral": make_mixtral, "qwen3_moe": make_qwen3_moe}[request.param]
    return make(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def logits(model: Model, placed: PlacedModel) -> torch.Tensor:
    """Of a prompt in two chunks and three decodes."""
    shape = KvShape.of(model.config, 16)
    pool = KvPool(shape, 8, torch.zeros(8 * shape.page_bytes, dtype=torch.uint8))
    compute = placed.compute(Runner(placed.model, pool))
    tokens = [(7 * i * i + 3 * i + 1) % 128 for i in range(50)]
    rows, pages = [], list(range(8))
    for begin, end in ((0, 20), (20, 47), (47, 48), (48, 49), (49, 50)):
        rows.append(compute.step(Batch.of([Slice(tokens[begin:end], end, pages, True)], 16))[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_gpu_experts": 0},
        {"num_gpu_experts": 3, "expert_placement_strategy": "random"},
        {"gpu_experts_ratio": 0.5, "enable_dynamic_expert_update": True},
        {"gpu_experts_ratio": 1.0, "enable_dynamic_expert_update": True},
    ],
    ids=str,
)
def test_a_model_gives_the_same_logits_wherever_its_experts_lie(
    model_dir: Path, fields: dict[str, Any]
) -> None:
    model = load_model(model_dir)
    config = EngineConfig(model=model_dir, threads=2)
    plain = PlacedModel(config, model)
    expected = logits(model, plain)
    placed = PlacedModel(replace(config, **fields), model)
    assert torch.equal(logits(model, placed), expected)
    assert placed.state()["activations"] == plain.state()["activations"]
    assert placed.state()["activations"] == 50 * 2 * sum(model.config.moe_layers)
    placed.close()


def test_counts_are_kept_and_place_the_next_runs_experts(model_dir: Path, tmp_path: Path) -> None:
    model, path = load_model(model_dir), tmp_path / "counts.json"
    config = EngineConfig(model=model_dir, threads=2, expert_statistics=path)
    first = PlacedModel(config, model)
    logits(model, first)
    assert first.save() == str(path)
    again = PlacedModel(
        replace(config, expert_placement_strategy="frequency", num_gpu_experts=1), model
    )
    assert again.experts is not None
    counts = first.statistics.counts
    assert np.array_equal(again.statistics.counts, counts)
    assert counts[again.experts.hot].min() >= np.sort(counts.reshape(-1))[::-1][len(counts) - 1]
    again.close()
