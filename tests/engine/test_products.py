"""Products with weights: every instruction set computes what the plain formula says, and a row's
bits are its own, whatever stands beside it and however many threads there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from engine import _kernels, kernels
from engine.kernels import as_array, numerics
from kvc2.errors import InvalidConfig

# Largest error over the largest value: rounding to 8 bits of mantissa, or of long float32 sums.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


@pytest.fixture(params=_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture
def workbench(instruction_set: str) -> _kernels.Workbench:
    return _kernels.Workbench(instruction_set, 2)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    error = (ours.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= LIMITS[ours.dtype]


def linear(workbench: _kernels.Workbench, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.new_full((x.shape[0], w.shape[0]), math.nan)
    _kernels.linear(workbench, as_array(x), as_array(w), as_array(y))
    return y


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 96), (37, 96, 48), (16, 32, 16), (5, 40, 50), (33, 7, 3), (2, 1, 1), (3, 31, 17)],
)
def test_linear(
    workbench: _kernels.Workbench, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, inputs, outputs = shape
    x, w = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    close(linear(workbench, x, w), x.double() @ w.double().T)


@dataclass
class Routed:
    """Experts, plain or as records, and which of them each token has."""

    gate_up: torch.Tensor
    down: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor

    def run(
        self, workbench: _kernels.Workbench, x: torch.Tensor, rows: slice | torch.Tensor
    ) -> torch.Tensor:
        y = torch.full_like(x[rows], math.nan)
        routing = self.expert_ids[rows].numpy(), self.weights[rows].numpy()
        weights = as_array(self.gate_up), as_array(self.down)
        _kernels.ffn(workbench, as_array(x[rows]), *routing, *weights, as_array(y))
        return y


@dataclass
class Experts(Routed):
    @classmethod
    def of(cls, tokens: int, size: int, hidden: int, dtype: torch.dtype) -> Experts:
        ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
        gate_up, down = torch.randn(6, 2 * size, hidden) / 8, torch.randn(6, hidden, size) / 8
        return cls(gate_up.to(dtype), down.to(dtype), ids, torch.rand(tokens, 3))

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """One token and one choice at a time, in float64."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(x.double()):
            for expert, weight in zip(self.expert_ids[token], self.weights[token], strict=True):
                gate, up = (self.gate_up[expert].double() @ row).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                out[token] += weight * (self.down[expert].double() @ hidden)
        return out


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64, 96), (37, 96, 64), (5, 40, 50), (70, 32, 32)])
def test_ffn(
    workbench: _kernels.Workbench, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, size, hidden = shape
    x, experts = torch.randn(tokens, hidden).to(dtype), Experts.of(tokens, size, hidden, dtype)
    close(experts.run(workbench, x, slice(0, tokens)), experts.reference(x))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64, 96), (37, 96, 64), (5, 40, 50)])
def test_choices_computed_apart_sum_up_to_the_same_bits(
    workbench: _kernels.Workbench, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """However they are shared out; and what is nobody's is not touched."""
    tokens, size, hidden = shape
    x, experts = torch.randn(tokens, hidden).to(dtype), Experts.of(tokens, size, hidden, dtype)
    ids, weights = experts.expert_ids, (as_array(experts.gate_up), as_array(experts.down))
    outputs = torch.full((tokens, 3, hidden), math.nan)
    mine = torch.rand(ids.shape) < 0.5
    first = torch.where(mine, ids, -1).numpy()
    _kernels.ffn_choices(workbench, as_array(x), first, *weights, outputs.numpy())
    assert torch.equal(outputs.isnan().any(-1), ~mine)
    rest = torch.where(mine, -1, ids).numpy()
    _kernels.ffn_choices(workbench, as_array(x), rest, *weights, outputs.numpy())
    y = torch.full_like(x, math.nan)
    _kernels.sum_choices(workbench, outputs.numpy(), experts.weights.numpy(), as_array(y))
    assert torch.equal(y, experts.run(workbench, x, slice(0, tokens)))


@dataclass
class Gated:
    """How a model's experts gate, and the plain formula of it in float64."""

    how: dict[str, object]
    formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    biases: bool = False


functional = torch.nn.functional
GATED = {
    "gelu": Gated(
        {"activation": "gelu_tanh"}, lambda gate, up: functional.gelu(gate, approximate="tanh") * up
    ),
    "quick gelu": Gated({"alpha": 1.702}, lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up),
    "gpt-oss": Gated(  # as its model card's reference: clamped, an up that is moved by one, biases
        {"alpha": 1.702, "limit": 7.0, "offset": 1.0},
        lambda gate, up: (
            gate.clamp(max=7.0)
            * torch.sigmoid(1.702 * gate.clamp(max=7.0))
            * (up.clamp(-7.0, 7.0) + 1)
        ),
        biases=True,
    ),
    "biases": Gated({}, lambda gate, up: functional.silu(gate) * up, biases=True),
}


@DTYPES
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("shape", [(1, 64, 96), (37, 40, 50)])
def test_ffn_gates_as_the_plain_formula(
    workbench: _kernels.Workbench, dtype: torch.dtype, name: str, shape: tuple[int, int, int]
) -> None:
    tokens, size, hidden = shape
    gated = GATED[name]
    x, experts = 4 * torch.randn(tokens, hidden), Experts.of(tokens, size, hidden, dtype)
    x = x.to(dtype)
    biases = torch.randn(6, 2 * size), torch.randn(6, hidden)
    given = {"gate_up_bias": biases[0].numpy(), "down_bias": biases[1].numpy()}
    gating = _kernels.Gating(**gated.how, **(given if gated.biases else {}))  # type: ignore[arg-type]
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(experts.expert_ids[token], experts.weights[token], strict=True):
            both = experts.gate_up[expert].double() @ row + gated.biases * biases[0][expert]
            made = experts.down[expert].double() @ gated.formula(*both.chunk(2))
            expected[token] += weight * (made + gated.biases * biases[1][expert])
    y = torch.full_like(x, math.nan)
    routing = experts.expert_ids.numpy(), experts.weights.numpy()
    weights = as_array(experts.gate_up), as_array(experts.down)
    _kernels.ffn(workbench, as_array(x), *routing, *weights, as_array(y), gating=gating)
    close(y, expected)
    outputs = torch.full((tokens, 3, hidden), math.nan)
    ids = experts.expert_ids.numpy()
    _kernels.ffn_choices(workbench, as_array(x), ids, *weights, outputs.numpy(), gating=gating)
    apart = torch.full_like(x, math.nan)
    _kernels.sum_choices(workbench, outputs.numpy(), experts.weights.numpy(), as_array(apart))
    assert torch.equal(apart, y)


@pytest.mark.parametrize("size", [50.0, 87.0, 89.0, 200.0, 3e4])
def test_a_gate_far_below_zero_is_shut(workbench: _kernels.Workbench, size: float) -> None:
    """e^x has no more room in a float there."""
    gate_up, down = torch.ones(1, 2, 1), torch.ones(1, 1, 1)
    x, y, ids = torch.tensor([[-size]]), torch.full((1, 1), math.nan), torch.zeros(1, 1).long()
    for gating in (_kernels.Gating(), _kernels.Gating(activation="gelu_tanh")):
        _kernels.ffn(
            workbench, x.numpy(), ids.numpy(), torch.ones(1, 1).numpy(), gate_up.numpy(),
            down.numpy(), y.numpy(), gating=gating,
        )  # fmt: skip
        assert abs(y.item()) <= size**2 * math.exp(-min(size, 80.0)) * 1.001


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation": "relu"}, "silu or gelu_tanh"),
        ({"limit": 0.0}, "limit must be over 0"),
        ({"gate_up_bias": torch.zeros(6, 64).numpy()}, "gate_up_bias has a wrong shape"),
        ({"down_bias": torch.zeros(5, 96).numpy()}, "down_bias has a wrong shape"),
    ],
)
def test_a_gating_that_does_not_fit_is_refused(
    workbench: _kernels.Workbench, given: dict[str, object], message: str
) -> None:
    x, experts = torch.randn(1, 96), Experts.of(1, 64, 96, torch.float32)
    with pytest.raises(ValueError, match=message):
        _gate(workbench, x, experts, given)


def _gate(
    workbench: _kernels.Workbench, x: torch.Tensor, experts: Experts, given: dict[str, object]
) -> None:
    routing = experts.expert_ids.numpy(), experts.weights.numpy()
    weights, gating = (experts.gate_up.numpy(), experts.down.numpy()), _kernels.Gating(**given)  # type: ignore[arg-type]
    _kernels.ffn(workbench, x.numpy(), *routing, *weights, x.numpy().copy(), gating=gating)


Compute = Callable[[_kernels.Workbench, torch.Tensor], torch.Tensor]  # rows' indices -> outputs
TOKENS = 4096


def one_weight(dtype: torch.dtype) -> Compute:
    x, w = torch.randn(TOKENS, 75).to(dtype), torch.randn(37, 75).to(dtype)
    return lambda workbench, rows: linear(workbench, x[rows], w)


def six_experts(dtype: torch.dtype) -> Compute:
    x, experts = torch.randn(TOKENS, 64).to(dtype), Experts.of(TOKENS, 32, 64, dtype)
    return lambda workbench, rows: experts.run(workbench, x, rows)


@DTYPES
@pytest.mark.parametrize("made", [one_weight, six_experts])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    instruction_set: str, dtype: torch.dtype, made: Callable[[torch.dtype], Compute]
) -> None:
    compute, all_rows = made(dtype), torch.arange(TOKENS)
    one, two, five = (_kernels.Workbench(instruction_set, threads) for threads in (1, 2, 5))
    whole = compute(two, all_rows)
    assert torch.equal(compute(five, all_rows), whole)
    shuffled = torch.randperm(TOKENS)
    assert torch.equal(compute(two, shuffled), whole[shuffled])
    begin = 0
    for length in (1, 2, 3, 4, 5, 7, 16, 33, 64, 300):
        rows = all_rows[begin : begin + length]
        assert torch.equal(compute(one, rows), whole[rows])
        padded = torch.cat((rows, torch.full((2,), 9)))
        assert torch.equal(compute(five, padded)[:length], whole[rows])
        begin += length


def test_instruction_sets_of_one_class_give_the_same_bits_and_others_do_not() -> None:
    """Of our kernels; torch's, which compute between them, are told apart by the set alone."""
    torch.manual_seed(0)
    for dtype in LIMITS:
        x, experts = torch.randn(33, 512).to(dtype), Experts.of(33, 64, 512, dtype)
        found = {}
        for name in _kernels.instruction_sets():
            run = experts.run(_kernels.Workbench(name, 2), x, slice(0, 33))
            found[name] = as_array(run).tobytes()
            assert found[name] == found.get(numerics(dtype, name).split(".")[0], found[name])
        if "avx2" in found and dtype == torch.float32:
            assert found["avx2"] != found["portable"]
        if "avx512" in found:
            assert found["avx512"] == found["avx2"]


@pytest.mark.parametrize(
    ("best", "dtype", "found"),
    [
        ("portable", torch.float32, "portable.5"),
        ("avx2", torch.bfloat16, "avx2.5"),
        ("avx512", torch.bfloat16, "avx512.5"),
        ("avx512_vnni", torch.bfloat16, "avx512.5"),
        ("avx512_bf16", torch.bfloat16, "avx512_bf16.5"),
        ("avx512_bf16", torch.float32, "avx512.5"),
        ("amx", torch.float32, "avx512.5"),
        ("amx", torch.bfloat16, "amx.5"),
    ],
)
def test_the_class_of_the_kernels_is_that_of_what_computes_the_dtype(
    best: str, dtype: torch.dtype, found: str
) -> None:
    by_torch = torch.backends.cpu.get_cpu_capability().lower()
    assert numerics(dtype, best) == f"{found}-torch.{by_torch}"


def test_an_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_chosen", kernels._chosen)
    for name in _kernels.instruction_sets():
        kernels.choose(name)
        assert numerics(torch.float32) == numerics(torch.float32, name)
    monkeypatch.undo()
    kernels.workbench.cache_clear()
    with pytest.raises(InvalidConfig, match=r"cpu_isa = 'mmx'.*this machine has portable"):
        kernels.choose("mmx")


def test_wrong_arguments_are_named() -> None:
    workbench = _kernels.Workbench("portable", 1)
    x, w = torch.zeros(2, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="w has a wrong shape"):
        linear(workbench, x, torch.zeros(4, 9))
    with pytest.raises(ValueError, match="w has another dtype"):
        linear(workbench, x, w.bfloat16())
    with pytest.raises(ValueError, match="x is not contiguous"):
        linear(workbench, torch.zeros(8, 2).T, w)
    with pytest.raises(ValueError, match="instruction set 'mmx'"):
        _kernels.Workbench("mmx", 1)
    experts = Experts.of(2, 8, 8, torch.float32)
    experts.expert_ids[0, 0] = 6
    with pytest.raises(ValueError, match="expert_ids"):
        experts.run(workbench, x, slice(0, 2))
