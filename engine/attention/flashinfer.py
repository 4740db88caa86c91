"""Attention on CUDA with flashinfer, which is imported with the first pool. Not yet run on
hardware: its call is held against the signatures of two versions, and computed as documented on the
CPU (tests/engine/test_flashinfer_api.py)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import Attention, KvPool
from engine.batch import Batch

_WORKSPACE_BYTES = 128 << 20  # what flashinfer's documentation advises
# By name: `auto` would take another on another GPU or in another version, and other bits with it.
_BACKEND = "fa2"


class FlashInferAttention(Attention):
    """flashinfer's paged prefill over pages in its HND layout; a decode is a prefill of one.

    `split_pages`: a context is summed so many pages at a time, whatever else is in the batch; 0: as
    flashinfer divides it among what the GPU has free, which depends on the batch.
    """

    _places: tuple[Tensor, Tensor]

    def __init__(self, pool: KvPool, query_heads: int, split_pages: int = 0) -> None:
        super().__init__(pool, query_heads)
        self.workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self.split_pages = split_pages
        self._wrapper = _wrapper(self.workspace)
        self._splits: dict[str, Any] = {"fixed_split_size": split_pages} if split_pages else {}

    def captured(self, rows: int) -> Attention | None:
        return CapturedFlashInfer(self, rows)

    def plan(self, batch: Batch) -> None:
        device = self.pool.device
        self._places = batch.page_ids.to(device), batch.page_offsets.to(device)
        self._plan_sums(batch)

    def _plan_sums(self, batch: Batch) -> None:
        """Lengths and pages stay on the CPU: flashinfer plans there, and would copy them back."""
        shape = self.pool.shape
        pages = -(-batch.context_lens // shape.page_size)
        used = torch.arange(batch.block_tables.shape[1]) < pages.unsqueeze(1)
        self._wrapper.plan(
            _starts(batch.query_lens),
            _starts(pages),
            batch.block_tables[used],
            (batch.context_lens - 1) % shape.page_size + 1,
            self.query_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=True,
            q_data_type=shape.dtype,
            **self._splits,
        )

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        pages, offsets = self._places
        self.pool.key(layer)[pages, :, offsets] = key
        self.pool.value(layer)[pages, :, offsets] = value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out: Tensor = self._wrapper.run(query, (self.pool.key(layer), self.pool.value(layer)))
        return out


class CapturedFlashInfer(FlashInferAttention):
    """Steps of so many decodes, planned into memory at fixed addresses. It shares the workspace of
    `like`: one of them runs at a time.

    A graph holds one way of dividing, so that `fixed_split_size`, whose number of parts depends on
    the contexts, can't be used: each context is one part then, and a longer one isn't held.
    """

    def __init__(self, like: FlashInferAttention, rows: int) -> None:
        Attention.__init__(self, like.pool, like.query_heads)
        self.workspace, self.split_pages = like.workspace, like.split_pages
        self._splits = {"disable_split_kv": True} if like.split_pages else {}
        self._room = 2 * like.pool.num_pages  # shared pages are there once a sequence

        def ints(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=like.pool.device)

        self._places = ints(rows, torch.int64), ints(rows, torch.int64)
        self._wrapper = _wrapper(
            self.workspace,
            use_cuda_graph=True,
            qo_indptr_buf=ints(rows + 1),
            paged_kv_indptr_buf=ints(rows + 1),
            paged_kv_indices_buf=ints(self._room + rows),
            paged_kv_last_page_len_buf=ints(rows),
        )

    def holds(self, batch: Batch) -> bool:
        pages = -(-batch.context_lens // self.pool.shape.page_size)
        if self.split_pages and int(pages.max()) > self.split_pages:
            return False
        return int(pages.sum()) <= self._room

    def plan(self, batch: Batch) -> None:
        for place, given in zip(self._places, (batch.page_ids, batch.page_offsets), strict=True):
            place.copy_(given)
        self._plan_sums(batch)


def _wrapper(workspace: Tensor, **fixed: Any) -> Any:
    flashinfer = importlib.import_module("flashinfer")  # the extra `cuda`; it has no types
    make = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    return make(workspace, "HND", backend=_BACKEND, **fixed)


def _starts(lengths: Tensor) -> Tensor:
    """int32 [n + 1]: where each of n runs begins, and where the last ends."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
