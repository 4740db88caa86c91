"""Biases, penalties and bans change the logits of one request by its own data alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.adjust import Adjustment, adjustment
from engine.request import Request, SamplingParams
from tests.doubles.engine_doubles import NoText, build

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0])


def made(prompt: list[int], ends: frozenset[int] = frozenset(), **fields: Any) -> Adjustment:
    found = adjustment(
        Request(
            request_id="a",
            tokens=np.array(prompt, np.uint32),
            max_tokens=4,
            sampling=SamplingParams(**fields),
            text=NoText(),
            deliver=lambda _: None,
            end_token_ids=ends,
        )
    )
    assert found is not None
    return found


def changed(adjust: Adjustment) -> Tensor:
    logits = LOGITS.clone()
    adjust.change(logits)
    return logits


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    adjust = made([0, 1, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert torch.equal(changed(adjust), LOGITS)
    for token in (2, 2, 1):
        adjust.took(token)
    assert changed(adjust).tolist() == [2.0, -1.75, -0.5, 0.0]


def test_repetition_counts_the_prompt_too() -> None:
    adjust = made([0, 1], repetition_penalty=2.0)
    assert changed(adjust).tolist() == [1.0, -2.0, 0.5, 0.0]
    adjust.took(2)
    assert changed(adjust).tolist() == [1.0, -2.0, 0.25, 0.0]


FLOAT = torch.finfo(torch.float32)


@pytest.mark.parametrize("by", [5e-324, 1e-300, FLOAT.tiny, FLOAT.max, 1e308])
def test_no_penalty_makes_a_logit_infinite(by: float) -> None:
    """All that may be asked for has an answer; what a model says itself stays."""
    adjust = made([0, 1, 2, 3], repetition_penalty=by, frequency_penalty=2.0, logit_bias={0: 100.0})
    for token in (0, 1):
        adjust.took(token)
    assert changed(adjust).isfinite().all()
    logits = torch.tensor([float("-inf"), float("nan"), -1.0, 2.0])
    adjust.change(logits)
    assert [logits[0].item(), logits[1].isnan().item()] == [float("-inf"), True]
    assert logits[2:].isfinite().all()


def test_a_bias_is_added() -> None:
    assert changed(made([0], logit_bias={3: 5.0, 0: -100.0})).tolist() == [-98.0, -1.0, 0.5, 5.0]


def test_no_end_comes_before_min_tokens() -> None:
    adjust = made([0], frozenset({0, 9}), min_tokens=2)
    for _ in range(2):
        assert int(changed(adjust).argmax()) == 2
        adjust.took(2)
    assert torch.equal(changed(adjust), LOGITS)


def test_a_model_of_end_tokens_alone_is_still_answered() -> None:
    adjust = made([0], frozenset(range(4)), min_tokens=2)
    assert torch.equal(changed(adjust), LOGITS)


def test_what_asks_for_nothing_costs_nothing() -> None:
    house = build(8, daemon=False)
    house.ask([1, 2, 3])
    (sequence,) = house.scheduler._by_id.values()
    assert sequence.adjustment is None


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 3, "temperature": 5.0},
        {"seed": 3, "temperature": 5.0, "min_p": 0.01, "frequency_penalty": 2.0},
        {"temperature": 0.0, "repetition_penalty": 4.0, "logit_bias": {5: 9.0}},
        {"temperature": 0.0, "presence_penalty": 2.0},
    ],
)
def test_a_request_gets_the_same_tokens_alone_and_beside_others(fields: dict[str, Any]) -> None:
    sampling = SamplingParams(**fields)
    alone = build(64, daemon=False)
    asked = alone.ask(range(20), 30, sampling=sampling)
    alone.run()
    beside = build(64, daemon=False)
    others = [
        beside.ask(range(i, 20), 25, sampling=SamplingParams(seed=i, logit_bias={i: 100.0}))
        for i in range(3)
    ]
    again = beside.ask(range(20), 30, sampling=sampling)
    beside.run()
    assert again.tokens == asked.tokens
    assert all(set(other.tokens) == {i} for i, other in enumerate(others))
