"""A decoder as a stack of attention and feed-forward layers; the models fill it with weights.

Not responsible for where KV lies: the caller's `attend` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.device import Device
from engine.layers import Rope, rms_norm, rotate, silu_and_multiply

# (layer, query, key, value) -> mixed values; [T, heads, head_dim] each, see attention/base.py.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
FeedForward = Callable[[Tensor], Tensor]  # [T, hidden] -> [T, hidden]


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and keys over head_dim, before the rotation (Qwen3)."""

    query: Tensor  # [head_dim]
    key: Tensor  # [head_dim]


@dataclass(frozen=True)
class DenseFeedForward:
    """A gated FFN without experts."""

    gate_up: Tensor  # [2 * size, hidden], gate first
    down: Tensor  # [hidden, size]
    device: Device

    def __call__(self, x: Tensor) -> Tensor:
        hidden = silu_and_multiply(self.device.linear(x, self.gate_up))
        return self.device.linear(hidden, self.down)


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm attention, then a pre-norm feed-forward, each added to its input."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    head_norms: HeadNorms | None
    out: Tensor  # [hidden, query_heads * head_dim]
    feed_forward_norm: Tensor  # [hidden]
    feed_forward: FeedForward


@dataclass(frozen=True)
class Model:
    """Weights of a decoder and their forward. Changes nothing; threads may share it."""

    config: ModelConfig
    device: Device  # of all weights
    embeddings: Tensor  # [vocab, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]
    rope: Rope
    weights_digest: bytes  # of the tensors as they were read, see weights.Checkpoint
    expert_format: str = ""  # by name, see quantised; empty: as they are computed

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """int64 [T] tokens at their positions -> [T, hidden], after the last layer."""
        angles = self.rope.angles(positions)
        x = self.embeddings[token_ids]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, x, angles, attend)
            normed = rms_norm(x, layer.feed_forward_norm, self.config.rms_norm_eps)
            x = x + layer.feed_forward(normed)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, vocab]."""
        normed = rms_norm(hidden, self.norm, self.config.rms_norm_eps)
        return self.device.linear(normed, self.head).float()

    def _attention(
        self,
        index: int,
        layer: DecoderLayer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        c = self.config
        normed = rms_norm(x, layer.attention_norm, c.rms_norm_eps)
        qkv = self.device.linear(normed, layer.qkv)
        heads = qkv.view(x.shape[0], -1, c.head_dim)
        query, key, value = torch.split(heads, [c.query_heads, c.kv_heads, c.kv_heads], dim=1)
        if layer.head_norms is not None:
            query = rms_norm(query, layer.head_norms.query, c.rms_norm_eps)
            key = rms_norm(key, layer.head_norms.key, c.rms_norm_eps)
        mixed = attend(index, rotate(query, angles), rotate(key, angles), value)
        return self.device.linear(mixed.reshape(x.shape[0], -1), layer.out)
