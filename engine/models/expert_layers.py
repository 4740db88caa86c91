"""The experts of some layers of a checkpoint, for whoever runs the rest of the model elsewhere.

Not responsible for routing: the caller says which experts a token has, and how they are weighed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import ModelConfig
from engine.experts import statistics
from engine.experts.hybrid import PlacedExperts
from engine.experts.router import Routing
from engine.experts.statistics import Counts, Statistics
from engine.models.mixtral import NAMES as MIXTRAL_NAMES
from engine.models.packed import open_packed
from engine.models.placed import place_experts
from engine.models.qwen3_moe import NAMES as QWEN3_NAMES
from engine.models.stack import moe_layer
from engine.settings import EngineConfig
from engine.weights import Checkpoint
from kvc2 import flags
from kvc2.errors import InvalidConfig, InvalidRequest

Values = TypeVar("Values", Tensor, NDArray[Any])

# The flags of `kvc2-engine serve` that are about experts, and mean here what --help says
SETTINGS = (
    *("device_threads", "dtype", "enable_dynamic_expert_update", "expert_copies_per_s"),
    *("expert_dtype", "expert_memory_gb", "expert_nodes", "expert_placement_seed"),
    *("expert_placement_strategy", "gpu_experts_ratio", "gpu_prefill_token_threshold"),
    *("init_expert_location", "num_gpu_experts", "threads"),
)
_NAMES = {"MixtralForCausalLM": MIXTRAL_NAMES, "Qwen3MoeForCausalLM": QWEN3_NAMES}


class HybridExperts:
    """The experts of one layer or of several, hot ones on the device and cold ones in memory or on
    disk. One call at a time; `close` ends its threads.

    A row of `forward` depends on that row alone, in every bit, wherever its experts lie.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: tuple[int, ...],
        placed: PlacedExperts,
        seen: Statistics,
    ) -> None:
        self.config = model
        self.layers = layers
        self._placed = placed
        self._seen = seen

    @classmethod
    def from_checkpoint(
        cls, model_dir: str | Path, layer: int | Iterable[int], **settings: Any
    ) -> HybridExperts:
        """Reads the experts of these layers, numbered from 0, out of a Hugging Face directory.

        `settings` are those of SETTINGS; without num_gpu_experts and gpu_experts_ratio all are the
        CPU's. Layers that are read together share threads, and what is hot is dealt out over them.
        Raises InvalidConfig for a setting, a layer without experts or a model that isn't known,
        CheckpointError for a directory that holds none.
        """
        for name in settings:
            flags.check_known(name, name, SETTINGS)
        config = flags.build(EngineConfig, {"model": Path(model_dir), **settings})
        model = ModelConfig.load(config.model, config.dtype)
        wanted = _wanted(model, layer)
        on_disk = config.expert_memory_gb is not None
        shape = model.num_layers, model.num_experts
        counts, seen = np.zeros(shape), Statistics(*shape)
        if config.init_expert_location is not None:
            counts = statistics.load("init_expert_location", config.init_expert_location, *shape)
        with Checkpoint(config.model, model.dtype, experts_on_disk=on_disk) as checkpoint:
            names = _NAMES[model.architecture]
            alone = replace(model, moe_layers=tuple(i in wanted for i in range(model.num_layers)))
            packed = open_packed(alone, checkpoint, config.expert_dtype, None)
            layers = {each: moe_layer(model, checkpoint, each, names, packed) for each in wanted}
            if on_disk:
                checkpoint.digest()  # which each later read must have
            placed = place_experts(config, model, layers, counts, seen)
        return cls(model, wanted, placed, seen)

    @property
    def counts(self) -> Counts:
        """How often each expert was chosen so far, [layers, experts] of the whole model."""
        return self._seen.counts

    def state(self) -> dict[str, Any]:
        """Where experts lie, as GET /experts tells it."""
        return self._placed.state()

    def forward(
        self, hidden: Values, ids: Values, weights: Values, *, layer: int | None = None
    ) -> Values:
        """The weighed sum of each row's experts: [T, hidden], of the kind, dtype and device of
        `hidden`; computed in the model's dtype.

        hidden [T, hidden] of floats; ids [T, k] of integers, -1 for an expert that is another's;
        weights [T, k] of floats. numpy or torch. `layer`: needed where several were read. Counts
        what was chosen, and lets experts move before the first of the layers. Raises
        InvalidRequest that names the argument, ExpertReadError for an expert that can't be read.
        """
        at = self.layers[0] if layer is None and len(self.layers) == 1 else layer
        if at not in self.layers:
            raise InvalidRequest("layer", layer, f"one of {self.layers}")
        rows = _tensor("hidden", hidden).to("cpu", self.config.dtype).contiguous()
        chosen = _tensor("ids", ids).cpu()
        if rows.ndim != 2 or rows.shape[1] != self.config.hidden_size:
            mend = f"the shape [tokens, {self.config.hidden_size}]"
            raise InvalidRequest("hidden", tuple(rows.shape), mend)
        factors = _tensor("weights", weights).to("cpu", torch.float32).contiguous()
        self._check(len(rows), chosen, factors)
        if chosen.numel() == 0:
            return _like(torch.zeros_like(rows), hidden)
        chosen = chosen.to(torch.int64).contiguous()
        if at == self.layers[0]:
            self._placed.between_steps(time.monotonic())
        self._seen.record(at, chosen[chosen >= 0])
        return _like(self._placed.compute(at, rows, Routing(chosen, factors)), hidden)

    def close(self) -> None:
        """After the last call."""
        self._placed.close()

    def __enter__(self) -> HybridExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, tokens: int, ids: Tensor, weights: Tensor) -> None:
        if ids.ndim != 2 or len(ids) != tokens or ids.is_floating_point():
            mend = f"integers of the shape [{tokens}, k]"
            raise InvalidRequest("ids", f"{ids.dtype} {tuple(ids.shape)}", mend)
        if weights.shape != ids.shape:
            mend = f"the shape of ids, {tuple(ids.shape)}"
            raise InvalidRequest("weights", tuple(weights.shape), mend)
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.config.num_experts:
            mend = f"-1, or an expert under {self.config.num_experts}"
            raise InvalidRequest("ids", (int(ids.min()), int(ids.max())), mend)


def _wanted(model: ModelConfig, layer: int | Iterable[int]) -> tuple[int, ...]:
    wanted = tuple(sorted({layer} if isinstance(layer, int) else set(layer)))
    having = [index for index, has_experts in enumerate(model.moe_layers) if has_experts]
    if not wanted or not set(wanted) <= set(having):
        raise InvalidConfig("layer", layer, f"layers that have experts, of {having}")
    return wanted


def _tensor(name: str, values: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(name, type(values).__name__, "a tensor or array of numbers") from error


def _like(made: Tensor, given: Values) -> Values:
    if isinstance(given, Tensor):
        return made.to(given.device, given.dtype)
    return made.float().numpy().astype(given.dtype)
