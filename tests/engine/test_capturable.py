"""A decode step on CUDA can be captured by a graph: it never makes the host wait for the device,
and copies nothing between the two. The model is the one that serves: its experts' choices are
counted.

No GPU is needed: torch's FakeTensorMode computes shapes, types and devices alone, and refuses to
wait; what crosses devices is refused here. (Where a batch lies on the CPU, `Runner` copies it to
the device before the first layer, which is before the graph.)
"""

from __future__ import annotations

import dataclasses
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention.base import Attention, KvPool, KvShape
from engine.attention.paged_torch import PagedTorchAttention
from engine.batch import Batch, Slice
from engine.device import CPU, cuda
from engine.models import load_model
from engine.models.placed import PlacedModel
from engine.runner import Runner
from engine.settings import EngineConfig
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe

CUDA, PAGES, PAGE_SIZE = torch.device("cuda", 0), 24, 16
# torch's own, which switches nothing: a build of torch without CUDA has none for it
GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>);
}
"""


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.version.cuda is not None:
        return
    folder = tmp_path_factory.mktemp("guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source)]
    subprocess.run([*command, f"-L{torch_folder}/lib", "-lc10", "-o", str(library)], check=True)
    torch.ops.load_library(str(library))


def moved(thing: Any, mode: FakeTensorMode) -> Any:
    """The same tree of objects, each tensor of it a fake one on the device."""
    if isinstance(thing, torch.Tensor):
        with mode:
            return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=CUDA)
    if isinstance(thing, list | tuple):
        return type(thing)(moved(each, mode) for each in thing)
    if isinstance(thing, types.FunctionType | type) or not hasattr(thing, "__dict__"):
        return thing
    if not type(thing).__module__.startswith("engine."):
        return thing
    copy = object.__new__(type(thing))
    for name, value in vars(thing).items():
        object.__setattr__(copy, name, moved(value, mode))
    return copy


class OneDevice(TorchDispatchMode):
    """Refuses what has to do with two: a copy between them waits for one of them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
        devices = {str(each.device) for each in tensors}
        assert len(devices) <= 1, f"{func} has to do with {sorted(devices)}"
        return made


class NoAttention(Attention):
    """flashinfer's place: it plans on the host and runs on the device."""

    def plan(self, batch: Batch) -> None: ...

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None: ...

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(query)


class Planned(PagedTorchAttention):
    """What its plan leaves is on the device; planning itself is outside of a graph."""

    mode: FakeTensorMode

    def plan(self, batch: Batch) -> None:
        pass


BATCH = Batch.of([Slice([1], 48, [6, 2, 5], True), Slice([2], 17, [9, 10], True)], PAGE_SIZE)


class NoCopies:
    """The side stream's place: it copies beside the device, and waits for nothing."""

    def fork(self) -> None: ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None: ...

    def call(self, work: Callable[[], None]) -> None: ...

    def join(self) -> None: ...

    def wait(self) -> None: ...

    def mark(self) -> None: ...

    def seconds(self, began: object, ended: object) -> float:
        raise AssertionError("no moment was marked")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)


def step(
    make: Callable[..., Path],
    folder: Path,
    attention: type[Attention],
    hot: float | None = None,
) -> torch.Tensor:
    """Logits of a decode step of two sequences, fake ones on the device. `hot`: of the experts."""
    device = dataclasses.replace(
        cuda(),
        memory=CPU.memory,
        empty=CPU.empty,
        attention=attention,
        finish=CPU.finish,
        side_stream=NoCopies,
    )
    path = make(folder / "model", torch.bfloat16)
    config = EngineConfig(model=path, gpu_experts_ratio=hot)
    placed = PlacedModel(config, load_model(path, device=device))
    mode = FakeTensorMode()
    model = moved(placed.model, mode)
    object.__setattr__(model, "device", dataclasses.replace(device, memory=CUDA))
    shape = KvShape.of(model.config, PAGE_SIZE)
    planner = PagedTorchAttention(
        KvPool(shape, PAGES, torch.empty(PAGES * shape.page_bytes, dtype=torch.uint8)),
        model.config.query_heads,
    )
    planner.plan(BATCH)
    with mode:
        memory = torch.empty(PAGES * shape.page_bytes, dtype=torch.uint8, device=CUDA)
        runner = Runner(model, KvPool(shape, PAGES, memory))
        inputs = {f.name: moved(getattr(BATCH, f.name), mode) for f in dataclasses.fields(BATCH)}
        planned = getattr(runner._compute, "_attention", None)
        if isinstance(planned, Planned):
            planned._places = moved(planner._places, mode)
            planned._sequences = moved(planner._sequences, mode)
        with OneDevice():
            return runner.step(Batch(**inputs))


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
@pytest.mark.parametrize("attention", [NoAttention, Planned])
def test_a_decode_step_never_waits_for_the_device(
    tmp_path: Path, make: Callable[..., Path], attention: type[Attention]
) -> None:
    logits = step(make, tmp_path, attention)
    assert (logits.shape[0], logits.device) == (2, CUDA)


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
def test_a_decode_step_with_cold_experts_waits_for_nothing_either(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    logits = step(make, tmp_path, NoAttention, hot=0.5)
    assert (logits.shape[0], logits.device) == (2, CUDA)


def test_a_step_that_waits_is_seen() -> None:
    """As the experts' did, that counted their tokens on the host."""
    with FakeTensorMode():
        ids = torch.zeros(4, dtype=torch.int64, device=CUDA)
        with pytest.raises(DynamicOutputShapeException):
            torch.bincount(ids, minlength=4)


def test_a_copy_between_devices_is_seen() -> None:
    """As the counting of choices did, a layer at a time."""
    with FakeTensorMode(), OneDevice():
        ids = torch.zeros(4, dtype=torch.int64, device=CUDA)
        with pytest.raises(AssertionError, match="'cpu', 'cuda:0'"):
            ids.cpu()
