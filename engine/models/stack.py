"""Builds decoders from checkpoints: what Mixtral and Qwen3-MoE share.

A model file supplies the names of its tensors; the shapes come from the configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.choice import ChoiceRule
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.experts.grouped import GroupedExperts, MoeLayer
from engine.experts.router import Router, Routing
from engine.experts.store import StoredExperts
from engine.extents import Extent
from engine.layers import Rope
from engine.models.base import DecoderLayer, FeedForward, HeadNorms, Model
from engine.models.packed import PackedExperts, fill, matrix, quantise_named
from engine.quantised import Quantised
from engine.weights import Checkpoint


@dataclass(frozen=True)
class ExpertNames:
    """How an architecture calls its experts' parts."""

    block: str  # of one layer: "block_sparse_moe" or "mlp"
    gate: str
    up: str
    down: str


Read = Callable[[ModelConfig, Checkpoint, str, ExpertNames], Callable[[Tensor, Routing], Tensor]]


def attention_layer(
    config: ModelConfig, checkpoint: Checkpoint, index: int, feed_forward: FeedForward
) -> DecoderLayer:
    """Layer `index` with its norms and projections; the feed-forward is the caller's."""
    c, prefix, settle = config, f"model.layers.{index}", checkpoint.device.settle
    rows = {"q": c.query_heads * c.head_dim, "k": c.kv_heads * c.head_dim}
    rows["v"] = rows["k"]
    projections = [
        checkpoint.tensor(f"{prefix}.self_attn.{part}_proj.weight", size, c.hidden_size)
        for part, size in rows.items()
    ]
    return DecoderLayer(
        attention_norm=checkpoint.tensor(f"{prefix}.input_layernorm.weight", c.hidden_size),
        qkv=settle(torch.cat(projections)),
        head_norms=_head_norms(config, checkpoint, f"{prefix}.self_attn"),
        out=settle(
            checkpoint.tensor(f"{prefix}.self_attn.o_proj.weight", c.hidden_size, rows["q"])
        ),
        feed_forward_norm=checkpoint.tensor(
            f"{prefix}.post_attention_layernorm.weight", c.hidden_size
        ),
        feed_forward=feed_forward,
    )


def moe_layer(
    config: ModelConfig,
    checkpoint: Checkpoint,
    index: int,
    names: ExpertNames,
    packed: PackedExperts | None = None,
) -> MoeLayer:
    """The router and experts of a layer, stored one by one or fused; in `packed` where it is given.

    Files hold experts one by one under the architecture's own names; transformers 5 keeps them
    fused in memory as `mlp.experts.gate_up_proj`, and a plain dump of that is read too.
    """
    c, layer = config, f"model.layers.{index}"
    fused = f"{layer}.mlp.experts.gate_up_proj" in checkpoint
    block = f"{layer}.mlp" if fused else f"{layer}.{names.block}"
    read: Read = _fused_experts if fused else _single_experts
    if checkpoint.experts_on_disk:
        if fused:
            raise CheckpointError(f"{block}: experts stored as one tensor can't stay on disk")
        read = _experts_on_disk
    router = checkpoint.tensor(f"{block}.gate.weight", c.num_experts, c.hidden_size)
    prefix = f"{block}.experts"
    if packed is None:
        experts = read(config, checkpoint, prefix, names)
    else:
        parts = _fused_parts if fused else _single_parts
        part = parts(config, checkpoint, prefix, names, packed)
        experts = fill(config, packed, index, part, checkpoint)
    return MoeLayer(
        Router(router, ChoiceRule(c.experts_per_token, c.normalize_top_k), checkpoint.device),
        experts,
    )


def stack(config: ModelConfig, checkpoint: Checkpoint, layers: list[DecoderLayer]) -> Model:
    """The whole model: embeddings below the layers, norm and head above. The last of it to be read:
    what is left of the checkpoint is only digested."""
    c = config
    settle = checkpoint.device.settle
    embeddings = settle(checkpoint.tensor("model.embed_tokens.weight", c.vocab_size, c.hidden_size))
    head = embeddings
    if not c.tied_embeddings:
        head = settle(checkpoint.tensor("lm_head.weight", c.vocab_size, c.hidden_size))
    norm = checkpoint.tensor("model.norm.weight", c.hidden_size)
    return Model(
        config=config,
        device=checkpoint.device,
        embeddings=embeddings,
        layers=tuple(layers),
        norm=norm,
        head=head,
        rope=Rope(c.rope, c.head_dim, c.max_positions).to(checkpoint.device.memory),
        weights_digest=checkpoint.digest(),
    )


def _head_norms(config: ModelConfig, checkpoint: Checkpoint, prefix: str) -> HeadNorms | None:
    if config.architecture != "Qwen3MoeForCausalLM":
        return None
    return HeadNorms(
        checkpoint.tensor(f"{prefix}.q_norm.weight", config.head_dim),
        checkpoint.tensor(f"{prefix}.k_norm.weight", config.head_dim),
    )


def _fused_experts(
    config: ModelConfig, checkpoint: Checkpoint, prefix: str, names: ExpertNames
) -> GroupedExperts:
    count, size, hidden = config.num_experts, config.expert_size, config.hidden_size
    device = checkpoint.experts_on

    def read(part: str, *shape: int) -> Tensor:
        return device.settle(checkpoint.tensor(f"{prefix}.{part}_proj", *shape, device=device))

    gate_up, down = read("gate_up", count, 2 * size, hidden), read("down", count, hidden, size)
    return GroupedExperts(gate_up, down, device)


def _experts_on_disk(
    config: ModelConfig, checkpoint: Checkpoint, prefix: str, names: ExpertNames
) -> StoredExperts:
    size, hidden = config.expert_size, config.hidden_size

    def extents(expert: int) -> tuple[Extent, Extent, Extent]:
        stem = f"{prefix}.{expert}"
        return (
            checkpoint.extent(f"{stem}.{names.gate}.weight", size, hidden),
            checkpoint.extent(f"{stem}.{names.up}.weight", size, hidden),
            checkpoint.extent(f"{stem}.{names.down}.weight", hidden, size),
        )

    experts = tuple(extents(expert) for expert in range(config.num_experts))
    return StoredExperts(experts, size, hidden, config.dtype)


def _single_experts(
    config: ModelConfig, checkpoint: Checkpoint, prefix: str, names: ExpertNames
) -> GroupedExperts:
    count, size, hidden = config.num_experts, config.expert_size, config.hidden_size
    device = checkpoint.experts_on
    gate_up = device.empty((count, 2 * size, hidden), config.dtype)
    down = device.empty((count, hidden, size), config.dtype)

    def read(expert: int, part: str, *shape: int) -> Tensor:
        return checkpoint.tensor(f"{prefix}.{expert}.{part}.weight", *shape, device=device)

    for expert in range(count):
        gate_up[expert, :size] = read(expert, names.gate, size, hidden)
        gate_up[expert, size:] = read(expert, names.up, size, hidden)
        down[expert] = read(expert, names.down, hidden, size)
    return GroupedExperts(gate_up, down, device)


def _fused_parts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    prefix: str,
    names: ExpertNames,
    packed: PackedExperts,
) -> Callable[[int, str], Quantised]:
    count, size, hidden = config.num_experts, config.expert_size, config.hidden_size

    @functools.cache
    def whole() -> dict[str, Tensor]:
        gate_up = checkpoint.tensor(f"{prefix}.gate_up_proj", count, 2 * size, hidden)
        down = checkpoint.tensor(f"{prefix}.down_proj", count, hidden, size)
        return {"gate": gate_up[:, :size], "up": gate_up[:, size:], "down": down}

    def part(expert: int, name: str) -> Quantised:
        return quantise_named(f"{prefix}: {name}", whole()[name][expert], packed.format)

    return part


def _single_parts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    prefix: str,
    names: ExpertNames,
    packed: PackedExperts,
) -> Callable[[int, str], Quantised]:
    size, hidden = config.expert_size, config.hidden_size

    def part(expert: int, name: str) -> Quantised:
        shape = (hidden, size) if name == "down" else (size, hidden)
        called = f"{prefix}.{expert}.{getattr(names, name)}.weight"
        return matrix(checkpoint, called, shape, packed.format)

    return part
