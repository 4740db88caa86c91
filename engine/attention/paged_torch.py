"""Attention in plain torch, on any device and in any type: each sequence's pages are gathered, and
torch's own product attends to them.

The reference that other attentions are held against, the one for float32 on a GPU (flashinfer has
no such kernels), and the one for a GPU without flashinfer. It copies all that it reads, once a
layer; not for speed. On the CPU it has been run; on CUDA not yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention.base import Attention
from engine.batch import Batch


@dataclass(frozen=True)
class _Sequence:
    """Rows [begin, end) of a step's queries, and what they see."""

    begin: int
    end: int
    context: int
    pages: Tensor  # int64, on the device
    mask: Tensor | None  # bool [queries, context]; None: a single query sees all


class PagedTorchAttention(Attention):
    """Gathers, then `scaled_dot_product_attention`, a sequence at a time."""

    _places: tuple[Tensor, Tensor]
    _sequences: list[_Sequence]

    def plan(self, batch: Batch) -> None:
        device = self.pool.device
        self._places = batch.page_ids.to(device), batch.page_offsets.to(device)
        tables = batch.block_tables.long().to(device)
        self._sequences, begin = [], 0
        lengths = zip(batch.query_lens.tolist(), batch.context_lens.tolist(), strict=True)
        for row, (queries, context) in enumerate(lengths):
            pages = tables[row, : -(-context // self.pool.shape.page_size)]
            mask = None
            if queries > 1:
                seen = torch.ones(queries, context, dtype=torch.bool, device=device)
                mask = seen.tril(context - queries)
            self._sequences.append(_Sequence(begin, begin + queries, context, pages, mask))
            begin += queries

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        pages, offsets = self._places
        self.pool.key(layer)[pages, :, offsets] = key
        self.pool.value(layer)[pages, :, offsets] = value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out = torch.empty_like(query)
        for each in self._sequences:
            keys = self._gathered(self.pool.key(layer), each)
            values = self._gathered(self.pool.value(layer), each)
            mixed = functional.scaled_dot_product_attention(
                query[each.begin : each.end].transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=each.mask,
                scale=self.scale,
                enable_gqa=True,
            )
            out[each.begin : each.end] = mixed.squeeze(0).transpose(0, 1)
        return out

    def _gathered(self, part: Tensor, sequence: _Sequence) -> Tensor:
        """[1, kv_heads, context, head_dim] of a sequence's keys, or values."""
        pages = part[sequence.pages].transpose(0, 1)  # [kv_heads, pages, page_size, head_dim]
        shape = self.pool.shape
        flat = pages.reshape(shape.kv_heads, -1, shape.head_dim)
        return flat[:, : sequence.context].unsqueeze(0)
