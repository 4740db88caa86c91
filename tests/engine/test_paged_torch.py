"""Attention in plain torch, the reference for GPUs: on the CPU, against our own kernel, and in
whole models against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.attention.base import Attention, KvPool, KvShape
from engine.attention.cpu import CpuAttention
from engine.attention.paged_torch import PagedTorchAttention
from engine.batch import Batch, Slice
from engine.device import CPU
from engine.models import load_model
from engine.runner import Runner
from kvc2.layout import Layout, layer_major, side_by_side
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe, reference_logits
from tests.engine.flashinfer_stand_in import SLICES

PAGES, PAGE_SIZE, QUERY_HEADS = 24, 16, 8
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest value
PROMPT = [(7 * i * i + 3 * i + 1) % 128 for i in range(90)]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("slices", list(SLICES.values()), ids=list(SLICES))
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_it_attends_as_our_own_kernel_does(
    slices: list[Slice], dtype: torch.dtype, kv_heads: int
) -> None:
    shape = KvShape(2, kv_heads, 64, PAGE_SIZE, dtype)
    batch, random = Batch.of(slices, PAGE_SIZE), torch.Generator().manual_seed(4)
    tokens = batch.token_ids.shape[0]
    query = torch.randn(tokens, QUERY_HEADS, 64, generator=random).to(dtype)
    key, value = (torch.randn(tokens, kv_heads, 64, generator=random).to(dtype) for _ in range(2))

    def attended(make: type[Attention]) -> tuple[torch.Tensor, torch.Tensor]:
        filled = torch.Generator().manual_seed(3)
        numbers = torch.randn(PAGES * shape.page_bytes // dtype.itemsize, generator=filled)
        memory = numbers.to(dtype).view(torch.uint8)
        attention = make(KvPool(shape, PAGES, memory), QUERY_HEADS)
        attention.plan(batch)
        attention.write(1, key, value)
        return attention.attend(1, query).float(), memory

    (ours, our_pages), (theirs, their_pages) = map(attended, (PagedTorchAttention, CpuAttention))
    assert torch.equal(our_pages, their_pages)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= NEAR[dtype]


@pytest.mark.parametrize(("lay", "beside"), [(layer_major, False), (side_by_side, True)])
def test_pages_lie_in_a_pool_as_the_layout_says(lay: Callable[..., Layout], beside: bool) -> None:
    """What the daemon copies is what attention has written."""
    shape = KvShape(3, 2, 8, PAGE_SIZE, torch.float32)
    memory = torch.zeros(PAGES * shape.page_bytes, dtype=torch.uint8)
    pool = KvPool(shape, PAGES, memory, side_by_side=beside)
    layout = lay(3, PAGES, segment_bytes=shape.segment_bytes, page_size=PAGE_SIZE)
    assert layout.row_bytes == shape.segment_bytes * (2 if beside else 1)
    for page in (0, 5, PAGES - 1):
        for each in layout.segments:
            part = pool.value(each.layer) if each.kv else pool.key(each.layer)
            part[page] = 100 * page + 10 * each.layer + each.kv + 1
            begin = each.offset + page * each.stride
            lies = memory[begin : begin + each.bytes].view(torch.float32)
            assert torch.equal(lies, part[page].flatten())


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
@pytest.mark.parametrize("chunk", [16, 37, 90])
def test_a_model_with_it_has_the_logits_of_transformers(
    tmp_path: Path, make: Callable[..., Path], chunk: int
) -> None:
    """Over pages that hold NaN wherever nobody wrote."""
    model_dir = make(tmp_path / "model")
    device = dataclasses.replace(CPU, attention=PagedTorchAttention, fused=False)
    model = load_model(model_dir, device=device)
    shape = KvShape.of(model.config, PAGE_SIZE)
    memory = torch.full((PAGES * shape.page_bytes,), 0xFF, dtype=torch.uint8)
    runner = Runner(model, KvPool(shape, PAGES, memory))
    rows, pages = [], [3, 10, 17, 0, 7, 14]
    for begin in range(0, len(PROMPT), chunk):
        part = PROMPT[begin : begin + chunk]
        step = Batch.of([Slice(part, begin + len(part), pages, True)], PAGE_SIZE)
        rows.append(runner.step(step)[0])
    ends = [min(begin + chunk, len(PROMPT)) - 1 for begin in range(0, len(PROMPT), chunk)]
    expected = reference_logits(model_dir, PROMPT, torch.float32)[ends]
    assert (torch.stack(rows) - expected).abs().max().item() < 1e-4
