"""The experts of one layer on one device, their tokens grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.experts.router import Router, Routing
from engine.layers import linear, silu_and_multiply


@dataclass(frozen=True)
class GroupedExperts:
    """Gated FFNs: down(silu(gate(x)) * up(x)), weighed and summed over a token's experts."""

    gate_up: Tensor  # [experts, 2 * size, hidden], gate first
    down: Tensor  # [experts, hidden, size]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden]. A token's sum runs in the order of its routing, so it
        doesn't depend on the rest of the batch."""
        tokens, chosen = routing.expert_ids.shape
        order = routing.expert_ids.flatten().argsort(stable=True)
        counts = torch.bincount(routing.expert_ids.flatten(), minlength=self.gate_up.shape[0])
        rows = x[order // chosen]
        outputs = torch.empty_like(rows)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                hidden = silu_and_multiply(
                    linear(rows[begin : begin + count], self.gate_up[expert])
                )
                outputs[order[begin : begin + count]] = linear(hidden, self.down[expert])
                begin += count
        mixed = outputs.view(tokens, chosen, -1).float() * routing.weights.unsqueeze(-1)
        return mixed.sum(1).to(x.dtype)


@dataclass(frozen=True)
class MoeLayer:
    """Router and experts. The seam where a placement will split experts over devices."""

    router: Router
    experts: GroupedExperts

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))
