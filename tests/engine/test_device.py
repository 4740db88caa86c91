"""Which device an engine computes on: what --device takes, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import device
from engine.serve import check_device
from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_the_cpu_where_there_is_no_cuda(no_cuda: None) -> None:
    assert device.chosen("auto") is device.CPU
    assert device.chosen("cpu") is device.CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there_is_refused_with_what_was_found(no_cuda: None, name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"device = .*finds no CUDA device"):
        device.chosen(name)


def test_a_device_is_chosen_by_its_number(two_gpus: None) -> None:
    assert [device.chosen(name).ordinal for name in ("auto", "cuda", "cuda:1")] == [0, 0, 1]
    with pytest.raises(InvalidConfig, match="cuda:0 to cuda:1"):
        device.chosen("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps"])
def test_what_is_no_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidConfig, match="auto, cpu, cuda or cuda:N"):
        EngineConfig(model=Path("m"), device=name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_dynamic_expert_update", True),
        ("expert_memory_gb", 1.0),
        ("expert_nodes", 2),
        ("host_memory_gb", 1.0),
        ("gpu_prefill_token_threshold", 512),
        ("max_deferred_experts_per_token", 1),
    ],
)
def test_what_a_cuda_device_lacks_is_refused_by_name(field: str, value: float) -> None:
    given = {field: value, "gpu_experts_ratio": 0.5, "device": "cuda"}
    config = EngineConfig(Path("m"), **given)  # type: ignore[arg-type]
    check_device(config, device.CPU)
    with pytest.raises(InvalidConfig, match=f"^{field} = .*not built"):
        check_device(config, device.cuda())
    check_device(EngineConfig(Path("m"), device="cuda", gpu_experts_ratio=0.5), device.cuda())


def test_float32_is_attended_to_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """flashinfer has no such kernels. The two give other bits, and so other KV."""
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    numerics = device.cuda().numerics
    assert (numerics(torch.bfloat16), numerics(torch.float32)) == ("cuda", "cuda-torch")
    assert device.cuda(0, 64).numerics(torch.bfloat16) == "cuda-split.64"
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert numerics(torch.bfloat16) == "cuda-torch"
    assert device.cuda(0, 64).numerics(torch.bfloat16) == "cuda-torch"
