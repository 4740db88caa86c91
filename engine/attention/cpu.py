"""Attention on the CPU, over a pool that is ordinary memory (it plays the GPU on the stand-in)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import _kernels
from engine.attention.base import Attention
from engine.batch import Batch
from engine.kernels import as_array, workbench


class CpuAttention(Attention):
    """Our kernels, on the pages as they lie: nothing is gathered, and a token's result has the
    same bits in any batch and chunk."""

    _places: tuple[_kernels.I64, _kernels.I64]
    _sequences: tuple[_kernels.I32, _kernels.I32, _kernels.I32]

    def plan(self, batch: Batch) -> None:
        self._places = batch.page_ids.numpy(), batch.page_offsets.numpy()
        lengths = batch.query_lens.numpy(), batch.context_lens.numpy()
        self._sequences = (*lengths, batch.block_tables.numpy())

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        new = as_array(key.contiguous()), as_array(value.contiguous())
        pages = as_array(self.pool.key(layer)), as_array(self.pool.value(layer))
        _kernels.write(*new, *self._places, *pages)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        pages = as_array(self.pool.key(layer)), as_array(self.pool.value(layer))
        queries = as_array(query.contiguous())
        _kernels.attend(workbench(), queries, *pages, *self._sequences, as_array(out))
        return out
