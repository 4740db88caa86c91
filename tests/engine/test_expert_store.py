"""Experts on disk: the same bits as in memory, or an error; and memory keeps what will be used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import experts_on_disk as benchmark
from benchmarks.routings import Text
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.experts.reads import ExpertReadError
from engine.experts.store import ExpertStore, Held, Turns
from engine.models import build_model
from engine.models.placed import PlacedModel
from engine.settings import EngineConfig
from engine.weights import Checkpoint
from kvc2.errors import InvalidConfig
from tests.doubles.checkpoints import fuse_experts, make_mixtral
from tests.engine.test_hybrid import logits

EXPERTS, EXPERT_BYTES = 16, 3 * 96 * 48 * 4


def memory_gb(experts: int) -> float:
    return (experts + 0.5) * EXPERT_BYTES / 1e9


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_mixtral(tmp_path / "model", num_local_experts=EXPERTS)


def placed(model_dir: Path, **fields: Any) -> PlacedModel:
    config = EngineConfig(model=model_dir, threads=2, **fields)
    model = ModelConfig.load(model_dir)
    on_disk = config.expert_memory_gb is not None
    with Checkpoint(model_dir, model.dtype, experts_on_disk=on_disk) as checkpoint:
        return PlacedModel(config, build_model(model, checkpoint))


@pytest.fixture
def expected(model_dir: Path) -> torch.Tensor:
    made = placed(model_dir)
    return logits(made.model, made)


@pytest.mark.parametrize("memory", [8, 30, 1000])
@pytest.mark.parametrize(
    "fields",
    [{}, {"gpu_experts_ratio": 0.3, "enable_dynamic_expert_update": True}],
    ids=["cold", "hot and cold"],
)
def test_experts_on_disk_give_the_same_logits(
    model_dir: Path, expected: torch.Tensor, memory: int, fields: dict[str, Any]
) -> None:
    """Also where memory holds fewer experts than one layer of one step needs."""
    made = placed(model_dir, expert_memory_gb=memory_gb(memory), **fields)
    assert torch.equal(logits(made.model, made), expected)
    state = made.state()
    assert 0 < state["memory_experts"] <= min(memory, 3 * EXPERTS)
    assert state["read_bytes"] > 0
    made.close()


def test_a_file_that_is_replaced_is_still_the_one_that_was_loaded(
    model_dir: Path, expected: torch.Tensor
) -> None:
    made = placed(model_dir, expert_memory_gb=memory_gb(8))
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors").write_bytes(b"another")
    assert torch.equal(logits(made.model, made), expected)
    made.close()


@pytest.mark.parametrize("how", ["written", "cut"])
def test_what_is_not_as_it_was_is_an_error_and_never_a_wrong_token(
    model_dir: Path, how: str
) -> None:
    made = placed(model_dir, expert_memory_gb=memory_gb(8))
    path = model_dir / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(size // 8)
        else:
            file.seek(size // 8)
            file.write(b"\x55" * (size // 2))
    for _ in range(2):  # the next step fails as well, and nothing hangs
        with pytest.raises(ExpertReadError, match=r"was written since|has become shorter"):
            logits(made.model, made)
    made.close()


def test_what_can_not_stay_on_disk_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="expert_memory_gb"):
        placed(model_dir, expert_memory_gb=memory_gb(7))
    with pytest.raises(CheckpointError, match="stored as one"):
        placed(fuse_experts(model_dir, tmp_path / "fused"), expert_memory_gb=1.0)
    config = replace(ModelConfig.load(model_dir), dtype=torch.bfloat16)
    with (
        Checkpoint(model_dir, config.dtype, experts_on_disk=True) as checkpoint,
        pytest.raises(CheckpointError, match="must be stored as"),
    ):
        build_model(config, checkpoint)


@pytest.fixture
def store(model_dir: Path) -> Iterator[ExpertStore]:
    made = placed(model_dir, expert_memory_gb=memory_gb(8))
    assert made.experts is not None
    source = made.experts._host
    assert isinstance(source, ExpertStore)
    yield source
    made.close()


def test_the_next_layers_experts_are_read_ahead(store: ExpertStore) -> None:
    store._guesses.guess = lambda layer, x: torch.tensor([[3, 4]])
    x, outputs = torch.zeros(1, 48), torch.empty(1, 2, 48)
    store.compute(0, x, torch.tensor([[1, 2]]), outputs)
    assert all(each in store._coming or each in store._held for each in ((1, 3), (1, 4)))
    before = store.misses
    store.compute(1, x, torch.tensor([[3, 4]]), outputs)
    assert store.misses == before


def test_a_guess_that_can_not_be_read_fails_no_step(store: ExpertStore) -> None:
    read = store.read

    def broken(expert: tuple[int, int], *place: Any) -> Future[None]:
        if expert[0] != 1:
            return read(expert, *place)
        failed: Future[None] = Future()
        failed.set_exception(ExpertReadError("gone"))
        return failed

    store.read = broken  # type: ignore[method-assign]
    store._guesses.guess = lambda layer, x: torch.tensor([[3, 4]])
    x, outputs = torch.zeros(1, 48), torch.empty(1, 2, 48)
    for ids in ([1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]):
        store.compute(0, x, torch.tensor([ids]), outputs)
    with pytest.raises(ExpertReadError, match="gone"):
        store.compute(1, x, torch.tensor([[3, 4]]), outputs)
    store.compute(0, x, torch.tensor([[1, 2]]), outputs)


def test_a_layer_that_has_all_it_needs_looks_for_no_victim(
    model_dir: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at all that memory holds would cost more than computing, the more it holds."""
    made = placed(model_dir, expert_memory_gb=memory_gb(1000))
    logits(made.model, made)  # reads them all
    monkeypatch.setattr(Turns, "until_use", lambda *_: pytest.fail("looked"))
    assert torch.equal(logits(made.model, made), expected)
    made.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 4)), max_size=40))
def test_what_is_held_is_what_was_put_and_not_taken(
    events: list[tuple[bool, int, int]],
) -> None:
    held, there = Held((3, 5)), dict[tuple[int, int], int]()
    for number, (put, *expert) in enumerate(events):
        each = (expert[0], expert[1])
        if put and each not in there:
            held.put(each, number)
            there[each] = number
        elif not put and each in there:
            assert held.pop(each) == there.pop(each)
        assert len(held) == len(there)
        assert (each in held) == (each in there)
    keep = {each for each in there if sum(each) % 2}
    assert held.beside(keep).tolist() == [list(each) for each in sorted(there.keys() - keep)]
    ids = np.array([[-1, 0, 1], [2, 3, 4]])
    wanted = [[there.get((1, int(id)), -1) if (1, int(id)) in keep else -1 for id in row]
              for row in ids]  # fmt: skip
    assert held.places(1, ids, {each for each in keep if each[0] == 1}).tolist() == wanted


def test_the_victim_is_whose_next_use_is_expected_last() -> None:
    """Of equals that whose layer comes round last; of one layer that which is used the least."""
    turns = Turns([0, 2, 5], (6, 4))
    for _ in range(100):
        for layer in (0, 2, 5):
            turns.use(layer, np.array([0, 1]))
    waits = turns.until_use(2, np.array([(0, 0), (2, 0), (5, 0), (5, 3)]))
    assert waits[2] < waits[0] < waits[1] < waits[3]


def test_what_is_kept_beats_lru_where_layers_come_round() -> None:
    steps = benchmark.needed(Text(seed=7), tokens=150)
    capacity = 16 * 64 // 3
    ours, lru, best = (benchmark.hit_rate(steps, capacity, policy) for policy in benchmark.POLICIES)
    assert lru < ours < best


def test_wrong_guesses_never_drive_out_what_each_step_uses(model_dir: Path) -> None:
    """Six experts are used by turns; each layer guesses another one for the next, in vain."""
    made = placed(model_dir, expert_memory_gb=memory_gb(12))
    assert made.experts is not None
    store = made.experts._host
    assert isinstance(store, ExpertStore)
    wrong = iter(range(10**6))
    store._guesses.guess = lambda layer, x: torch.tensor([[8 + next(wrong) % 8]])
    x, outputs = torch.randn(1, 48), torch.empty(1, 2, 48)
    for step in range(60):
        if step == 30:
            before = store.hits, store.misses
        for layer in range(3):
            store.compute(layer, x, torch.tensor([[0, 1]]), outputs)
    assert (store.hits, store.misses) == (before[0] + 30 * 6, before[1])
    made.close()


def test_guesses_that_are_mostly_wrong_are_not_read_until_they_are_right_again(
    model_dir: Path,
) -> None:
    made = placed(model_dir, expert_memory_gb=memory_gb(12))
    assert made.experts is not None
    store = made.experts._host
    assert isinstance(store, ExpertStore)
    x, outputs = torch.randn(1, 48), torch.empty(1, 2, 48)
    needed: dict[int, list[int]] = {}
    random = np.random.default_rng(0)
    right = False

    def guess(layer: int, x: torch.Tensor) -> torch.Tensor:
        wrong = [each for each in range(EXPERTS) if each not in needed[layer]]
        return torch.tensor([needed[layer] if right else wrong[:2]])

    store._guesses.guess = guess
    before = 0
    for step in range(240):
        right = step >= 120
        needed = {at: random.permutation(EXPERTS)[:2].tolist() for at in range(3)}
        before = store.misses
        for layer in range(3):
            store.compute(layer, x, torch.tensor([needed[layer]]), outputs)
            if layer == 2:  # the first layer's turn comes in another step
                store._guesses._made = set()
        if step == 119:
            assert not store._guesses.pay
    assert store._guesses.pay
    assert store.misses - before <= 2  # of the first layer, which nobody guessed
    made.close()
