"""What the benchmarks and the demo decide by: the rule of equality, the rows, the cases."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    admission,
    first_repeat,
    large_checkpoint,
    replayers,
    report,
    tier_hits,
    timing_probe,
    ttft,
)
from benchmarks.equality import bf16_step, compare
from benchmarks.processes import Answer, Process
from engine.config import ModelConfig
from engine.models import build_model, load_model
from engine.models.placed import moe_layers
from engine.weights import Checkpoint
from kvc2.commands import replay, traces
from tests.doubles.byte_tokenizer import VOCAB_SIZE, add_tokenizer
from tests.doubles.checkpoints import make_mixtral, reshard
from tests.kvc2.commands.test_replay import random_trace

PEERS = {"lmcache", "mooncake", "sglang", "vllm"}  # in whose environments some parts run


@pytest.mark.parametrize(
    "name", sorted(each.stem for each in Path(report.__file__).parent.glob("*.py"))
)
def test_each_finds_what_it_is_made_of(name: str) -> None:
    try:
        importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in PEERS:
            raise


@pytest.mark.parametrize(
    ("value", "step"), [(1.0, 2**-7), (1.99, 2**-7), (2.0, 2**-6), (20.5, 2**-3), (-20.5, 2**-3)]
)
def test_a_bf16_step_is_the_distance_to_the_next_number(value: float, step: float) -> None:
    assert bf16_step(value) == step


def test_equal_tokens_are_equal_whatever_the_logits() -> None:
    assert compare((1, 2), (1, 2), ((3.0, 3.0), (9.0, 1.0))).how == "tokens"


def test_a_first_difference_at_a_tie_is_equal_and_later_ones_do_not_matter() -> None:
    top = ((9.0, 1.0), (20.0, 19.75), (9.0, 1.0))  # steps of 0.125 at 20: two apart
    found = compare((1, 5, 7), (1, 4, 9), top)
    assert (found.how, found.at, found.steps) == ("tie", 1, 2.0)


def test_a_first_difference_elsewhere_is_none() -> None:
    top = ((9.0, 1.0), (20.0, 19.6))
    assert not compare((1, 5), (1, 4), top).equal
    assert not compare((5, 4), (1, 4), top).equal


def test_an_output_that_ends_early_differs_where_it_ends() -> None:
    top = ((9.0, 1.0), (20.0, 20.0))
    assert compare((1,), (1, 4), top).how == "tie"
    assert compare((1,), (1, 4), ((9.0, 1.0), (9.0, 1.0))).how == "differs"
    assert compare((1, 4, 4), (1, 4), top).how == "differs"


def test_rows_are_all_alike_and_an_absent_peer_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report.row(
        "case",
        "ms",
        "lower",
        [3.0, 1.0, 2.0],
        peers={"here": 4.0, "gone": report.Absent("not installed")},
        goal="fast",
    )
    report.finish("title", [made], tmp_path / "deep" / "rows.json")
    (row,) = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert row.pop("load_average") >= 0
    assert row == {
        "case": "case",
        "unit": "ms",
        "better": "lower",
        "ours": 2.0,
        "limit": None,
        "limit_name": None,
        "peers": {"here": 4.0, "gone": None},
        "spread": [1.0, 3.0],
        "repeats": 3,
    }
    assert "gone did not run: not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (1.2345, "1.23"), (0.012345, "0.0123")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_with_room_for_all_the_gpu_tier_has_every_hit_and_each_block_is_copied_once() -> None:
    trace = random_trace(1)
    found = tier_hits.drive(trace, (1.5, 1.5, 1.5), "lru")
    unlimited = replay.hit_rate(trace, 2 * trace.blocks, "lru")
    assert found.hits == {"gpu": pytest.approx(unlimited), "cpu": 0, "disk": 0}
    used = len(set(trace.ids.tolist()))
    assert found.moved == {"promoted": 0, "loaded": 0, "demoted": used, "written": used}


def test_what_a_small_gpu_tier_lacks_comes_from_the_slower_ones() -> None:
    trace = random_trace(1)
    found = tier_hits.drive(trace, (0.2, 0.3, 1.5), "lru")
    assert min(found.hits.values()) > 0
    assert found.total > replay.hit_rate(trace, round(0.2 * trace.blocks), "lru")
    blocks = {tier: share * trace.input_tokens.sum() for tier, share in found.hits.items()}
    size = trace.block_tokens
    assert found.moved["promoted"] * size >= blocks["cpu"] + blocks["disk"] - 1e-6
    assert found.moved["loaded"] * size >= blocks["disk"] - 1e-6


def test_second_access_writes_less_to_disk_and_with_room_for_all_finds_the_same() -> None:
    trace = random_trace(1)
    always = tier_hits.drive(trace, (1.5, 1.5, 1.5), "lru")
    picky = tier_hits.drive(trace, (1.5, 1.5, 1.5), "lru", second_access=True)
    used = np.bincount(trace.ids)
    assert picky.moved["written"] == (used > 1).sum() < always.moved["written"]
    assert picky.hits == always.hits


def path_trace(paths: list[list[int]]) -> traces.Trace:
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in paths])])
    ids = np.array([block for each in paths for block in each], np.uint32)
    return traces.Trace("made", 1, ids, offsets, np.diff(offsets) + 1, int(ids.max()) + 1)


def test_a_turn_goes_on_from_the_request_that_ends_where_its_known_blocks_do() -> None:
    trace = path_trace(
        [
            [0, 1, 2],  # a conversation
            [0, 3],  # another one, below the same beginning
            [0, 1, 2, 4],  # its second turn
            [0, 1, 2, 5],  # a branch: its first turn has been gone on from
            [0, 1, 2, 4, 6],  # the third turn
            [7],
            [7],  # the same again
        ]
    )
    assert replayers.previous_turns(trace).tolist() == [-1, -1, 0, -1, 2, -1, 5]
    assert admission.first_turns(trace).tolist() == [0, 0, 3, 0, 0, 0, 1]


def test_what_is_cut_off_a_trace_is_not_counted() -> None:
    cut = admission.head(random_trace(1), 7)
    assert len(cut) == 7
    assert cut.ids.size == cut.offsets[-1]
    assert cut.blocks == len(set(cut.ids.tolist()))
    assert admission.head(cut, 0).ids.tolist() == cut.ids.tolist()


@pytest.mark.parametrize("disk", [0.0, 1.5])
def test_processes_that_replay_a_trace_find_what_they_stored(disk: float) -> None:
    trace = admission.head(random_trace(1), 60)
    room = admission.Sizes(4.0, disk)
    found = admission.measure(trace, room, admission.DAEMONS["lru"], processes=2)
    # another process may not have stored yet what one by one would be found
    assert 0 < found["found"] <= 100 * replay.hit_rate(trace, 2 * trace.blocks, "lru")
    assert found["cpu pages"] >= trace.blocks
    assert found["cpu refused"] == 0
    assert found["2nd turns"] == (admission.first_turns(trace) > 0).sum()
    assert ("written" in found) == (disk > 0)


def test_a_large_checkpoint_is_one_that_loads_and_can_be_mapped(tmp_path: Path) -> None:
    """As it lies in the file, each layer's experts are the arrays that a mapping computes on."""
    fields = {"vocab_size": VOCAB_SIZE, "num_local_experts": 8}
    small = make_mixtral(tmp_path / "small", torch.bfloat16, **fields)
    source = add_tokenizer(reshard(small, tmp_path / "source", 2))
    large_checkpoint.write(source, tmp_path / "large", 12)
    config = ModelConfig.load(tmp_path / "large")
    whole = moe_layers(load_model(tmp_path / "large"))
    with Checkpoint(tmp_path / "large", config.dtype, experts_on_disk=True) as checkpoint:
        stored = moe_layers(build_model(config, checkpoint))
    mapped = large_checkpoint._mapped(tmp_path / "large")(None, None, stored, None, None)
    assert len(whole) == 3
    for layer, moe in whole.items():
        assert moe.experts.gate_up.shape[0] == 12  # type: ignore[attr-defined]
        assert torch.equal(mapped.layers[layer].gate_up, moe.experts.gate_up)  # type: ignore[attr-defined]
        assert torch.equal(mapped.layers[layer].down, moe.experts.down)  # type: ignore[attr-defined]
    for layer, mean in large_checkpoint.router_inputs(source).items():  # no expert has the most
        pull = whole[layer].router.weight.float() @ mean
        assert float(pull.abs().max()) < 0.02 * float(mean.norm())


def test_what_a_daemon_costs_is_told_of_each_pair_in_time_and_in_processor_time() -> None:
    samples = {
        ttft.COLD: [100.0, 220.0, 300.0],
        ttft.ALONE: [100.0, 200.0, 400.0],
        ttft.COLD_CPU: [101.0, 50.0, 306.0],
        ttft.ALONE_CPU: [100.0, 50.0, 300.0],
        ttft.DAEMON_CPU: [1.0, 2.0, 9.0],
    }
    wall, processor = ttft.rows_of("1k", samples)
    assert (wall.case, wall.ours) == ("overhead_1k_no_hits", 0.0)
    assert wall.spread == pytest.approx((-25.0, 10.0))
    assert processor.case == "overhead_1k_no_hits_cpu"
    assert processor.ours == pytest.approx(1.0)
    assert processor.spread == pytest.approx((0.0, 2.0))
    assert processor.goal is not None
    assert "101 ms, 100 alone, 2 of the daemon" in processor.goal


def test_a_process_tells_what_it_has_had_of_the_processors(tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.05: pass\nprint('did')\ntime.sleep(60)"
    process = Process("worker (a)", [sys.executable, "-c", work], tmp_path)
    process.wait_until(lambda: "did" in process.log.read_text(), "work")
    assert 0.05 - 2 / os.sysconf("SC_CLK_TCK") <= process.cpu_s() < 60
    process.stop()


def test_what_a_first_repeat_finds_and_how_long_it_takes() -> None:
    """Of three requests the second and third go on from the first; the third is too long for the
    model, which cuts it to two blocks."""
    offsets = np.array([0, 2, 5, 8])
    ids = np.array([0, 1, 0, 1, 2, 0, 1, 3], np.uint32)
    trace = traces.Trace("t", 1, ids, offsets, np.array([2, 3, 3]), 4)
    prompts = first_repeat.Prompts(trace, 3 * first_repeat.PAGE_SIZE)
    assert [prompts.pages(i) for i in range(3)] == [2, 2, 2]
    first, second = prompts.tokens(0), prompts.tokens(1)
    assert len(first) == 2 * first_repeat.PAGE_SIZE + 1
    assert first[:-1] == second[:-1]  # their first two blocks are the same
    answers = [
        Answer("", (), (), 33, matched, {}, 0, 0.0, seconds)
        for matched, seconds in ((0, 0.5), (32, 0.1), (16, 0.3))
    ]
    found = first_repeat.figures(prompts, answers, np.array([0, 2, 3]))
    assert found["second turns"] == 2
    assert (found["whole"], found["found"]) == (50, 75)
    assert found["TTFT mean"] == pytest.approx(200)
    assert found["TTFT mean, all requests"] == pytest.approx(300)


def test_times_are_told_apart_by_rank() -> None:
    dice = np.random.default_rng(0)
    one, other = dice.normal(0.0, 1.0, 400), dice.normal(0.5, 1.0, 300)
    pairs = (other[None, :] > one[:, None]).mean() + (other[None, :] == one[:, None]).mean() / 2
    assert timing_probe.auc(one, other) == pytest.approx(pairs)
    assert timing_probe.auc(np.array([1.0, 2.0]), np.array([3.0])) == 1.0
    assert timing_probe.told_apart(np.array([3.0]), np.array([1.0, 2.0])) == 1.0
    assert timing_probe.auc(np.ones(5), np.ones(7)) == 0.5


def test_a_bootstrap_s_interval_holds_what_it_is_of() -> None:
    """0.638 is the chance for two normal distributions that are half a deviation apart."""
    inside = 0
    for seed in range(20):
        dice = np.random.default_rng(seed)
        one, other = dice.normal(0.0, 1.0, 200), dice.normal(0.5, 1.0, 200)
        low, high = timing_probe.interval(one, other, seed)
        assert 0.5 <= low < high < 0.8
        inside += low < 0.638 < high
    assert inside >= 16
