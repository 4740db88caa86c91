"""What a `cache_control` mark keeps: from a body to the daemon's pins; what usage says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.request import Pin
from kvc2 import errors
from tests.doubles.engine_doubles import VOCABULARY, build
from tests.doubles.scripted import TEMPLATE
from tests.doubles.small_daemon import PAGE_SIZE
from tests.engine.test_dialects import CLAUDES
from tests.engine.test_tools import Spoken

MARK = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
TOOLS = "{% if tools %}<|turn|>tools{% for t in tools %}{{ t | tojson }}{% endfor %}</s>{% endif %}"


def text(content: str, **mark: Any) -> dict[str, Any]:
    return {"type": "text", "text": content} | mark


@pytest.fixture
def spoken(tmp_path: Path) -> Spoken:
    head, turns = TEMPLATE.split("{% for m", 1)
    return Spoken(tmp_path, head + TOOLS + "{% for m" + turns, daemon=True)


def asked(spoken: Spoken, **fields: Any) -> Any:
    body = {"model": "hash", "max_tokens": 5, "temperature": 0}
    reply = spoken.client.post("/v1/messages", json=body | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def pinned(spoken: Spoken) -> list[tuple[str, int]]:
    """The texts that the daemon was asked to keep, and for how long."""
    assert spoken.house.daemon is not None
    decode = spoken.tokenizer.decode
    special = spoken.tokenizer.special_tokens
    return [(decode(tokens, special), ttl) for _, tokens, ttl in spoken.house.daemon.pinned_for]


CONVERSATION = [
    {"role": "user", "content": [text("one "), text("two ", **MARK), text("three")]},
    {"role": "assistant", "content": [text("so it is", **HOUR)]},
    {"role": "user", "content": "say"},
]


def test_a_mark_keeps_what_stands_before_it(spoken: Spoken) -> None:
    system = [text("You are brief. "), text("Be kind.", **HOUR), text(" The date is new.")]
    asked(spoken, system=system, messages=CONVERSATION)
    begin = "<|turn|>system\nYou are brief. Be kind."
    middle = " The date is new.</s><|turn|>user\none two "
    end = "three</s><|turn|>assistant\nso it is</s><|turn|>"
    assert pinned(spoken) == [
        (begin, 3600),
        (begin + middle, 300),
        (begin + middle + end, 3600),
    ]


def test_a_mark_on_a_tool_keeps_the_tools_up_to_it(spoken: Spoken) -> None:
    more = [CLAUDES | {"name": "first"} | MARK, CLAUDES | {"name": "second"}]
    asked(spoken, tools=more, system="Brief.", messages=[{"role": "user", "content": "say"}])
    ((kept, ttl_s),) = pinned(spoken)
    assert ttl_s == 300
    assert '"name": "first"' in kept
    assert '"name": "sec' not in kept


def test_a_mark_in_the_answer_of_a_tool(spoken: Spoken) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text("rain", **MARK)]}
    call = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    messages = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, text("say")]},
    ]
    asked(spoken, messages=messages, tools=[CLAUDES])
    ((kept, _),) = pinned(spoken)
    assert "rain" in kept
    assert "say" not in kept


def test_a_body_with_a_mark_of_its_own_is_kept_whole(spoken: Spoken) -> None:
    asked(spoken, messages=[{"role": "user", "content": "say"}], **HOUR)
    ((kept, ttl_s),) = pinned(spoken)
    assert "say</s><|turn|>assistant\n" in kept
    assert ttl_s == 3600


def test_without_a_mark_nothing_is_kept(spoken: Spoken) -> None:
    asked(spoken, messages=[{"role": "user", "content": "say"}])
    assert pinned(spoken) == []


@pytest.mark.parametrize("more", [0, 1])
def test_there_are_four_marks_at_most(spoken: Spoken, more: int) -> None:
    content = [text(each, **MARK) for each in ("a", "b", "c", "say")]
    body = {"model": "hash", "max_tokens": 5, "messages": [{"role": "user", "content": content}]}
    reply = spoken.client.post("/v1/messages", json=body | (MARK if more else {}))
    assert reply.status_code == (400 if more else 200), reply.text
    assert ("at most 4 marks" in reply.text) is bool(more)


def test_a_mark_that_the_template_has_no_chat_for_asks_for_nothing(tmp_path: Path) -> None:
    refusing = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    spoken = Spoken(tmp_path, refusing + TEMPLATE, daemon=True)
    asked(spoken, messages=CONVERSATION)
    assert [ttl_s for _, ttl_s in pinned(spoken)] == [300]


# from the scheduler to the daemon


def prompt(blocks: int, first: int = 0) -> list[int]:
    return [(first + i) % VOCABULARY for i in range(blocks * PAGE_SIZE + 1)]


def test_pins_go_to_the_daemon_once_also_when_a_request_is_set_back() -> None:
    house = build(6, low_water=0)  # too few pages for both
    pins = (Pin(PAGE_SIZE - 1, 9), Pin(PAGE_SIZE, 300), Pin(2 * PAGE_SIZE + 1, 3600))
    for first in (0, 50):
        house.ask(prompt(2, first), max_tokens=8, pins=pins)
    house.run()
    assert house.scheduler._metrics.preemptions._value.get() > 0
    assert house.daemon is not None
    told = [(tokens, ttl_s) for _, tokens, ttl_s in house.daemon.pinned_for]
    assert told == [
        (prompt(2, first)[:end], ttl_s)
        for first in (0, 50)
        for end, ttl_s in ((PAGE_SIZE, 300), (2 * PAGE_SIZE + 1, 3600))
    ]


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_the_daemon_has_is_told_behind_its_answers(tokens: int) -> None:
    house = build(64)
    answers = [house.ask(prompt(3), tokens, tell_held=True) for _ in range(2)]
    house.run()
    for answer in answers:
        held = answer.outputs[-1].held
        assert held is not None
        assert held.result(0) == (3 * PAGE_SIZE + tokens) // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize("how", ["refusing", "alone", "failing"])
def test_what_a_daemon_does_not_take_is_not_told(how: str) -> None:
    house = build(64, daemon=how != "alone")
    pin = (Pin(PAGE_SIZE, 300),)
    if house.daemon is not None:
        house.daemon.refuse = how == "refusing"
        house.daemon.fault = errors.LimitReached("x", 1, "y") if how == "failing" else None
    answer = house.ask(prompt(3), 4, tell_held=True, pins=pin)
    house.run()
    assert len(answer.tokens) == 4
    held = answer.outputs[-1].held
    assert held is not None
    assert held.result(0) == 0
