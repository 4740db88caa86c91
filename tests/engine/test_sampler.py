"""Laws of sampling: greedy is argmax, a seed fixes the stream, filters keep the best tokens."""

from __future__ import annotations

import pytest
import torch

from engine.sampler import SamplingParams, sample

LOGITS = torch.tensor([0.1, 3.0, 2.0, -1.0, 2.5])  # best first: 1, 4, 2, 0, 3


def draws(params: SamplingParams, count: int = 400) -> list[int]:
    generator = params.generator()
    return [sample(LOGITS[None], [params], [generator])[0] for _ in range(count)]


def test_greedy_is_argmax_and_draws_nothing() -> None:
    params = SamplingParams(temperature=0)
    generator = params.generator()
    before = generator.get_state()
    assert sample(LOGITS[None], [params], [generator]) == [1]
    assert torch.equal(generator.get_state(), before)


def test_a_seed_fixes_the_stream_and_another_changes_it() -> None:
    assert draws(SamplingParams(seed=7)) == draws(SamplingParams(seed=7))
    assert draws(SamplingParams(seed=7)) != draws(SamplingParams(seed=8))
    assert draws(SamplingParams()) != draws(SamplingParams())


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    params = [SamplingParams(seed=1), SamplingParams(temperature=0), SamplingParams(seed=2)]
    generators = [p.generator() for p in params]
    batched = [sample(LOGITS.expand(3, -1), params, generators) for _ in range(50)]
    assert [tokens[2] for tokens in batched] == draws(params[2], 50)


def test_top_k_keeps_the_best() -> None:
    assert set(draws(SamplingParams(top_k=2, seed=0))) == {1, 4}
    assert set(draws(SamplingParams(top_k=1, seed=0))) == {1}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)
    two = float(probabilities[1] + probabilities[4])
    assert set(draws(SamplingParams(top_p=two - 1e-3, seed=0))) == {1, 4}
    assert set(draws(SamplingParams(top_p=two + 1e-3, seed=0))) == {1, 4, 2}
    assert set(draws(SamplingParams(top_p=1e-6, seed=0))) == {1}


def test_draws_follow_the_tempered_softmax() -> None:
    expected = (LOGITS / 2.0).softmax(-1)
    counts = torch.bincount(torch.tensor(draws(SamplingParams(temperature=2.0, seed=3), 4000)))
    assert (counts / 4000 - expected).abs().max().item() < 0.04  # 5 standard deviations


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_the_colder_the_surer_and_never_nan(temperature: float) -> None:
    assert set(draws(SamplingParams(temperature=temperature, seed=0), 20)) == {1}
    wide = torch.tensor([[3e38, -3e38, 2e38]])
    params = SamplingParams(temperature=temperature, top_p=0.5, seed=0)
    assert sample(wide, [params], [params.generator()]) == [0]


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
