"""Chooses each token's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import Device


@dataclass(frozen=True)
class Routing:
    """Which experts compute a token, and how their outputs are weighed, best first."""

    expert_ids: Tensor  # int64 [T, k]
    weights: Tensor  # float32 [T, k]


@dataclass(frozen=True)
class Router:
    """Softmax over all experts in float32, then the k best (arXiv 2401.04088, section 2.1)."""

    weight: Tensor  # [experts, hidden]
    experts_per_token: int
    normalize: bool  # the chosen weights are scaled to sum to 1
    device: Device

    def __call__(self, x: Tensor) -> Routing:
        probabilities = self.device.linear(x, self.weight).float().softmax(-1)
        weights, ids = torch.topk(probabilities, self.experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(ids, weights)
