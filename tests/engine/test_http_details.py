"""What `details` of `kvc2` add to an answer: where its prompt was found, and why not more of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from engine.http import service
from engine.prefix import (
    BridgeConfig,
    Daemon,
    Lease,
    PoolMemory,
    explain,
    explanation_of,
    open_bridge,
)
from engine.request import Caller, Explanation
from kvc2.answers import TierTokens
from kvc2.client import Explained
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engine_doubles import House
from tests.doubles.engine_doubles import build as build_house
from tests.doubles.engines import NUM_PAGES, PAGE_SIZE, POOL_BYTES, identity, layout
from tests.engine.test_http import CHAT, COMPLETION, over

WAIT_S = 20.0
DETAILS = {"kvc2": {"details": True}}
TEN = "abcdefghij"  # two full blocks of four before the last token, and two letters
NEW = {
    "why": "never_seen",
    "missing_block": 0,
    "cause": "",
    "tier": "",
    "policy": "",
    "died_s_ago": 0.0,
    "found": {"gpu": 0, "cpu": 0, "disk": 0, "remote": 0},
}


@pytest.fixture
def house() -> House:
    return build_house(64)


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    yield from over(house, {})


def body_of(prompt: str, *, chat: bool, stream: bool) -> dict[str, Any]:
    asks = DETAILS | {"stream": stream}
    if chat:
        return CHAT | asks | {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
    return COMPLETION | asks | {"prompt": prompt}


def details(client: TestClient, prompt: str, *, chat: bool = False, stream: bool = False) -> Any:
    """The answer's `kvc2`; of a stream, that of its one piece that has any."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reply = client.post(path, json=body_of(prompt, chat=chat, stream=stream))
    assert reply.status_code == 200, reply.text
    if not stream:
        return reply.json()["kvc2"]
    pieces = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line[6:7] == "{"]
    (told,) = [piece for piece in pieces if "kvc2" in piece]
    assert told["choices"][0]["finish_reason"] == "length"
    return told["kvc2"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_an_answer_says_what_was_found_and_why_the_next_block_was_not(
    client: TestClient, chat: bool, stream: bool
) -> None:
    assert details(client, TEN, chat=chat, stream=stream)["explanation"] == NEW
    again = details(client, TEN, chat=chat, stream=stream)
    two_blocks = {"gpu": 8, "cpu": 0, "disk": 0, "remote": 0}
    whole = NEW | {"why": "nothing", "missing_block": None, "found": two_blocks}
    assert (again["explanation"], again["tiers"]) == (whole, two_blocks)
    longer = details(client, TEN + "klmn", chat=chat, stream=stream)["explanation"]
    assert longer == NEW | {"missing_block": 2, "found": two_blocks}


def test_nothing_of_a_sibling_is_told(client: TestClient, house: House) -> None:
    assert house.daemon is not None
    house.daemon.sibling = np.array([90, 91, 92, 93], np.uint32)
    assert details(client, TEN)["explanation"] == NEW | {"why": "diverged"}


def test_without_details_nothing_is_asked(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.admission.explain", lambda bridge, lease: 1 / 0)
    assert "kvc2" not in client.post("/v1/completions", json=COMPLETION).json()


def test_no_daemon_is_said() -> None:
    for client in over(build_house(64, daemon=False), {}):
        assert details(client, TEN)["explanation"] == NEW | {
            "why": "no_daemon",
            "missing_block": None,
        }


def test_what_is_asked_of_a_silent_daemon_holds_no_answer_back(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: Future[Explanation] = Future()
    monkeypatch.setattr("engine.admission.explain", lambda bridge, lease: never)
    monkeypatch.setattr(service, "EXPLAIN_WAIT_S", 0.0)
    assert details(client, TEN)["explanation"]["why"] == "unknown"


def test_no_step_waits_for_the_explanation() -> None:
    house = build_house(64)
    house.acquires.held = True
    asked = house.ask(range(9), explain=True)
    house.step()
    house.acquires.run()  # the acquire: what is asked behind it stays
    house.run()
    assert asked.finish == "length"
    why = asked.outputs[-1].explanation
    assert why is not None
    assert not why.done()
    house.acquires.run()
    assert why.result(0) == Explanation("never_seen", 0)


@pytest.mark.parametrize("reason", ["dead", "silent"])
def test_a_daemon_that_is_gone_is_said(reason: str) -> None:
    house = build_house(64)
    lease = house.bridge.acquire(b"r", np.arange(9, dtype=np.uint32), Caller()).result()
    assert house.daemon is not None
    assert lease.session
    house.acquires.held = True
    asked = explain(house.bridge, lease)
    house.daemon.detach(reason)  # between the question and its answer
    house.acquires.run()
    assert asked.result(0) == Explanation("no_daemon")
    assert explain(house.bridge, lease).result(0) == Explanation("no_daemon")
    house.daemon.reattach()
    assert explain(house.bridge, lease).result(0) == Explanation("no_daemon")
    assert explain(house.bridge, Lease(b"own")).result(0) == Explanation("not_served")


FOUND = Explained(
    page_size=16,
    tokens=100,
    hit_blocks=4,
    runs=(("gpu", 1), ("disk", 3)),
    why="evicted",
    cause="evicted",
    tier="disk",
    policy="lru",
    died_s_ago=7.0,
    sibling=np.arange(16, dtype=np.uint32),
    sibling_equal=3,
    other=None,
    namespace="ab",
    asked_s_ago=0.0,
    uptime_s=9.0,
    dead_known=1,
    dead_forgotten=0,
)


def test_a_dead_block_is_told_with_its_cause() -> None:
    held = TierTokens(gpu=16, disk=48)
    assert explanation_of(FOUND, 64) == Explanation(
        "evicted", 4, "evicted", "disk", "lru", 7.0, held
    )
    assert explanation_of(replace(FOUND, why="nothing", cause=""), 64).missing_block is None


def test_what_a_tier_had_and_was_not_brought_is_told_so() -> None:
    held = TierTokens(gpu=16, disk=48)
    for matched, tier in ((0, "gpu"), (16, "disk"), (48, "disk")):
        assert explanation_of(FOUND, matched) == Explanation(
            "not_loaded", matched // 16, tier=tier, found=held
        )
    unsaid = replace(FOUND, hit_blocks=6)  # more runs than are told
    assert explanation_of(unsaid, 80) == Explanation("not_loaded", 5, found=held)


def test_the_daemon_explains_what_an_acquire_found(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        pool = PoolMemory(POOL_BYTES)
        bridge = open_bridge(
            NUM_PAGES,
            BridgeConfig(PAGE_SIZE, identity=identity().encode(), low_water=8),
            Daemon(served.address, pool, layout(), "details"),
        )
        assert bridge.wait_attached(WAIT_S)
        tokens = np.arange(2 * PAGE_SIZE + 1, dtype=np.uint32)
        first = bridge.acquire(b"first", tokens, Caller()).result(WAIT_S)
        assert explain(bridge, first).result(WAIT_S) == Explanation("never_seen", 0)
        assert bridge.grow(first, len(tokens))
        bridge.commit([(first, tokens)])
        bridge.release([first])
        assert bridge.settle(WAIT_S)
        again = bridge.acquire(b"again", tokens, Caller()).result(WAIT_S)
        held = TierTokens(gpu=2 * PAGE_SIZE)
        assert explain(bridge, again).result(WAIT_S) == Explanation("nothing", found=held)
        other = replace(again, request_id=b"never asked")
        assert explain(bridge, other).result(WAIT_S) == Explanation("unknown")
        bridge.close()
        pool.close()
