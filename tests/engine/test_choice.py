"""How experts are chosen: every instruction set as torch's plain form, whatever stands beside a
token."""

from __future__ import annotations

import math

import pytest
import torch

from engine import _kernels, kernels, layers
from engine.choice import ChoiceRule

RULES = {
    "mixtral": ChoiceRule(2),
    "qwen3": ChoiceRule(8, normalize=False),
    "deepseek-v2": ChoiceRule(6, normalize=False, scale=16.0, groups=8, chosen_groups=3),
    "deepseek-v3": ChoiceRule(8, scoring="sigmoid", scale=2.5, groups=8, chosen_groups=4),
    "all": ChoiceRule(48, scoring="sigmoid"),
    "of one": ChoiceRule(1, groups=48, chosen_groups=1),
}
EXPERTS = 48
CLOSE = 2e-6  # of weights up to `scale`: the order of a sum, and another exponential


@pytest.fixture(params=_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    bench = _kernels.Workbench(request.param, 2)
    monkeypatch.setattr(kernels, "workbench", lambda: bench)
    return str(request.param)


def logits(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(tokens, experts)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", ["none", "bias", "selection", "both"])
@pytest.mark.parametrize("name", RULES)
def test_a_choice_is_that_of_torch(
    instruction_set: str, name: str, biases: str, dtype: torch.dtype
) -> None:
    rule, x = RULES[name], logits(33, EXPERTS, dtype)
    bias = torch.randn(EXPERTS) if biases in ("bias", "both") else None
    selection = torch.rand(EXPERTS) / 4 if biases in ("selection", "both") else None
    ids, weights = kernels.choose_experts(x, rule, bias, selection)
    expected, expected_weights = layers.choose_experts(x, rule, bias, selection)
    assert _choices_agree(ids, expected, x, bias)
    assert (weights - expected_weights).abs().max().item() <= CLOSE * max(1.0, rule.scale)


def _choices_agree(
    ids: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> bool:
    """Equal, but where two experts score within the error of an exponential."""
    wide = x.float() if bias is None else x.float() + bias
    ours, theirs = wide.gather(-1, ids), wide.gather(-1, expected)
    return bool(torch.equal(ids, expected) or (ours - theirs).abs().max() < 1e-4)


@pytest.mark.parametrize("experts", [1, 2, 15, 16, 17, 128, 1024])
def test_any_number_of_experts(instruction_set: str, experts: int) -> None:
    rule, x = ChoiceRule(min(4, experts)), logits(5, experts, torch.float32)
    ids, weights = kernels.choose_experts(x, rule, None, None)
    expected, expected_weights = layers.choose_experts(x, rule, None, None)
    assert torch.equal(ids, expected)
    assert (weights - expected_weights).abs().max().item() <= CLOSE


def test_a_token_chooses_the_same_alone_and_among_others(instruction_set: str) -> None:
    rule, x = RULES["deepseek-v3"], logits(40, EXPERTS, torch.bfloat16)
    ids, weights = kernels.choose_experts(x, rule, None, None)
    order = torch.randperm(40)
    shuffled = kernels.choose_experts(x[order], rule, None, None)
    assert torch.equal(shuffled[0], ids[order])
    assert torch.equal(shuffled[1], weights[order])
    for token in range(40):
        alone = kernels.choose_experts(x[token : token + 1], rule, None, None)
        assert torch.equal(alone[0][0], ids[token])
        assert torch.equal(alone[1][0], weights[token])


def test_ties_go_to_the_lower_id(instruction_set: str) -> None:
    x = torch.zeros(1, EXPERTS)
    x[0, 40] = 1.0
    ids, _ = kernels.choose_experts(x, ChoiceRule(4), None, None)
    assert ids.tolist() == [[40, 0, 1, 2]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_still_chooses_experts_that_exist(
    instruction_set: str, scoring: str, bad: float
) -> None:
    x = torch.full((1, EXPERTS), bad)
    rule = ChoiceRule(8, scoring="softmax" if scoring == "softmax" else "sigmoid")
    ids, _ = kernels.choose_experts(x, rule, None, None)
    assert sorted(ids[0].tolist()) == sorted(set(ids[0].tolist()))
    assert set(ids[0].tolist()) <= set(range(EXPERTS))
    x = logits(1, EXPERTS, torch.float32)
    x[0, 5] = math.nan
    ids, _ = kernels.choose_experts(x, rule, None, None)
    assert 5 not in ids[0].tolist()


@pytest.mark.parametrize(
    ("rule", "experts"),
    [
        (ChoiceRule(9), 8),
        (ChoiceRule(2, groups=3), 8),
        (ChoiceRule(5, groups=4, chosen_groups=2), 8),
        (ChoiceRule(1), 1025),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(
    instruction_set: str, rule: ChoiceRule, experts: int
) -> None:
    with pytest.raises(ValueError, match="chosen groups must hold experts_per_token"):
        kernels.choose_experts(torch.zeros(1, experts), rule, None, None)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"groups": 2, "chosen_groups": 3}, "chosen_groups"),
        ({"scoring": "tanh"}, "softmax or sigmoid"),
        ({"bias": torch.zeros(7)}, "bias has a wrong shape"),
    ],
)
def test_bad_rules_name_what_is_wrong(
    instruction_set: str, keywords: dict[str, object], message: str
) -> None:
    given = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    with pytest.raises(ValueError, match=message):
        choose_of_8({"experts_per_token": 2, **given})


def choose_of_8(keywords: dict[str, object]) -> None:
    rule = _kernels.ChoiceRule(**keywords)  # type: ignore[arg-type]
    ids, weights = torch.zeros(1, 2, dtype=torch.int64).numpy(), torch.zeros(1, 2).numpy()
    _kernels.choose(kernels.workbench(), rule, torch.zeros(1, 8).numpy(), ids, weights)
