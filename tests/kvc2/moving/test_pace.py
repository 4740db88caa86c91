"""What is worth waiting for: the choice against every split, the meter against its promises."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc2.moving import pace
from kvc2.moving.pace import Estimate, Meter, Offer

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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


MIB = 1 << 20
FAST, SLOW = 1e9, 20e6  # bytes/s


def moved(meter: Meter, bandwidth: float, num_bytes: int = 8 * MIB, queue_s: float = 0.0) -> None:
    meter.saw(num_bytes, num_bytes / bandwidth, queue_s)


def bandwidth(meter: Meter) -> float:
    assert meter.estimate is not None
    return meter.estimate.bandwidth_bytes_per_s


def test_the_first_transfer_is_the_estimate_and_later_ones_move_it() -> None:
    meter = Meter(Clock())
    assert meter.estimate is None
    moved(meter, FAST, queue_s=0.25)
    assert meter.estimate == Estimate(pytest.approx(FAST), pytest.approx(0.25))
    for _ in range(12):
        moved(meter, SLOW)
    assert bandwidth(meter) < 2 * SLOW
    assert meter.estimate.queue_s < 0.01


@given(st.lists(st.floats(1e3, 1e11), min_size=1), st.integers(4096, 100 * MIB))
def test_an_estimate_lies_between_what_was_seen(seen: list[float], num_bytes: int) -> None:
    meter = Meter(Clock())
    for each in seen:
        moved(meter, each, num_bytes)
    assert min(seen) * 0.99 <= bandwidth(meter) <= max(seen) * 1.01


def test_small_transfers_hardly_move_the_estimate() -> None:
    meter = Meter(Clock())
    moved(meter, FAST)
    moved(meter, SLOW, num_bytes=4096)
    assert bandwidth(meter) > 0.95 * FAST


def test_behind_an_overdue_transfer_nothing_is_worth_waiting_for_until_one_has_ended() -> None:
    meter = Meter(Clock())
    moved(meter, FAST)
    meter.overdue(8 * MIB, 1.0)
    assert bandwidth(meter) == 8 * MIB
    offers = [Offer("disk", 1, meter.estimate)]
    found = pace.choose(offers, page_bytes=1, page_size=512, prefill_rate=1e-3)
    assert found.blocks == 0
    meter.overdue(8 * MIB, 0.5)
    assert bandwidth(meter) == 8 * MIB
    moved(meter, SLOW)
    assert bandwidth(meter) == pytest.approx(SLOW)
    fresh = Meter(Clock())
    fresh.overdue(8 * MIB, 2.0)
    assert bandwidth(fresh) == 4 * MIB


def test_a_tier_that_recovers_is_known_after_one_probe() -> None:
    meter = Meter(Clock())
    for _ in range(12):
        moved(meter, SLOW)
    moved(meter, FAST, pace.PROBE_BYTES)
    assert bandwidth(meter) > 0.25 * FAST


@given(st.floats(0.001, 100.0), st.floats(0.0, 1.0), st.floats(0.0, pace.LATE_S_MAX))
def test_waiting_in_vain_costs_an_eighth_or_a_sixteenth_more_than_expected(
    computing_s: float, share: float, late_s: float
) -> None:
    expected_s = share * computing_s
    waited = expected_s + pace.patience_s(computing_s, expected_s, 0.0)
    assert waited <= max(computing_s / 8, expected_s + computing_s / 16) * 1.001
    assert waited >= max(computing_s / 8, expected_s * 1.0625) * 0.999  # an estimate is no promise
    more = pace.patience_s(computing_s, expected_s, late_s)
    assert min(late_s, computing_s) <= more <= max(late_s, computing_s / 8)


def test_how_late_a_tier_may_be_is_learnt_from_loads_that_came_and_is_forgotten() -> None:
    meter = Meter(Clock())
    moved(meter, FAST)
    for late_s, learnt in ((-1.0, 0.0), (0.05, 0.1), (0.2, 0.25), (9.0, 0.25)):
        meter.late(late_s)
        assert meter.estimate is not None
        assert meter.estimate.late_s == pytest.approx(learnt)
    for _ in range(100):
        meter.late(0.0)
    assert meter.estimate.late_s < 0.02


@given(st.floats(0.001, 100.0))
def test_probes_take_a_small_part_of_all_time(seconds: float) -> None:
    clock = Clock()
    meter = Meter(clock)
    busy = 0.0
    for _ in range(20):
        while not meter.may_probe():
            clock.now += 0.01 + seconds / 100
        clock.now += seconds
        busy += seconds
        meter.saw(pace.PROBE_BYTES, seconds, 0.0)
    assert busy <= (clock.now + pace.PROBE_S) / (pace.PROBE_REST + 1) * 1.06


def test_a_tier_that_only_looks_recovered_is_believed_ever_more_rarely() -> None:
    """It is fast in every probe and overdue whenever someone waits: one request in 32 s pays."""
    clock = Clock()
    meter = Meter(clock)
    paid = []
    while clock.now < 1000:
        clock.now += 0.25
        if meter.may_probe():
            moved(meter, FAST)
            meter.overdue(8 * MIB, 0.4)
            paid.append(clock.now)
    gaps = [later - sooner for sooner, later in itertools.pairwise(paid)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= pace.PROBE_S_MAX
    meter.on_time()
    moved(meter, FAST)
    clock.now += pace.PROBE_S
    assert meter.may_probe()
