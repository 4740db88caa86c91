"""Steps that fail, and logits that mean nothing: what ends is the request that failed, alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.request import SamplingParams
from tests.doubles.engine_doubles import VOCABULARY, build, expected_tokens
from tests.engine.test_scheduler import prompt


def test_a_failed_step_ends_its_requests_and_no_other() -> None:
    house = build()
    house.model.fail_next = True
    failed = house.ask(prompt(5), 3)
    house.step()
    house.step()
    after = house.ask(prompt(5), 3)
    house.run()
    assert failed.finish == "error"
    assert after.tokens == expected_tokens(prompt(5), 3)


@pytest.mark.parametrize("failing", [[0], [1], [0, 2], [0, 1, 2]])
def test_a_step_that_fails_on_some_requests_computes_their_neighbours(failing: list[int]) -> None:
    house = build()
    house.model.poison = frozenset({VOCABULARY - 1})
    asked = [house.ask([*prompt(4, i), VOCABULARY - 1 if i in failing else 1], 3) for i in range(3)]
    house.run()
    for index, each in enumerate(asked):
        if index in failing:
            assert (each.finish, each.tokens) == ("error", [])
        else:
            wanted = expected_tokens([*prompt(4, index), 1], 3)
            assert (each.finish, each.tokens) == ("length", wanted)
    assert house.bridge.book.counts().held == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_also_where_the_best_is_taken(
    wrong: float,
) -> None:
    house = build()
    compute = house.model.step

    def poisoned(batch: Any, layer_ready: Any = None) -> torch.Tensor:
        logits = compute(batch, layer_ready)
        logits[0, 0] = wrong
        return logits

    house.model.step = poisoned  # type: ignore[method-assign]
    failed = house.ask(prompt(5), 3)
    house.run()
    assert (failed.finish, failed.tokens) == ("error", [])


def test_a_row_that_nothing_can_be_drawn_from_ends_its_request_and_no_other() -> None:
    house = build()
    compute = house.model.step

    def poisoned(batch: Any, layer_ready: Any = None) -> torch.Tensor:
        logits = compute(batch, layer_ready)
        if len(logits) == 2:
            logits[0] = float("nan")
        return logits

    house.model.step = poisoned  # type: ignore[method-assign]
    drawn = SamplingParams(temperature=0.5, seed=1)
    failed = house.ask(prompt(5), 6, sampling=drawn)
    other = house.ask(prompt(5, 1), 6, sampling=drawn)
    house.run()
    assert failed.finish == "error"
    assert "chosen" in (failed.outputs[-1].error or "")
    assert other.finish == "length"
    assert len(other.tokens) == 6
    assert house.bridge.book.counts().held == 0
