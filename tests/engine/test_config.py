"""Model directories that the engine can't run are refused, and the field is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.base import KvShape
from engine.config import ModelConfig
from engine.errors import CheckpointError
from kvc2.errors import InvalidConfig

_CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "rope_theta": 5000.0,
    "eos_token_id": 2,
}


def load(tmp_path: Path, dtype: str = "auto", **fields: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG | fields))
    return ModelConfig.load(tmp_path, dtype)


def test_fields_are_those_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.dtype == torch.bfloat16
    assert (config.num_layers, config.query_heads, config.kv_heads) == (3, 4, 2)
    assert (config.head_dim, config.expert_size) == (12, 96)
    assert (config.rope.rope_type, config.rope.theta) == ("default", 5000.0)
    assert config.eos_token_ids == (2,)


def test_generation_config_wins_on_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load(tmp_path).eos_token_ids == (5, 6)


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    assert load(tmp_path, "float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("architectures", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}),
        ("sliding_window", {"sliding_window": 128}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("dtype", {"dtype": "float16"}),
        ("num_experts_per_tok", {"num_experts_per_tok": 5}),
        ("num_attention_heads", {"num_key_value_heads": 3}),
        (
            "rope_parameters.rope_type",
            {"rope_theta": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        ),
        (
            "rope_parameters.partial_rotary_factor",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
    ],
)
def test_an_unsupported_model_is_refused_by_field(
    tmp_path: Path, field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidConfig) as refused:
        load(tmp_path, **fields)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field} = ")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="dtype = 'int8'"):
        load(tmp_path, "int8")


@pytest.mark.parametrize("page_size", [0, 3, 1024])
def test_a_page_size_that_is_no_power_of_two_is_refused(tmp_path: Path, page_size: int) -> None:
    with pytest.raises(InvalidConfig, match="page_size"):
        KvShape.of(load(tmp_path), page_size)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.load(tmp_path)
