"""The index against its naive oracle, by random walks (tests/machines.py)."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.machines import IndexMachine

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def walk(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        IndexMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=QUIET,
        ),
    )


def test_the_index_equals_its_oracle_on_random_walks() -> None:
    walk(150, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_index_equals_its_oracle_on_long_random_walks() -> None:
    walk(2000, 120)
