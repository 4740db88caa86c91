"""Our call of flashinfer, without flashinfer: bound to the real signatures of two versions, and
computed as documented, against our own kernel. `flashinfer_signatures.py` wrote them down from the
wheels, and writes those of another version."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.attention.base import Attention, KvPool, KvShape
from engine.attention.cpu import CpuAttention
from engine.attention.flashinfer import FlashInferAttention
from engine.batch import Batch, Slice
from tests.engine.flashinfer_stand_in import SIGNATURES, SLICES, bound, stand_in

PAGES, PAGE_SIZE, QUERY_HEADS = 24, 16, 8
ROUNDING = 2e-2  # bf16 keeps 8 bits
SHAPE = KvShape(layers=2, kv_heads=2, head_dim=64, page_size=PAGE_SIZE, dtype=torch.bfloat16)


@pytest.mark.parametrize("version", SIGNATURES)
@pytest.mark.parametrize("slices", list(SLICES.values()), ids=list(SLICES))
def test_our_call_means_what_our_own_kernel_does(
    monkeypatch: pytest.MonkeyPatch, version: str, slices: list[Slice]
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in(version))
    batch, random = Batch.of(slices, PAGE_SIZE), torch.Generator().manual_seed(4)
    tokens = batch.token_ids.shape[0]
    query = torch.randn(tokens, QUERY_HEADS, 64, generator=random).bfloat16()
    key, value = (torch.randn(tokens, 2, 64, generator=random).bfloat16() for _ in range(2))

    def attended(make: type[Attention]) -> torch.Tensor:
        filled = torch.Generator().manual_seed(3)
        numbers = torch.randn(PAGES * SHAPE.page_bytes // 2, generator=filled).bfloat16()
        attention = make(KvPool(SHAPE, PAGES, numbers.view(torch.uint8)), QUERY_HEADS)
        attention.plan(batch)
        attention.write(1, key, value)
        return attention.attend(1, query).float()

    ours, theirs = attended(FlashInferAttention), attended(CpuAttention)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= ROUNDING


@pytest.mark.parametrize("version", SIGNATURES)
def test_by_fixed_splits_a_context_is_summed_the_same_beside_any_other(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """As flashinfer divides them itself, it depends on what else is in the batch."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in(version))
    one = Slice([1], 180, list(range(12)), 1)
    others = [Slice([2], 190, list(range(12)), 1), Slice(range(40), 40, [12, 13, 14], 1)]

    def parts(split_pages: int, slices: list[Slice]) -> int:
        memory = torch.zeros(PAGES * SHAPE.page_bytes, dtype=torch.uint8)
        attention = FlashInferAttention(KvPool(SHAPE, PAGES, memory), QUERY_HEADS, split_pages)
        attention.plan(Batch.of(slices, PAGE_SIZE))
        return -(-12 // attention._wrapper.division.part_pages)

    assert [parts(5, slices) for slices in ([one], [one, *others], [one] * 9)] == [3, 3, 3]
    assert len({parts(0, slices) for slices in ([one], [one, *others], [one] * 9)}) > 1


@pytest.mark.parametrize("version", SIGNATURES)
@pytest.mark.parametrize("split_pages", [1, 2, 3])
def test_parts_of_a_context_are_merged_to_what_the_whole_is(
    monkeypatch: pytest.MonkeyPatch, version: str, split_pages: int
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in(version))
    random = torch.Generator().manual_seed(5)
    batch = Batch.of(SLICES["all of it"], PAGE_SIZE)
    query = torch.randn(len(batch.token_ids), QUERY_HEADS, 64, generator=random).bfloat16()
    numbers = torch.randn(PAGES * SHAPE.page_bytes // 2, generator=random).bfloat16()
    pool = KvPool(SHAPE, PAGES, numbers.view(torch.uint8))

    def attended(attention: Attention) -> torch.Tensor:
        attention.plan(batch)
        return attention.attend(1, query).float()

    ours = attended(FlashInferAttention(pool, QUERY_HEADS, split_pages))
    theirs = attended(CpuAttention(pool, QUERY_HEADS))
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= ROUNDING


@pytest.mark.parametrize("version", SIGNATURES)
def test_a_call_that_flashinfer_would_not_take_is_seen(version: str) -> None:
    with pytest.raises(TypeError, match="head_dim"):
        bound(version, "plan", (None,) * 9, {"head_dim": 64})
