"""Decode steps that are replayed from graphs, on the CPU: graph_tape.py captures and replays,
flashinfer_stand_in.py attends."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import layers
from engine.attention.base import Attention, KvPool, KvShape
from engine.attention.flashinfer import CapturedFlashInfer, FlashInferAttention
from engine.attention.paged_torch import PagedTorchAttention
from engine.batch import Batch, Slice
from engine.config import ModelConfig
from engine.device import CPU, Device, cuda
from engine.graphs import Graphs, GraphSizes, graph_bytes
from engine.models import load_model
from engine.models.placed import PlacedModel
from engine.runner import PlainModel, Runner
from engine.settings import EngineConfig, graph_rows
from kvc2.errors import InvalidConfig
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe
from tests.engine.flashinfer_stand_in import SIGNATURES, stand_in
from tests.engine.graph_tape import TapeRecorder, TapeSideStream

PAGES, PAGE_SIZE, PADDING = 24, 16, 23
SIZES = GraphSizes((1, 2, 4), PADDING)
ROUNDING = 2e-2  # bf16 keeps 8 bits: sums in another order differ by a few steps
Make = Callable[..., Path]


@dataclass
class Talk:
    """A request's pages, and how many tokens have KV."""

    pages: list[int]
    length: int = 0

    def next(self, tokens: int) -> Slice:
        """Of its tokens, which follow from their places."""
        places = range(self.length, self.length + tokens)
        self.length += tokens
        return Slice(
            [(7 * n * n + self.pages[0]) % 128 for n in places], self.length, self.pages, 1
        )


@dataclass
class Bench:
    """A model over a pool of its own, with graphs or without."""

    runner: Runner
    recorder: TapeRecorder
    placed: PlacedModel
    sequences: list[Talk] = field(
        default_factory=lambda: [Talk(list(range(n, n + 5))) for n in (0, 5, 10, 15)]
    )

    def step(self, tokens: dict[int, int], *, padded_to: int | None = None) -> Tensor:
        """Of these sequences, so many tokens each."""
        batch = Batch.of([self.sequences[at].next(n) for at, n in tokens.items()], PAGE_SIZE)
        logits = self.compute(batch if padded_to is None else batch.padded(padded_to, PADDING))
        return logits[: len(batch.token_ids)]

    def compute(self, batch: Batch) -> Tensor:
        return self.placed.compute(self.runner).step(batch)

    @property
    def graphs(self) -> Graphs:
        assert isinstance(self.runner._compute, PlainModel)
        assert self.runner._compute.graphs is not None
        return self.runner._compute.graphs

    @property
    def memory(self) -> Tensor:
        return self.runner.pool._parts


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for each other, spinning, in small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Make, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        make: make(folder / make.__name__, torch.bfloat16, head_dim=64)
        for make in (make_mixtral, make_qwen3_moe)
    }


@pytest.fixture(params=SIGNATURES)
def bench(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, models: dict[Make, Path]
) -> Callable[..., Bench]:
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in(request.param))

    def make(
        sizes: GraphSizes = SIZES,
        *,
        make: Make = make_mixtral,
        split_pages: int = 8,
        hot: float | None = None,
        **parts: Any,
    ) -> Bench:
        """`split_pages`: at least what contexts here have, so that attention's bits are the same
        in a graph and without. `hot`: part of the experts."""
        recorder = TapeRecorder()
        device = dataclasses.replace(
            cuda(),
            memory=CPU.memory,
            empty=CPU.empty,
            attention=lambda pool, heads: FlashInferAttention(pool, heads, split_pages),
            finish=CPU.finish,
            recorder=lambda: recorder,
            side_stream=lambda: TapeSideStream(recorder),
        )
        config = EngineConfig(model=models[make], gpu_experts_ratio=hot, threads=1)
        return bench_of(config, dataclasses.replace(device, **parts), sizes, recorder)

    return make


def bench_of(
    config: EngineConfig, device: Device, sizes: GraphSizes, recorder: TapeRecorder
) -> Bench:
    placed = PlacedModel(config, load_model(config.model, device=device))
    shape = KvShape.of(placed.model.config, PAGE_SIZE)
    memory = torch.full((PAGES * shape.page_bytes,), 0xFF, dtype=torch.uint8)
    pool = KvPool(shape, PAGES, memory, side_by_side=True)
    return Bench(Runner(placed.model, pool, sizes), recorder, placed)


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= ROUNDING


PROMPTS = {0: 30, 1: 17, 2: 5, 3: 16}
DECODES = ([0, 1], [0], [2, 0, 1], [3, 1, 2, 0], [1], [3, 2], [0, 1, 2], [3])


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
def test_a_replay_has_the_bits_of_the_same_rows_computed_one_by_one(
    bench: Callable[..., Bench], make: Make
) -> None:
    """Requests come and go, contexts cross pages, and each size is used again and again."""
    ours, theirs = bench(make=make), bench(GraphSizes(), make=make)
    assert torch.equal(ours.step(PROMPTS), theirs.step(PROMPTS))
    for _ in range(6):
        for rows in DECODES:
            size = next(n for n in SIZES.rows if n >= len(rows))
            tokens = dict.fromkeys(rows, 1)
            assert torch.equal(ours.step(tokens), theirs.step(tokens, padded_to=size))
    assert ours.recorder.replays == 6 * len(DECODES)
    assert ours.recorder.captures == len(SIZES.rows)
    assert torch.equal(ours.memory.view(torch.int16), theirs.memory.view(torch.int16))


def test_a_replay_is_as_near_as_bf16_to_a_step_without_padding(bench: Callable[..., Bench]) -> None:
    """Attention divided by what is free, in a graph and without."""
    ours, theirs = bench(split_pages=0), bench(GraphSizes(), split_pages=0)
    for each in (ours, theirs):
        each.step(PROMPTS)
    for rows in DECODES:
        tokens = dict.fromkeys(rows, 1)
        near(ours.step(tokens), theirs.step(tokens))
    assert ours.recorder.replays == len(DECODES)


def test_padding_changes_no_bit_of_a_live_row_and_writes_to_its_own_page(
    bench: Callable[..., Bench],
) -> None:
    ours = bench()
    ours.step(PROMPTS)
    batch = Batch.of([ours.sequences[at].next(1) for at in (0, 2, 3)], PAGE_SIZE)
    before = ours.memory.view(torch.int16).clone()
    first = ours.compute(batch)
    after = ours.memory.view(torch.int16).clone()
    changed = (before != after).flatten(3).any(-1).any(0).any(0).nonzero().flatten()
    written = {*batch.page_ids.tolist(), PADDING}
    assert set(changed.tolist()) <= written
    for content in (0x7F, 0x00):
        ours.runner.pool._parts[:, :, PADDING].view(torch.uint8).fill_(content)
        assert torch.equal(ours.compute(batch), first)
    assert ours.recorder.captures == 1
    live = [page for page in range(PAGES) if page != PADDING]
    assert torch.equal(ours.memory.view(torch.int16)[:, :, live], after[:, :, live])


def test_a_size_is_captured_when_it_first_comes_and_never_again(
    bench: Callable[..., Bench],
) -> None:
    ours = bench()
    assert ours.step(PROMPTS).shape[0] == 4
    assert ours.graphs.captured == []
    for rows, captured in (([0], [1]), ([0, 1, 2], [1, 4]), ([3, 2, 1, 0], [1, 4]), ([1], [1, 4])):
        ours.step(dict.fromkeys(rows, 1))
        assert ours.graphs.captured == captured
    assert (ours.recorder.captures, ours.recorder.replays) == (2, 4)


def test_padding_is_not_counted_among_the_choices_of_experts(bench: Callable[..., Bench]) -> None:
    ours = bench()
    ours.step(PROMPTS)
    counted = ours.placed.statistics.counts.sum(1)
    assert counted.tolist() == [2.0 * sum(PROMPTS.values())] * 3
    ours.step({0: 1, 1: 1, 3: 1})
    assert ours.recorder.replays == 1
    assert (ours.placed.statistics.counts.sum(1) - counted).tolist() == [2.0 * 3] * 3


@pytest.mark.parametrize("make", [make_mixtral, make_qwen3_moe])
@pytest.mark.parametrize("hot", [0.0, 0.5, 0.8])
def test_cold_experts_are_computed_beside_a_replay_and_padding_is_not(
    bench: Callable[..., Bench], make: Make, hot: float
) -> None:
    """The graph calls the host at each replay, for the rows that are live then."""
    ours, theirs = bench(make=make, hot=hot), bench(GraphSizes(), make=make, hot=hot)
    assert torch.equal(ours.step(PROMPTS), theirs.step(PROMPTS))
    prompts = ours.placed.statistics.counts
    for rows in DECODES:
        size = next(n for n in SIZES.rows if n >= len(rows))
        tokens = dict.fromkeys(rows, 1)
        assert torch.equal(ours.step(tokens), theirs.step(tokens, padded_to=size))
    assert ours.recorder.replays == len(DECODES)
    beside, counts = ours.placed.beside, ours.placed.statistics.counts
    assert beside is not None
    measured = ours.placed.measured()  # what the budget of device memory is divided by
    assert measured.host_activations == int((counts * ~beside.hot).sum())
    assert measured.device_activations == int((prompts * beside.hot).sum())  # a replay isn't timed
    assert (measured.activation_s is not None) is (hot > 0)


ELSE: dict[str, tuple[tuple[int, ...], dict[int, int]]] = {
    "a prompt": (SIZES.rows, {0: 2}),
    "a chunk beside decodes": (SIZES.rows, {0: 1, 1: 2, 2: 1}),
    "more decodes than the largest size": ((1, 2), {0: 1, 1: 1, 2: 1}),
}


@pytest.mark.parametrize(("rows", "tokens"), ELSE.values(), ids=ELSE)
def test_what_no_graph_holds_is_computed_as_before(
    bench: Callable[..., Bench], rows: tuple[int, ...], tokens: dict[int, int]
) -> None:
    ours, theirs = bench(GraphSizes(rows, PADDING)), bench(GraphSizes())
    for each in (ours, theirs):
        each.step(PROMPTS)
    assert torch.equal(ours.step(tokens), theirs.step(tokens))
    assert ours.recorder.captures == 0


def test_logits_stay_when_their_graph_is_replayed_again(bench: Callable[..., Bench]) -> None:
    ours = bench()
    ours.step(PROMPTS)
    first = ours.step({0: 1, 1: 1})
    kept = first.clone()
    assert not torch.equal(ours.step({2: 1, 3: 1}), kept)
    assert torch.equal(first, kept)


def test_layers_that_are_still_under_way_are_waited_for_one_by_one(
    bench: Callable[..., Bench],
) -> None:
    ours, asked = bench(), list[int]()
    ours.step(PROMPTS)
    batch = Batch.of([ours.sequences[0].next(1)], PAGE_SIZE)
    logits = ours.runner.step(batch, asked.append)
    assert (asked, ours.recorder.captures) == ([0, 1, 2], 0)
    assert torch.equal(ours.compute(batch), logits)
    assert ours.recorder.replays == 1


def test_contexts_that_a_fixed_plan_does_not_hold_are_computed_as_before(
    bench: Callable[..., Bench],
) -> None:
    """A graph has one way of dividing, so that it could not sum them in the parts of a step without
    one."""
    ours, theirs = bench(split_pages=2), bench(GraphSizes(), split_pages=2)
    for each in (ours, theirs):
        each.step({0: 2 * PAGE_SIZE - 1, 1: 4})
    for expected in (1, 1):  # of one context of two pages, then of three
        assert torch.equal(ours.step({0: 1, 1: 1}), theirs.step({0: 1, 1: 1}))
        assert ours.recorder.replays == expected


def test_attention_without_fixed_plans_has_no_graphs(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    ours = bench(attention=PagedTorchAttention)
    ours.step(PROMPTS)
    for _ in range(3):
        ours.step({0: 1, 1: 1})
    assert ours.recorder.captures == 0
    assert [each for each in caplog.messages if "PagedTorchAttention has no fixed plans" in each]
    assert len(caplog.records) == 1


def experts_that_wait(x: Tensor, ids: Tensor, *rest: Tensor) -> Tensor:
    assert len(ids.tolist()) == len(x)
    return layers.grouped_experts(x, ids, *rest)


def test_what_can_not_be_captured_is_computed_as_before_and_told_once(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ours, theirs = bench(experts=experts_that_wait), bench(GraphSizes())
    for each in (ours, theirs):
        each.step(PROMPTS)
    for rows in DECODES:
        tokens = dict.fromkeys(rows, 1)
        assert torch.equal(ours.step(tokens), theirs.step(tokens))
    assert ours.graphs.captured == []
    (told,) = caplog.messages
    assert "a step of 2 can't be captured: tolist: operation not permitted" in told


# bugs that a graph would have, which the stand-ins must show


class MovingPlans(CapturedFlashInfer):
    """Where tokens go is told in other memory each step."""

    def plan(self, batch: Batch) -> None:
        super().plan(batch)
        self._places = batch.page_ids, batch.page_offsets


class PartsByContext(CapturedFlashInfer):
    """It divides as a step without a graph does."""

    def __init__(self, like: FlashInferAttention, rows: int) -> None:
        super().__init__(like, rows)
        self._splits = {"fixed_split_size": 2}


BUGS = {"memory that is gone": MovingPlans, "launched for blocks, tile and merge": PartsByContext}


@pytest.mark.parametrize("why", BUGS)
def test_a_graph_over_what_does_not_stay_is_seen(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def captured(self: FlashInferAttention, rows: int) -> Attention:
        return BUGS[why](self, rows)

    monkeypatch.setattr(FlashInferAttention, "captured", captured)
    ours = bench()
    ours.step({0: 2 * PAGE_SIZE - 1})
    ours.step({0: 1})
    with pytest.raises(RuntimeError, match=why):
        ours.step({0: 1})


# sizes, and what they take


def sized(sizes: str, max_running: int = 16) -> tuple[int, ...]:
    return graph_rows(
        EngineConfig(model=Path("m"), cuda_graph_sizes=sizes, max_running=max_running)
    )


def test_sizes_are_powers_of_two_up_to_a_full_batch_or_as_they_are_given() -> None:
    assert sized("auto") == (1, 2, 4, 8, 16)
    assert sized("auto", 20) == (1, 2, 4, 8, 16, 20)
    assert sized("auto", 1) == (1,)
    assert sized("8,1,8") == (1, 8)
    assert sized("off") == ()


@pytest.mark.parametrize("sizes", ["", "0", "1,0", "1,,2", "-1", "all", "1, 2"])
def test_what_is_no_size_is_refused_by_name(sizes: str) -> None:
    with pytest.raises(InvalidConfig, match=r"cuda_graph_sizes = .*auto, off, or numbers"):
        sized(sizes)


def test_the_memory_of_graphs_is_known_beforehand(tmp_path: Path) -> None:
    """At least each size's logits; and what is made between kernels, once."""
    model = ModelConfig.load(make_qwen3_moe(tmp_path / "model"), "bfloat16")
    assert graph_bytes(model, ()) == 0
    one, two = graph_bytes(model, (8,)), graph_bytes(model, (4, 8))
    assert two - one == 4 * model.vocab_size * 4
    assert one > 8 * model.vocab_size * (4 + 2)


def rows_of(sequence: Sequence[int]) -> list[Slice]:
    return [Slice([n], 20 + n, [3 * n, 3 * n + 1], 1) for n in sequence]


def test_a_padded_batch_has_the_same_first_rows() -> None:
    batch = Batch.of(rows_of([1, 2, 3]), PAGE_SIZE)
    padded = batch.padded(8, PADDING)
    assert batch.only_decodes
    assert padded.only_decodes
    for each in dataclasses.fields(Batch):
        part, more = getattr(batch, each.name), getattr(padded, each.name)
        assert more.dtype == part.dtype
        assert torch.equal(more[:3], part)
    assert padded.context_lens[3:].tolist() == [1] * 5
    assert padded.page_ids[3:].tolist() == [PADDING] * 5


@pytest.mark.parametrize(
    "slices",
    [
        [Slice([1, 2], 2, [0], 1)],
        [Slice([1], 1, [0], 0)],
        [Slice([1], 5, [0], 1), Slice([1, 2], 2, [1], 2)],
    ],
)
def test_a_prompt_is_no_decode(slices: list[Slice]) -> None:
    assert not Batch.of(slices, PAGE_SIZE).only_decodes
