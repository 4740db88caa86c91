"""What waits for a place in the batch is announced: the daemon reads its disk meanwhile."""

from __future__ import annotations

import random

import pytest

from engine.admission import ANNOUNCED_MAX
from engine.request import Caller
from engine.scheduler import SchedulerConfig
from kvc2 import errors
from tests.doubles.engine_doubles import House, build, expected_tokens

ONE_PLACE = SchedulerConfig(chunk_size=8, token_budget=8, max_running=1)


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=9)


def announced(house: House) -> list[list[int]]:
    assert house.daemon is not None
    return [tokens for _, tokens in house.daemon.prefetched]


def test_those_without_a_place_are_announced_once_and_the_next_ones_first() -> None:
    house = build(64, config=ONE_PLACE)
    prompts = [prompt(seed) for seed in range(ANNOUNCED_MAX + 3)]
    for each in prompts:
        house.ask(each, 2)
    house.step(2)
    assert announced(house) == prompts[1 : 1 + ANNOUNCED_MAX]
    house.run()
    assert announced(house) == prompts[1:]
    for asked, each in zip(house.asked, prompts, strict=True):
        assert asked.tokens == expected_tokens(each, 2)


def test_who_has_a_place_is_not_announced() -> None:
    house = build(64)
    house.ask(prompt(0), 2)
    house.ask(prompt(1), 2)
    house.run()
    assert announced(house) == []


def test_each_is_announced_in_its_callers_namespace() -> None:
    house = build(64, config=ONE_PLACE)
    house.ask(prompt(0), 2)
    house.ask(prompt(1), 2, caller=Caller("a tenant", b"salt"))
    house.ask(prompt(2), 2)
    house.run()
    assert house.daemon is not None
    first, second = (namespace for namespace, _ in house.daemon.prefetched)
    assert first != second


@pytest.mark.parametrize("daemon", [True, False], ids=["daemon that fails", "alone"])
def test_what_comes_of_it_is_nothing_to_the_requests(daemon: bool) -> None:
    house = build(64, config=ONE_PLACE, daemon=daemon)
    for seed in range(3):
        house.ask(prompt(seed), 2)
    if house.daemon is not None:
        house.daemon.fault = errors.Unreachable("a daemon that is busy")
    house.run()
    for seed, asked in enumerate(house.asked):
        assert asked.tokens == expected_tokens(prompt(seed), 2)
