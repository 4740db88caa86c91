"""The experts of one layer on one device, their tokens grouped by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.device import Device
from engine.experts.router import Router, Routing


@dataclass(frozen=True)
class GroupedExperts:
    """Gated FFNs: down(silu(gate(x)) * up(x)), weighed and summed over a token's experts."""

    gate_up: Tensor  # [experts, 2 * size, hidden], gate first
    down: Tensor  # [experts, hidden, size]
    device: Device

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden]. On the CPU a token's sum runs in the order of its routing,
        so it doesn't depend on the rest of the batch."""
        return self.device.experts(x, routing.expert_ids, routing.weights, self.gate_up, self.down)


@dataclass(frozen=True)
class MoeLayer:
    """Router and experts: those of one device, or of several (hybrid). What experts are given is
    theirs until they return: who computes longer keeps a copy."""

    router: Router
    experts: Callable[[Tensor, Routing], Tensor]  # [T, hidden] -> [T, hidden]

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))
