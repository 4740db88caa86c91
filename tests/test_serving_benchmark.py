"""The arithmetic of benchmarks.serving: what a load's figures are made of, without a server."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import serving
from benchmarks.processes import ProcessError
from benchmarks.report import Absent
from benchmarks.serving_load import (
    Figures,
    Seen,
    Slo,
    Tokens,
    figures,
    least_prefilled,
    percentile,
    poisson,
)
from benchmarks.serving_peers import neighbours


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (25, 1), (26, 2), (50, 2), (75, 3), (99, 4), (100, 4)]
)
def test_a_percentile_is_a_value_that_was_seen(percent: float, value: float) -> None:
    assert percentile([3, 1, 4, 2], percent) == value


def longest_shared(prompt: Tokens, earlier: list[Tokens], block: int) -> int:
    """By looking at every pair."""
    best = 0
    for other in earlier:
        same = 0
        while same < min(len(prompt), len(other)) and prompt[same] == other[same]:
            same += 1
        best = max(best, same)
    return min(best, len(prompt) - 1) // block * block


@pytest.mark.parametrize("seed", range(20))
def test_the_least_is_what_the_longest_shared_blocks_leave(seed: int) -> None:
    chance = random.Random(seed)
    prompts = [tuple(chance.choices((1, 2), k=chance.randrange(1, 13))) for _ in range(12)]
    wanted = sum(
        len(prompt) - longest_shared(prompt, prompts[:i], 2) for i, prompt in enumerate(prompts)
    )
    assert least_prefilled(prompts, 2) == wanted


def test_a_prompt_that_is_known_whole_computes_its_last_block() -> None:
    assert least_prefilled([(1, 2, 3, 4)] * 3, 2) == 4 + 2 + 2


def test_figures_are_those_of_the_answers() -> None:
    quick = Seen(0.0, (1.0, 1.5, 2.0), prompt=10, cached=4, generated=3)
    slow = Seen(1.0, (4.0, 5.0), prompt=20, cached=0, generated=3)  # two tokens in one piece
    found = figures([quick, slow], 26, Slo(ttft=2.0, per_token=0.6))
    assert (found.ttft_p50, found.ttft_p99) == (1000, 3000)
    assert (found.token_p50, found.token_p99) == (500, 1000)
    assert found.output_rate == 6 / 5
    assert found.requests_rate == 2 / 5
    assert found.goodput == 1 / 5  # the other's first token came late
    assert (found.prefilled, found.least) == (26, 26)
    assert not Slo(ttft=2.0, per_token=0.4).kept(quick)


def test_poisson_arrivals_have_their_rate() -> None:
    at = poisson(20_001, 4.0, seed=1)
    assert at[0] == 0.0
    assert at == sorted(at)
    assert at[-1] == pytest.approx(5000, rel=0.03)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("users", [1, 4, 64])
def test_users_share_their_beginning_and_nothing_else(users: int, sharing: bool) -> None:
    grid = serving.WHOLE
    prompts = [p for talk in serving.talks(grid, users, sharing=sharing, seed=1) for p in talk]
    least = least_prefilled(prompts, serving.BLOCK)
    if sharing:
        assert least == grid.shared + len(prompts) * grid.own
    else:
        assert least == sum(map(len, prompts)) == len(prompts) * grid.alone
    again = [p for talk in serving.talks(grid, users, sharing=sharing, seed=2) for p in talk]
    assert not {p[: serving.BLOCK] for p in prompts} & {p[: serving.BLOCK] for p in again}


def test_a_trace_is_replayed_in_its_order_and_in_its_time(tmp_path: Path) -> None:
    path = tmp_path / "small.kvt.npz"
    anchors, fresh = np.array([-1, 1, -1]), np.array([2, 1, 400])  # the last one fits no context
    at = np.array([10.0, 40.0, 50.0])
    np.savez(path, anchor=anchors, n_new=fresh, input=fresh * 16, block_size=16, t=at)
    load = serving.replayed(path, serving.WHOLE, seconds=6.0, repeat=0)
    assert load.at == [0.0, 6.0]
    first, second = load.prompts
    assert len(first) == 2 * serving.TRACE_BLOCK
    assert second[: len(first)] == first
    assert len(second) == 3 * serving.TRACE_BLOCK


def test_rows_of_q_and_k_are_turned_by_neighbours() -> None:
    """Rotating halves of the one is rotating neighbours of the other."""
    heads, d, hidden = 3, 8, 5
    weight, x, angle = torch.randn(heads * d, hidden), torch.randn(hidden), torch.rand(d // 2)
    q = (weight @ x).reshape(heads, 2, d // 2)
    by_halves = torch.stack(
        [
            q[:, 0] * angle.cos() - q[:, 1] * angle.sin(),
            q[:, 1] * angle.cos() + q[:, 0] * angle.sin(),
        ]
    )
    p = (neighbours(weight, heads) @ x).reshape(heads, d // 2, 2)
    even = p[..., 0] * angle.cos() - p[..., 1] * angle.sin()
    odd = p[..., 1] * angle.cos() + p[..., 0] * angle.sin()
    assert torch.allclose(by_halves, torch.stack([even, odd]))


class Asked:
    """A serving_load.Server that nobody asks."""

    def __init__(self, name: str) -> None:
        self.name, self.port, self.more = name, 0, dict[str, Any]()


def test_each_cell_has_a_row_for_each_figure_and_says_which_peer_stopped() -> None:
    cells = serving.Cells(Slo(1.0, 1.0), absent={"away": "not installed"})
    ours, peer, broken = Asked("ours"), Asked("peer"), Asked("broken")
    fast = figures([Seen(0.0, (1.0, 1.5, 2.0), 10, 4, 3)], 6, cells.slo)
    slow = figures([Seen(0.0, (2.0, 3.0, 4.0), 10, 0, 3)], 5, cells.slo)

    def breaks() -> Figures:
        raise ProcessError("no answer")

    cells.add("shared_1", ours, lambda: fast)
    cells.add("shared_1", peer, lambda: slow)
    cells.add("shared_1", broken, breaks)
    cells.add("shared_4", ours, lambda: fast)
    cells.add("shared_4", broken, lambda: fast)  # it is not asked again
    rows = {row.case: row for row in cells.rows("ours")}
    assert len(rows) == 2 * len(serving.NAMED)
    row = rows["shared_1_prefill"]
    assert (row.ours, row.peers["peer"], row.better) == (1.0, 2.0, "lower")
    assert rows["shared_1_output"].peers["peer"] == 3 / 4
    assert row.peers["away"] == Absent("not installed")
    assert row.peers["broken"] == Absent("shared_1: no answer")
    assert rows["shared_4_output"].peers["broken"] == Absent("shared_1: no answer")
