"""What this engine's KV depends on, as the daemon's namespaces name it.

Not here: the digest of the weights (weights/), tenants and salts (kvc2).
"""

from __future__ import annotations

from dataclasses import asdict

from engine.config import ModelConfig
from kvc2.identity import DEFAULT_KINDS, Identity, by_layer, formats_digest

SHARED_NUMERICS = "shared"  # of engines that take each other's bits for their own
WEIGHT_CLASSES = ("attention", "embedding", "experts", "norms", "router")


def identity_of(
    config: ModelConfig,
    weights_digest: bytes,
    page_size: int,
    *,
    numerics: str = "",
    deferral: int = 0,
    expert_format: str = "",
) -> Identity:
    """Everything that this engine's KV depends on: the weights, their shapes and their formats by
    their digest, what config.json alone says by name. `numerics`: as the model's Device has it,
    or SHARED_NUMERICS. `deferral`: experts of a token that are added a layer later.
    `expert_format`: as the model has it.
    Raises errors.InvalidRequest for a model whose KV can't be cached by prefix."""
    dtype = str(config.dtype).removeprefix("torch.")
    rope = {name: str(value) for name, value in asdict(config.rope).items() if name != "theta"}
    kinds = ("moe" if has_experts else "dense" for has_experts in config.moe_layers)
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
        rms_norm_eps=config.rms_norm_eps,
        experts=by_layer(kinds, DEFAULT_KINDS["experts"]),
        formats_digest=formats_digest({"experts": expert_format}) if expert_format else "",
        numerics=numerics,
        deferral=deferral,
    )
