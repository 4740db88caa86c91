"""Runs one step of a model over the paged pool.

Not responsible for what the step computes (scheduler), nor for choosing tokens (sampler).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.attention.base import Attention, KvPool, KvShape
from engine.batch import Batch
from engine.graphs import Graphs, GraphSizes
from engine.models.base import Attend, Model
from engine.models.fused import FusedModel

LayerReady = Callable[[int], None]
NO_GRAPHS = GraphSizes()


class Runner:
    """A model bound to a pool in its device's memory. One step at a time, from one thread.

    The first one on the CPU gives torch's threads to our kernels (`Device.claim_threads`).
    """

    def __init__(self, model: Model, pool: KvPool, graphs: GraphSizes = NO_GRAPHS) -> None:
        """`graphs`: of decode steps, where the device captures any."""
        expected = KvShape.of(model.config, pool.shape.page_size)
        if pool.shape != expected:
            raise ValueError(f"pool: its shape is {pool.shape}, the model's {expected}")
        self.model = model
        self.pool = pool
        model.device.claim_threads()
        self._compute = (
            FusedModel(model, pool) if model.device.fused else PlainModel(model, pool, graphs)
        )

    @torch.inference_mode()
    def step(self, batch: Batch, layer_ready: LayerReady | None = None) -> Tensor:
        """Computes the batch's KV into its pages; float32 logits [R, vocab] of its logits_rows.

        `layer_ready(i)` is called before layer i reads the pool, and may wait, so that a
        promotion in layer order can still be under way. What it raises ends the step: pages of
        the batch's own tokens are then undefined, all others untouched.
        """
        return self._compute.logits(batch, layer_ready)


class PlainModel:
    """A model whose layers torch computes one operation after the other, on any device; decode
    steps by a graph, where they can be."""

    def __init__(self, model: Model, pool: KvPool, graphs: GraphSizes) -> None:
        self.model = model
        self._attention = model.device.attention(pool, model.config.query_heads)
        self.graphs: Graphs | None = None
        recorder = model.device.recorder() if graphs.rows else None
        if recorder is not None:
            self.graphs = Graphs(
                graphs,
                recorder,
                attention=self._attention,
                memory=model.device.memory,
                compute=self._decoded,
            )

    def logits(self, batch: Batch, layer_ready: LayerReady | None) -> Tensor:
        """As `Runner.step`."""
        logits = None
        if self.graphs is not None and layer_ready is None:
            logits = self.graphs.logits(batch)
        if logits is None:
            logits = self._one_by_one(batch, layer_ready)
        self.model.device.finish()  # what is committed next is read by another process
        return logits

    def _one_by_one(self, batch: Batch, layer_ready: LayerReady | None) -> Tensor:
        self._attention.plan(batch)
        memory = self.model.device.memory  # an index on the CPU would be copied in each layer
        token_ids, positions = batch.token_ids.to(memory), batch.positions.to(memory)
        attend = _attend(self._attention, layer_ready)
        hidden = self.model.hidden(token_ids, positions, attend)
        return self.model.logits(hidden[batch.logits_rows.to(memory)])

    def _decoded(self, attention: Attention, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What a graph holds: all rows' logits, of an attention that is planned."""
        hidden = self.model.hidden(token_ids, positions, _attend(attention, None))
        return self.model.logits(hidden)


def _attend(attention: Attention, layer_ready: LayerReady | None) -> Attend:
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer_ready is not None:
            layer_ready(layer)
        attention.write(layer, key, value)
        return attention.attend(layer, query)

    return attend
