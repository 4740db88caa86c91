"""Where the engine computes and by which kernels, chosen once: no other file asks what kind of
device a tensor is on (tests/test_tidy.py).

Not responsible for the kernels themselves (kernels, layers, attention/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine import kernels, layers, memory
from engine.attention.base import Attention, KvPool
from engine.attention.cpu import CpuAttention
from engine.attention.flashinfer import FlashInferAttention
from engine.choice import ChoiceRule


@dataclass(frozen=True)
class Device:
    """A memory, and the kernels for tensors in it.

    linear(x [T, in], weight [out, in]) -> [T, out]. experts(x, expert_ids, weights, gate_up, down)
    -> [T, hidden], see `layers.grouped_experts`. attention(pool, query_heads) makes the attention
    of a runner. claim_threads() is called before the first step, after the weights are loaded.
    empty(shape, dtype) is memory for a weight, settle(weight) that weight where it stays.
    choose_experts: see `layers`. fused: whether a layer up to its feed-forward is one call of
    csrc/decoder (models/fused), and none of `linear` and `attention`.
    numerics(dtype): the class of these kernels; only those of one class give the same bits.
    takes_records: whether weights of experts may be quantised (engine/quantised.py).
    """

    memory: torch.device  # of weights, tables and activations
    linear: Callable[[Tensor, Tensor], Tensor]
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    choose_experts: Callable[
        [Tensor, ChoiceRule, Tensor | None, Tensor | None], tuple[Tensor, Tensor]
    ]
    attention: Callable[[KvPool, int], Attention]
    fused: bool
    claim_threads: Callable[[], None]
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    settle: Callable[[Tensor], Tensor]
    numerics: Callable[[torch.dtype], str]
    takes_records: bool


def set_threads(threads: int) -> None:
    """How many CPU threads load the weights, and how many `claim_threads` takes later."""
    torch.set_num_threads(threads)


CPU = Device(
    memory=torch.device("cpu"),
    linear=kernels.linear,
    experts=kernels.grouped_experts,
    choose_experts=kernels.choose_experts,
    attention=CpuAttention,
    fused=True,
    claim_threads=kernels.claim_threads,
    empty=memory.empty,
    settle=memory.settle,
    numerics=kernels.numerics,
    takes_records=True,
)


def cuda(index: int = 0) -> Device:
    """An NVIDIA GPU: torch's products, flashinfer's attention. Not yet run on hardware."""
    place = torch.device("cuda", index)
    return Device(
        memory=place,
        linear=functional.linear,
        experts=layers.grouped_experts,
        choose_experts=layers.choose_experts,
        attention=FlashInferAttention,
        fused=False,
        claim_threads=lambda: None,  # torch's own threads keep the GPU fed
        empty=lambda shape, dtype: torch.empty(shape, dtype=dtype, device=place),
        settle=lambda weight: weight,
        numerics=lambda _: "cuda",
        takes_records=False,
    )
