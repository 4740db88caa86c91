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
    """flashinfer's paged prefill over pages in its HND layout; a decode is a prefill of one."""

    _places: tuple[Tensor, Tensor]

    def __init__(self, pool: KvPool, query_heads: int) -> None:
        super().__init__(pool, query_heads)
        flashinfer = importlib.import_module("flashinfer")  # the extra `cuda`; it has no types

        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", backend=_BACKEND
        )

    def plan(self, batch: Batch) -> None:
        """Lengths and pages stay on the CPU: flashinfer plans there, and would copy them back."""
        shape, device = self.pool.shape, self.pool.device
        self._places = batch.page_ids.to(device), batch.page_offsets.to(device)
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
        )

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        pages, offsets = self._places
        self.pool.key(layer)[pages, :, offsets] = key
        self.pool.value(layer)[pages, :, offsets] = value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out: Tensor = self._wrapper.run(query, (self.pool.key(layer), self.pool.value(layer)))
        return out


def _starts(lengths: Tensor) -> Tensor:
    """int32 [n + 1]: where each of n runs begins, and where the last ends."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
