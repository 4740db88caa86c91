"""Products with quantised weights: every instruction set computes what the record says, a row's
bits are its own, and the error is that of the format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from engine import _kernels
from engine.kernels import as_array, numerics
from engine.quantised import FP8, INT4, INT4_GROUP128, INT8, Format, floats, quantise
from tests.engine.test_products import Routed

INT4_ZEROS = Format("int4", 32, zeros=True)
FORMATS = [INT8, INT4, INT4_GROUP128, INT4_ZEROS, Format("int4", 128, zeros=True), FP8]
EACH = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TOKENS = 4096


@pytest.fixture(params=_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def record(format: Format, parts: list[torch.Tensor]) -> torch.Tensor:
    shape = format.shape(len(parts), *parts[0].shape)
    packed = torch.empty(1, shape.num_bytes, dtype=torch.uint8)
    matrices = [quantise(part, format) for part in parts]
    shape.write(matrices, packed[0])
    return packed


def stored(format: Format, weight: torch.Tensor) -> torch.Tensor:
    """What stands in the record; scales of nibbles are bfloat16 there."""
    matrix = quantise(weight, format)
    if format.kind == "int4":
        matrix.scales.copy_(matrix.scales.bfloat16())
    return floats(matrix, format)


def linear(
    bench: _kernels.Workbench, x: torch.Tensor, packed: torch.Tensor, out: int
) -> torch.Tensor:
    y = x.new_full((x.shape[0], out), math.nan)
    _kernels.linear(bench, as_array(x), as_array(packed), as_array(y))
    return y


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@EACH
@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 64, 96), (37, 160, 48), (8, 256, 16), (5, 40, 50), (9, 7, 3), (2, 1, 1)]
)
def test_a_product_is_that_of_what_the_record_stands_for(
    instruction_set: str, format: Format, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Where inputs are whole numbers up to 127, and one is 127, quantising them loses nothing."""
    tokens, inputs, out = shape
    x = torch.randint(-127, 128, (tokens, inputs)).float()
    x[:, :: format.group // 2 or inputs] = 127
    w = torch.randn(out, inputs)
    y = linear(_kernels.Workbench(instruction_set, 2), x.to(dtype), record(format, [w]), out)
    limit = 1e-6 if dtype == torch.float32 else 3e-3  # of bfloat16: of the output alone
    assert distance(y, x.double() @ stored(format, w).double().T) < limit


@EACH
def test_codes_of_all_values_are_read(instruction_set: str, format: Format) -> None:
    """Small and large, of both signs: of fp8 also those without a leading one."""
    w = torch.cat((2.0 ** torch.arange(-16, 16), -(1.7 ** torch.arange(-20, 12.0)))).view(1, -1)
    y = linear(_kernels.Workbench(instruction_set, 1), 127 * torch.eye(64), record(format, [w]), 1)
    torch.testing.assert_close(y.T / 127, stored(format, w), rtol=1e-6, atol=0)


@dataclass
class Experts(Routed):
    """Six of which a token has three, and the floats that they were made of."""

    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, tokens: int, size: int, hidden: int, formats: tuple[Format, Format]) -> Experts:
        parts = [
            (
                torch.randn(size, hidden) / hidden**0.5,
                torch.randn(size, hidden) / hidden**0.5,
                torch.randn(hidden, size) / size**0.5,
            )
            for _ in range(6)
        ]
        gate_up = torch.cat([record(formats[0], [gate, up]) for gate, up, _ in parts])
        down = torch.cat([record(formats[1], [down]) for _, _, down in parts])
        ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
        return cls(gate_up, down, ids, torch.rand(tokens, 3), parts)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """Of the weights before they were quantised, in float64."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(x.double()):
            for expert, weight in zip(self.expert_ids[token], self.weights[token], strict=True):
                gate, up, down = (part.double() for part in self.parts[expert])
                hidden = torch.nn.functional.silu(gate @ row) * (up @ row)
                out[token] += weight * (down @ hidden)
        return out


# Largest distance from float32, over the length of the result: of one product, of an FFN.
@pytest.mark.parametrize(
    ("format", "product", "layer"),
    [(INT8, 0.0125, 0.029), (INT4, 0.098, 0.17), (INT4_GROUP128, 0.12, 0.21),
     (INT4_ZEROS, 0.098, 0.17), (FP8, 0.028, 0.05)],
    ids=lambda value: value.name if isinstance(value, Format) else None,
)  # fmt: skip
@DTYPES
def test_the_error_is_that_of_the_format(
    instruction_set: str, format: Format, product: float, layer: float, dtype: torch.dtype
) -> None:
    bench = _kernels.Workbench(instruction_set, 2)
    x, w = torch.randn(16, 2048).to(dtype), torch.randn(512, 2048).bfloat16().float()
    y = linear(bench, x, record(format, [w]), 512)
    assert distance(y, x.double() @ w.double().T) < product
    experts = Experts.of(16, 256, 512, (format, format))
    found = experts.run(bench, x[:, :512].contiguous(), slice(0, 16))
    assert distance(found, experts.reference(x[:, :512])) < layer


def test_tensors_of_one_layer_may_be_stored_in_several_ways(instruction_set: str) -> None:
    bench = _kernels.Workbench(instruction_set, 2)
    x = torch.randn(11, 96).bfloat16()
    for formats in ((INT4, INT8), (FP8, INT4), (INT8, FP8)):
        experts = Experts.of(11, 64, 96, formats)
        assert distance(experts.run(bench, x, slice(0, 11)), experts.reference(x)) < 0.2


@EACH
@DTYPES
def test_choices_computed_apart_sum_up_to_the_same_bits(
    instruction_set: str, format: Format, dtype: torch.dtype
) -> None:
    bench = _kernels.Workbench(instruction_set, 2)
    x, experts = torch.randn(37, 72).to(dtype), Experts.of(37, 40, 72, (format, format))
    packed = as_array(experts.gate_up), as_array(experts.down)
    outputs = torch.full((37, 3, 72), math.nan)
    mine = torch.rand(experts.expert_ids.shape) < 0.5
    for ours in (mine, ~mine):
        ids = torch.where(ours, experts.expert_ids, -1).numpy()
        _kernels.ffn_choices(bench, as_array(x), ids, *packed, outputs.numpy())
    y = torch.full_like(x, math.nan)
    _kernels.sum_choices(bench, outputs.numpy(), experts.weights.numpy(), as_array(y))
    assert torch.equal(y, experts.run(bench, x, slice(0, 37)))


Compute = Callable[[_kernels.Workbench, torch.Tensor], torch.Tensor]  # rows' indices -> outputs


def one_weight(format: Format, dtype: torch.dtype) -> Compute:
    x, w = torch.randn(TOKENS, 75).to(dtype), record(format, [torch.randn(37, 75)])
    return lambda bench, rows: linear(bench, x[rows], w, 37)


def six_experts(format: Format, dtype: torch.dtype) -> Compute:
    x, experts = torch.randn(TOKENS, 64).to(dtype), Experts.of(TOKENS, 32, 64, (format, format))
    return lambda bench, rows: experts.run(bench, x, rows)


@EACH
@DTYPES
@pytest.mark.parametrize("made", [one_weight, six_experts])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    instruction_set: str,
    format: Format,
    dtype: torch.dtype,
    made: Callable[[Format, torch.dtype], Compute],
) -> None:
    compute, all_rows = made(format, dtype), torch.arange(TOKENS)
    one, two, five = (_kernels.Workbench(instruction_set, threads) for threads in (1, 2, 5))
    whole = compute(two, all_rows)
    assert torch.equal(compute(five, all_rows), whole)
    shuffled = torch.randperm(TOKENS)
    assert torch.equal(compute(two, shuffled), whole[shuffled])
    begin = 0
    for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64, 300):
        rows = all_rows[begin : begin + length]
        assert torch.equal(compute(one, rows), whole[rows])
        padded = torch.cat((rows, torch.full((2,), 9)))
        assert torch.equal(compute(five, padded)[:length], whole[rows])
        begin += length


@EACH
def test_instruction_sets_of_one_class_give_the_same_bits(format: Format) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, experts = torch.randn(33, 512).to(dtype), Experts.of(33, 64, 512, (format, format))
        found: dict[str, bytes] = {}
        for name in _kernels.instruction_sets():
            run = experts.run(_kernels.Workbench(name, 2), x, slice(0, 33))
            bits = as_array(run).tobytes()
            assert bits == found.setdefault(numerics(dtype, name).split(".")[0], bits)


@pytest.mark.parametrize("format", FORMATS[:-1], ids=lambda format: format.name)
@DTYPES
def test_sums_of_integers_are_exact_in_lanes_and_in_tiles(
    format: Format, dtype: torch.dtype
) -> None:
    """So sets that differ in floats have the same bits: few tokens may go to another than many."""
    torch.manual_seed(0)
    sets = [name for name in _kernels.instruction_sets() if name.startswith(("avx512", "amx"))]
    if len(sets) < 2:
        pytest.skip("needs two sets of AVX-512 or AMX")
    for inputs, out in ((512, 64), (200, 40), (72, 16)):
        x, w = torch.randn(70, inputs).to(dtype), record(format, [torch.randn(out, inputs)])
        found = [linear(_kernels.Workbench(name, 2), x, w, out) for name in sets]
        assert all(torch.equal(y, found[0]) for y in found)


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none(instruction_set: str, format: Format, bad: float) -> None:
    """In its own row: the others have their bits."""
    bench = _kernels.Workbench(instruction_set, 1)
    x, w = torch.randn(3, 64), record(format, [torch.randn(16, 64)])
    whole = linear(bench, x, w, 16)
    x[1, 5] = bad
    found = linear(bench, x, w, 16)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])


def test_zeros_are_zeros(instruction_set: str) -> None:
    bench = _kernels.Workbench(instruction_set, 1)
    for format in FORMATS:
        nothing = record(format, [torch.zeros(16, 64)])
        assert not linear(bench, torch.randn(3, 64), nothing, 16).any()
        assert not linear(
            bench, torch.zeros(3, 64), record(format, [torch.randn(16, 64)]), 16
        ).any()


def test_records_that_do_not_fit_are_refused_by_name() -> None:
    bench = _kernels.Workbench("portable", 1)
    x, w = torch.zeros(2, 64), record(INT8, [torch.randn(16, 64)])
    with pytest.raises(ValueError, match="w has a wrong shape"):
        linear(bench, torch.zeros(2, 60), w, 16)
    with pytest.raises(ValueError, match="w has a wrong shape"):
        linear(bench, x, w, 17)
    with pytest.raises(ValueError, match="w is too short for a record"):
        linear(bench, x, w[:, :32].contiguous(), 16)
    with pytest.raises(ValueError, match="w is no record of a quantised weight"):
        linear(bench, x, w[:, :-64].contiguous(), 16)
    for byte, value in ((0, 0), (4, 9), (8, 3), (20, 7), (5, 1)):
        spoiled = w.clone()
        spoiled[0, byte] = value
        with pytest.raises(ValueError, match="w is no record of a quantised weight"):
            linear(bench, x, spoiled, 16)
    with pytest.raises(ValueError, match="65536 is the most"):
        INT8.shape(1, 16, 65537)


def test_records_of_chosen_experts_must_agree() -> None:
    bench = _kernels.Workbench("portable", 1)
    x, experts = torch.zeros(2, 16), Experts.of(2, 16, 16, (INT8, INT8))
    experts.expert_ids = torch.tensor([[0, 1, 2], [0, 1, 2]])
    experts.gate_up[3] = 0  # nobody's
    experts.run(bench, x, slice(0, 2))
    experts.gate_up[2] = 0
    with pytest.raises(ValueError, match="gate_up has records that differ"):
        experts.run(bench, x, slice(0, 2))
    experts = Experts.of(2, 16, 16, (INT8, INT8))
    experts.gate_up = experts.down
    with pytest.raises(ValueError, match="gate_up has a wrong shape"):
        experts.run(bench, x, slice(0, 2))
