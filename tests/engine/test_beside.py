"""Cold experts beside a device, on a CPU: a side stream is as late as may be, or as early."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import kernels, layers
from engine.experts.beside import BesideDevice, Pinned
from engine.experts.hybrid import HostExecutor, Spent, Weights
from engine.experts.router import Routing
from engine.kernels import Choices
from tests.engine.graph_tape import TapeRecorder, TapeSideStream

LAYERS, EXPERTS, CHOSEN, HIDDEN, SIZE, TOKENS = 2, 6, 3, 64, 40, 9
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value
MASKS = {
    "none": np.zeros((LAYERS, EXPERTS), bool),
    "some": np.array([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]], bool),
    "a layer": np.array([[1] * EXPERTS, [0] * EXPERTS], bool),
    "all": np.ones((LAYERS, EXPERTS), bool),
}


class Failing(HostExecutor):
    """It does so while it is told to."""

    error: Exception | None = None

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        if self.error is not None:
            raise self.error
        super().compute(layer, x, expert_ids, outputs)


class Bench:
    def __init__(self, mask: str, dtype: torch.dtype, *, prompt: bool = False) -> None:
        random = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=random) / 8).to(dtype)

        self.weights = {
            at: Weights(weights(EXPERTS, 2 * SIZE, HIDDEN), weights(EXPERTS, HIDDEN, SIZE))
            for at in range(LAYERS)
        }
        sums = Choices(kernels.workbench_of(1))
        self.host, hot = Failing(self.weights, sums), MASKS[mask]
        self.side = TapeSideStream(TapeRecorder(), prompt=prompt)
        self.experts = BesideDevice(
            self.host,
            self.weights[0].weights(int(hot.sum())),
            hot,
            side=self.side,
            sums=sums,
            pinned=Pinned(self.side, (TOKENS, HIDDEN), CHOSEN, dtype),
        )
        self.x = torch.randn(TOKENS, HIDDEN, generator=random).to(dtype)
        ids = [torch.randperm(EXPERTS, generator=random)[:CHOSEN] for _ in range(TOKENS)]
        self.routing = Routing(torch.stack(ids), torch.rand(TOKENS, CHOSEN, generator=random))

    def rows(self, count: int) -> tuple[Tensor, Routing]:
        ids, weights = self.routing.expert_ids[:count], self.routing.weights[:count]
        return self.x[:count], Routing(ids, weights)

    def computed(self, layer: int, count: int) -> Tensor:
        with self.experts.step(count):
            return self.experts.compute(layer, *self.rows(count))

    def expected(self, layer: int, count: int) -> Tensor:
        x, routing = self.rows(count)
        parts = self.weights[layer].gate_up, self.weights[layer].down
        return layers.grouped_experts(x, routing.expert_ids, routing.weights, *parts)


def near(ours: Tensor, theirs: Tensor) -> None:
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error.item() <= NEAR[theirs.dtype]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_the_sum_is_that_of_all_experts_wherever_they_lie(
    mask: str, prompt: bool, dtype: torch.dtype
) -> None:
    bench = Bench(mask, dtype, prompt=prompt)
    for layer in range(LAYERS):
        for count in (TOKENS, 1, 4):  # rows of a larger step are still in pinned memory
            near(bench.computed(layer, count), bench.expected(layer, count))
    cold = MASKS[mask].size - int(MASKS[mask].sum())
    assert bool(bench.side.host_calls) is bool(cold)


@pytest.mark.parametrize("mask", MASKS)
def test_what_both_spent_is_told_by_their_choices(mask: str) -> None:
    """The stand-in's clock says how often the device was timed: once a layer that has hot ones."""
    bench, spent, layers_timed = Bench(mask, torch.float32), Spent(), 0
    hot = torch.from_numpy(MASKS[mask])
    for layer in range(LAYERS):
        for count in (TOKENS, 4):
            bench.computed(layer, count)
            chosen = hot[layer][bench.rows(count)[1].expert_ids]
            spent.host_activations += int((~chosen).sum())
            if hot[layer].any():
                spent.device_activations += int(chosen.sum())
                layers_timed += 1
    ours = bench.experts.spent
    assert ours.host_activations == spent.host_activations
    assert ours.device_activations == spent.device_activations
    assert ours.device_s == layers_timed
    assert bool(ours.host_s) is not bool(hot.all())


def test_what_a_failed_step_spent_on_the_device_is_not_told() -> None:
    bench = Bench("some", torch.float32)
    bench.host.error = OSError("a bad expert")
    with pytest.raises(OSError, match="a bad expert"):
        bench.computed(0, TOKENS)
    assert (bench.experts.spent.device_activations, bench.experts.spent.device_s) == (0, 0)


def test_two_layers_of_a_step_use_the_same_pinned_memory() -> None:
    bench = Bench("some", torch.float32)
    with bench.experts.step(TOKENS):
        made = [bench.experts.compute(layer, *bench.rows(TOKENS)) for layer in range(LAYERS)]
    for layer, ours in enumerate(made):
        near(ours, bench.expected(layer, TOKENS))


def test_what_fails_on_the_host_fails_the_step_and_not_the_next() -> None:
    bench = Bench("some", torch.float32)
    bench.host.error = OSError("a bad expert")
    with pytest.raises(OSError, match="a bad expert"):
        bench.computed(0, TOKENS)
    bench.host.error = None
    near(bench.computed(0, TOKENS), bench.expected(0, TOKENS))


def test_a_step_that_ends_early_leaves_nothing_under_way() -> None:
    bench = Bench("some", torch.float32)

    def broken(layer: int, x: Tensor, routing: Routing) -> Tensor:
        raise RuntimeError("the device's part failed")

    sound: Callable[..., Tensor] = bench.experts._compute_hot
    bench.experts._compute_hot = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the device's part"):
        bench.computed(0, TOKENS)
    bench.experts._compute_hot = sound  # type: ignore[method-assign]
    near(bench.computed(0, TOKENS), bench.expected(0, TOKENS))


def test_what_is_never_joined_is_seen() -> None:
    """The stand-in shows that the order is kept: without it a sum would hold anything."""
    bench = Bench("some", torch.float32)
    bench.side.join = lambda: None  # type: ignore[method-assign]
    with bench.experts.step(TOKENS):
        made = bench.experts.compute(0, *bench.rows(TOKENS))
        with pytest.raises(AssertionError, match="never joined"):
            bench.experts.compute(1, *bench.rows(TOKENS))
    assert (made - bench.expected(0, TOKENS)).abs().max() > 1


@pytest.mark.parametrize("dtype", NEAR)
def test_choices_of_others_count_nothing_whatever_lies_there(dtype: torch.dtype) -> None:
    bench = Bench("all", dtype)
    x, routing = bench.rows(TOKENS)
    parts = bench.weights[0].gate_up, bench.weights[0].down
    ids, weights = routing.expert_ids.clone(), routing.weights.clone()
    ids[0, 1], ids[3], ids[5, 2] = -1, -1, -1
    made = layers.some_experts(x, ids, weights, *parts)
    kept = weights.masked_fill(ids < 0, 0)
    near(made, layers.grouped_experts(x, ids.clamp(min=0), kept, *parts))
    assert not made[3].any()
    assert not layers.some_experts(x, torch.full_like(ids, -1), weights, *parts).any()
