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


@dataclass(frozen=True)
class Rules:
    """How scores are made of products, as the kernel takes it."""

    scale: float | None = None
    soft_cap: float = 0.0
    window: int = 0
    sinks: torch.Tensor | None = None  # [query_heads]

    def keywords(self) -> dict[str, object]:
        sinks = None if self.sinks is None else self.sinks.numpy()
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "window": self.window,
            "sinks": sinks,
        }

    def weights(self, products: torch.Tensor, ages: torch.Tensor, size: int) -> torch.Tensor:
        """Of products [heads, queries, keys], in float64; ages [queries, keys]."""
        scores = products * (1 / math.sqrt(size) if self.scale is None else self.scale)
        if self.soft_cap:
            scores = self.soft_cap * (scores / self.soft_cap).tanh()
        unseen = (ages < 0) | (ages >= self.window) if self.window else ages < 0
        scores = scores.masked_fill(unseen, -math.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


PLAIN = Rules()


@dataclass
class Context:
    """Sequences whose pages are dealt out at random; what no sequence owns is NaN."""

    key_pages: torch.Tensor
    value_pages: torch.Tensor
    block_tables: torch.Tensor
    keys: list[torch.Tensor]  # [context, kv_heads, head_dim] of each sequence
    values: list[torch.Tensor]

    @classmethod
    def of(
        cls,
        contexts: list[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        value_size: int | None = None,
    ) -> Context:
        """shape: KV heads, page size, key size; values are as large where nothing else is said."""
        kv_heads, page_size, key_size = shape
        most = max(-(-context // page_size) for context in contexts)
        pages = torch.randperm(len(contexts) * most).int().view(len(contexts), most)
        sizes = key_size, value_size or key_size
        keys, values = ([torch.randn(c, kv_heads, n).to(dtype) for c in contexts] for n in sizes)
        empty = (
            torch.full((pages.numel(), kv_heads, page_size, n), math.nan, dtype=dtype)
            for n in sizes
        )
        made = cls(*empty, pages, keys, values)
        for row, (key, value) in enumerate(zip(made.keys, made.values, strict=True)):
            positions = torch.arange(len(key))
            ids, offsets = pages[row][positions // page_size].long(), positions % page_size
            places = ids.numpy(), offsets.numpy()
            stores = as_array(made.key_pages), as_array(made.value_pages)
            _kernels.write(as_array(key), as_array(value), *places, *stores)
        return made

    def attend(
        self,
        workbench: _kernels.Workbench,
        queries: list[torch.Tensor],
        contexts: list[int],
        rules: Rules = PLAIN,
    ) -> list[torch.Tensor]:
        """Outputs of each sequence's queries, which are the last of its first `contexts`."""
        flat = torch.cat(queries)
        out = flat.new_full((*flat.shape[:2], self.value_pages.shape[3]), math.nan)
        lengths = torch.tensor([len(q) for q in queries]).int()
        pages = as_array(self.key_pages), as_array(self.value_pages)
        held = torch.tensor(contexts).int().numpy(), self.block_tables.numpy()
        operands = as_array(flat), *pages, lengths.numpy(), *held, as_array(out)
        _kernels.attend(workbench, *operands, **rules.keywords())
        return list(out.split(lengths.tolist()))

    def reference(
        self, row: int, query: torch.Tensor, context: int, rules: Rules = PLAIN
    ) -> torch.Tensor:
        """The plain formula under a causal mask, in float64."""
        key, value = (x[row][:context].double() for x in (self.keys, self.values))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        products = torch.einsum("qhd,khd->hqk", query.double(), key)
        positions = torch.arange(context - len(query), context).unsqueeze(1)
        weights = rules.weights(products, positions - torch.arange(context), query.shape[2])
        return torch.einsum("hqk,khd->qhd", weights, value)


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


@pytest.mark.parametrize("size", [64, 128, 192, 256])
@pytest.mark.parametrize("page_size", [16, 512])
def test_sizes_of_heads_and_pages(workbench: _kernels.Workbench, size: int, page_size: int) -> None:
    context = Context.of([290], (2, page_size, size), torch.bfloat16)
    query = torch.randn(3, 16, size).bfloat16()
    (output,) = context.attend(workbench, [query], [290])
    close(output, context.reference(0, query, 290))


RULES = {
    "scale": Rules(scale=0.02),
    "soft cap": Rules(soft_cap=1.5),
    "window": Rules(window=100),
    "window of one": Rules(window=1),
    "sinks": Rules(sinks=torch.tensor([-2.0, 0.0, 3.0, 30.0, -90.0, 1.0])),
    "all": Rules(0.1, 2.0, 257, torch.linspace(-1, 4, 6)),
}


@DTYPES
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules_of_scores(workbench: _kernels.Workbench, dtype: torch.dtype, rules: Rules) -> None:
    contexts, lengths = [5, 600, 300], [5, 1, 70]
    context = Context.of(contexts, (2, 16, 32), dtype)
    queries = [torch.randn(n, 6, 32).to(dtype) for n in lengths]
    outputs = context.attend(workbench, queries, contexts, rules)
    for row, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        close(output, context.reference(row, query, contexts[row], rules))


@DTYPES
@pytest.mark.parametrize(("key_size", "value_size"), [(64, 32), (24, 50)])
def test_values_of_another_size_than_keys(
    workbench: _kernels.Workbench, dtype: torch.dtype, key_size: int, value_size: int
) -> None:
    context = Context.of([300], (2, 16, key_size), dtype, value_size)
    query = torch.randn(9, 4, key_size).to(dtype)
    (output,) = context.attend(workbench, [query], [300])
    close(output, context.reference(0, query, 300))


@DTYPES
def test_values_inside_keys(workbench: _kernels.Workbench, dtype: torch.dtype) -> None:
    """As multi-head latent attention has them, absorbed: one KV head, and the first 512 elements of
    a key of 576 are the value (arXiv 2405.04434)."""
    context = Context.of([300], (1, 16, 576), dtype)
    context.values = [context.keys[0][..., :512]]
    context.value_pages = context.key_pages[..., :512]
    query = torch.randn(5, 16, 576).to(dtype)
    (output,) = context.attend(workbench, [query], [300])
    close(output, context.reference(0, query, 300))


@DTYPES
@pytest.mark.parametrize("rules", [PLAIN, Rules(window=150, sinks=torch.zeros(6))], ids=str)
def test_a_query_does_not_depend_on_its_chunk_or_batch(
    workbench: _kernels.Workbench, dtype: torch.dtype, rules: Rules
) -> None:
    context = Context.of([600, 40], (2, 16, 32), dtype)
    query = torch.randn(600, 6, 32).to(dtype)
    whole = context.attend(workbench, [query, query[:7]], [600, 40], rules)[0]
    done = 0
    for chunk in (1, 130, 37, 131, 300, 1):
        part = query[done : done + chunk]
        alone = context.attend(workbench, [part, query[:1]], [done + chunk, 9], rules)[0]
        assert torch.equal(alone, whole[done : done + chunk])
        done += chunk


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("name", _kernels.instruction_sets())
def test_a_query_does_not_depend_on_the_threads(name: str, threads: int) -> None:
    """Two threads share a context out by its pieces; one does not."""
    workbench, other = _kernels.Workbench(name, 2), _kernels.Workbench(name, threads)
    context = Context.of([900], (2, 16, 32), torch.bfloat16)
    query = torch.randn(1, 6, 32).bfloat16()
    (found,) = context.attend(workbench, [query], [900])
    assert torch.equal(context.attend(other, [query], [900])[0], found)


@DTYPES
def test_avx2_and_avx512_give_the_same_bits(dtype: torch.dtype) -> None:
    sets = [name for name in ("avx2", "avx512") if name in _kernels.instruction_sets()]
    context = Context.of([300], (2, 16, 40), dtype)
    query = torch.randn(80, 6, 40).to(dtype)
    found = [context.attend(_kernels.Workbench(name, 2), [query], [300])[0] for name in sets]
    assert all(torch.equal(each, found[0]) for each in found)


def test_wrong_arguments_are_named() -> None:
    workbench = _kernels.Workbench("portable", 1)
    context, query = Context.of([20], (1, 16, 8), torch.float32), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="context_lens"):
        context.attend(workbench, [query], [33])
    context.block_tables[0, 1] = 2
    with pytest.raises(ValueError, match="block_tables"):
        context.attend(workbench, [query], [20])
    context.block_tables[0, 1] = 1
    with pytest.raises(ValueError, match="window must not be negative"):
        context.attend(workbench, [query], [20], Rules(window=-1))
    with pytest.raises(ValueError, match="sinks has a wrong shape"):
        context.attend(workbench, [query], [20], Rules(sinks=torch.zeros(2)))
    context.value_pages = context.value_pages[:1]
    with pytest.raises(ValueError, match="value_pages has a wrong shape"):
        context.attend(workbench, [query], [20])
