"""Runs one step of a model over the paged pool.

Not responsible for what the step computes (scheduler), nor for choosing tokens (sampler).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.attention.base import KvPool, KvShape
from engine.batch import Batch
from engine.models.base import Model
from engine.models.fused import FusedModel

LayerReady = Callable[[int], None]


class Runner:
    """A model bound to a pool in its device's memory. One step at a time, from one thread.

    The first one on the CPU gives torch's threads to our kernels (`Device.claim_threads`).
    """

    def __init__(self, model: Model, pool: KvPool) -> None:
        expected = KvShape.of(model.config, pool.shape.page_size)
        if pool.shape != expected:
            raise ValueError(f"pool: its shape is {pool.shape}, the model's {expected}")
        self.model = model
        self.pool = pool
        model.device.claim_threads()
        self._compute = FusedModel(model, pool) if model.device.fused else PlainModel(model, pool)

    @torch.inference_mode()
    def step(self, batch: Batch, layer_ready: LayerReady | None = None) -> Tensor:
        """Computes the batch's KV into its pages; float32 logits [R, vocab] of its logits_rows.

        `layer_ready(i)` is called before layer i reads the pool, and may wait, so that a
        promotion in layer order can still be under way. What it raises ends the step: pages of
        the batch's own tokens are then undefined, all others untouched.
        """
        return self._compute.logits(batch, layer_ready)


class PlainModel:
    """A model whose layers torch computes one operation after the other, on any device."""

    def __init__(self, model: Model, pool: KvPool) -> None:
        self.model = model
        self._attention = model.device.attention(pool, model.config.query_heads)

    def logits(self, batch: Batch, layer_ready: LayerReady | None) -> Tensor:
        """As `Runner.step`."""
        self._attention.plan(batch)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if layer_ready is not None:
                layer_ready(layer)
            self._attention.write(layer, key, value)
            return self._attention.attend(layer, query)

        memory = self.model.device.memory  # an index on the CPU would be copied in each layer
        token_ids, positions = batch.token_ids.to(memory), batch.positions.to(memory)
        hidden = self.model.hidden(token_ids, positions, attend)
        logits = self.model.logits(hidden[batch.logits_rows.to(memory)])
        self.model.device.finish()  # what is committed next is read by another process
        return logits
