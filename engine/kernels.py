"""Our C++ kernels over torch's tensors in CPU memory. A row's result doesn't depend on the batch.

Not responsible for when they are used (device.py), nor for attention (attention/cpu.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import _kernels
from engine.choice import ChoiceRule
from kvc2.errors import InvalidConfig

# Rises whenever the order of any sum in csrc/experts, csrc/attention or csrc/decoder changes.
_ORDER_OF_SUMS = 5


_chosen = _kernels.instruction_sets()[-1]


def choose(instruction_set: str) -> None:
    """Compute by another than the best of this machine, from the first product on. Raises
    InvalidConfig that says what the machine has."""
    global _chosen
    offered = _kernels.instruction_sets()
    if instruction_set not in offered:
        raise InvalidConfig("cpu_isa", instruction_set, f"this machine has {', '.join(offered)}")
    _chosen = instruction_set
    workbench.cache_clear()


@functools.cache
def workbench() -> _kernels.Workbench:
    """The chosen instruction set, with as many threads as torch has at the first call. One for all
    kernels: they take turns."""
    return _kernels.Workbench(_chosen, torch.get_num_threads())


def numerics(dtype: torch.dtype, instruction_set: str | None = None) -> str:
    """The class of what computes in this dtype, by the chosen instruction set or another: bits are
    equal within one, and nowhere else. Our kernels by AVX2 and AVX-512 give the same, but torch,
    which makes the tables of angles by the best that it finds itself, may not; portable lanes lack
    the fused multiply-add; tiles and AVX512-BF16 add products of bfloat16 in orders of their
    own."""
    computing = instruction_set or _chosen
    of_bfloat16 = computing in ("avx512_bf16", "amx") and dtype == torch.bfloat16
    if computing not in ("portable", "avx2") and not of_bfloat16:
        computing = "avx512"
    by_torch = torch.backends.cpu.get_cpu_capability().lower()
    return f"{computing}.{_ORDER_OF_SUMS}-torch.{by_torch}"


def claim_threads() -> None:
    """The kernels take torch's threads, once; torch is left with one. More of torch's would spin
    beside ours between its small operations: on a busy machine a prefill then took five times as
    long."""
    workbench()
    torch.set_num_threads(1)


def as_array(x: Tensor) -> _kernels.Array:
    """A contiguous CPU tensor as the kernels take it; shares its memory."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def workbench_of(threads: int) -> _kernels.Workbench:
    """Another of the same instruction set, whose calls run beside those of the first."""
    return _kernels.Workbench(_chosen, threads)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[T, in] x [out, in] -> [T, out], in the dtype of x."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _kernels.linear(workbench(), as_array(x.contiguous()), as_array(weight), as_array(out))
    return out


def grouped_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As `layers.grouped_experts`. A token's sum runs in the order of its expert_ids."""
    out = torch.empty_like(x)
    ids, factors = expert_ids.numpy(), weights.numpy()
    experts = as_array(gate_up), as_array(down)
    _kernels.ffn(workbench(), as_array(x), ids, factors, *experts, as_array(out))
    return out


def rule_with(
    rule: ChoiceRule, bias: Tensor | None, selection_bias: Tensor | None
) -> _kernels.ChoiceRule:
    """A rule and its biases, float32 [experts], as the kernels take them."""
    return _kernels.ChoiceRule(
        rule.experts_per_token,
        scoring=rule.scoring,
        normalize=rule.normalize,
        scale=rule.scale,
        groups=rule.groups,
        chosen_groups=rule.chosen_groups,
        bias=None if bias is None else bias.numpy(),
        selection_bias=None if selection_bias is None else selection_bias.numpy(),
    )


def choose_experts(
    logits: Tensor, rule: ChoiceRule, bias: Tensor | None, selection_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `layers.choose_experts`."""
    shape = logits.shape[0], rule.experts_per_token
    ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    known = rule_with(rule, bias, selection_bias)
    _kernels.choose(workbench(), known, as_array(logits), ids.numpy(), weights.numpy())
    return ids, weights


def count_choices(expert_ids: Tensor, counts: NDArray[np.float64]) -> None:
    """Adds one to counts [experts] for each of int64 expert_ids, of any shape. Raises ValueError,
    and adds nothing, for an id that is none."""
    _kernels.count_choices(expert_ids.numpy(), counts)


@dataclass(frozen=True)
class Choices:
    """The halves of `grouped_experts`: outputs of choices, by whoever has their experts, and their
    sum. Together they give its bits, however the choices are shared out."""

    bench: _kernels.Workbench

    def compute(
        self, x: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, outputs: Tensor
    ) -> None:
        """outputs [T, k, hidden], float32, of those whose id isn't -1; the others stay."""
        experts = as_array(gate_up), as_array(down)
        ids = expert_ids.numpy()
        _kernels.ffn_choices(self.bench, as_array(x), ids, *experts, outputs.numpy())

    def sum(self, outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, k, hidden] weighed by [T, k] -> [T, hidden], in the order of the choices."""
        out = torch.empty(outputs.shape[0], outputs.shape[2], dtype=dtype)
        _kernels.sum_choices(self.bench, outputs.numpy(), weights.numpy(), as_array(out))
        return out
