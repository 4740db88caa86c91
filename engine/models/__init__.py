"""Architectures: each file turns a checkpoint into a `Model`; this one chooses the file."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.models.base import Model
from engine.models.mixtral import mixtral
from engine.models.qwen3_moe import qwen3_moe
from engine.weights import Checkpoint

_BUILDERS = {"MixtralForCausalLM": mixtral, "Qwen3MoeForCausalLM": qwen3_moe}


def load_model(
    model_dir: Path, dtype: str = "auto", device: torch.device = torch.device("cpu")
) -> Model:
    """The model of a Hugging Face directory, in the memory of `device`.

    `dtype` as in ModelConfig.load. Raises ConfigError or CheckpointError, naming what is wrong.
    """
    config = ModelConfig.load(model_dir, dtype)
    return _BUILDERS[config.architecture](config, Checkpoint(model_dir, config.dtype, device))
