"""What only an NVIDIA GPU can show of the engine. Skipped, with the reason, where there is none.

Here are the parts that need the device itself: flashinfer's attention against our own on the CPU,
experts and products in torch, and a whole model against transformers. Everything else of the gpu
tier runs on the stand-in, in the other tests.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention.base import Attention, KvPool, KvShape
from engine.attention.paged_torch import PagedTorchAttention
from engine.batch import Batch, Slice
from engine.device import CPU, Device
from engine.device import cuda as cuda_device
from engine.experts.beside import BesideDevice, Pinned
from engine.experts.grouped import GroupedExperts
from engine.experts.hybrid import HostExecutor, Weights
from engine.experts.router import Routing
from engine.graphs import GraphSizes, graph_bytes
from engine.kernels import Choices, workbench
from engine.models import load_model
from engine.runner import Runner
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe, reference_logits

pytestmark = pytest.mark.cuda

PAGES, PAGE_SIZE, QUERY_HEADS = 24, 16, 8
SHAPE = KvShape(layers=2, kv_heads=2, head_dim=64, page_size=PAGE_SIZE, dtype=torch.bfloat16)
ROUNDING = 2e-2  # bf16 keeps 8 bits: sums in another order differ by a few steps
PROMPT = [(7 * i * i + 3 * i + 1) % 128 for i in range(90)]


@pytest.fixture
def cuda() -> Device:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    return cuda_device()


@pytest.fixture
def cuda_attends(cuda: Device) -> Device:
    """A device whose attention can be made, too."""
    pytest.importorskip("flashinfer", reason="the extra `cuda` (flashinfer) is not installed")
    return cuda


def pool_on(device: Device) -> KvPool:
    """The same random pages on any device."""
    filled = torch.Generator().manual_seed(3)
    numbers = PAGES * SHAPE.page_bytes // SHAPE.dtype.itemsize
    content = torch.randn(numbers, generator=filled).to(SHAPE.dtype)
    return KvPool(SHAPE, PAGES, content.view(torch.uint8).to(device.memory))


def near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    error = (ours.cpu().float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error.item() <= ROUNDING


SLICES = {
    "a whole prompt": [Slice(range(37), 37, [5, 2, 9], True)],
    "a chunk on a prefix": [Slice(range(20), 100, [7, 1, 4, 11, 0, 3, 8], True)],
    "decodes": [Slice([1], 48, [6, 2, 5], True), Slice([2], 17, [9, 10], True)],
    "all of it": [
        Slice(range(37), 37, [5, 2, 9], True),
        Slice([1], 48, [6, 12, 13], True),
        Slice(range(20), 100, [7, 1, 4, 11, 0, 3, 8], True),
    ],
}


def attended(device: Device, attention: Attention, batch: Batch) -> torch.Tensor:
    """Of the same queries, keys and values on any device."""
    tokens, dtype, memory = len(batch.token_ids), attention.pool.shape.dtype, device.memory
    random = torch.Generator().manual_seed(4)
    query = torch.randn(tokens, QUERY_HEADS, SHAPE.head_dim, generator=random).to(dtype)
    key, value = (
        torch.randn(tokens, SHAPE.kv_heads, SHAPE.head_dim, generator=random).to(dtype)
        for _ in range(2)
    )
    attention.plan(batch)
    attention.write(1, key.to(memory), value.to(memory))
    return attention.attend(1, query.to(memory))


@pytest.mark.parametrize("slices", list(SLICES.values()), ids=list(SLICES))
def test_flashinfer_attends_as_plain_torch_and_as_our_own_kernel_do(
    cuda_attends: Device, slices: list[Slice]
) -> None:
    device, batch = cuda_attends, Batch.of(slices, PAGE_SIZE)
    ours = attended(device, device.attention(pool_on(device), QUERY_HEADS), batch)
    near(ours, attended(device, PagedTorchAttention(pool_on(device), QUERY_HEADS), batch).cpu())
    near(ours, attended(CPU, CPU.attention(pool_on(CPU), QUERY_HEADS), batch))


@pytest.mark.parametrize("slices", list(SLICES.values()), ids=list(SLICES))
def test_plain_torch_attends_on_the_device_as_on_the_cpu(cuda: Device, slices: list[Slice]) -> None:
    """What serves where flashinfer is not installed."""
    ours, theirs = (
        attended(each, PagedTorchAttention(pool_on(each), QUERY_HEADS), Batch.of(slices, PAGE_SIZE))
        for each in (cuda, CPU)
    )
    near(ours, theirs)


def test_experts_on_the_device_are_those_of_the_cpu(cuda: Device) -> None:
    random = torch.Generator().manual_seed(5)
    gate_up = (torch.randn(6, 2 * 96, 64, generator=random) / 8).bfloat16()
    down = (torch.randn(6, 64, 96, generator=random) / 8).bfloat16()
    x = torch.randn(33, 64, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(6, generator=random)[:2] for _ in range(33)])
    weights = torch.rand(33, 2, generator=random)

    def mixed(device: Device) -> torch.Tensor:
        memory = device.memory
        experts = GroupedExperts(gate_up.to(memory), down.to(memory), device)
        return experts(x.to(memory), Routing(ids.to(memory), weights.to(memory)))

    near(mixed(cuda), mixed(CPU))


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
@pytest.mark.parametrize("chunk", [16, 90])
def test_a_model_on_the_device_stays_as_near_to_float32_as_transformers_does(
    cuda_attends: Device,
    tmp_path: Path,
    make: Callable[..., Path],
    chunk: int,
) -> None:
    """The rule of test_forward: our error is at most 1.5 x theirs in bf16, on average."""
    model_dir = make(
        tmp_path / "model", torch.bfloat16, num_local_experts=4, num_experts_per_tok=4, head_dim=64
    )
    model = load_model(model_dir, device=cuda_attends)
    shape = KvShape.of(model.config, PAGE_SIZE)
    pages_bytes = PAGES * shape.page_bytes
    memory = torch.full((pages_bytes,), 0xFF, dtype=torch.uint8, device=model.device.memory)
    runner = Runner(model, KvPool(shape, PAGES, memory))
    pages = [3, 10, 17, 0, 7, 14]
    rows = []
    for begin in range(0, len(PROMPT), chunk):
        part = PROMPT[begin : begin + chunk]
        step = Batch.of([Slice(part, begin + len(part), pages, True)], PAGE_SIZE)
        rows.append(runner.step(step)[0].cpu())
    ends = [min(begin + chunk, len(PROMPT)) - 1 for begin in range(0, len(PROMPT), chunk)]
    exact = reference_logits(model_dir, PROMPT, torch.float32)[ends]
    theirs = reference_logits(model_dir, PROMPT, torch.bfloat16)[ends]
    our_error = (torch.stack(rows) - exact).abs().mean().item()
    assert our_error <= 1.5 * (theirs - exact).abs().mean().item()


def test_a_graphs_decodes_are_those_of_the_same_rows_computed_one_by_one(
    cuda_attends: Device, tmp_path: Path
) -> None:
    """Bit for bit, since both launch the same kernels; what it prints only hardware can tell."""
    device, rows, padding = cuda_device(split_pages=PAGES), (1, 4, 16), PAGES - 1
    model = load_model(make_qwen3_moe(tmp_path / "m", torch.bfloat16, head_dim=64), device=device)
    shape = KvShape.of(model.config, PAGE_SIZE)

    def runner(sizes: GraphSizes) -> Runner:
        memory = torch.zeros(PAGES * shape.page_bytes, dtype=torch.uint8, device=device.memory)
        runner = Runner(model, KvPool(shape, PAGES, memory, side_by_side=True), sizes)
        prompts = [Slice(PROMPT[:20], 20, [2 * n, 2 * n + 1], 1) for n in range(8)]
        runner.step(Batch.of(prompts, PAGE_SIZE))
        return runner

    def decodes(length: int, count: int) -> Batch:
        slices = [Slice([PROMPT[length]], length, [2 * n, 2 * n + 1], 1) for n in range(count)]
        return Batch.of(slices, PAGE_SIZE)

    one_by_one, replayed = runner(GraphSizes()), runner(GraphSizes(rows, padding))
    before, took = torch.cuda.memory_reserved(), dict.fromkeys(("one by one", "replayed"), 0.0)
    for count in (3, 1, 8):
        size = next(n for n in rows if n >= count)
        for length in range(21, 29):
            batch = decodes(length, count)
            began = time.perf_counter()
            expected = one_by_one.step(batch.padded(size, padding))[:count]
            middle = time.perf_counter()
            assert torch.equal(replayed.step(batch), expected)
            if length > 24:  # the first ones capture, and compile
                took["one by one"] += middle - began
                took["replayed"] += time.perf_counter() - middle
    for way, seconds in took.items():
        print(f"{way}: {seconds / 12 * 1e3:.3f} ms a step")
    grew = torch.cuda.memory_reserved() - before
    print(f"graphs: {grew / 1e6:.1f} MB, {graph_bytes(model.config, rows) / 1e6:.1f} MB expected")


def test_cold_experts_are_computed_beside_the_device_in_a_graph_too(cuda: Device) -> None:
    random, memory, tokens = torch.Generator().manual_seed(6), cuda.memory, 33

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) / 8).bfloat16()

    host, hot = (
        Weights(drawn(6, 2 * 96, 64), drawn(6, 64, 96)),
        np.array([[1, 0, 0, 1, 0, 1]], bool),
    )
    side, sums = cuda.side_stream(), Choices(workbench())
    experts = BesideDevice(
        HostExecutor({0: host}, sums),
        Weights(drawn(3, 2 * 96, 64).to(memory), drawn(3, 64, 96).to(memory)),
        hot,
        side=side,
        sums=sums,
        pinned=Pinned(side, (tokens, 64), 2, torch.bfloat16),
    )
    ids = torch.stack([torch.randperm(6, generator=random)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=random)
    x, there = drawn(tokens, 64).to(memory), Routing(ids.to(memory), weights.to(memory))

    def expected() -> torch.Tensor:
        return GroupedExperts(host.gate_up, host.down, CPU)(x.cpu(), Routing(ids, weights))

    with torch.inference_mode():
        with experts.step(tokens):
            made = experts.compute(0, x, there)
        near(made, expected())
        spent = dataclasses.asdict(experts.spent)
        assert spent["device_s"] > 0
        assert spent["device_activations"] + spent["host_activations"] == 2 * tokens
        print(f"of {tokens} tokens' choices: {spent}")
        recorder = cuda.recorder()
        assert recorder is not None
        with experts.step(tokens):
            replay, made = recorder.capture(lambda: experts.compute(0, x, there))
        for _ in range(3):
            x.copy_(drawn(tokens, 64).to(memory))
            with experts.step(tokens):
                replay()
            near(made, expected())
        assert experts.spent.device_s == spent["device_s"]  # no moment of a replay is known
