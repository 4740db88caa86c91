"""Chooses each token's experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.choice import ChoiceRule
from engine.device import Device


@dataclass(frozen=True)
class Routing:
    """Which experts compute a token, and how their outputs are weighed, best first."""

    expert_ids: Tensor  # int64 [T, k]
    weights: Tensor  # float32 [T, k]


@dataclass(frozen=True)
class Router:
    """Chooses the experts of each token by the logits that its product with `weight` gives."""

    weight: Tensor  # [experts, hidden]
    rule: ChoiceRule
    device: Device
    bias: Tensor | None = None  # float32 [experts], of the logits
    selection_bias: Tensor | None = None  # float32 [experts], of the scores, for the choice alone

    def __call__(self, x: Tensor) -> Routing:
        logits = self.device.linear(x, self.weight)
        return Routing(
            *self.device.choose_experts(logits, self.rule, self.bias, self.selection_bias)
        )
