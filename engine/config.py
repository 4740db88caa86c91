"""What the engine must know about a model, read once from its directory and checked there.

Not responsible for weights (weights.py), nor for the server's own settings (settings.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from engine.errors import CheckpointError
from engine.quantised import BLOCK
from engine.settings import Dtype
from kvc2.errors import InvalidConfig

ARCHITECTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in get_args(Dtype) if name != "auto"
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding whose angles depend on the position alone, so that cached KV stays true.

    Fields that a `rope_type` doesn't use keep their neutral values. Names as in transformers.
    """

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None  # None: inferred from `factor` (yarn), else 1
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only mixture-of-experts transformer, as the runtime sees it."""

    architecture: str  # one of ARCHITECTURES
    dtype: torch.dtype  # of weights, activations and KV
    num_layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    num_experts: int
    experts_per_token: int
    expert_size: int  # intermediate size of one expert
    dense_size: int  # intermediate size of a layer without experts
    moe_layers: tuple[bool, ...]  # per layer: has experts
    normalize_top_k: bool  # router weights of the chosen experts are scaled to sum to 1
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def load(cls, model_dir: Path, dtype: str = "auto") -> ModelConfig:
        """The configuration of a Hugging Face model directory.

        `dtype`: "auto" (what the checkpoint says), "bfloat16" or "float32". Raises InvalidConfig
        for a model that the engine can't run, CheckpointError for a directory that holds none.
        """
        architecture = _architecture(model_dir)
        from transformers import AutoConfig  # slow to import, and only needed here

        hf = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        _refuse_unsupported(hf)
        layers = int(hf.num_hidden_layers)
        sparse = architecture == "Qwen3MoeForCausalLM"
        heads = int(hf.num_attention_heads)
        return cls(
            architecture=architecture,
            dtype=_dtype(dtype, getattr(hf, "dtype", None)),
            num_layers=layers,
            hidden_size=int(hf.hidden_size),
            query_heads=heads,
            kv_heads=int(hf.num_key_value_heads),
            head_dim=int(getattr(hf, "head_dim", None) or hf.hidden_size // heads),
            vocab_size=int(hf.vocab_size),
            max_positions=int(hf.max_position_embeddings),
            rms_norm_eps=float(hf.rms_norm_eps),
            rope=_rope(hf),
            tied_embeddings=bool(hf.tie_word_embeddings),
            num_experts=int(hf.num_local_experts),
            experts_per_token=_experts_per_token(hf),
            expert_size=int(hf.moe_intermediate_size if sparse else hf.intermediate_size),
            dense_size=int(hf.intermediate_size),
            moe_layers=_moe_layers(hf, layers),
            normalize_top_k=bool(getattr(hf, "norm_topk_prob", True)),
            eos_token_ids=_eos_token_ids(model_dir, hf),
            bos_token_id=hf.bos_token_id,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model directory. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: is this a model directory?") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _architecture(model_dir: Path) -> str:
    names = read_json(model_dir / "config.json").get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    if name not in ARCHITECTURES:
        raise InvalidConfig("architectures", name, f"supported are {', '.join(ARCHITECTURES)}")
    return str(name)


def _dtype(wanted: str, stored: object) -> torch.dtype:
    if wanted != "auto":
        if wanted not in DTYPES:
            raise InvalidConfig("dtype", wanted, f"must be auto, {' or '.join(DTYPES)}")
        return DTYPES[wanted]
    name = str(stored).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidConfig("dtype", name, f"the checkpoint's type; choose {' or '.join(DTYPES)}")
    return DTYPES[name]


def _refuse_unsupported(hf: Any) -> None:
    """Raises InvalidConfig, naming the first field that asks for what the runtime doesn't do."""
    window = getattr(hf, "sliding_window", None)
    if window is not None and window < hf.max_position_embeddings:
        raise InvalidConfig("sliding_window", window, "windows under the context are not supported")
    if getattr(hf, "attention_bias", False):
        raise InvalidConfig("attention_bias", True, "must be false")
    if hf.hidden_act != "silu":
        raise InvalidConfig("hidden_act", hf.hidden_act, "must be silu")
    _refuse_quantisation(getattr(hf, "quantization_config", None))
    if hf.num_attention_heads % hf.num_key_value_heads != 0:
        heads = hf.num_attention_heads
        raise InvalidConfig("num_attention_heads", heads, "a multiple of num_key_value_heads")


def _refuse_quantisation(told: Any) -> None:
    """Of quantised checkpoints fp8 with blocks is read, as DeepSeek and Qwen ship it. Raises
    InvalidConfig with what a checkpoint has instead."""
    if told is None:
        return
    given = told if isinstance(told, dict) else told.to_dict()
    field, method = "quantization_config", given.get("quant_method")
    if method != "fp8":
        mend = "only fp8 with weight_block_size [128, 128] is read; take the checkpoint in bfloat16"
        raise InvalidConfig(f"{field}.quant_method", method, f"{mend} with --expert-dtype")
    if given.get("weight_block_size") != [BLOCK, BLOCK]:
        mend = f"must be [{BLOCK}, {BLOCK}]"
        raise InvalidConfig(f"{field}.weight_block_size", given.get("weight_block_size"), mend)
    if given.get("fmt", "e4m3") != "e4m3":
        raise InvalidConfig(f"{field}.fmt", given["fmt"], "must be e4m3")
    if given.get("activation_scheme", "dynamic") != "dynamic":
        scheme = given["activation_scheme"]
        raise InvalidConfig(f"{field}.activation_scheme", scheme, "must be dynamic")


def _experts_per_token(hf: Any) -> int:
    chosen, experts = int(hf.num_experts_per_tok), int(hf.num_local_experts)
    if not 1 <= chosen <= experts:
        raise InvalidConfig("num_experts_per_tok", chosen, f"must be 1 to {experts}, the experts")
    return chosen


def _moe_layers(hf: Any, layers: int) -> tuple[bool, ...]:
    dense = frozenset(getattr(hf, "mlp_only_layers", None) or ())
    step = int(getattr(hf, "decoder_sparse_step", 1))
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _rope(hf: Any) -> RopeConfig:
    given = dict(hf.rope_parameters)
    rope_type = given.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        supported = ", ".join(ROPE_TYPES)
        mend = f"supported are {supported}; KV that depends on the total length can't be cached"
        raise InvalidConfig("rope_parameters.rope_type", rope_type, mend)
    for field in ("mscale", "mscale_all_dim"):
        if given.get(field):
            raise InvalidConfig(f"rope_parameters.{field}", given[field], "is not supported")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        value = given["partial_rotary_factor"]
        raise InvalidConfig("rope_parameters.partial_rotary_factor", value, "must be 1")
    return RopeConfig(
        rope_type=rope_type,
        theta=float(given["rope_theta"]),
        factor=float(given.get("factor") or 1.0),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=given.get("attention_factor"),
        original_max_positions=int(
            given.get("original_max_position_embeddings") or hf.max_position_embeddings
        ),
    )


def _eos_token_ids(model_dir: Path, hf: Any) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers' generate."""
    ids: Any = None
    if (model_dir / "generation_config.json").exists():
        ids = read_json(model_dir / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = hf.eos_token_id
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)
