"""Architectures: each file turns a checkpoint into a `Model`; this one chooses the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.config import ModelConfig
from engine.device import CPU, Device
from engine.models.base import Model
from engine.models.mixtral import mixtral
from engine.models.packed import PackedExperts
from engine.models.qwen3_moe import qwen3_moe
from engine.weights import Checkpoint

_BUILDERS = {"MixtralForCausalLM": mixtral, "Qwen3MoeForCausalLM": qwen3_moe}


def build_model(
    config: ModelConfig, checkpoint: Checkpoint, packed: PackedExperts | None = None
) -> Model:
    """The model of a checkpoint, in the memory of its device; its experts in `packed`, if it is
    given, which is then kept. Reads all of it. Raises CheckpointError, naming what is wrong."""
    model = _BUILDERS[config.architecture](config, checkpoint, packed)
    if packed is None:
        return model
    packed.keep(checkpoint)
    return replace(model, expert_format=packed.format.name)


def load_model(model_dir: Path, dtype: str = "auto", device: Device = CPU) -> Model:
    """The model of a Hugging Face directory, in the memory of `device`.

    `dtype` as in ModelConfig.load. Raises InvalidConfig or CheckpointError, naming what is wrong.
    """
    config = ModelConfig.load(model_dir, dtype)
    with Checkpoint(model_dir, config.dtype, device) as checkpoint:
        return build_model(config, checkpoint)
