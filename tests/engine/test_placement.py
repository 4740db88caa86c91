"""Which experts are hot: at the start, by what was counted, and as the traffic goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import placement as benchmark
from benchmarks.routings import Text, usage
from engine.experts.dynamic import PLAN_TOKENS, DynamicPlacement, Exchange, Pace
from engine.experts.placement import Room, best, hot_experts, place, share
from engine.experts.statistics import (
    SCHEMA,
    Counts,
    LateCounts,
    Statistics,
    load,
    resume,
    save,
)
from engine.settings import PlacementStrategy
from kvc2.errors import InvalidConfig

LAYERS = (False, True, True, False, True)
EXPERTS = 6
STRATEGIES: tuple[PlacementStrategy, ...] = get_args(PlacementStrategy)


def random_counts(seed: int, layers: tuple[bool, ...] = LAYERS, experts: int = EXPERTS) -> Counts:
    counts = np.random.default_rng(seed).integers(0, 9, (len(layers), experts)).astype(float)
    counts[~np.array(layers)] = 0
    return counts


# the first placement


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("hot", [0, 1, 7, 12, 18])
def test_as_many_experts_are_hot_as_there_is_room_for(
    strategy: PlacementStrategy, hot: int
) -> None:
    room = Room(LAYERS, EXPERTS, hot)
    mask = place(strategy, room, random_counts(1), seed=3)
    assert mask.sum() == hot
    assert not mask[[0, 3]].any(), "a layer without experts has none to place"
    assert (mask.sum(1)[room.rows] >= room.layer_min).all() or strategy in {
        "front-loading",
        "random",
    }
    assert np.array_equal(mask, place(strategy, room, random_counts(1), seed=3))


def test_uniform_deals_out_evenly_and_front_loading_fills_layers() -> None:
    room = Room(LAYERS, EXPERTS, 8)
    assert place("uniform", room, random_counts(1), 0).sum(1).tolist() == [0, 3, 3, 0, 2]
    assert place("front-loading", room, random_counts(1), 0).sum(1).tolist() == [0, 6, 2, 0, 0]


def test_another_seed_is_another_random_placement() -> None:
    room = Room(LAYERS, EXPERTS, 9)
    first, second = (place("random", room, random_counts(1), seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


@given(st.integers(0, 10_000), st.integers(0, 12))
def test_no_placement_of_that_size_serves_more_than_the_best(seed: int, hot: int) -> None:
    """Against all of them, where the least of a layer allows."""
    layers, experts = (True, True), 3
    room = Room(layers, experts, min(hot, 6))
    counts = random_counts(seed, layers, experts)
    found = best(counts, room)
    served = [
        sum(counts.reshape(-1)[list(each)])
        for each in itertools.combinations(range(6), room.hot)
        if min(sum(i < 3 for i in each), sum(i >= 3 for i in each)) >= room.layer_min
    ]
    assert counts[found].sum() == max(served)


def test_a_layer_keeps_its_least_however_little_it_was_chosen() -> None:
    counts = np.ones((2, 8)) * [[1000.0], [1.0]]
    assert best(counts, Room((True, True), 8, 8)).sum(1).tolist() == [7, 1]


@pytest.mark.parametrize(
    ("per_layer", "ratio", "hot"), [(None, None, 30), (2, None, 6), (99, None, 30), (None, 0.1, 3)]
)
def test_hot_experts_come_from_a_number_a_layer_or_a_ratio(
    per_layer: int | None, ratio: float | None, hot: int
) -> None:
    assert hot_experts(3, 10, per_layer, ratio) == hot


# statistics


def test_what_was_recorded_is_counted_by_layer() -> None:
    statistics = Statistics(2, 4)
    statistics.record(1, torch.tensor([[0, 3], [3, 1]]))
    statistics.record(1, torch.tensor([[3, 1]]))
    assert statistics.counts.tolist() == [[0, 0, 0, 0], [1, 2, 0, 3]]


def test_what_a_device_chose_is_counted_behind_the_step_and_padding_never() -> None:
    at_once, behind = Statistics(3, 4), Statistics(3, 4)
    late = LateCounts(behind, torch.full((3, 8, 2), 99), layers=[0, 2])
    for tokens in (5, 2):  # the second step leaves rows of the first behind its own
        for layer in (0, 2):
            ids = torch.randint(4, (tokens + 1, 2), generator=torch.Generator().manual_seed(layer))
            at_once.record(layer, ids[:tokens])
            late.record(layer, ids)
        assert (behind.counts != at_once.counts).any()
        late.count(tokens)
        assert (behind.counts == at_once.counts).all()


@given(st.lists(st.integers(-1, 5), max_size=24))
def test_choices_are_counted_whole_or_not_at_all(chosen: list[int]) -> None:
    statistics = Statistics(2, 5)
    statistics.record(0, torch.tensor([[4, 0]]))
    ids = torch.tensor(chosen, dtype=torch.int64).view(-1, 1)
    if all(0 <= each < 5 for each in chosen):
        statistics.record(0, ids)
        expected = np.bincount([4, 0, *chosen], minlength=5)
    else:
        with pytest.raises(ValueError, match=r"under the number of experts, not (-1|5)"):
            statistics.record(0, ids)
        expected = np.array([1, 0, 0, 0, 1])
    assert np.array_equal(statistics.counts, [expected, np.zeros(5)])


@pytest.mark.parametrize("name", ["counts.json", "counts.safetensors"])
def test_saved_counts_come_back_and_add_up_over_restarts(tmp_path: Path, name: str) -> None:
    path, counts = tmp_path / name, random_counts(5)
    assert not resume("expert_statistics", path, 5, EXPERTS, "model").any()
    save(path, counts, "model")
    assert np.array_equal(load("init_expert_location", path, 5, EXPERTS), counts)
    again = Statistics(5, EXPERTS)
    again.add(resume("expert_statistics", path, 5, EXPERTS, "model"))
    again.record(1, torch.tensor([[2]]))
    assert again.counts.sum() == counts.sum() + 1
    with pytest.raises(InvalidConfig, match="another model's experts"):
        resume("expert_statistics", path, 5, EXPERTS, "another")
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_a_recorders_file_of_several_buffers_is_summed_up(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    counts = torch.tensor(np.array([random_counts(1), random_counts(2)]), dtype=dtype)
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "dump.pt")
    found = load("init_expert_location", tmp_path / "dump.pt", 5, EXPERTS)
    assert np.array_equal(found, random_counts(1) + random_counts(2))


class Hostile:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_files_code_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"logical_count": Hostile(made)}, tmp_path / "dump.pt")
    with pytest.raises(InvalidConfig, match="init_expert_location"):
        load("init_expert_location", tmp_path / "dump.pt", 5, EXPERTS)
    assert not made.exists()


BAD_COUNTS: dict[str, Any] = {
    "no tensor": [1, 2],
    "sparse": torch.eye(5, EXPERTS).to_sparse(),
    "another shape": torch.zeros(2, 4, EXPERTS),
    "too few dimensions": torch.zeros(EXPERTS),
    "negative": torch.full((5, EXPERTS), -1),
    "not a number": torch.full((5, EXPERTS), float("nan")),
    "too large": torch.full((5, EXPERTS), 1e30),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"logical_count": BAD_COUNTS[name]}, tmp_path / "dump.pt")
    with pytest.raises(InvalidConfig, match="init_expert_location"):
        load("init_expert_location", tmp_path / "dump.pt", 5, EXPERTS)


BAD_FILES: dict[str, bytes] = {
    "a.json": b"{",
    "b.json": b"[]",
    "f.json": b'{"schema": "kvc2-experts/1", "model": "m", "counts": "many"}',
    "c.json": b'{"schema": "kvc2-experts/1", "model": "m"}',
    "d.json": b'{"schema": "kvc2-experts/1", "model": "m", "counts": [[1], "x"]}',
    "e.json": b"\xff",
    "a.safetensors": b"not one",
    "a.pt": b"not one",
    "a.txt": b"",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_holds_no_counts_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(InvalidConfig, match="init_expert_location"):
        load("init_expert_location", tmp_path / name, 5, EXPERTS)
    with pytest.raises(InvalidConfig, match="No such file"):
        load("init_expert_location", tmp_path / "none.json", 5, EXPERTS)


@pytest.mark.parametrize("name", ["none/c.json", "file/c.json", f"{'c' * 250}.json"])
def test_a_file_that_could_not_be_saved_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match=r"expert_statistics = .*can be written"):
        resume("expert_statistics", tmp_path / name, 5, EXPERTS, "m")


def test_counts_that_a_recorder_held_as_a_parameter_are_read(tmp_path: Path) -> None:
    counts = torch.nn.Parameter(torch.ones(5, EXPERTS))
    torch.save({"logical_count": counts}, tmp_path / "dump.pt")
    assert load("init_expert_location", tmp_path / "dump.pt", 5, EXPERTS).sum() == 5 * EXPERTS


def test_numbers_beyond_any_count_are_told_as_such(tmp_path: Path) -> None:
    counts = [[2**70] * EXPERTS] * 5
    told = {"schema": SCHEMA, "model": "m", "counts": counts}
    (tmp_path / "c.json").write_text(json.dumps(told))
    with pytest.raises(InvalidConfig, match=r"counts from 0 to 2\^53"):
        load("init_expert_location", tmp_path / "c.json", 5, EXPERTS)


# moving experts while serving


def policy(hot: int = 8, **pace: float) -> DynamicPlacement:
    room = Room((True, True), 8, hot)
    known = np.ones((2, 8))
    given_pace = Pace(**({"copies_per_s": 1e9} | pace))
    return DynamicPlacement(room, best(known, room), known, given_pace)


def chosen(*experts: int, tokens: int = PLAN_TOKENS) -> Counts:
    """Every token chooses these of both layers."""
    counts = np.zeros((2, 8))
    counts[:, list(experts)] = tokens
    return counts


def test_what_the_traffic_chooses_comes_to_the_device() -> None:
    moves = policy()
    assert not moves.hot[1, 6:].any()
    for step in range(8):
        moves.observe(chosen(6, 7), PLAN_TOKENS)
        for exchange in moves.plan(float(step)):
            moves.done(exchange)
    assert moves.hot[:, 6:].all()
    assert moves.hot.sum() == 8


def test_a_plan_is_not_made_at_every_token() -> None:
    moves = policy()
    moves.observe(chosen(6, 7, tokens=PLAN_TOKENS - 1), PLAN_TOKENS - 1)
    assert moves.plan(0.0) == []
    moves.observe(chosen(6, 7, tokens=1), 1)
    assert moves.plan(0.0)


def test_no_more_copies_begin_than_the_budget_allows() -> None:
    moves = policy(copies_per_s=2.0, burst=1.0)
    began = []
    for step in range(20):
        moves.observe(chosen(4, 5, 6, 7), PLAN_TOKENS)
        began.append(len(moves.plan(step * 0.25)))  # half a copy each
    assert sum(began[:3]) <= 2
    assert sum(began) >= 4, "the budget fills up again"


def test_what_would_not_pay_for_its_copy_does_not_move() -> None:
    dear = policy(copy_activations=1e6)
    dear.observe(chosen(6, 7), PLAN_TOKENS)
    assert dear.plan(0.0) == []


def test_a_steady_mix_moves_nothing_back_and_forth() -> None:
    random, moves, late = np.random.default_rng(0), policy(), 0
    for step in range(400):
        counts = np.zeros((2, 8))
        for layer in range(2):
            picks = random.choice(8, 64, p=np.array([8, 7, 6, 5, 4, 3, 2, 1]) / 36)
            counts[layer] = np.bincount(picks, minlength=8)
        moves.observe(counts, PLAN_TOKENS)
        plan = moves.plan(float(step))
        late += len(plan) * (step >= 100)
        for exchange in plan:
            moves.done(exchange)
    assert moves.hot[:, :3].all()
    assert late <= 150  # one in two of all plans may follow chance, at the border only


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 200), st.booleans()), max_size=40))
def test_the_device_is_always_full_and_no_layer_is_left_out(
    steps: list[tuple[int, int, bool]],
) -> None:
    """Whatever comes and whatever fails: exchanges name a cold and a hot expert, none twice."""
    room = Room((True, False, True), 8, 10)
    known = np.zeros((3, 8))
    moves = DynamicPlacement(room, place("uniform", room, known, 0), known, Pace(1e9))
    under_way: list[Exchange] = []
    for now, (expert, tokens, fails) in enumerate(steps):
        counts = np.zeros((3, 8))
        counts[[0, 2], expert] = tokens
        moves.observe(counts, tokens)
        begun = moves.plan(float(now))
        places = [place for each in (*under_way, *begun) for place in (each.hot, each.cold)]
        assert len(places) == len(set(places))
        for exchange in begun:
            assert moves.hot[exchange.cold]
            assert not moves.hot[exchange.hot]
        under_way += begun
        if under_way:
            (moves.failed if fails else moves.done)(under_way.pop(0))
        assert moves.hot.sum() == room.hot
        assert not moves.hot[1].any()


# the benchmark's routings


def test_the_generator_is_as_skewed_as_what_was_published() -> None:
    """Within a few points of each figure that it is fitted to."""
    told = list(usage(Text(seed=100)).values())
    assert np.allclose(told[:5], [0.214, 0.347, 0.519, 0.752, 0.681], atol=0.04)
    assert 0.41 < told[5] < 0.67
    assert 0.27 < told[6] < 0.56


def test_ours_is_not_behind_and_recovers_from_a_shift() -> None:
    """On few tokens; the benchmark has the figures."""
    text = Text(seed=7)
    profile = text.profile((0, 1, 2), 20, 50)
    room = benchmark.room_of(text.shape, 0.3)
    before, after = (list(text.steps(each, 4000, 2)) for each in ((0, 1, 2), (3, 4, 5)))
    served = benchmark.serve(before, room, profile)
    ours = served.percent("ours")
    assert ours >= max(served.percent("static"), served.percent("last batch")) - 0.5
    shifted = benchmark.serve([*before, *after], room, profile)
    counts = np.sum([step.counts for step in after], axis=0)
    goal = 0.95 * share(best(counts, room), counts)
    assert benchmark.recovery_tokens(shifted, len(before), goal) <= 2000
