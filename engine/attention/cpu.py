"""Attention on the CPU, over a pool that is ordinary memory (it plays the GPU on the stand-in)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.base import Attention
from engine.batch import Batch


class CpuAttention(Attention):
    """Gathers each sequence's context once per layer and attends in float32."""

    _batch: Batch

    def plan(self, batch: Batch) -> None:
        self._batch = batch

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        pages, offsets = self._batch.page_ids, self._batch.page_offsets
        self.pool.key(layer)[pages, :, offsets] = key
        self.pool.value(layer)[pages, :, offsets] = value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out = torch.empty_like(query)
        begin = 0
        for row, length in enumerate(self._batch.query_lens.tolist()):
            end = begin + length
            out[begin:end] = self._attend_one(layer, row, query[begin:end])
            begin = end
        return out

    def _attend_one(self, layer: int, row: int, query: Tensor) -> Tensor:
        context = int(self._batch.context_lens[row])
        count = -(-context // self.pool.shape.page_size)
        pages = self._batch.block_tables[row, :count].long()
        heads, dim = self.pool.shape.kv_heads, self.pool.shape.head_dim
        key = self.pool.key(layer)[pages].transpose(0, 1).reshape(heads, -1, dim)[:, :context]
        value = self.pool.value(layer)[pages].transpose(0, 1).reshape(heads, -1, dim)[:, :context]
        tokens = query.shape[0]
        grouped = query.view(tokens, heads, -1, dim).permute(1, 2, 0, 3).float()
        scores = grouped @ key.float().transpose(1, 2).unsqueeze(1) * self.scale
        ages = torch.arange(context) - torch.arange(context - tokens, context).unsqueeze(1)
        weights = scores.masked_fill(ages > 0, -torch.inf).softmax(-1)
        mixed = weights @ value.float().unsqueeze(1)
        return mixed.permute(2, 0, 1, 3).reshape(query.shape).to(query.dtype)
