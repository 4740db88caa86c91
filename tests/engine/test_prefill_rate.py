"""The prefill rate that the engine measures and tells the daemon, on a model of known speed."""

from __future__ import annotations

import pytest

from tests.doubles.engine_doubles import build


def test_the_measured_prefill_rate_is_told_with_commits() -> None:
    house = build(seconds=0.01)
    assert house.daemon is not None
    house.ask(range(16), 1)
    house.run()
    assert house.scheduler.prefill_rate == pytest.approx(100.0)
    assert house.daemon.prefill_rates[-1] == pytest.approx(100.0)


def test_short_steps_hardly_change_the_measured_prefill_rate() -> None:
    """A step has fixed costs: a token alone takes as long as many."""
    house = build(seconds=0.01)
    house.ask(range(32), 1)
    house.run()
    house.model.seconds = 1.0
    house.ask([90], 1)
    house.run()
    rate = house.scheduler.prefill_rate
    assert rate is not None
    assert 90.0 < rate < 100.0


def test_a_first_short_step_is_soon_forgotten() -> None:
    house = build(seconds=1.0)
    house.ask([7], 1)
    house.run()
    assert house.scheduler.prefill_rate == pytest.approx(1.0)
    house.model.seconds = 0.01
    house.ask(range(40, 56), 1)
    house.run()
    assert house.scheduler.prefill_rate == pytest.approx(100.0, rel=0.1)
