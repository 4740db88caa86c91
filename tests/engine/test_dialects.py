"""Other interfaces than OpenAI's first two, over a model that says what a test wants, by their own
clients where the environment has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.engine.test_tools import SCHEMA, THINKING, WEATHER, Spoken

TOOL = WEATHER["function"]
CLAUDES = {"name": "weather", "input_schema": TOOL["parameters"], "description": "d"}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tmp_path_factory.mktemp("model"), THINKING)


@pytest.fixture(scope="module")
def openai(spoken: Spoken) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="x", http_client=spoken.client)


def post(spoken: Spoken, path: str, body: dict[str, Any], status: int = 200) -> Any:
    reply = spoken.client.post(path, json={"model": "hash"} | body)
    assert reply.status_code == status, reply.text
    return reply


def events(text: str) -> list[Any]:
    """Of a stream; each event's name is its type."""
    found = []
    for each in text.strip().split("\n\n"):
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# /v1/responses


def test_a_response_is_what_openais_client_reads(openai: OpenAI) -> None:
    answer = openai.responses.create(
        model="hash", input="say", instructions="Be brief.", temperature=0, store=False
    )
    assert answer.output_text == "abc"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4


def test_a_response_calls_and_takes_the_answer(openai: OpenAI) -> None:
    tool: Any = {"type": "function"} | TOOL
    answer = openai.responses.create(
        model="hash", input="talk and call", tools=[tool], temperature=0
    )
    _, call = answer.output
    assert answer.output_text == "Let me see."
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}
    history: Any = [{"role": "user", "content": "x"}, *(o.to_dict() for o in answer.output)]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain; say"})
    again = openai.responses.create(model="hash", input=history, tools=[tool], temperature=0)
    assert again.output_text == "abc"


@pytest.mark.parametrize("text", ["talk and call", "think", "say"])
def test_a_streamed_response_says_the_same(openai: OpenAI, text: str) -> None:
    tool: Any = {"type": "function"} | TOOL
    asked: Any = {"model": "hash", "input": text, "tools": [tool], "temperature": 0}
    whole = openai.responses.create(**asked)
    seen = list(openai.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[0].type == "response.created"
    last = seen[-1]
    assert last.type == "response.completed"

    def told(response: Any) -> list[Any]:
        return [
            (o.type, getattr(o, "arguments", None) or [c.text for c in o.content])
            for o in response.output
        ]

    assert told(last.response) == told(whole)
    deltas = "".join(e.delta for e in seen if e.type == "response.output_text.delta")
    assert deltas == whole.output_text


def test_a_response_of_a_form_and_one_cut_off(spoken: Spoken) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    answer = post(spoken, "/v1/responses", {"input": "say", "text": form}).json()
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"ok", "kind"}
    answer = post(spoken, "/v1/responses", {"input": "say", "max_output_tokens": 2}).json()
    assert answer["status"] == "incomplete"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "message", "role": "wizard", "content": "x"}]}, "input.0"),
    ],
)
def test_what_a_response_can_not_do_is_named(
    spoken: Spoken, fields: dict[str, Any], param: str
) -> None:
    error = post(spoken, "/v1/responses", {"input": "say"} | fields, 400).json()["error"]
    assert error["param"].startswith(param)


# /v1/messages


def ask(spoken: Spoken, text: str, status: int = 200, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 50, "temperature": 0}
    return post(spoken, "/v1/messages", body | fields, status)


def test_a_message_has_blocks(spoken: Spoken) -> None:
    answer = ask(spoken, "talk and call", tools=[CLAUDES]).json()
    text, call = answer["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert answer["stop_reason"] == "tool_use"
    assert ask(spoken, "think").json()["content"][0]["thinking"] == "hmm well"
    cut = ask(spoken, "say", max_tokens=2).json()
    assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "ab")


def test_a_message_names_the_sequence_that_ended_it(spoken: Spoken) -> None:
    fields: dict[str, Any] = {"stop_sequences": ["zz", "c"]}
    answer = ask(spoken, "say", **fields).json()
    assert answer["content"][0]["text"] == "ab"
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "c")
    told = events(ask(spoken, "say", stream=True, **fields).text)
    assert told[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "c"}
    unmet = ask(spoken, "say", stop_sequences=["zz"]).json()
    assert (unmet["stop_reason"], unmet["stop_sequence"]) == ("end_turn", None)


@pytest.mark.parametrize("text", ["talk and call", "think", "call one"])
def test_a_streamed_message_says_the_same(spoken: Spoken, text: str) -> None:
    whole = ask(spoken, text, tools=[CLAUDES]).json()
    told = events(ask(spoken, text, tools=[CLAUDES], stream=True).text)
    assert [told[0]["type"], told[-1]["type"]] == ["message_start", "message_stop"]
    blocks: list[Any] = []
    for event in told:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            delta = dict(event["delta"])
            kind = delta.pop("type")
            ((name, value),) = delta.items()
            block = blocks[event["index"]]
            block["json" if kind == "input_json_delta" else name] += value
    for block, wanted in zip(blocks, whole["content"], strict=True):
        if block["type"] == "tool_use":
            assert json.loads(block["json"]) == wanted["input"]
        else:
            assert block | {"json": ""} == wanted | {"json": ""}
    assert told[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert told[-2]["usage"] == whole["usage"]


def test_a_conversation_with_tools_becomes_a_chat(spoken: Spoken) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hm"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "is_error": True},
                {"type": "text", "text": "say", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    answer = ask(spoken, "", messages=messages, tools=[CLAUDES], system="Be brief.").json()
    assert answer["content"] == [{"type": "text", "text": "abc"}]


def test_forced_and_formed_messages(spoken: Spoken) -> None:
    choice = {"type": "tool", "name": "weather"}
    answer = ask(spoken, "say", tools=[CLAUDES], tool_choice=choice).json()
    assert answer["content"][0]["input"]["city"] in ("Paris", "Oslo")
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = ask(spoken, "say", output_config=form).json()
    assert set(json.loads(answer["content"][0]["text"])) == {"ok", "kind"}


def test_refusals_have_each_interfaces_form(spoken: Spoken) -> None:
    error = ask(spoken, "say", 400, max_tokens=0).json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in error["error"]["message"]
    error = post(spoken, "/api/chat", {"messages": []}, 400).json()
    assert "messages" in error["error"]
    assert post(spoken, "/v1/embeddings", {"input": "a"}, 404).json()["error"]["code"]


# Ollama's


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_of_ollamas(spoken: Spoken, stream: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "talk and call"}], "tools": [WEATHER]}
    options = {"options": {"temperature": 0, "num_ctx": 100}, "stream": stream}
    told = lines(post(spoken, "/api/chat", asked | options | {"model": "hash:latest"}).text)
    assert "".join(each["message"]["content"] for each in told) == "Let me see."
    (call,) = [call for each in told for call in each["message"].get("tool_calls", ())]
    assert call["function"]["name"] == "weather"
    assert call["function"]["arguments"] == {"city": "Paris"}
    assert told[-1]["done"]
    assert told[-1]["eval_count"] > 0
    thought = {"messages": [{"role": "user", "content": "think"}], "stream": stream}
    told = lines(post(spoken, "/api/chat", thought | {"options": {"temperature": 0}}).text)
    assert "".join(each["message"].get("thinking", "") for each in told) == "hmm well"


def test_ollama_generates(spoken: Spoken) -> None:
    asked = {"prompt": "say", "options": {"temperature": 0, "num_predict": 2}}
    told = lines(post(spoken, "/api/generate", asked).text)
    assert "".join(each["response"] for each in told) == "ab"
    assert told[-1]["done_reason"] == "length"
    raw = post(spoken, "/api/generate", asked | {"raw": True, "stream": False}).json()
    assert raw["prompt_eval_count"] == 3
    formed = {"format": SCHEMA, "stream": False, "prompt": "say"}
    answer = post(spoken, "/api/generate", formed).json()["response"]
    assert set(json.loads(answer)) == {"ok", "kind"}


def test_ollama_tells_of_the_model(spoken: Spoken) -> None:
    assert spoken.client.get("/api/version").json()["version"]
    (model,) = spoken.client.get("/api/tags").json()["models"]
    assert model["name"] == "hash"
    shown = post(spoken, "/api/show", {"model": "hash:latest"}).json()
    assert {"tools", "thinking"} <= set(shown["capabilities"])
    assert post(spoken, "/api/show", {"name": "hash"}).json() == shown  # as it once was called
    for named in ({"model": "other"}, {"name": "other"}, {"model": "hash", "name": "other"}):
        post(spoken, "/api/show", named, 404)


# tokens


def test_text_becomes_tokens_and_text_again(spoken: Spoken) -> None:
    found = post(spoken, "/tokenize", {"prompt": "héllo<|turn|>"}).json()
    assert found["count"] == len(found["tokens"]) == 7
    assert found["max_model_len"] == 2000
    text = post(spoken, "/detokenize", {"tokens": found["tokens"]}).json()["prompt"]
    assert text == "héllo<|turn|>"
    chat = post(spoken, "/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json()
    assert "user\na" in post(spoken, "/detokenize", {"tokens": chat["tokens"]}).json()["prompt"]
    post(spoken, "/tokenize", {"prompt": "a", "messages": []}, 400)
    post(spoken, "/detokenize", {"tokens": [1 << 20]}, 400)
    post(spoken, "/tokenize", {"prompt": "a" * 4000, "model": "hash"}, 413)
    post(spoken, "/tokenize", {"prompt": "a", "model": "other"}, 404)


def test_what_was_cached_and_what_is_now_is_told(tmp_path: Path) -> None:
    spoken = Spoken(tmp_path, daemon=True)
    text = "a long text that is said twice, for its blocks to be found again: say"
    first, second = (ask(spoken, text).json()["usage"] for _ in range(2))
    prompt = sum(v for k, v in first.items() if k != "output_tokens")
    assert first["cache_read_input_tokens"] == 0
    assert first["cache_creation_input_tokens"] > 0
    # all but the block of the last token, which is always computed
    assert prompt - 4 <= second["cache_read_input_tokens"] < prompt
    assert first["cache_creation_input_tokens"] == prompt // 4 * 4
    assert sum(v for k, v in second.items() if k != "output_tokens") == prompt
