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
def test_a_call_that_flashinfer_would_not_take_is_seen(version: str) -> None:
    with pytest.raises(TypeError, match="head_dim"):
        bound(version, "plan", (None,) * 9, {"head_dim": 64})
