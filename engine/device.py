"""Where the engine computes and by which kernels, chosen once: no other file asks what kind of
device a tensor is on (tests/test_tidy.py).

Not responsible for the kernels themselves (kernels, layers, attention/).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Buffer

from engine import kernels, layers, memory
from engine.attention.base import Attention, KvPool
from engine.attention.cpu import CpuAttention
from engine.attention.flashinfer import FlashInferAttention
from engine.attention.paged_torch import PagedTorchAttention
from engine.choice import ChoiceRule
from engine.graphs import CudaRecorder, CudaSideStream, Recorder, SideStream
from kvc2.errors import InvalidConfig
from kvc2.host import machine


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
    ordinal: of a CUDA device; None: of none. over(memory): what an engine's pool lies in, as
    attention takes it. side_by_side: K and V of a page lie so there. room(): of `memory`.
    finish(): returns when all that was begun is done, so that others may read it.
    recorder(): what captures steps there (graphs); None: nothing does. side_stream(): what runs
    beside its own work; not of a CPU.
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
    ordinal: int | None
    over: Callable[[Any], Tensor | Buffer]
    side_by_side: bool
    room: Callable[[], machine.Room]
    finish: Callable[[], None]
    recorder: Callable[[], Recorder | None]
    side_stream: Callable[[], SideStream]


def set_threads(threads: int) -> None:
    """How many CPU threads load the weights, and how many `claim_threads` takes later."""
    torch.set_num_threads(threads)


def _no_side_stream() -> SideStream:
    raise RuntimeError("a CPU's work has threads of its own beside it (experts/hybrid)")


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
    ordinal=None,
    over=lambda memory: memory.map,
    side_by_side=False,
    room=machine.memory,
    finish=lambda: None,
    recorder=lambda: None,
    side_stream=_no_side_stream,
)


def cuda(index: int = 0, split_pages: int = 0) -> Device:
    """An NVIDIA GPU: torch's products, flashinfer's attention. Not yet run on hardware.
    `split_pages`: as FlashInferAttention has it; it changes bits."""
    device = torch.device("cuda", index)

    def numerics(dtype: torch.dtype) -> str:
        if not _flashinfer_has(dtype):
            return "cuda-torch"
        return f"cuda-split.{split_pages}" if split_pages else "cuda"

    def attention(pool: KvPool, query_heads: int) -> Attention:
        if _flashinfer_has(pool.shape.dtype):
            return FlashInferAttention(pool, query_heads, split_pages)
        return PagedTorchAttention(pool, query_heads)

    def over(memory: Any) -> Tensor:
        return torch.as_tensor(_DeviceBytes(memory.address, memory.num_bytes), device=device)

    def room() -> machine.Room:
        free, total = torch.cuda.mem_get_info(device)
        return machine.Room(str(device), total, free)

    return Device(
        memory=device,
        linear=functional.linear,
        experts=layers.grouped_experts,
        choose_experts=layers.choose_experts,
        attention=attention,
        fused=False,
        claim_threads=lambda: None,  # torch's own threads keep the GPU fed
        empty=lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device),
        settle=lambda weight: weight,
        takes_records=False,
        numerics=numerics,
        ordinal=index,
        over=over,
        side_by_side=True,
        room=room,
        finish=lambda: torch.cuda.synchronize(device),
        recorder=lambda: CudaRecorder(device),
        side_stream=lambda: CudaSideStream(device),
    )


class _DeviceBytes:
    """Memory of a device that torch takes over as it lies (numba's CUDA array interface)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _flashinfer_has(dtype: torch.dtype) -> bool:
    """Whether it is installed, and has kernels for this type."""
    return dtype is not torch.float32 and importlib.util.find_spec("flashinfer") is not None


def chosen(name: str, split_pages: int = 0) -> Device:
    """By --device; `split_pages`: as `cuda` has it. Raises InvalidConfig, with what was found, for
    one that is not there."""
    if name == "cpu":
        return CPU
    why = _why_not_cuda()
    if name == "auto":
        return CPU if why else cuda(split_pages=split_pages)
    if why:
        raise InvalidConfig("device", name, f"cpu or auto: {why}")
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise InvalidConfig("device", name, f"cuda:0 to cuda:{count - 1}, which torch sees")
    return cuda(index, split_pages)


def _why_not_cuda() -> str:
    """Why no CUDA device can be had; empty: one can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.bindings"):
        return "cuda-bindings is not installed (pip install 'kvc2[cuda]')"
    return ""
