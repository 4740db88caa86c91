"""What this engine's KV depends on, as the daemon's namespaces name it.

Not here: the digest of the weights (weights/), tenants and salts (kvc2).
"""

from __future__ import annotations

from dataclasses import asdict

from engine.config import ModelConfig
from kvc2.namespace import Identity

WEIGHT_CLASSES = ("attention", "embedding", "experts", "norms", "router")


def identity_of(config: ModelConfig, weights_digest: bytes, page_size: int) -> Identity:
    """Everything that this engine's KV depends on: the weights and their shapes by their digest,
    what config.json alone says by name. Raises errors.InvalidRequest for a model whose KV can't be
    cached by prefix."""
    dtype = str(config.dtype).removeprefix("torch.")
    rope = {name: str(value) for name, value in asdict(config.rope).items() if name != "theta"}
    return Identity(
        weights_digest=weights_digest.hex(),
        architecture=config.architecture,
        dtypes=tuple((kind, dtype) for kind in WEIGHT_CLASSES),
        kv_dtype=dtype,
        layers=config.num_layers,
        kv_heads=config.kv_heads,
        head_size=config.head_dim,
        rope_theta=config.rope.theta,
        page_size=page_size,
        rope_scaling=tuple(sorted(rope.items())),
        experts_per_token=config.experts_per_token,
        normalize_top_k=int(config.normalize_top_k),
        moe_layers=tuple(int(has_experts) for has_experts in config.moe_layers),
        rms_norm_eps=config.rms_norm_eps,
    )
