"""Qwen3-MoE (arXiv 2505.09388): normed queries and keys, and some layers without experts."""

from __future__ import annotations

import torch

from engine.config import ModelConfig
from engine.models.base import DenseFeedForward, FeedForward, Model
from engine.models.packed import PackedExperts
from engine.models.stack import ExpertNames, attention_layer, moe_layer, stack
from engine.weights import Checkpoint

NAMES = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def qwen3_moe(config: ModelConfig, checkpoint: Checkpoint, packed: PackedExperts | None) -> Model:
    """A Qwen3MoeForCausalLM checkpoint as a model."""
    layers = [
        attention_layer(config, checkpoint, i, _feed_forward(config, checkpoint, i, packed))
        for i in range(config.num_layers)
    ]
    return stack(config, checkpoint, layers)


def _feed_forward(
    config: ModelConfig, checkpoint: Checkpoint, index: int, packed: PackedExperts | None
) -> FeedForward:
    if config.moe_layers[index]:
        return moe_layer(config, checkpoint, index, NAMES, packed)
    prefix, size, hidden = f"model.layers.{index}.mlp", config.dense_size, config.hidden_size
    gate = checkpoint.tensor(f"{prefix}.gate_proj.weight", size, hidden)
    up = checkpoint.tensor(f"{prefix}.up_proj.weight", size, hidden)
    down = checkpoint.tensor(f"{prefix}.down_proj.weight", hidden, size)
    settle = checkpoint.device.settle
    return DenseFeedForward(settle(torch.cat((gate, up))), settle(down), checkpoint.device)
