"""Mixtral (arXiv 2401.04088): experts in every layer, their weights normalised."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.models.base import Model
from engine.models.packed import PackedExperts
from engine.models.stack import ExpertNames, attention_layer, moe_layer, stack
from engine.weights import Checkpoint

NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def mixtral(config: ModelConfig, checkpoint: Checkpoint, packed: PackedExperts | None) -> Model:
    """A MixtralForCausalLM checkpoint as a model."""
    layers = [
        attention_layer(config, checkpoint, i, moe_layer(config, checkpoint, i, NAMES, packed))
        for i in range(config.num_layers)
    ]
    return stack(config, checkpoint, layers)
