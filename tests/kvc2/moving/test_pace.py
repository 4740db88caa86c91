"""What is worth waiting for: the choice against every split."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc2.moving import pace
from kvc2.moving.pace import Offer
from kvc2.tiers.meter import LATE_S_MAX, Estimate

PAGE_BYTES, PAGE_SIZE = 1000, 4
TIERS = ("gpu", "cpu", "disk")
# bytes/s and seconds: from free to far slower than any computing
ESTIMATES = (None, Estimate(math.inf, 0.0), Estimate(1e6, 0.0), Estimate(2e3, 0.5), Estimate(10, 9))
RATES = (0.0, 1.0, 16.0, 1e6)  # tokens/s


def ready_s(offers: tuple[Offer, ...], bring: int, rate: float) -> float:
    """Until all blocks are there, when the first `bring` are brought and the others computed."""
    tiers = [offer for offer in offers for _ in range(offer.blocks)]
    seconds = (len(tiers) - bring) * PAGE_SIZE / rate
    for offer in {each.tier: each for each in tiers[:bring]}.values():
        if offer.estimate is not None:
            of_tier = [each for each in tiers[:bring] if each.tier == offer.tier]
            seconds += offer.estimate.seconds(len(of_tier) * PAGE_BYTES)
    return seconds


def test_no_split_is_ready_sooner_than_the_chosen_one() -> None:
    """Every order of up to three runs in three tiers, at every estimate and rate."""
    shapes = [
        list(zip(tiers, blocks, strict=True))
        for runs in range(4)
        for tiers in itertools.product(TIERS, repeat=runs)
        for blocks in itertools.product((1, 3), repeat=runs)
    ]
    for shape, cpu, disk, rate in itertools.product(shapes, ESTIMATES, ESTIMATES, RATES):
        known = {"gpu": Estimate(math.inf, 0.0), "cpu": cpu, "disk": disk}
        offers = tuple(Offer(tier, blocks, known[tier]) for tier, blocks in shape)
        every = sum(blocks for _, blocks in shape)
        choice = pace.choose(offers, page_bytes=PAGE_BYTES, page_size=PAGE_SIZE, prefill_rate=rate)
        if rate == 0:
            assert choice == pace.Choice(every, None)
            continue
        times = [ready_s(offers, bring, rate) for bring in range(every + 1)]
        assert times[choice.blocks] <= min(times) + 1e-9
        bringing_s = times[choice.blocks] - (every - choice.blocks) * PAGE_SIZE / rate
        computing_s = choice.blocks * PAGE_SIZE / rate
        assert choice.patience_s == pytest.approx(pace.patience_s(computing_s, bringing_s, 0.0))
        for deadline_s in (0.0, 1.2, 2.6):
            found = pace.choose(
                offers,
                page_bytes=PAGE_BYTES,
                page_size=PAGE_SIZE,
                prefill_rate=rate,
                deadline_s=deadline_s,
            )
            computing = [(every - bring) * PAGE_SIZE / rate for bring in range(every + 1)]
            bringing = [time - rest for time, rest in zip(times, computing, strict=True)]
            within = [at for at, seconds in enumerate(bringing) if seconds <= deadline_s + 1e-9]
            assert found.blocks in within
            assert times[found.blocks] <= min(times[at] for at in within) + 1e-9


@given(st.floats(0.001, 100.0), st.floats(0.0, 1.0), st.floats(0.0, LATE_S_MAX))
def test_waiting_in_vain_costs_an_eighth_or_a_sixteenth_more_than_expected(
    computing_s: float, share: float, late_s: float
) -> None:
    expected_s = share * computing_s
    waited = expected_s + pace.patience_s(computing_s, expected_s, 0.0)
    assert waited <= max(computing_s / 8, expected_s + computing_s / 16) * 1.001
    assert waited >= max(computing_s / 8, expected_s * 1.0625) * 0.999  # an estimate is no promise
    more = pace.patience_s(computing_s, expected_s, late_s)
    assert min(late_s, computing_s) <= more <= max(late_s, computing_s / 8)


def test_a_tier_whose_queue_has_no_end_is_not_waited_for() -> None:
    offers = [Offer("disk", 1, Estimate(8e6, math.inf))]
    found = pace.choose(offers, page_bytes=1, page_size=512, prefill_rate=1e-3)
    assert found.blocks == 0
