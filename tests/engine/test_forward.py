"""The engine's logits are transformers' logits, however a prompt is cut, batched or cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.device import CPU, Device, cuda
from engine.models import load_model
from engine.runner import Runner
from tests.doubles.checkpoints import (
    fuse_experts,
    make_mixtral,
    make_qwen3_moe,
    reference_logits,
    reshard,
)

PAGE_SIZE = 16
PAGES = 24
EXACT = 1e-4  # absolute, fp32: the order of sums differs, nothing else
PROMPT = [(7 * i * i + 3 * i + 1) % 128 for i in range(90)]
OTHER = [(5 * i * i + 11 * i + 4) % 128 for i in range(51)]


@dataclass
class Checkpoints:
    """Model directories of the whole module, made once."""

    root: Path

    def get(self, name: str, make: Callable[[Path], Path]) -> Path:
        path = self.root / name
        return path if path.exists() else make(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def model_dir(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    make = {"mixtral": make_mixtral, "qwen3_moe": make_qwen3_moe}[request.param]
    return checkpoints.get(request.param, make)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_runner(
    model_dir: Path, dtype: str = "auto", page_size: int = PAGE_SIZE, device: Device = CPU
) -> Runner:
    model = load_model(model_dir, dtype, device)
    shape = KvShape.of(model.config, page_size)
    # Not zeros: what the runner hasn't written must not reach any logits.
    memory = torch.full((PAGES * shape.page_bytes,), 0xFF, dtype=torch.uint8)
    return Runner(model, KvPool(shape, PAGES, memory))


def pages_of(first: int, tokens: int, page_size: int = PAGE_SIZE) -> list[int]:
    """Pages that are neither in order nor next to each other."""
    return [(first + 7 * i) % PAGES for i in range(-(-tokens // page_size))]


def prefill(
    runner: Runner, tokens: list[int], pages: list[int], chunk: int, done: int = 0
) -> torch.Tensor:
    """Logits of the last token of every chunk, [chunks, vocab]."""
    size = runner.pool.shape.page_size
    rows = []
    for begin in range(done, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        step = Batch.of([Slice(part, begin + len(part), pages, True)], size)
        rows.append(runner.step(step)[0])
    return torch.stack(rows)


def close(ours: torch.Tensor, reference: torch.Tensor, limit: float = EXACT) -> None:
    assert ours.dtype == torch.float32
    assert (ours - reference).abs().max().item() <= limit


@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 90])
def test_prefill_in_any_chunks_gives_the_logits_of_transformers(
    model_dir: Path, chunk: int
) -> None:
    runner = make_runner(model_dir)
    ours = prefill(runner, PROMPT, pages_of(3, len(PROMPT)), chunk)
    reference = reference_logits(model_dir, PROMPT, torch.float32)
    ends = [min(begin + chunk, len(PROMPT)) - 1 for begin in range(0, len(PROMPT), chunk)]
    close(ours, reference[ends])


@pytest.mark.parametrize("chunk", [5, 90])
def test_the_products_of_another_device_give_the_same_logits(model_dir: Path, chunk: int) -> None:
    """Those of a GPU, on tensors of the CPU."""
    device = dataclasses.replace(
        cuda(),
        memory=CPU.memory,
        empty=CPU.empty,
        attention=CPU.attention,
        finish=CPU.finish,
    )
    runner = make_runner(model_dir, device=device)
    ours = prefill(runner, PROMPT, pages_of(3, len(PROMPT)), chunk)
    close(ours[-1], reference_logits(model_dir, PROMPT, torch.float32)[-1])


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_page_size_does_not_change_logits(model_dir: Path, page_size: int) -> None:
    runner = make_runner(model_dir, page_size=page_size)
    tokens = PROMPT[:20]
    ours = prefill(runner, tokens, list(range(PAGES - 1, -1, -1)), 7)
    close(ours[-1], reference_logits(model_dir, tokens, torch.float32)[-1])


def test_a_matched_prefix_gives_the_logits_of_a_whole_prefill(model_dir: Path) -> None:
    """Pages filled by one sequence serve another that shares only its first three blocks."""
    runner = make_runner(model_dir)
    first = pages_of(0, len(PROMPT))
    prefill(runner, PROMPT, first, 90)
    tokens = PROMPT[:48] + OTHER
    pages = first[:3] + [page for page in range(PAGES) if page not in first]
    close(
        prefill(runner, tokens, pages, 64, done=48)[-1],
        reference_logits(model_dir, tokens, torch.float32)[-1],
    )


def test_a_mixed_batch_gives_each_sequence_its_own_logits(model_dir: Path) -> None:
    """One decodes, one continues its prefill, one starts, one wants no logits."""
    runner = make_runner(model_dir)
    decoding, filling, fresh = [0, 1, 2, 3], [9, 8, 7, 6], [20, 21]
    prefill(runner, OTHER[:50], decoding, 50)
    prefill(runner, PROMPT[:20], filling, 20)
    batch = Batch.of(
        [
            Slice(OTHER[50:51], 51, decoding, True),
            Slice(PROMPT[20:50], 50, filling, True),
            Slice(OTHER[:10], 10, [23], False),
            Slice(PROMPT[:17], 17, fresh, True),
        ],
        PAGE_SIZE,
    )
    logits = runner.step(batch)
    assert logits.shape == (3, 128)
    prompt = reference_logits(model_dir, PROMPT, torch.float32)
    close(logits[0], reference_logits(model_dir, OTHER, torch.float32)[50])
    close(logits[1], prompt[49])
    close(logits[2], prompt[16])


def test_greedy_decoding_follows_transformers(model_dir: Path) -> None:
    runner = make_runner(model_dir)
    tokens, pages = PROMPT[:30], pages_of(5, 60)
    logits = prefill(runner, tokens, pages, 30)[-1]
    for _ in range(25):
        tokens = [*tokens, int(logits.argmax())]
        step = Batch.of([Slice(tokens[-1:], len(tokens), pages, True)], PAGE_SIZE)
        logits = runner.step(step)[0]
    reference = reference_logits(model_dir, tokens, torch.float32)
    assert tokens[30:] == reference[29:-1].argmax(-1).tolist()
    close(logits, reference[-1])


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
def test_bfloat16_stays_as_near_to_float32_as_transformers_does(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    """Both round to 8 bits of mantissa: our error is at most 1.5 x theirs, on average.

    Every expert is chosen: a near tie in the router that rounding decides would swamp the error.
    """
    model_dir = make(tmp_path / "model", torch.bfloat16, num_local_experts=4, num_experts_per_tok=4)
    runner = make_runner(model_dir)
    assert runner.pool.key(0).dtype == torch.bfloat16
    ours = prefill(runner, PROMPT, pages_of(0, 90), 1)
    exact = reference_logits(model_dir, PROMPT, torch.float32)
    theirs = reference_logits(model_dir, PROMPT, torch.bfloat16)
    our_error = (ours - exact).abs().mean().item()
    assert our_error <= 1.5 * (theirs - exact).abs().mean().item()


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
def test_sharded_fused_and_tied_checkpoints_are_the_same_model(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    plain = make(tmp_path / "plain", tie_word_embeddings=True)
    reference = reference_logits(plain, PROMPT, torch.float32)[-1]
    sharded = reshard(plain, tmp_path / "sharded", 3)
    fused = fuse_experts(plain, tmp_path / "fused")
    for model_dir in (plain, sharded, fused):
        close(prefill(make_runner(model_dir), PROMPT, pages_of(0, 90), 90)[-1], reference)


def test_dense_layers_and_unnormalised_routers_of_qwen3_moe(tmp_path: Path) -> None:
    fields = {
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
    }
    model_dir = make_qwen3_moe(tmp_path / "model", **fields)
    runner = make_runner(model_dir)
    assert runner.model.config.moe_layers == (False, True, False, True)
    ours = prefill(runner, PROMPT, pages_of(0, 90), 90)[-1]
    close(ours, reference_logits(model_dir, PROMPT, torch.float32)[-1])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_static_rope_scalings_are_those_of_transformers(
    tmp_path: Path, rope: dict[str, object]
) -> None:
    rope_parameters = rope | {"rope_theta": 10_000.0}
    model_dir = make_mixtral(tmp_path / "model", rope_parameters=rope_parameters)
    ours = prefill(make_runner(model_dir), PROMPT, pages_of(0, 90), 90)[-1]
    close(ours, reference_logits(model_dir, PROMPT, torch.float32)[-1])


def test_layer_ready_is_called_in_order_before_a_layer_reads_the_pool(model_dir: Path) -> None:
    """A promotion that fills a layer's pages only when it is asked for still counts."""
    runner = make_runner(model_dir)
    pages = pages_of(0, len(PROMPT))
    whole = prefill(runner, PROMPT, pages, 90)[-1]
    layers = runner.pool.shape.layers
    kept = [runner.pool.pages(layer).clone() for layer in range(layers)]
    for layer in range(layers):
        runner.pool.pages(layer).zero_()
    calls = []

    def promote(layer: int) -> None:
        calls.append(layer)
        runner.pool.pages(layer).copy_(kept[layer])

    step = Batch.of([Slice(PROMPT[80:], 90, pages, True)], PAGE_SIZE)
    close(runner.step(step, promote)[0], whole)
    assert calls == list(range(layers))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Slice([], 4, [0], True), "0 tokens in a context of 4"),
        (Slice([1, 2, 3], 2, [0], True), "3 tokens in a context of 2"),
        (Slice([1], 17, [0], True), "1 pages for a context of 17"),
    ],
)
def test_an_impossible_slice_is_refused_by_name(part: Slice, message: str) -> None:
    with pytest.raises(ValueError, match=f"slice 1: {message}"):
        Batch.of([Slice([1], 1, [0], True), part], PAGE_SIZE)


def test_a_pool_of_another_shape_or_size_is_refused(model_dir: Path) -> None:
    runner = make_runner(model_dir)
    shape = runner.pool.shape
    with pytest.raises(ValueError, match="memory"):
        KvPool(shape, PAGES + 1, bytearray(PAGES * shape.page_bytes))
    other = KvShape(shape.layers + 1, shape.kv_heads, shape.head_dim, 16, shape.dtype)
    memory = bytearray(PAGES * other.page_bytes)
    with pytest.raises(ValueError, match="pool"):
        Runner(runner.model, KvPool(other, PAGES, memory))
