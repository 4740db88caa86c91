"""The machine of tests/oracles/cache_machine.py, and that its walks come everywhere."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.oracles.cache_machine import SEEN, CacheMachine

EVERYWHERE = (
    "pool: hit",
    "pool: hit beyond an image",
    "arena: hit",
    "arena: from disk",
    "arena: skipped",
    "keys: hit",
    "keys: from disk",
    "poll: the same",
    "poll: more came",
    "copies: result 0",
    "copies: result 1",
    "copies: in a lease",
    "evicted: cpu",
    "evicted: disk",
    "restart: something is there",
)


@pytest.mark.parametrize("examples", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_a_cache_is_a_dictionary_that_may_forget(examples: int) -> None:
    few = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    SEEN.clear()
    run_state_machine_as_test(CacheMachine, settings=few)  # type: ignore[no-untyped-call]
    print(dict(SEEN))
    if examples > 100:
        assert not [each for each in EVERYWHERE if not SEEN[each]]
