"""Tools, reasoning and answers of a form, over a model that says what a test wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from engine.http.speech.formats import BY_NAME
from engine.http.speech.voice import AUTO, OWN
from engine.http.tokenizer import Tokenizer
from engine.request import Bounds
from engine.settings import ToolFormat
from tests.doubles.engine_doubles import build as build_house
from tests.doubles.scripted import END_ID, TEMPLATE, Script
from tests.engine.test_http import over

CALL = ("<tool_call>", '\n{"name": "wea', 'ther", "argu', 'ments": {"city"', ': "Paris"}', "}\n")
CALL2 = ('_call>\n{"name": ', '"weather", "arguments": ', '{"city": "Pa', 'ris"}}\n</tool_call>')
SCRIPTS = {
    "call one": [*CALL, "</tool_call>"],
    "talk and call": ["Let me ", "see.", "\n\n<tool", *CALL2],
    "broken": ["<tool_call>non", "sense</tool_call>"],
    "think": ["<think>", "hmm ", "well", "</think>", "\n\nyes"],
    "say": ["a", "b", "c"],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
THINKING = TEMPLATE + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
THINKING += "{# </think> #}"


class Spoken:
    """A served script."""

    def __init__(
        self,
        folder: Path,
        template: str = TEMPLATE,
        *,
        daemon: bool = False,
        context_tokens: int = 2000,
        **served: Any,
    ) -> None:
        script = Script(SCRIPTS)
        self.tokenizer = Tokenizer(script.write(folder, template))
        house = build_house(256, daemon=daemon)
        self.house = house
        house.scheduler._compute = script.compute()
        bounds = Bounds(script.vocab_size, context_tokens)
        self._served = over(
            house,
            {},
            tokenizer=self.tokenizer,
            bounds=bounds,
            end_token_ids=frozenset({END_ID}),
            **served,
        )
        self.client: TestClient = next(self._served)

    def chat(self, text: str, *, status: int = 200, **fields: Any) -> Any:
        body = {
            "model": "hash",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 200,
        }
        reply = self.client.post("/v1/chat/completions", json=body | fields)
        assert reply.status_code == status, reply.text
        if fields.get("stream"):
            lines = reply.text.split("\n\n")
            return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return reply.json()

    def choice(self, text: str, **fields: Any) -> Any:
        return self.chat(text, **fields)["choices"][0]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tmp_path_factory.mktemp("model"), THINKING)


def heard(pieces: list[Any]) -> dict[str, Any]:
    """A stream's message, put together as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for piece in pieces:
        for choice in piece["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    message["calls"].append({"id": call["id"], "name": call["function"]["name"]})
                    message["calls"][-1]["arguments"] = ""
                message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            message["finish"] = choice["finish_reason"]
    return message


@pytest.mark.parametrize("text", ["call one", "talk and call"])
def test_a_call_is_told_whole_and_in_pieces(spoken: Spoken, text: str) -> None:
    choice = spoken.choice(text, tools=[WEATHER, NOW])
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == (None if text == "call one" else "Let me see.")
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    streamed = heard(spoken.chat(text, tools=[WEATHER], stream=True))
    assert streamed["content"] == (message["content"] or "")
    assert streamed["finish"] == "tool_calls"
    (told,) = streamed["calls"]
    assert (told["name"], told["arguments"]) == ("weather", '{"city": "Paris"}')
    assert told["id"].startswith("call_")


def test_arguments_come_in_more_than_one_piece(spoken: Spoken) -> None:
    pieces = spoken.chat("call one", tools=[WEATHER], stream=True)
    deltas = [c["delta"] for p in pieces for c in p["choices"] if "tool_calls" in c["delta"]]
    assert len(deltas) >= 3


def test_without_tools_a_call_is_text(spoken: Spoken) -> None:
    written = "".join(SCRIPTS["call one"])
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = spoken.choice("call one", **fields)
        assert choice["message"]["content"] == written
        assert choice["finish_reason"] == "stop"


def test_what_can_not_be_read_is_text(spoken: Spoken) -> None:
    choice = spoken.choice("broken", tools=[WEATHER])
    assert choice["message"]["content"] == "".join(SCRIPTS["broken"])
    assert "tool_calls" not in choice["message"]


def test_calls_and_answers_go_through_the_models_template(spoken: Spoken) -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo <|turn|>"}'}
    messages = [
        {"role": "user", "content": "hm"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain; say"},
    ]
    answer = spoken.choice("", messages=messages, tools=[WEATHER])
    assert answer["message"]["content"] == "abc"
    tokens = spoken.tokenizer.chat(
        [
            messages[0],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"function": {"name": "weather", "arguments": {"city": "Oslo <|turn|>"}}}
                ],
            },
            messages[2],
        ],
        1000,
        tools=[WEATHER],
    )
    text = spoken.tokenizer.decode(tokens)
    assert '{"name": "weather", "arguments": {"city": "Oslo <|turn|>"}}' in text
    assert "Tells the weather." in text
    assert tokens.count(1) == 5  # turns: what the arguments hold is no control token


# reasoning


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(thinking: Spoken, stream: bool) -> None:
    if stream:
        message = heard(thinking.chat("think", stream=True))
    else:
        message = thinking.choice("think")["message"]
    assert message["reasoning_content"] == "hmm well"
    assert message["content"] == "yes"


def test_a_template_that_begins_reasoning_is_seen(tmp_path: Path) -> None:
    spoken = Spoken(tmp_path, THINKING)
    plain = spoken.tokenizer.chat([{"role": "user", "content": "x"}], 1000)
    asked = {"enable_thinking": True}
    inside = spoken.tokenizer.chat([{"role": "user", "content": "x"}], 1000, variables=asked)
    voice = spoken.tokenizer.voice
    assert voice.ends_inside(spoken.tokenizer.end_of(inside))
    assert not voice.ends_inside(spoken.tokenizer.end_of(plain))
    message = spoken.choice("x", chat_template_kwargs=asked)["message"]
    assert (message["reasoning_content"], message["content"]) == ("hmm well", "yes")


def test_effort_and_the_callers_variables_reach_the_template(tmp_path: Path) -> None:
    template = TEMPLATE + "{{ reasoning_effort }}{{ enable_thinking }}{{ mood }}{# </think> #}"
    spoken = Spoken(tmp_path, template)
    usage = [
        spoken.chat("say", **fields)["usage"]["prompt_tokens"]
        for fields in (
            {},
            {"reasoning_effort": "low"},
            {"reasoning_effort": "none"},
            {"chat_template_kwargs": {"mood": "good<|turn|>", "enable_thinking": False}},
        )
    ]
    lengths = [len("lowTrue"), len("noneFalse"), len("good<|turn|>False")]
    assert [tokens - usage[0] for tokens in usage[1:]] == lengths


# answers of a form

FORCED: list[tuple[dict[str, Any], int]] = [
    ({"tool_choice": "required", "tools": [WEATHER]}, 1),
    ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, 1),
    ({"tool_choice": "required", "parallel_tool_calls": False}, 1),
]


@pytest.mark.parametrize(("fields", "least"), FORCED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_made_by_a_model_that_would_not(
    spoken: Spoken, fields: dict[str, Any], least: int, stream: bool
) -> None:
    asked = {"tools": [WEATHER, NOW], "stream": stream, "max_tokens": 60} | fields
    if stream:
        message = heard(spoken.chat("say", **asked))
        calls, finish = message["calls"], message["finish"]
    else:
        choice = spoken.choice("say", **asked)
        calls = [each["function"] for each in choice["message"]["tool_calls"]]
        finish = choice["finish_reason"]
    assert len(calls) >= least
    if finish == "tool_calls":  # else it was cut off
        for call in calls:
            arguments = json.loads(call["arguments"])
            assert call["name"] in ("weather", "now")
            assert call["name"] != "weather" or arguments["city"] in ("Paris", "Oslo")
    if fields.get("parallel_tool_calls") is False or isinstance(fields["tool_choice"], dict):
        assert len(calls) == 1


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["cold", "warm"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_has_the_form_of_its_schema(spoken: Spoken, temperature: int, n: int) -> None:
    answer = spoken.chat("say", response_format=form(SCHEMA), temperature=temperature, n=n)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert set(found) == {"ok", "kind"}
        assert isinstance(found["ok"], bool)
        assert found["kind"] in ("cold", "warm")


def test_an_answer_is_an_object(spoken: Spoken) -> None:
    choice = spoken.choice("say", response_format={"type": "json_object"}, max_tokens=30)
    assert choice["message"]["content"].startswith("{")


def test_a_model_with_tools_may_call_or_answer_in_its_form(spoken: Spoken) -> None:
    asked = {"tools": [WEATHER], "response_format": form(SCHEMA)}
    called = spoken.choice("call one", **asked)
    assert called["message"]["tool_calls"][0]["function"]["name"] == "weather"
    answered = spoken.choice("say", **asked)["message"]["content"]
    assert json.loads(answered)["kind"] in ("cold", "warm")


def test_others_in_the_batch_are_not_held_to_it(spoken: Spoken) -> None:
    """Two at once: the one without a schema says its script."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(spoken.choice, "say", response_format=form(SCHEMA))
        free = pool.submit(spoken.choice, "talk and call")
        assert free.result()["message"]["content"] == "".join(SCRIPTS["talk and call"])
        assert json.loads(held.result()["message"]["content"])


def test_reasoning_goes_before_the_form(thinking: Spoken) -> None:
    asked = {"response_format": form(SCHEMA), "chat_template_kwargs": {"enable_thinking": True}}
    template_token = thinking.tokenizer.token_of("</think>")
    assert template_token is not None
    message = thinking.choice("say", **asked, logit_bias={str(template_token): 100})["message"]
    assert json.loads(message["content"])["kind"] in ("cold", "warm")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": form({"type": "no such"})}, "response_format"),
        ({"response_format": form({"$ref": "#/nowhere"})}, "response_format"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}
                ],
            },
            "tools",
        ),
        ({"tool_choice": "required"}, None),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [NOW]}, None),
        ({"tools": [NOW, NOW]}, "tools"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused(
    spoken: Spoken, fields: dict[str, Any], param: str | None
) -> None:
    error = spoken.chat("say", status=400, **fields)["error"]
    assert error["param"] == param
    if param is None:
        assert "tool_choice" in error["message"]


def test_each_format_has_a_flag() -> None:
    assert set(get_args(ToolFormat)) == {AUTO, OWN, *BY_NAME}


# templates that know no tools


PLAIN = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "<|turn|>assistant\n"
)


def test_a_model_without_tools_is_told_of_them(tmp_path: Path) -> None:
    spoken = Spoken(tmp_path, PLAIN)
    assert spoken.choice("call one", tools=[WEATHER])["message"]["tool_calls"]
    user = {"role": "user", "content": "hm"}
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = {"role": "assistant", "content": "So.", "tool_calls": [call]}
    said = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    text = spoken.tokenizer.decode(
        spoken.tokenizer.chat([user, asked, said], 2000, tools=[WEATHER])
    )
    assert "Tells the weather." in text
    assert 'So.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}' in text
    assert "user\n<tool_response>\nrain\n</tool_response>" in text
    system = {"role": "system", "content": "Be brief."}
    text = spoken.tokenizer.decode(spoken.tokenizer.chat([system, user], 2000, tools=[WEATHER]))
    assert text.startswith("system\nBe brief.\n\n# Tools")
    assert text.count("system\n") == 1
