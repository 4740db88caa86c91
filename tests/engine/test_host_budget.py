"""Host memory is divided by what each part saves, never beyond what there is, and moves slowly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from engine import asking
from engine.attention.base import KvShape
from engine.budget import Measured
from engine.experts.store import ExpertStore
from engine.host_budget import (
    DECIDE_S,
    GAIN_MIN,
    HostDivision,
    HostSizes,
    Redivision,
    divide,
    given,
    most_pages,
    saved_s,
)
from engine.models.host_memory import MOVE_S, HeldPages, HostMemory
from engine.prefix import BridgeConfig, PoolMemory, open_bridge
from engine.serve import Engine, assemble
from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig
from tests.system.engine import small_model

SIZES = HostSizes(
    expert_bytes=1000, total=64, least_experts=4, page_bytes=300, page_size=16, least_pages=10
)
COUNTS = np.random.default_rng(0).zipf(1.5, (4, 16)).clip(0, 1000).astype(float)
MEASURED = Measured(
    needed_experts=1000,
    missed_experts=100,
    read_wait_s=1.0,
    prompt_tokens=5000,
    prefill_tokens_per_s=100.0,
    hit_rates=((160.0, 0.2), (1600.0, 0.6)),
)
measurements = st.builds(
    lambda wait, tokens, rate: replace(
        MEASURED, read_wait_s=wait, prompt_tokens=tokens, hit_rates=((160.0, 0), (1600.0, rate))
    ),
    st.floats(0, 100),
    st.floats(0, 1e6),
    st.floats(0, 1),
)
totals = st.integers(7000, 100_000)


# the division


@settings(max_examples=100, deadline=None)
@for_all(totals, measurements)
def test_a_division_fits_and_none_would_have_saved_more(total: int, measured: Measured) -> None:
    made = divide(total, SIZES, COUNTS, measured)
    assert made.by == "measured"
    assert made.used_bytes(SIZES) <= total
    assert made.experts >= SIZES.least_experts
    assert made.pages >= SIZES.least_pages

    def saved(experts: int, pages: int) -> float:
        found = saved_s(COUNTS, measured, SIZES, np.array([experts]), np.array([pages]))
        assert found is not None
        return float(found[0])

    for experts in range(SIZES.least_experts, SIZES.total + 1):
        pages = (total - experts * 1000) // 300
        if pages >= SIZES.least_pages:
            assert saved(experts, pages) <= saved(made.experts, made.pages)


@pytest.mark.parametrize("lacks", ["missed_experts", "prefill_tokens_per_s", "hit_rates"])
def test_without_a_measurement_each_gets_half(lacks: str) -> None:
    unknown = replace(MEASURED, **{lacks: () if lacks == "hit_rates" else 0.0})
    assert divide(60_000, SIZES, COUNTS, unknown) == HostDivision(30, 100, "half each")


def test_what_the_user_gives_stays_and_what_does_not_fit_is_refused() -> None:
    assert given(60_000, SIZES, 20, None) == HostDivision(54, 20, "given")
    assert given(60_000, SIZES, None, 20) == HostDivision(20, 133, "given")
    assert given(60_000, SIZES, 20, 20) == HostDivision(20, 20, "given")
    for pages, experts in [(200, None), (None, 60), (100, 31), (None, 3), (1, 20)]:
        with pytest.raises(InvalidConfig, match=r"host_memory_gb = 6e-05: .* need \d"):
            given(60_000, SIZES, pages, experts)
    with pytest.raises(
        InvalidConfig, match=r"host_memory_gb = 6e-06: at least 7e-06: 4 experts, 10 pages"
    ):
        most_pages(6000, SIZES)


@for_all(totals, measurements, measurements)
def test_only_what_saves_a_tenth_more_is_gone_for_and_then_it_stays(
    total: int, before: Measured, after: Measured
) -> None:
    start = divide(total, SIZES, COUNTS, before)
    policy = Redivision(total, SIZES, start, now=0.0)
    policy.decide(DECIDE_S - 1, COUNTS, after)
    assert policy.goal == start
    policy.decide(DECIDE_S, COUNTS, after)
    both = np.array([start.experts, policy.goal.experts])
    pages = np.array([start.pages, policy.goal.pages])
    saved = saved_s(COUNTS, after, SIZES, both, pages)
    assert saved is not None
    assert policy.goal == start or saved[1] >= (1 + GAIN_MIN) * saved[0] * (1 - 1e-9)
    goal = policy.goal
    for turn in range(2, 5):  # the same traffic goes on
        policy.decide(turn * DECIDE_S, COUNTS, after)
        assert policy.goal == goal


# moving


class FakeStore:
    """Gives up at most so many at once: reads may be under way."""

    def __init__(self, places: int, most: int) -> None:
        self.places = places
        self.most = most
        self.stuck = 0

    def resize(self, places: int) -> None:
        assert SIZES.least_experts <= places <= self.most
        self.places = max(places, min(self.places, self.stuck))


class FakePages:
    """Those that are asked for come at the next turn, or when they are waited for."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.free = self.coming = 0

    def hold(self, count: int) -> None:
        self.settle()
        self.coming = min(count, self.free)

    def settle(self) -> None:
        self.held, self.coming = self.held + self.coming, 0

    def close(self) -> None:
        pass

    def let_go(self, count: int) -> None:
        assert 0 < count <= self.held
        self.held -= count


@settings(max_examples=100, deadline=None)
@for_all(
    totals,
    measurements,
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 30), measurements),
        max_size=30,
    ),
)
def test_both_never_have_more_than_the_budget_and_come_to_what_is_wanted(
    total: int, first: Measured, events: list[tuple[int, int, int, Measured]]
) -> None:
    """Whatever is free, stuck, or suddenly needed."""
    division = divide(total, SIZES, COUNTS, first)
    policy = Redivision(total, SIZES, division, now=0.0)
    most = min(SIZES.total, (total - SIZES.least_pages * SIZES.page_bytes) // SIZES.expert_bytes)
    num_pages = most_pages(total, SIZES)
    store, pages = FakeStore(division.experts, most), FakePages(num_pages - division.pages)
    shown = [(COUNTS, first)]
    memory = HostMemory(policy, store, pages, num_pages, lambda: shown[0])  # type: ignore[arg-type]
    now = 1e9

    def check() -> None:
        assert memory.now.used_bytes(SIZES) <= total
        assert memory.now.pages >= SIZES.least_pages
        assert store.places >= SIZES.least_experts

    def turn() -> None:
        nonlocal now
        now += DECIDE_S
        memory.turn(now)
        if memory._deciding is not None:
            memory._deciding.result(timeout=60)
        check()

    try:
        for free, stuck, needed, measured in events:
            pages.free, store.stuck, shown[0] = free, stuck, (COUNTS, measured)
            turn()
            if needed:
                before = pages.held + pages.coming
                assert memory.spare(needed) == (pages.held < before)
                check()
        pages.free, store.stuck = 1000, 0
        for _ in range(400):
            turn()
        goal = policy.goal
        assert store.places == goal.experts
        assert memory.now.pages >= min(goal.pages, num_pages)
        store.stuck = 0
        while pages.held and store.places > SIZES.least_experts:
            assert memory.spare(1000)  # all that is held back can be had, down to the least
            check()
    finally:
        memory.close()


@pytest.mark.parametrize(("pages", "experts"), [(20, None), (None, 20), (20, 20)])
def test_a_fixed_division_never_moves(pages: int | None, experts: int | None) -> None:
    fixed = given(60_000, SIZES, pages, experts)
    policy = Redivision(60_000, SIZES, fixed, now=0.0)
    memory = HostMemory(policy, None, FakePages(0), fixed.pages, lambda: 1 / 0)  # type: ignore
    for turn in range(5):
        memory.turn(1e9 + turn * DECIDE_S)
    assert not memory.spare(5)
    assert policy.goal == fixed
    memory.close()


def test_a_move_takes_a_second_at_least() -> None:
    division = HostDivision(30, 100, "measured")
    policy = Redivision(60_000, SIZES, division, now=1e9)
    store, pages = FakeStore(20, 60), FakePages(100)
    memory = HostMemory(policy, store, pages, 200, lambda: (COUNTS, MEASURED))  # type: ignore
    memory.turn(1e9)
    store.places = 20
    memory.turn(1e9 + MOVE_S / 2)
    assert store.places == 20
    memory.turn(1e9 + MOVE_S)
    assert store.places > 20
    memory.close()


# the pages of a pool

SHAPE = KvShape(layers=3, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@for_all(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=12))
def test_pages_that_are_held_back_take_no_memory_and_no_others_lose_a_byte(
    asked: list[tuple[bool, int]],
) -> None:
    num_pages = 40
    memory = PoolMemory(num_pages * SHAPE.page_bytes)
    whole = np.frombuffer(memory.map, np.uint8)
    made: list[HeldPages] = []
    bridge = open_bridge(
        num_pages,
        BridgeConfig(page_size=16),
        prepare=lambda bridge: made.append(HeldPages(bridge, memory, SHAPE, num_pages)),
    )
    held = made[0]
    by_page = whole.reshape(2 * SHAPE.layers, num_pages, SHAPE.segment_bytes)
    by_page[:] = 7
    resident = os.fstat(memory.fd).st_blocks
    gone: set[int] = set()
    for hold, count in asked:
        before = held.held
        if hold:
            held.hold(count)
            held.settle()
            assert held.held - before == min(count, num_pages - before)
        else:
            held.let_go(count)
            assert before - held.held == min(count, before)
        gone |= set(held._lease.pages)
        bridge.book.check([held._lease.pages])
        assert bridge.book.free == num_pages - held.held
    assert (by_page[:, sorted(set(range(num_pages)) - gone)] == 7).all()
    assert os.fstat(memory.fd).st_blocks <= resident - len(gone) * SHAPE.page_bytes // 512
    bridge.close()
    held.close()
    del whole, by_page
    memory.close()


# an engine

Opened = tuple[Engine, TestClient]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), num_local_experts=8)


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    with ExitStack() as stack:

        def opening(model: Path, **fields: Any) -> Opened:
            own = {"threads": 2, "chunk_size": 64, "max_running": 2, "served_model_name": "m"}
            engine = assemble(EngineConfig(model=model, **own, **fields))
            stack.callback(engine.experts.close)
            stack.callback(engine.bridge.close)
            return engine, stack.enter_context(TestClient(engine.app))

        yield opening


def answers(client: TestClient, prompts: list[list[int]]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        body = {"model": "m", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        body |= {"ignore_eos": True, "kvc2": {"details": True}}
        told = client.post("/v1/completions", json=body)
        assert told.status_code == 200, told.text
        found.append([each["token_id"] for each in told.json()["kvc2"]["tokens"]])
    return found


def test_an_engine_moves_memory_while_it_serves_and_no_token_changes(
    model: Path, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 200, 150).tolist() for _ in range(6)]
    expected = answers(opened(model, kv_memory_gb=0.01)[1], prompts)
    engine, client = opened(model, host_memory_gb=0.0013)
    memory = engine.experts.host_memory
    assert memory is not None
    monkeypatch.setattr("engine.models.host_memory.MOVE_S", 0.0)
    sizes, total = memory._policy.sizes, memory._policy.total_bytes
    start = memory.now
    assert start.by == "half each"
    least = HostDivision(sizes.least_experts, 0, "measured")
    most = HostDivision(min(sizes.total, start.experts + 6), sizes.least_pages, "measured")
    seen = set()
    for prompt, tokens in zip(prompts, expected, strict=True):
        goal = most if len(seen) % 2 == 0 else least
        pages = (total - goal.experts * sizes.expert_bytes) // sizes.page_bytes
        memory._policy.goal = replace(goal, pages=pages)
        assert answers(client, [prompt]) == [tokens]
        assert memory.now.used_bytes(sizes) <= total
        seen.add(memory.now.experts)
    assert len(seen) > 1
    engine.bridge.book.check()
    told = engine.experts.state()
    assert told["host_budget"]["now"]["experts"] == memory.now.experts
    assert {"needed", "hits"} <= set(told["host_budget"]["another_gb"])
    assert "of host memory KV has" in asking.experts(told, as_json=False)
    metrics = client.get("/metrics").text
    assert 'kvc2_engine_host_memory_gb{what="experts"}' in metrics
    assert 'kvc2_engine_another_host_gb{what="needed"}' in metrics


def test_a_prompt_that_needs_all_pages_gets_those_that_are_held_back(
    model: Path, opened: Callable[..., Opened]
) -> None:
    engine, client = opened(model, host_memory_gb=0.0013)
    memory = engine.experts.host_memory
    assert memory is not None
    before = memory.now
    prompt = np.random.default_rng(1).integers(3, 200, before.pages * 16 + 40).tolist()
    assert len(answers(client, [prompt])[0]) == 6
    assert memory.now.pages > before.pages
    assert memory.now.experts < before.experts
    assert memory.now.used_bytes(memory._policy.sizes) <= memory._policy.total_bytes


def test_a_store_gives_memory_up_and_takes_it_again(
    model: Path, opened: Callable[..., Opened]
) -> None:
    engine, client = opened(model, host_memory_gb=0.0013)
    assert engine.experts.experts is not None
    store = engine.experts.experts.host
    assert isinstance(store, ExpertStore)
    most = store.places + len(store._unused)
    prompts = [[5, 6, 7] * 10, [9, 8, 7] * 10]
    expected = answers(client, prompts)
    for places in (8, most, 12, 9):
        store.resize(places)
        assert store.places == places
        assert len(store._held) <= places
        assert answers(client, prompts) == expected
        assert store.places == len(store._free) + len(store._held) + len(store._coming)
