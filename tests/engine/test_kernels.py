"""Attention: every instruction set computes what the plain formula says, and a query's bits are its
own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from engine import _kernels
from engine.kernels import as_array

# Largest error over the largest value: rounding to 8 bits of mantissa, or of long float32 sums.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


@pytest.fixture(params=_kernels.instruction_sets())
def workbench(request: pytest.FixtureRequest) -> _kernels.Workbench:
    torch.manual_seed(0)
    return _kernels.Workbench(request.param, 2)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    error = (ours.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= LIMITS[ours.dtype]


@dataclass
class Context:
    """Sequences whose pages are dealt out at random; what no sequence owns is NaN."""

    key_pages: torch.Tensor
    value_pages: torch.Tensor
    block_tables: torch.Tensor
    keys: list[torch.Tensor]  # [context, kv_heads, head_dim] of each sequence
    values: list[torch.Tensor]

    @classmethod
    def of(cls, contexts: list[int], shape: tuple[int, int, int], dtype: torch.dtype) -> Context:
        kv_heads, page_size, head_dim = shape
        most = max(-(-context // page_size) for context in contexts)
        pages = torch.randperm(len(contexts) * most).int().view(len(contexts), most)
        empty = torch.full((pages.numel(), *shape), math.nan, dtype=dtype)
        new = [torch.randn(2, c, kv_heads, head_dim).to(dtype) for c in contexts]
        made = cls(empty, empty.clone(), pages, [kv[0] for kv in new], [kv[1] for kv in new])
        for row, (key, value) in enumerate(zip(made.keys, made.values, strict=True)):
            positions = torch.arange(len(key))
            ids, offsets = pages[row][positions // page_size].long(), positions % page_size
            places = ids.numpy(), offsets.numpy()
            stores = as_array(made.key_pages), as_array(made.value_pages)
            _kernels.write(as_array(key), as_array(value), *places, *stores)
        return made

    def attend(
        self, workbench: _kernels.Workbench, queries: list[torch.Tensor], contexts: list[int]
    ) -> list[torch.Tensor]:
        """Outputs of each sequence's queries, which are the last of its first `contexts`."""
        flat = torch.cat(queries)
        out = torch.full_like(flat, math.nan)
        lengths = torch.tensor([len(q) for q in queries]).int()
        pages = as_array(self.key_pages), as_array(self.value_pages)
        held = torch.tensor(contexts).int().numpy(), self.block_tables.numpy()
        _kernels.attend(workbench, as_array(flat), *pages, lengths.numpy(), *held, as_array(out))
        return list(out.split(lengths.tolist()))

    def reference(self, row: int, query: torch.Tensor, context: int) -> torch.Tensor:
        """Softmax of scores under a causal mask, in float64."""
        key, value = (x[row][:context].double() for x in (self.keys, self.values))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.double(), key) / math.sqrt(query.shape[2])
        ages = torch.arange(context) - torch.arange(context - len(query), context).unsqueeze(1)
        return torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(ages > 0, -math.inf).softmax(-1), value
        )


@DTYPES
@pytest.mark.parametrize(
    ("shape", "group"),
    [((2, 16, 32), 3), ((1, 4, 64), 1), ((3, 32, 20), 2), ((2, 512, 96), 5)],
    ids=str,
)
def test_attend(
    workbench: _kernels.Workbench, dtype: torch.dtype, shape: tuple[int, int, int], group: int
) -> None:
    contexts, lengths = [1, 300, 128, 257], [1, 1, 128, 90]
    context = Context.of(contexts, shape, dtype)
    queries = [torch.randn(n, shape[0] * group, shape[2]).to(dtype) for n in lengths]
    outputs = context.attend(workbench, queries, contexts)
    for row, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        close(output, context.reference(row, query, contexts[row]))


@DTYPES
def test_a_query_does_not_depend_on_its_chunk_or_batch(
    workbench: _kernels.Workbench, dtype: torch.dtype
) -> None:
    context = Context.of([300, 40], (2, 16, 32), dtype)
    query = torch.randn(300, 6, 32).to(dtype)
    whole = context.attend(workbench, [query, query[:7]], [300, 40])[0]
    done = 0
    for chunk in (1, 130, 37, 131, 1):
        part = query[done : done + chunk]
        alone = context.attend(workbench, [part, query[:1]], [done + chunk, 9])[0]
        assert torch.equal(alone, whole[done : done + chunk])
        done += chunk


def test_wrong_arguments_are_named() -> None:
    workbench = _kernels.Workbench("portable", 1)
    context, query = Context.of([20], (1, 16, 8), torch.float32), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="context_lens"):
        context.attend(workbench, [query], [33])
    context.block_tables[0, 1] = 2
    with pytest.raises(ValueError, match="block_tables"):
        context.attend(workbench, [query], [20])
