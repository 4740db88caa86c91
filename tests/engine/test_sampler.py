"""Laws of sampling: what a naive sampler that sorts would choose, in a batch as alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.adjust import Adjustment, adjustment
from engine.request import Request, SamplingParams
from engine.sampler import Draw, Sampler
from tests.doubles.engine_doubles import NoText

LOGITS = torch.tensor([0.1, 3.0, 2.0, -1.0, 2.5])  # best first: 1, 4, 2, 0, 3
INF = float("inf")


# the oracle


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10, from its paper."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        first, third = (b >> 32) ^ counter[1] ^ key[0], (a >> 32) ^ counter[3] ^ key[1]
        counter = [first, b & 0xFFFFFFFF, third, a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def uniform(seed: int, position: int) -> float:
    halves = [x >> shift & 0xFFFFFFFF for x in (position, seed) for shift in (0, 32)]
    low, high, _, _ = philox([*halves[:2], 0, 0], halves[2:])
    return float((high << 32 | low) >> 11) * 2.0**-53


def naive(logits: list[float], params: SamplingParams, number: float) -> int:
    """Sorts everything, in doubles; `number` in [0, 1) decides."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[ranked[0]]
    if params.temperature == 0:
        return ranked[0]
    ranked = ranked[: params.top_k or len(logits)]
    temperature = min(max(params.temperature, 1e-37), 1e30)
    weights = {i: math.exp((logits[i] - best) / temperature) for i in ranked}
    kept, before, every = [], 0.0, sum(weights.values())
    for i in ranked:
        if before < params.top_p * every and weights[i] >= params.min_p:
            kept.append(i)
        before += weights[i]
    left = number * sum(weights[i] for i in kept)
    for i in sorted(kept):
        left -= weights[i]
        if left < 0 and weights[i] > 0:
            return i
    return max(i for i in kept if weights[i] > 0)


def acceptable(logits: list[float], draw: Draw) -> set[int]:
    """The naive choice, and what it would be if float32 had rounded a limit the other way."""
    number, near = uniform(draw.seed & (1 << 64) - 1, draw.position), 3e-5
    shifts = itertools.product((0, -near, near), repeat=3)
    found = set()
    for u, p, m in shifts:
        top_p = min(1.0, max(1e-9, draw.params.top_p + (p if draw.params.top_p < 1 else 0)))
        min_p = min(1.0, max(0.0, draw.params.min_p * (1 + m)))
        params = replace(draw.params, top_p=top_p, min_p=min_p)
        found.add(naive(logits, params, min(max(number + u, 0.0), 1 - 1e-16)))
    return found


def test_the_oracle_draws_philox() -> None:
    """The vectors that its authors publish with their library."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


# the laws


def tokens(logits: Tensor, draws: list[Draw]) -> list[int]:
    found = Sampler().sample(logits, draws)
    for token in found:
        if isinstance(token, Exception):
            raise token
    return [token for token in found if isinstance(token, int)]


def stream(params: SamplingParams, count: int = 400, logits: Tensor = LOGITS) -> list[int]:
    seed = params.stream()
    draws = [Draw(params, seed, position) for position in range(count)]
    return tokens(logits.expand(count, -1), draws)


SPECIAL = [0.0, -0.0, 1.0, 1.0, -INF, 3e38, -3e38, 1e-40, 20.0]
ROWS = st.lists(
    st.sampled_from(SPECIAL) | st.floats(-30, 30, width=32), min_size=1, max_size=40
).filter(lambda row: max(row) > -INF)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-45, 1e-3, 0.5, 1.0, 2.0, 1e30, 1e300])
    | st.floats(0.05, 5.0),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 1e-6, 0.5, 0.9]) | st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]) | st.floats(0.0, 1.0),
)
DRAWS = st.builds(
    Draw, PARAMS, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 33) + 5)
)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(ROWS, DRAWS), min_size=1, max_size=6))
def test_a_token_is_what_sorting_would_choose_alone_and_in_a_batch(
    rows: list[tuple[list[float], Draw]],
) -> None:
    width = max(len(row) for row, _ in rows)
    padded = [row + [-INF] * (width - len(row)) for row, _ in rows]
    batch = torch.tensor(padded, dtype=torch.float32)
    draws = [draw for _, draw in rows]
    found = tokens(batch, draws)
    for logits, draw, token in zip(batch, draws, found, strict=True):
        assert token in acceptable(logits.tolist(), draw)
        assert logits[token] > -INF
        assert tokens(logits[None], [draw]) == [token]
    assert tokens(batch.flip(0), draws[::-1]) == found[::-1]


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 255, 256, 257, 4099])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
    ],
)
def test_vocabularies_of_every_length(vocabulary: int, fields: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(8, vocabulary, generator=random).mul_(3).bfloat16().float()  # with ties
    draws = [Draw(SamplingParams(**fields), 5, position) for position in range(8)]
    for row, draw, token in zip(logits, draws, tokens(logits, draws), strict=True):
        assert token in acceptable(row.tolist(), draw)


CHANGES = st.fixed_dictionaries(
    {
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 3),
        "logit_bias": st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=4),
    }
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12),
    CHANGES,
    st.lists(st.integers(0, 11), max_size=6),
    DRAWS,
)
def test_penalties_and_biases_come_before_the_choice(
    row: list[float], changes: dict[str, Any], before: list[int], draw: Draw
) -> None:
    logits = torch.tensor([row, row])
    kept = logits.clone()
    params = replace(draw.params, **changes)
    made = adjusting(params, [0, 3])
    for token in before:
        if made is not None:
            made.took(token)
    changed = naive_changes(row, params, [0, 3], before)
    found = tokens(logits, [Draw(params, draw.seed, draw.position, made), draw])
    assert found[0] in acceptable(changed, draw)
    assert found[1] in acceptable(row, draw)
    assert torch.equal(logits, kept)


def adjusting(params: SamplingParams, prompt: list[int]) -> Adjustment | None:
    prompted = np.array(prompt, np.uint32)
    return adjustment(Request("a", prompted, 4, params, NoText(), lambda _: None))


def naive_changes(
    row: list[float], params: SamplingParams, prompt: list[int], before: list[int]
) -> list[float]:
    def each() -> Iterator[float]:
        for token, logit in enumerate(row):
            if token in prompt or token in before:
                by = params.repetition_penalty
                logit = logit / by if logit > 0 else logit * by
            if count := Counter(before)[token]:
                logit -= params.presence_penalty + params.frequency_penalty * count
            yield logit + params.logit_bias.get(token, 0.0)

    return torch.tensor(list(each())).tolist()  # type: ignore[no-any-return]


def test_greedy_is_argmax_and_of_equal_ones_the_first() -> None:
    greedy = Draw(SamplingParams(temperature=0), 0, 0)
    assert tokens(LOGITS[None], [greedy]) == [1]
    ties = torch.full((1, 100_003), -1.0)
    ties[0, [77_777, 99_999, 100_002]] = 2.0
    assert tokens(ties, [greedy]) == [77_777]
    assert tokens(torch.tensor([[-1.0, -0.0, 0.0]]), [greedy]) == [1]


def test_of_equal_logits_the_lowest_ids_are_the_best() -> None:
    equal = torch.zeros(150_000)
    assert set(stream(SamplingParams(top_k=5, seed=1), 100, equal)) == set(range(5))
    assert max(stream(SamplingParams(top_p=1e-4, seed=1), 100, equal)) < 16


def test_a_seed_fixes_the_stream_and_another_changes_it() -> None:
    assert stream(SamplingParams(seed=7)) == stream(SamplingParams(seed=7))
    assert stream(SamplingParams(seed=7)) != stream(SamplingParams(seed=8))
    assert stream(SamplingParams(seed=7)) != stream(SamplingParams(seed=-7))
    assert stream(SamplingParams()) != stream(SamplingParams())


def test_top_k_keeps_the_best() -> None:
    assert set(stream(SamplingParams(top_k=2, seed=0))) == {1, 4}
    assert set(stream(SamplingParams(top_k=1, seed=0))) == {1}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)
    two = float(probabilities[1] + probabilities[4])
    assert set(stream(SamplingParams(top_p=two - 1e-3, seed=0))) == {1, 4}
    assert set(stream(SamplingParams(top_p=two + 1e-3, seed=0))) == {1, 4, 2}
    assert set(stream(SamplingParams(top_p=1e-6, seed=0))) == {1}


def test_min_p_keeps_what_is_probable_beside_the_best() -> None:
    probabilities = LOGITS.softmax(-1)
    ranked = probabilities.sort(descending=True)
    for keep in range(1, 5):
        least = float(ranked.values[keep - 1] / ranked.values[0]) - 1e-6
        drawn = set(stream(SamplingParams(min_p=least, seed=0)))
        assert drawn == set(ranked.indices[:keep].tolist())


def test_draws_follow_the_tempered_softmax() -> None:
    expected = (LOGITS / 2.0).softmax(-1)
    counts = torch.bincount(torch.tensor(stream(SamplingParams(temperature=2.0, seed=3), 4000)))
    assert (counts / 4000 - expected).abs().max().item() < 0.04  # 5 standard deviations


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_the_colder_the_surer_and_never_nan(temperature: float) -> None:
    assert set(stream(SamplingParams(temperature=temperature, seed=0), 20)) == {1}
    wide = torch.tensor([3e38, -3e38, 2e38])
    assert set(stream(SamplingParams(temperature=temperature, top_p=0.5), 20, wide)) == {0}


@pytest.mark.parametrize(
    "strange", [[float("nan"), 1.0], [INF, 1.0], [-INF, -INF], [1.0, -float("nan")]]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_meaning_has_no_token_and_the_others_have(
    strange: list[float], temperature: float
) -> None:
    draw = Draw(SamplingParams(temperature=temperature), 1, 1)
    first, second = Sampler().sample(torch.tensor([strange, [-INF, 4.0]]), [draw, draw])
    assert isinstance(first, ValueError)
    assert second == 1


def test_what_an_adjustment_raises_is_its_own_rows_alone() -> None:
    biased = adjusting(SamplingParams(logit_bias={3: 50.0}), [0])
    broken = adjusting(SamplingParams(logit_bias={5000: 1.0}), [0])  # no such token
    plain = Draw(SamplingParams(temperature=0), 0, 0)
    draws = [replace(plain, adjustment=each) for each in (broken, biased, None, broken, biased)]
    found = Sampler().sample(LOGITS.expand(5, -1), draws)
    assert [found[i] for i in (1, 2, 4)] == [3, 1, 3]
    assert isinstance(found[0], IndexError)
    assert isinstance(found[3], IndexError)


def test_no_rows_have_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, 7), []) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
