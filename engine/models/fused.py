"""A model's step on the CPU: a layer up to its feed-forward is one call, over arrays that are kept.

The same layers as models/base in torch, which is the reference. Not responsible for the products
and sums themselves (csrc/decoder, csrc/experts, csrc/attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import _kernels
from engine.attention.base import KvPool
from engine.batch import Batch
from engine.experts.grouped import MoeLayer
from engine.experts.router import Routing
from engine.kernels import as_array, rule_with, workbench
from engine.models.base import DecoderLayer, Model


@dataclass(frozen=True)
class Buffers:
    """What a step of up to so many tokens computes in, kept from step to step."""

    x: Tensor  # [tokens, hidden]
    normed: Tensor  # [tokens, hidden]
    expert_ids: Tensor  # int64 [tokens, k]
    weights: Tensor  # float32 [tokens, k]

    @classmethod
    def of(cls, model: Model, tokens: int) -> Buffers:
        c = model.config
        x = torch.empty(tokens, c.hidden_size, dtype=c.dtype)
        ids = torch.zeros(tokens, c.experts_per_token, dtype=torch.int64)
        return cls(x, torch.empty_like(x), ids, torch.zeros(ids.shape))

    def first(self, tokens: int) -> Buffers:
        """Views for as many."""
        parts = (self.x, self.normed, self.expert_ids, self.weights)
        return Buffers(*(part[:tokens] for part in parts))


class FusedModel:
    """A model and the pool that its steps write, on the CPU. One step at a time, from one thread.

    Keeps buffers for the largest step so far.
    """

    def __init__(self, model: Model, pool: KvPool) -> None:
        self.model = model
        self._workbench = workbench()
        cosines, sines = (table.numpy() for table in model.rope.tables)
        c = model.config
        self._decoder = _kernels.Decoder(
            self._workbench, cosines, sines, query_heads=c.query_heads, eps=c.rms_norm_eps
        )
        for index, layer in enumerate(model.layers):
            self._add(layer, pool, index)
        self._norm, self._head = as_array(model.norm), as_array(model.head)
        self._buffers = Buffers.of(model, 1)

    def logits(self, batch: Batch, layer_ready: Callable[[int], None] | None) -> Tensor:
        """As `Runner.step`."""
        tokens = len(batch.token_ids)
        if tokens > len(self._buffers.x):
            self._buffers = Buffers.of(self.model, tokens)
        use = self._buffers.first(tokens)
        torch.index_select(self.model.embeddings, 0, batch.token_ids, out=use.x)
        self._begin(batch, use)
        routing = Routing(use.expert_ids, use.weights)
        add = None
        for index, layer in enumerate(self.model.layers):
            if layer_ready is not None:
                layer_ready(index)
            self._decoder.run(index, add)
            feed_forward = layer.feed_forward
            if isinstance(feed_forward, MoeLayer):
                made = feed_forward.experts(use.normed, routing)
            else:
                made = feed_forward(use.normed)
            add = as_array(made)
        rows = batch.logits_rows.numpy()
        normed = use.normed[: len(rows)]  # the last feed-forward needs it no more
        self._decoder.finish(self._norm, rows, add, as_array(normed))
        logits = normed.new_empty(len(rows), len(self._head))
        _kernels.linear(self._workbench, as_array(normed), self._head, as_array(logits))
        return logits.float()

    def _add(self, layer: DecoderLayer, pool: KvPool, index: int) -> None:
        norms, moe = layer.head_norms, layer.feed_forward
        router = moe.router if isinstance(moe, MoeLayer) else None
        self._decoder.add_layer(
            attention_norm=as_array(layer.attention_norm),
            qkv=as_array(layer.qkv),
            out=as_array(layer.out),
            feed_forward_norm=as_array(layer.feed_forward_norm),
            key_pages=as_array(pool.key(index)),
            value_pages=as_array(pool.value(index)),
            query_norm=None if norms is None else as_array(norms.query),
            key_norm=None if norms is None else as_array(norms.key),
            router=None if router is None else as_array(router.weight),
            rule=None
            if router is None
            else rule_with(router.rule, router.bias, router.selection_bias),
        )

    def _begin(self, batch: Batch, use: Buffers) -> None:
        self._decoder.begin(
            batch.positions.numpy(),
            batch.query_lens.numpy(),
            batch.context_lens.numpy(),
            batch.block_tables.numpy(),
            batch.page_ids.numpy(),
            batch.page_offsets.numpy(),
            as_array(use.x),
            as_array(use.normed),
            use.expert_ids.numpy(),
            use.weights.numpy(),
        )
