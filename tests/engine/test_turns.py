"""Tenants take turns by tokens; nobody starves; a request ends at its deadline."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import Caller
from engine.scheduler import SchedulerConfig
from engine.turns import CREDIT
from tests.doubles.engine_doubles import Asked, House, build

CHUNK, RUNNING = 16, 4
CONFIG = SchedulerConfig(CHUNK, CHUNK + RUNNING, RUNNING)


def house(**fields: Any) -> House:
    return build(400, config=CONFIG, seconds=1.0, daemon=False, **fields)


def ask(house: House, tenant: str, start: int, tokens: int = 64, answer: int = 20) -> Asked:
    prompt = [(start * 31 + i * 7) % 97 for i in range(tokens)]
    return house.ask(prompt, answer, caller=Caller(tenant))


def ttft_s(asked: Asked) -> float:
    return float(asked.stats.ttft_ms) / 1000


@pytest.mark.parametrize("before", [0, 30, 300])
def test_a_flood_of_one_tenant_hardly_delays_anothers_first_token(before: int) -> None:
    """However long the flood has been under way: at most twice as long as without it, and the step
    that is under way."""
    alone = house()
    first = ask(alone, "b", 0)
    alone.run()
    flooded = house()
    for number in range(40):
        ask(flooded, "a", number + 1)
    flooded.step(before)
    second = ask(flooded, "b", 0)
    flooded.run()
    assert second.tokens == first.tokens
    assert ttft_s(second) <= 2 * ttft_s(first) + CONFIG.token_budget
    assert all(each.finish == "length" for each in flooded.asked)


def test_tenants_that_always_want_more_are_served_alike() -> None:
    """At each step the tokens computed for two of them differ by a bound, not by time."""
    served = house()
    for number in range(30):
        ask(served, "a", number, tokens=64)
        ask(served, "b", number + 50, tokens=16)
        ask(served, "b", number + 150, tokens=16)
    turns = served.scheduler._admission.turns
    worst = 0
    while {"a", "b"} <= {s.tenant for s in served.scheduler._admission.waiting}:
        served.step()
        counts = turns._served
        worst = max(worst, abs(counts["a"] - counts["b"]))
    assert worst <= 2 * (64 + 20) * RUNNING  # what runs already, when the turn changes


def test_within_a_tenant_it_is_first_come_first_served() -> None:
    served = house()
    asked = [ask(served, "a", number, answer=1) for number in range(12)]
    served.run()
    firsts = [ttft_s(each) for each in asked]
    assert firsts == sorted(firsts)


def test_no_request_starves_while_others_keep_coming() -> None:
    """The bound: what all tenants' requests that came before need, and a round of those that
    run."""
    served = house()
    oldest = [ask(served, tenant, i) for i, tenant in enumerate("abc")]
    steps = 0
    while not all(each.finish for each in oldest):
        ask(served, "a", steps + 10, tokens=32, answer=4)
        served.step()
        steps += 1
        assert steps <= 3 * (64 // CHUNK + 20) * 2
    assert served.scheduler.requests > 0


def test_a_place_is_given_up_for_a_tenant_without_one_and_taken_again() -> None:
    served = house()
    flood = [ask(served, "a", number, answer=200) for number in range(6)]
    served.step(60)
    late = ask(served, "b", 99, tokens=16, answer=2)
    served.step(12)
    assert late.finish == "length"
    served.run()
    assert all(len(each.tokens) == 200 for each in flood)


def test_as_many_tenants_as_places_take_none_from_each_other() -> None:
    served = house()
    for number, tenant in enumerate("abcdef"):
        ask(served, tenant, number, answer=30)
    served.run()
    assert served.scheduler._metrics.preemptions._value.get() == 0


def test_who_rests_earns_a_bounded_start() -> None:
    served = house()
    ask(served, "b", 0, tokens=16, answer=1)
    served.run()
    for number in range(20):
        ask(served, "a", number)
    served.step(100)
    ask(served, "b", 1)
    served.step(2)
    counts = served.scheduler._admission.turns._served
    assert 0 < counts["a"] - counts["b"] <= CREDIT + 2 * CONFIG.token_budget


def test_a_request_ends_at_its_deadline_wherever_it_is() -> None:
    served = house()
    running = ask(served, "a", 0, answer=500)
    late = served.ask([1, 2, 3], 400, deadline_s=50.0)
    waiting = [ask(served, "a", n) for n in range(8)]
    queued = served.ask([4, 5, 6], 4, deadline_s=1.0)
    served.run()
    for each in (late, queued):
        assert each.finish == "error"
        assert each.outputs[-1].unavailable
        assert "deadline" in (each.outputs[-1].error or "")
    assert 0 < len(late.tokens) < 400
    assert not queued.tokens
    assert running.finish == "length"
    assert all(each.finish == "length" for each in waiting)


def test_a_cancel_frees_everything_before_the_next_step() -> None:
    served = house()
    for number in range(6):
        ask(served, "a", number)
    served.step(3)
    for each in list(served.asked):
        served.scheduler.cancel(each.request.request_id)
    assert served.bridge.book.counts().held == 0
    assert served.scheduler.idle
