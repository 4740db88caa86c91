"""The experts of one layer on one device, their tokens grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine import _kernels
from engine.experts.router import Router, Routing
from engine.layers import as_array, kernel_session, silu_and_multiply


@dataclass(frozen=True)
class GroupedExperts:
    """Gated FFNs: down(silu(gate(x)) * up(x)), weighed and summed over a token's experts."""

    gate_up: Tensor  # [experts, 2 * size, hidden], gate first
    down: Tensor  # [experts, hidden, size]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden]. A token's sum runs in the order of its routing, so it
        doesn't depend on the rest of the batch."""
        if x.device.type != "cpu":
            return self._with_torch(x, routing)
        out = torch.empty_like(x)
        ids, weights = routing.expert_ids.numpy(), routing.weights.numpy()
        experts = as_array(self.gate_up), as_array(self.down)
        _kernels.ffn(kernel_session(), as_array(x), ids, weights, *experts, as_array(out))
        return out

    def _with_torch(self, x: Tensor, routing: Routing) -> Tensor:
        """One product an expert, on any device; waits for the device to count the tokens."""
        tokens, chosen = routing.expert_ids.shape
        order = routing.expert_ids.flatten().argsort(stable=True)
        counts = torch.bincount(routing.expert_ids.flatten(), minlength=self.gate_up.shape[0])
        rows = x[order // chosen]
        outputs = torch.empty_like(rows)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                taken = rows[begin : begin + count]
                hidden = silu_and_multiply(functional.linear(taken, self.gate_up[expert]))
                mixed = functional.linear(hidden, self.down[expert])
                outputs[order[begin : begin + count]] = mixed
                begin += count
        weighed = outputs.view(tokens, chosen, -1).float() * routing.weights.unsqueeze(-1)
        return weighed.sum(1).to(x.dtype)


@dataclass(frozen=True)
class MoeLayer:
    """Router and experts. The seam where a placement will split experts over devices."""

    router: Router
    experts: GroupedExperts

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))
