"""Laws of the scheduler and the bridge on a model whose KV is checkable (engine_doubles.py)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.request import Caller, Piece
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence
from kvc2 import errors
from tests.doubles.engine_doubles import House, NoText, build, expected_tokens
from tests.doubles.small_daemon import PAGE_SIZE


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


@pytest.mark.parametrize("daemon", [True, False], ids=["daemon", "alone"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16, 31, 40])
def test_tokens_are_those_of_the_model(daemon: bool, length: int) -> None:
    house = build(daemon=daemon)
    asked = house.ask(prompt(length), 7)
    house.run()
    assert asked.tokens == expected_tokens(prompt(length), 7)
    assert asked.finish == "length"
    assert house.bridge.book.counts().held == 0


def test_chunks_end_on_the_absolute_grid_after_a_hit_too() -> None:
    house = build()
    house.ask(prompt(14), 1)
    house.run()
    house.model.batches.clear()
    house.ask(prompt(14) + prompt(20, 1), 1)  # 12 tokens hit
    house.run()
    slices = [
        (int(b.context_lens[0] - b.query_lens[0]), int(b.context_lens[0]))
        for b in house.model.batches
    ]
    assert slices == [(12, 16), (16, 24), (24, 32), (32, 34)]


def test_decodes_go_first_and_the_budget_holds() -> None:
    house = build(64, config=SchedulerConfig(chunk_size=8, token_budget=9, max_running=4))
    house.ask(prompt(3), 20)
    house.step(2)
    house.ask(prompt(30, 1), 2)
    house.ask(prompt(30, 2), 2)
    house.run()
    sizes = [b.query_lens.tolist() for b in house.model.batches]
    assert all(sum(each) <= 9 for each in sizes)
    assert [1, 8] in sizes
    assert all(
        a.tokens == expected_tokens(a.request.tokens.tolist(), a.request.max_tokens)
        for a in house.asked
    )


def test_beside_decodes_little_is_prefilled_and_on_its_own_grid() -> None:
    config = SchedulerConfig(chunk_size=16, token_budget=20, max_running=4, mixed_chunk_size=4)
    house = build(64, config=config)
    talks = house.ask(prompt(3), 12)
    house.step(2)
    asked = [house.ask(prompt(42, seed), 1) for seed in (1, 2)]
    house.model.batches.clear()
    mixed = alone = 0
    while not house.scheduler.idle:
        house.step()
    for batch in house.model.batches:
        chunks = [int(n) for n in batch.query_lens if n > 1]
        ends = [int(c) for c, n in zip(batch.context_lens, batch.query_lens, strict=True) if n > 1]
        beside = 1 in batch.query_lens.tolist() and sum(chunks) > 0
        mixed += beside
        alone += not beside and bool(chunks)
        grid = 4 if beside else 16
        assert sum(chunks) <= (4 if beside else 20)
        assert all(end % grid == 0 or end == 42 for end in ends)
    assert mixed > 5
    assert alone > 0
    for each in (talks, *asked):
        assert each.tokens == expected_tokens(each.request.tokens.tolist(), len(each.tokens))
        assert each.finish == "length"


def test_first_come_is_first_served() -> None:
    house = build(64, config=SchedulerConfig(chunk_size=8, token_budget=8, max_running=1))
    asked = [house.ask(prompt(9, seed), 2) for seed in range(4)]
    ended: list[int] = []
    while not house.scheduler.idle:
        house.step()
        ended += [i for i, a in enumerate(asked) if a.finish and i not in ended]
    assert ended == [0, 1, 2, 3]


def test_a_prefix_is_computed_once_and_its_tokens_are_reported() -> None:
    house = build()
    first = house.ask(prompt(30), 3)
    house.run()
    again = house.ask(prompt(30), 3)
    house.run()
    assert again.tokens == first.tokens
    assert (first.stats.matched_tokens, first.stats.prefilled_tokens) == (0, 30)
    assert (again.stats.matched_tokens, again.stats.prefilled_tokens) == (28, 2)
    assert again.stats.tiers.gpu == 28


def test_tokens_are_copied_for_full_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    asked = house.ask(prompt(6), 20)
    house.step(2)
    copied: list[int | None] = []
    array = Sequence.array

    def seen(sequence: Sequence, end: int | None = None) -> Any:
        copied.append(end)
        return array(sequence, end)

    monkeypatch.setattr(Sequence, "array", seen)
    house.run()
    assert asked.finish == "length"
    assert copied == [8, 12, 16, 20, 24]


def test_generated_blocks_are_committed_too() -> None:
    house = build()
    first = house.ask(prompt(6), 20)
    house.run()
    turn = house.ask(prompt(6) + first.tokens + [5], 2)
    house.run()
    assert turn.stats.matched_tokens == 24  # 25 of the 26 tokens have KV: 6 full blocks


def test_a_prefix_from_below_is_waited_for_layer_by_layer() -> None:
    house = build()
    first = house.ask(prompt(30), 3)
    house.run()
    assert house.daemon is not None
    house.daemon.demote_and_evict()
    house.model.pool[sorted(house.daemon.pages.free)] = -7
    again = house.ask(prompt(30), 3)
    house.run()
    assert again.tokens == first.tokens
    assert again.stats.tiers.cpu == 28


def test_a_prefix_that_does_not_arrive_is_recomputed() -> None:
    house = build()
    first = house.ask(prompt(30), 3)
    house.run()
    assert house.daemon is not None
    house.daemon.demote_and_evict()
    house.model.pool[sorted(house.daemon.pages.free)] = -7
    house.daemon.arrive = False
    other = house.ask(prompt(9, 5), 6)
    again = house.ask(prompt(30), 3)
    house.run()
    assert again.tokens == first.tokens
    assert again.stats.matched_tokens == 0
    assert again.stats.prefilled_tokens == 30
    assert other.tokens == expected_tokens(prompt(9, 5), 6)


def test_identical_prompts_that_come_together_are_prefilled_once() -> None:
    house = build(64, seconds=0.01)
    asked = [house.ask(prompt(40), 3) for _ in range(4)]
    house.run()
    assert [a.tokens for a in asked] == [expected_tokens(prompt(40), 3)] * 4
    assert sum(a.stats.prefilled_tokens for a in asked) == 40 + 3 * 4
    assert [a.stats.matched_tokens for a in asked] == [0, 36, 36, 36]


def test_a_wait_for_another_engine_is_bounded() -> None:
    house = build(seconds=0.001)
    assert house.daemon is not None
    house.daemon.computing_extra = 16  # someone who never commits
    asked = house.ask(prompt(30), 3)
    house.step(3)
    assert asked.outputs == []
    house.run()
    assert asked.tokens == expected_tokens(prompt(30), 3)
    assert 0.0 < asked.stats.ttft_ms < 2000


def test_a_wait_ends_when_the_one_waited_for_is_cancelled() -> None:
    house = build(64, seconds=0.01)
    first = house.ask(prompt(40), 3)
    second = house.ask(prompt(40), 3)
    house.step(2)
    house.scheduler.cancel(first.request.request_id)
    house.run()
    assert second.tokens == expected_tokens(prompt(40), 3)
    assert first.finish is None


@pytest.mark.parametrize("daemon", [True, False], ids=["daemon", "alone"])
def test_when_pages_run_out_the_youngest_is_recomputed(daemon: bool) -> None:
    house = build(12, daemon=daemon, low_water=0)
    asked = [house.ask(prompt(9, seed), 24) for seed in range(3)]
    house.run()
    for seed, each in enumerate(asked):
        assert each.tokens == expected_tokens(prompt(9, seed), 24)
    metrics = house.scheduler._metrics  # what /metrics shows
    assert metrics.preemptions._value.get() > 0


def test_what_a_request_computed_itself_is_not_cached() -> None:
    house = build()
    house.ask(prompt(8), 1)
    house.run()
    asked = house.ask(prompt(8) + prompt(22, 1), 3)
    house.step(3)  # two chunks of the 22 tokens
    (sequence,) = house.scheduler.running
    assert (sequence.computed, sequence.generated) == (24, 0)
    assert house.daemon is not None
    assert list(house.daemon.leases) == [b"r1"]  # the id that the caller's answer has
    house.scheduler.running.preempt(sequence)
    house.step()
    assert b"r1/2" in house.daemon.leases  # one of its own, whenever the first one's release comes
    house.run()
    assert asked.tokens == expected_tokens(prompt(8) + prompt(22, 1), 3)
    assert (asked.stats.matched_tokens, asked.stats.tiers.gpu) == (8, 8)
    assert asked.stats.prefilled_tokens == 22  # and none of them twice


@pytest.mark.parametrize("steps", range(6))
def test_cancel_frees_all_pages(steps: int) -> None:
    house = build()
    asked = house.ask(prompt(20), 30)
    house.step(steps)
    house.scheduler.cancel(asked.request.request_id)
    house.run()
    assert house.bridge.book.counts().held == 0
    assert house.daemon is not None
    assert not house.daemon.leases
    house.scheduler.cancel("unknown")


def test_cancel_while_acquiring_releases_what_comes() -> None:
    house = build()
    house.acquires.held = True
    asked = house.ask(prompt(20), 30)
    house.step()
    house.scheduler.cancel(asked.request.request_id)
    house.step()
    assert not house.scheduler.idle
    house.acquires.run()
    house.step()
    assert house.scheduler.idle
    assert house.daemon is not None
    assert not house.daemon.leases


def test_end_tokens_and_stop_strings_end_it() -> None:
    tokens = expected_tokens(prompt(5), 10)
    house = build()
    by_end = house.ask(prompt(5), 10, end_token_ids=frozenset({tokens[3]}))
    by_text = house.ask(prompt(5), 10, text=NoText(stop_at=tokens[2]))
    house.run()
    first = tokens.index(tokens[3])
    assert (by_end.tokens, by_end.finish) == (tokens[: first + 1], "stop")
    assert (by_text.tokens, by_text.finish) == (tokens[: tokens.index(tokens[2]) + 1], "stop")


def test_text_that_fails_ends_its_request_and_no_other() -> None:
    class Broken(NoText):
        def push(self, token_id: int) -> Piece:
            raise ValueError("no such token")

    house = build()
    failed, other = house.ask(prompt(5), 3, text=Broken()), house.ask(prompt(5, 1), 3)
    house.run()
    assert (failed.finish, other.finish) == ("error", "length")


def test_scores_name_the_best_tokens() -> None:
    house = build()
    asked = house.ask(prompt(5), 2, top_scores=2)
    house.run()
    for output in asked.outputs:
        assert output.chosen is not None
        assert output.chosen == output.top[0]
        assert output.top[0].logit == 10.0
        assert output.top[1].logit == 0.0
        wanted = torch.tensor([10.0] + [0.0] * 96).log_softmax(-1)[0]
        assert output.chosen.logprob == pytest.approx(float(wanted), abs=1e-5)


def test_callers_share_nothing() -> None:
    house = build()
    for caller in (Caller(), Caller("b"), Caller("b", b"salt")):
        asked = house.ask(prompt(30), 2, caller=caller)
        house.run()
        assert asked.stats.matched_tokens == 0
        assert asked.tokens == expected_tokens(prompt(30), 2)


def test_salts_end_nobodys_caching() -> None:
    house = build(256)
    house.daemon.max_namespaces = 8

    def matched(caller: Caller) -> list[int]:
        asked = [house.ask(prompt(9), 1, caller=caller) for _ in range(2)]
        house.run()
        assert asked[1].tokens == expected_tokens(prompt(9), 1)
        return [int(each.stats.matched_tokens) for each in asked]

    others = [Caller("other", salt) for salt in (b"", b"1", b"2")]
    for each in others:
        assert matched(each) == [0, 8]
    handles = house.bridge._calls._namespaces._handles  # type: ignore[union-attr]
    made = [handles.use(each) for each in others]
    many = [Caller("greedy", bytes([salt])) for salt in range(1, 31)]
    assert [matched(each) for each in many] == [[0, 8]] * 30  # also after eight
    assert len(handles) == 8
    assert [handles.use(each) for each in others] == made
    assert matched(many[0]) == [8, 8]  # it was let go of, and what is cached under it was not
    for each in others:
        assert matched(each) == [8, 8]
    assert house.scheduler._metrics.salts_let_go._value.get() == 26


def test_a_refused_commit_costs_only_hits() -> None:
    house = build()
    assert house.daemon is not None
    house.daemon.refuse = True
    for _ in range(2):
        asked = house.ask(prompt(30), 5)
        house.run()
        assert asked.tokens == expected_tokens(prompt(30), 5)
        assert asked.stats.matched_tokens == 0


@pytest.mark.parametrize("reason", ["dead", "silent"])
@pytest.mark.parametrize("steps", range(1, 12, 2))
def test_requests_outlive_the_daemon(reason: str, steps: int) -> None:
    house = build(48)
    house.ask(prompt(30), 3)
    house.run()
    asked = [house.ask([*prompt(30), seed], 12) for seed in range(3)]
    house.step(steps)
    assert house.daemon is not None
    house.daemon.detach(reason)
    asked.append(house.ask(prompt(10, 9), 5))
    house.step(3)
    house.run() if reason == "dead" else house.step(4)
    house.daemon.reattach()
    asked.append(house.ask(prompt(10, 9), 5))
    house.run()
    for each in asked:
        wanted = expected_tokens(each.request.tokens.tolist(), each.request.max_tokens)
        assert each.tokens == wanted
    again = house.ask([*prompt(10, 9), 1, 2, 3], 1)
    house.run()
    assert again.stats.matched_tokens == 8


def test_a_dead_daemons_pages_are_the_engines() -> None:
    house = build(32)
    house.ask(prompt(60), 3)
    house.run()
    assert house.daemon is not None
    house.daemon.detach("dead")
    assert house.bridge.book.free == 32
    asked = house.ask(prompt(100), 8)
    house.run()
    assert asked.tokens == expected_tokens(prompt(100), 8)


def test_a_silent_daemons_pages_are_not_touched() -> None:
    house = build(32)
    house.ask(prompt(60), 3)
    house.run()
    assert house.daemon is not None
    resident = {
        page: house.model.pool[page].copy() for page in house.daemon.pages.resident.values()
    }
    house.daemon.detach("silent")
    house.ask(prompt(6, 3), 3)
    house.run()
    for page, values in resident.items():
        assert (house.model.pool[page] == values).all()


def test_alone_and_starved_a_request_fails_in_the_end() -> None:
    house = build(32, config=SchedulerConfig(8, 16, 4, starve_s=2.0))
    assert house.daemon is not None
    house.daemon.detach("silent")
    asked = house.ask(prompt(100), 8)
    house.run()
    assert asked.finish == "error"
    assert "pages" in (asked.outputs[-1].error or "")
    assert asked.outputs[-1].unavailable
    assert house.bridge.book.counts().held == 0


def test_an_unanswered_commit_keeps_its_pages_from_reuse() -> None:
    house = build(32)
    assert house.daemon is not None
    house.ordered.held = True
    asked = house.ask(prompt(8), 2)
    house.step(2)
    sent = [page for lease in house.bridge.leases() for page in lease.pages[:2]]
    house.daemon.fault = errors.Unreachable("deadline")
    house.ordered.held = False
    house.ordered.run()
    house.run()
    assert asked.tokens == expected_tokens(prompt(8), 2)
    assert house.bridge.book.counts().quarantined == len(sent)
    house.daemon.detach("dead")
    assert house.bridge.book.free == 32


def test_a_lease_that_another_session_opened_is_released() -> None:
    house = build(32)
    daemon = house.daemon
    assert daemon is not None
    acquire = daemon.acquire

    def late(*arguments: Any, **fields: Any) -> Any:
        if house.bridge.book.session == 1:  # it ends while the call is on its way
            daemon.detach("dead")
            daemon.reattach()
        return acquire(*arguments, **fields)

    daemon.acquire = late  # type: ignore[method-assign]
    asked = house.ask(prompt(30), 3)
    house.step()
    assert not daemon.leases
    house.run()
    assert asked.tokens == expected_tokens(prompt(30), 3)
    assert house.bridge.book.session == 2


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_keeps_tokens_and_pages_right(seed: int) -> None:
    choose = random.Random(seed)
    house = build(choose.choice([16, 24, 48]), low_water=choose.choice([0, 2, 5]), seconds=0.002)
    _traffic(house, choose)
    house.run(5000)
    for asked in house.asked:
        if asked.finish == "length":
            wanted = expected_tokens(asked.request.tokens.tolist(), asked.request.max_tokens)
            assert asked.tokens == wanted
    assert house.bridge.book.counts().held == 0


def _traffic(house: House, choose: random.Random) -> None:
    """Requests that share beginnings, cancels, evictions, deaths and silences."""
    daemon = house.daemon
    assert daemon is not None
    for _ in range(250):
        event = choose.random()
        if event < 0.25:
            shared = prompt(choose.choice([0, 8, 20]), choose.randrange(2))
            own = prompt(choose.randrange(1, 12), choose.randrange(100, 110))
            house.ask(shared + own, choose.randrange(1, 20))
        elif event < 0.29 and house.asked:
            house.scheduler.cancel(choose.choice(house.asked).request.request_id)
        elif event < 0.33 and not daemon.fault:
            daemon.demote_and_evict()
        elif event < 0.35:
            daemon.arrive = not daemon.arrive
        elif event < 0.37 and not daemon.fault:
            daemon.detach(choose.choice(["dead", "silent"]))
        elif event < 0.42 and daemon.fault:
            daemon.reattach()
        house.ordered.held = house.acquires.held = choose.random() < 0.3
        if not house.ordered.held:
            house.acquires.run()
            house.ordered.run()
        house.step()
        house.clock.now += 0.01
    house.ordered.held = house.acquires.held = False
    house.acquires.run()
    house.ordered.run()
    daemon.arrive = True
    if daemon.fault:
        daemon.reattach()


def test_page_size_is_what_the_doubles_say() -> None:
    assert build().bridge.config.page_size == PAGE_SIZE
