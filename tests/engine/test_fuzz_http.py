"""No body is a 5xx, whatever interface it is sent to: valid ones with parts changed, dropped, put
elsewhere, and what is no JSON. Framing of HTTP itself is tests/system/test_framing.py's."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_tools import SCHEMA, THINKING, WEATHER, Spoken, form

CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
ASKED = {"role": "user", "content": "say"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]}
FUNCTION = {"type": "function"} | WEATHER["function"]
CLAUDES = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "say", "n": 2, "stop": ["x"], "logprobs": 2, "logit_bias": {"5": 1}},
        {"prompt": ["a", "b"], "echo": True, "best_of": 2, "seed": 1, "min_p": 0.1},
        {"prompt": [[70, 71], [72]], "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/chat/completions": [
        {"messages": [ASKED], "tools": [WEATHER], "tool_choice": "auto", "stream": True},
        {"messages": [ASKED, CALLED, ANSWERED], "tools": [WEATHER], "kvc2": {"details": True}},
        {"messages": [ASKED], "tools": [WEATHER], "tool_choice": "required", "top_logprobs": 1},
        {"messages": [ASKED], "response_format": form(SCHEMA), "logprobs": True},
        {"messages": [ASKED], "chat_template_kwargs": {"enable_thinking": True}, "min_tokens": 2},
    ],
    "/v1/responses": [
        {"input": "say", "tools": [FUNCTION], "stream": True, "reasoning": {"effort": "low"}},
        {"input": [ASKED, {"type": "function_call", "call_id": "c"} | CALL], "store": True},
    ],
    "/v1/messages": [
        {"messages": [ASKED], "tools": [CLAUDES], "tool_choice": {"type": "any"}},
        {"messages": [ASKED], "system": [{"type": "text", "text": "a"}], "stream": True},
    ],
    "/api/chat": [{"messages": [ASKED], "tools": [WEATHER], "options": {"seed": 1}}],
    "/api/generate": [{"prompt": "say", "format": SCHEMA, "stream": False}],
    "/tokenize": [{"prompt": "say"}, {"messages": [ASKED], "tools": [WEATHER]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 0.5, 1e308, 10**400),
    *("", " ", "\0", "é\ud800".encode("utf-8", "replace").decode(), "<|turn|>", "x" * 3000),
    *([], [None], {}, {"": None}, [[[[]]]], {"type": "object"}, {"$ref": "#"}, {"type": "string"}),
    *("none", "auto", "required", "text", "json_object", [1, 2], {"a": {"b": []}}),
]
TEXTS = [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"model": "hash"', b"[" * 2000, b"1e999"]
SMALL = {"max_tokens": 6, "max_output_tokens": 6, "options": {"num_predict": 6}}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container of it with each key."""
    found = []
    if isinstance(value, dict):
        found = [(value, key) for key in value]
    elif isinstance(value, list):
        found = [(value, index) for index in range(len(value))]
    return found + [each for holder, key in list(found) for each in places(holder[key])]


def changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 4))):
        holder, key = chance.choice(places(body))
        match chance.randrange(4):
            case 0:
                holder[key] = copy.deepcopy(chance.choice(ODD))
            case 1:
                holder.pop(key)
            case 2:
                other, other_key = chance.choice(places(body) or [(holder, key)])
                if key in (holder if isinstance(holder, dict) else range(len(holder))):
                    holder[key] = copy.deepcopy(other[other_key])
            case _:
                if isinstance(holder, dict):
                    holder[chance.choice(("n", "stop", "tools", "type", "kvc2", "new"))] = 1
        if not places(body):
            break
    return body


def requests(count: int, seed: int) -> Any:
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice(list(VALID))
        if chance.random() < 0.03:
            yield path, chance.choice(TEXTS)
            continue
        body = chance.choice(VALID[path])
        if not path.endswith("tokenize"):
            limits = {k: v for k, v in SMALL.items() if k in LIMITS.get(path, ("max_tokens",))}
            body = limits | body
        body = {"model": "hash"} | body
        yield path, json.dumps(changed(body, chance)).encode()


LIMITS = {
    "/v1/responses": ("max_output_tokens",),
    "/api/chat": ("options",),
    "/api/generate": ("options",),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tmp_path_factory.mktemp("model"), THINKING)


@pytest.mark.parametrize("path", VALID)
def test_each_of_them_is_valid_as_it_is(spoken: Spoken, path: str) -> None:
    for body in VALID[path]:
        more = {} if path.endswith("tokenize") else {"max_tokens": 6}
        reply = spoken.client.post(path, json={"model": "hash"} | more | body)
        wanted = 400 if "top_logprobs" in body else 200  # without logprobs
        assert reply.status_code == wanted, (path, body, reply.text)


def check(spoken: Spoken, count: int, seed: int) -> dict[int, int]:
    """Answers by status."""
    seen: dict[int, int] = {}
    headers = {"content-type": "application/json"}
    for path, raw in requests(count, seed):
        reply = spoken.client.post(path, content=raw, headers=headers)
        assert reply.status_code < 500, (path, raw[:2000], reply.text[:500])
        assert b'"server_error"' not in reply.content, (path, raw[:2000], reply.text[-500:])
        seen[reply.status_code] = seen.get(reply.status_code, 0) + 1
    return seen


@pytest.mark.parametrize("seed", range(2))
def test_no_body_is_a_5xx(spoken: Spoken, seed: int) -> None:
    seen = check(spoken, 200, seed)
    assert set(seen) <= {200, 400, 404, 413}
    assert min(seen[200], seen[400]) > 10  # both sides of the line are tried


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_body_of_20000_is_a_5xx(tmp_path: Path) -> None:
    seen = check(Spoken(tmp_path, THINKING), 20_000, 99)
    print(seen)
    assert set(seen) <= {200, 400, 404, 413}
