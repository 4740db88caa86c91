"""What a request's `kvc2` field says, from its body to the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from engine.prefix import BridgeConfig, Daemon, PoolMemory, open_bridge
from engine.request import Caller
from kvc2.cache.namespaces import Namespace
from kvc2.client import Hints
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engine_doubles import House, expected_tokens
from tests.doubles.engine_doubles import build as build_house
from tests.doubles.engines import NUM_PAGES, PAGE_SIZE, POOL_BYTES, identity, layout
from tests.doubles.small_daemon import NOTHING_SAID
from tests.engine.test_http import CHAT, COMPLETION, over

ALL = {"priority": 7, "session_end": True, "expect_return_within_s": 30, "ttl_s": 3600}
WAIT_S = 20.0


@pytest.fixture
def house() -> House:
    return build_house(64)


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    yield from over(house, {})


def said(house: House) -> list[tuple[str, Hints]]:
    assert house.daemon is not None
    return [(call, hints) for call, _, hints in house.daemon.said]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("yes", "kvc2"),
        ([], "kvc2"),
        ({"priority": 8}, "kvc2.priority"),
        ({"priority": -1}, "kvc2.priority"),
        ({"priority": 1.5}, "kvc2.priority"),
        ({"priority": True}, "kvc2.priority"),
        ({"session_end": 1}, "kvc2.session_end"),
        ({"ttl_s": -1}, "kvc2.ttl_s"),
        ({"ttl_s": 1 << 32}, "kvc2.ttl_s"),
        ({"ttl_s": "60"}, "kvc2.ttl_s"),
        ({"expect_return_within_s": 1 << 32}, "kvc2.expect_return_within_s"),
        ({"ttl": 60}, "kvc2.ttl"),
    ],
)
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_bad_hint_is_named(client: TestClient, chat: bool, value: Any, param: str) -> None:
    body = (CHAT if chat else COMPLETION) | {"kvc2": value}
    reply = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("key", "nearest"), [("ttl", "ttl_s"), ("prio", "priority"), ("session_ends", "session_end")]
)
def test_an_unknown_hint_is_told_the_nearest_name(
    client: TestClient, key: str, nearest: str
) -> None:
    reply = client.post("/v1/completions", json=COMPLETION | {"kvc2": {key: 1}})
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (f"kvc2.{key}", "unknown_parameter")
    assert f"did you mean {nearest}?" in error["message"]


def test_hints_go_with_the_acquire_and_the_sessions_end_with_the_release(
    client: TestClient, house: House
) -> None:
    body = COMPLETION | {"prompt": "abcdefghij", "kvc2": ALL}
    assert client.post("/v1/completions", json=body).status_code == 200
    running = Hints(priority=7, expect_return_within_s=30, ttl_s=3600)
    ended = Hints(session_end=True, priority=7, expect_return_within_s=30, ttl_s=3600)
    assert said(house) == [("acquire", running), ("release", ended)]


def test_a_request_without_hints_says_nothing(client: TestClient, house: House) -> None:
    for body in (COMPLETION, COMPLETION | {"kvc2": {}}):
        assert client.post("/v1/completions", json=body).status_code == 200
    assert said(house) == [("acquire", NOTHING_SAID), ("release", NOTHING_SAID)] * 2


def test_a_lease_that_is_given_back_ends_no_session() -> None:
    house = build_house(6, low_water=0)  # too few pages for both: the younger one is set back
    for first in (0, 50):
        prompt = list(range(first, first + 9))
        house.ask(prompt, max_tokens=8, hints=Hints(session_end=True, priority=2))
    house.run()
    assert house.scheduler._metrics.preemptions._value.get() > 0
    assert [len(each.tokens) for each in house.asked] == [8, 8]
    assert house.daemon is not None
    ends = [i for call, i, hints in house.daemon.said if call == "release" and hints.session_end]
    assert [each.partition(b"/")[0] for each in ends] == [b"r0", b"r1"]
    assert len([1 for call, _, _ in house.daemon.said if call == "release"]) > len(ends)


def test_a_cancelled_request_ends_no_session() -> None:
    house = build_house(64)
    asked = house.ask(range(9), max_tokens=8, hints=Hints(session_end=True))
    house.step(3)
    house.scheduler.cancel(asked.request.request_id)
    assert said(house)[-1] == ("release", NOTHING_SAID)


def test_without_a_daemon_hints_are_taken_and_ignored() -> None:
    for client in over(build_house(64, daemon=False), {}):
        answer = client.post("/v1/completions", json=COMPLETION | {"kvc2": ALL}).json()
        text = "".join(chr(token + 32) for token in expected_tokens([65, 66, 67], 4))
        assert answer["choices"][0]["text"] == text


def test_the_hints_arrive_in_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[Any] = []
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        real = Namespace.hints

        def note(namespace: Namespace, given: Any) -> Any:
            arrived.append(given)
            return real(namespace, given)

        monkeypatch.setattr(Namespace, "hints", note)
        pool = PoolMemory(POOL_BYTES)
        bridge = open_bridge(
            NUM_PAGES,
            BridgeConfig(PAGE_SIZE, identity=identity().encode()),
            Daemon(served.address, pool, layout(), "hints"),
        )
        assert bridge.wait_attached(WAIT_S)
        tokens = np.arange(40, dtype=np.uint32)
        lease = bridge.acquire(b"r", tokens, Caller(), hints=Hints(True, 30, 7, 3600)).result(
            WAIT_S
        )
        lease.ended = True
        bridge.release([lease])
        bridge.close()
        pool.close()
    fields = ("session_end", "expect_return_within_s", "priority", "ttl_s")
    told = [tuple(getattr(each, name) for name in fields) for each in arrived]
    assert told == [(False, 30, 7, 3600), (True, 30, 7, 3600)]
