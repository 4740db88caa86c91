"""What a tier is taken to be able to: the meter against its promises."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc2.tiers import meter as meters
from kvc2.tiers.meter import Estimate, Meter


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
    assert meter.estimate is not None
    assert meter.estimate.queue_s == math.inf
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
    moved(meter, FAST, meters.PROBE_BYTES)
    assert bandwidth(meter) > 0.25 * FAST


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
        meter.saw(meters.PROBE_BYTES, seconds, 0.0)
    assert busy <= (clock.now + meters.PROBE_S) / (meters.PROBE_REST + 1) * 1.06


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
    assert gaps[-1] >= meters.PROBE_S_MAX
    meter.on_time()
    moved(meter, FAST)
    clock.now += meters.PROBE_S
    assert meter.may_probe()
