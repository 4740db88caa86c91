"""Small model directories with random weights, made by transformers, for the engine's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from engine.quantised import FP8, quantise
from engine.weights import Checkpoint

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    # Wide enough that the softmaxes aren't flat, so that a wrong mask or order shows.
    "initializer_range": 0.15,
}


def make_mixtral(model_dir: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A Mixtral with 4 experts, top 2; `fields` override its configuration."""
    own = {"num_local_experts": 4}
    return _save(MixtralForCausalLM, MixtralConfig, model_dir, dtype, **(own | fields))


def make_qwen3_moe(model_dir: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A Qwen3-MoE with 6 experts, top 2, norms that aren't 1; `fields` override."""
    own = {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    return _save(Qwen3MoeForCausalLM, Qwen3MoeConfig, model_dir, dtype, **(own | fields))


def _save(
    model_class: Any, config_class: Any, model_dir: Path, dtype: torch.dtype, **fields: Any
) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**(_SMALL | fields))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(model_dir)
    return model_dir


def weights_digest(model_dir: Path) -> bytes:
    """Of weights that nobody loads."""
    with Checkpoint(model_dir, torch.float32) as checkpoint:
        return checkpoint.digest()


def reshard(model_dir: Path, target_dir: Path, shards: int) -> Path:
    """The same tensors dealt out to several files, with an index."""
    target_dir.mkdir()
    (target_dir / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tensors = load_file(model_dir / "model.safetensors")
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, target_dir / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (target_dir / "model.safetensors.index.json").write_text(index)
    return target_dir


def fuse_experts(model_dir: Path, target_dir: Path) -> Path:
    """The same model with experts fused, under the names transformers 5 has in memory."""
    from transformers import AutoModelForCausalLM

    target_dir.mkdir()
    (target_dir / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(state, target_dir / "model.safetensors")
    return target_dir


def in_fp8(model_dir: Path, target_dir: Path, **told: Any) -> Path:
    """The same Qwen as it is shipped in fp8: matrices of layers, but for routers, with a scale for
    each block of 128 x 128. `told` overrides quantization_config."""
    target_dir.mkdir()
    config = json.loads((model_dir / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config["quantization_config"] = quantisation | {"activation_scheme": "dynamic"} | told
    (target_dir / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, weight in load_file(model_dir / "model.safetensors").items():
        tensors[name] = weight
        if weight.dim() == 2 and "_proj." in name:
            matrix = quantise(weight, FP8)
            tensors[name] = matrix.values.contiguous().view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = matrix.scales[::128].contiguous()
    save_file(tensors, target_dir / "model.safetensors")
    return target_dir


def reference_logits(model_dir: Path, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """transformers' float32 logits [T, vocab] of the whole prompt, computed in `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0]
    return logits.float()
