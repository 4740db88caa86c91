"""Memory of weights: each its own, aligned, and kept as long as somebody holds it."""

from __future__ import annotations

import gc

import pytest
import torch

from engine import memory

SHAPES = [(1,), (3, 7), (40, 1000, 33), (16, 1 << 20), (0, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_weights_lie_apart_and_on_cache_lines(dtype: torch.dtype) -> None:
    made = [memory.empty(shape, dtype) for shape in SHAPES for _ in range(3)]
    for number, each in enumerate(made):
        each.fill_(number)
        assert each.is_contiguous()
        assert each.data_ptr() % 64 == 0 or not each.numel()
    for number, each in enumerate(made):
        assert (each == number).all()


def test_a_settled_weight_is_a_copy_that_outlives_the_others() -> None:
    weight = torch.randn(700, 900)
    settled = memory.settle(weight)
    assert torch.equal(settled, weight)
    kept = weight.clone()
    weight.zero_()
    for _ in range(5):
        memory.empty((1 << 24,), torch.uint8)
        gc.collect()
    assert torch.equal(settled, kept)


def test_large_weights_begin_a_huge_page_and_are_counted_where_granted() -> None:
    before = memory.huge_bytes()
    large = memory.empty((256 << 20,), torch.uint8)
    assert large.data_ptr() % memory.HUGE_PAGE_BYTES == 0
    large.fill_(1)
    granted = memory.huge_bytes() - before
    print(f"{granted >> 20} MiB of 256 are in huge pages")
    assert 0 <= granted <= 260 << 20


def test_the_host_is_quoted_for_shared_memory() -> None:
    words = {"always", "within_size", "advise", "never", "deny", "force", "unknown"}
    assert memory.shared_policy() in words
