"""The plain layers of a transformer, in torch, on any device.

Not responsible for attention, for which products a device uses (device.py), or for how layers are
stacked (models/).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from engine.choice import ChoiceRule
from engine.config import RopeConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, summed in float32 (arXiv 1910.07467)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[T, 2n] -> [T, n]: silu of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def grouped_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Gated FFNs of x [T, hidden] -> [T, hidden], one product an expert: the sum over j of
    weights[t, j] * down_e(silu(gate_e x[t]) * up_e x[t]), e = expert_ids[t, j].

    expert_ids int64 [T, k], weights float32 [T, k]; gate_up [experts, 2 * size, hidden], gate
    first; down [experts, hidden, size]. Two products for all experts, and nothing that the host
    would have to wait for, so that a CUDA graph can hold it.
    """
    ends = _counts(expert_ids.flatten(), gate_up.shape[0]).cumsum(0, dtype=torch.int32)
    outputs = _grouped_outputs(x, expert_ids, ends, gate_up, down)
    return (outputs.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def some_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same without the choices whose id is -1: those are another's."""
    count = gate_up.shape[0]
    other = expert_ids < 0
    ids = expert_ids.masked_fill(other, count)  # behind all groups, and so not computed
    ends = _counts(ids.flatten(), count + 1)[:count].cumsum(0, dtype=torch.int32)
    outputs = _grouped_outputs(x, ids, ends, gate_up, down)
    weighed = outputs.float() * weights.unsqueeze(-1)
    # what wasn't computed may be anything, nan too
    return weighed.masked_fill(other.unsqueeze(-1), 0).sum(1).to(x.dtype)


def _grouped_outputs(x: Tensor, ids: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, k, hidden] of ids [T, k], whose rows by id end at `ends`."""
    tokens, chosen = ids.shape
    order = ids.flatten().argsort(stable=True)
    rows = x[order // chosen]
    hidden = silu_and_multiply(functional.grouped_mm(rows, gate_up.mT, offs=ends))
    grouped = functional.grouped_mm(hidden, down.mT, offs=ends)
    return torch.empty_like(grouped).index_copy(0, order, grouped).view(tokens, chosen, -1)


def choose_experts(
    logits: Tensor, rule: ChoiceRule, bias: Tensor | None, selection_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, k] and weights float32 [T, k] of logits [T, experts], computed in float32.

    `bias` [experts] is added to the logits, `selection_bias` [experts] to the scores, only for the
    choice.
    """
    wide = logits.float() if bias is None else logits.float() + bias
    scores = wide.softmax(-1) if rule.scoring == "softmax" else wide.sigmoid()
    wanted = scores if selection_bias is None else scores + selection_bias
    if rule.chosen_groups < rule.groups:
        grouped = wanted.view(len(wanted), rule.groups, -1)
        best = min(2 if selection_bias is not None else 1, grouped.shape[-1])
        worth = grouped.topk(best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(-1, worth.topk(rule.chosen_groups, dim=-1).indices, True)
        wanted = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    order = wanted.argsort(dim=-1, descending=True, stable=True)
    ids = order[..., : rule.experts_per_token]
    weights = scores.gather(-1, ids)
    if rule.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * rule.scale


def _counts(numbers: Tensor, below: int) -> Tensor:
    """int32 [below]: how often each number is there. Not `bincount`, whose result's size the host
    must know."""
    ones = torch.ones_like(numbers, dtype=torch.int32)
    zeros = torch.zeros(below, dtype=torch.int32, device=numbers.device)
    return zeros.scatter_add(0, numbers, ones)


class Rope:
    """Rotary embedding (arXiv 2104.09864), halves rotated as in Hugging Face's models.

    Angles come from a table in float32, so they depend on the position alone. Changes nothing.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int) -> None:
        angles = torch.outer(torch.arange(max_positions).float(), _frequencies(config, head_dim))
        scale = _attention_factor(config)
        self._cos = angles.cos() * scale  # [max_positions, head_dim / 2]
        self._sin = angles.sin() * scale

    def to(self, device: torch.device) -> Rope:
        """The same table on a device; changes this one."""
        self._cos, self._sin = self._cos.to(device), self._sin.to(device)
        return self

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, float32 [max_positions, head_dim / 2]."""
        return self._cos, self._sin

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [T, 1, head_dim / 2], for `rotate`; once a step."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns x [T, heads, head_dim] by its positions' angles; computed in float32."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position, float32 [head_dim / 2]."""
    plain = 1.0 / config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, plain)
    if config.rope_type == "yarn":
        return _yarn(config, plain, head_dim)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between mixed (Llama 3.1)."""
    waves = config.original_max_positions * plain / (2 * math.pi)  # in the original context
    width = config.high_freq_factor - config.low_freq_factor
    kept = ((waves - config.low_freq_factor) / width).clamp(0, 1)
    return (1 - kept) * plain / config.factor + kept * plain


def _yarn(config: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """NTK by parts (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        waves = config.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # as in the paper's code: no division by zero
    kept = 1 - ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)
    return (1 - kept) * plain / config.factor + kept * plain


def _attention_factor(config: RopeConfig) -> float:
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
