"""Every field of a body, in process, over a scheduler on the hash model: what is refused names
it."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion

from engine.http.app import build
from engine.http.service import Served
from engine.http.speech.voice import Voice
from engine.http.template import TemplateError
from engine.request import Bounds
from engine.scheduler import SchedulerConfig
from engine.worker import Worker
from kvc2.keyring import Keyring
from tests.doubles.engine_doubles import VOCABULARY, House, expected_tokens
from tests.doubles.engine_doubles import build as build_house


class Letters:
    """Token i is the letter chr(i + 32)."""

    def encode(self, text: str, most: int, *, special: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], shown: Container[int] = ()) -> str:
        return "".join(chr(token + 32) for token in token_ids)

    special_tokens: ClassVar[dict[int, str]] = {}
    voice = Voice.of("", "auto", None)
    template_source = ""
    json = None

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id + 32).encode()

    def end_of(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids)

    def token_of(self, literal: str) -> int | None:
        return None

    def chat(self, messages: Sequence[dict[str, str]], most: int, **more: Any) -> list[int]:
        if messages[0]["role"] == "tool":
            raise TemplateError("tools can't begin")
        return self.encode(messages[-1]["content"], most)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    yield from serve({})


def serve(tenants: dict[str, str]) -> Iterator[TestClient]:
    yield from over(build_house(64, daemon=False), tenants)


def over(
    house: House,
    tenants: dict[str, str],
    *,
    tokenizer: Any = None,
    max_queued: int = 8,
    strict_fields: bool = False,
    max_body_bytes: int = 4000,
    bounds: Bounds | None = None,
    end_token_ids: frozenset[int] = frozenset(),
) -> Iterator[TestClient]:
    served = Served(
        model="hash",
        end_token_ids=end_token_ids,
        keys=Keyring(tenants),
        max_body_bytes=max_body_bytes,
        strict_fields=strict_fields,
    )
    app = build(
        served,
        worker=Worker(house.scheduler, max_queued, bounds or BOUNDS),
        tokenizer=tokenizer or Letters(),
        registry=house.scheduler._metrics.registry,
        daemon=lambda: None,
    )
    with TestClient(app) as client:
        yield client


BOUNDS = Bounds(VOCABULARY, context_tokens=200)
COMPLETION = {"model": "hash", "prompt": "abc", "temperature": 0, "max_tokens": 4}
CHAT = {"model": "hash", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 1 << 63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 9}, "n"),  # more than the queue holds
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_tokens": 5}, "min_tokens"),  # of at most 4
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"logit_bias": {"a": 5}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"97": 1}}, "logit_bias"),  # beyond the vocabulary
    ({"logit_bias": [1]}, "logit_bias"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": 5}, "user"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"kvc2": {"details": "yes"}}, "kvc2.details"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BOTH)
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_bad_field_is_named(
    client: TestClient, chat: bool, fields: dict[str, Any], param: str
) -> None:
    body = (CHAT if chat else COMPLETION) | fields
    reply = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("invalid_value", "unknown_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 129}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": "a" * 200}, "prompt"),
        ({"prompt": "a" * 150, "max_tokens": 60}, "prompt"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    reply = client.post("/v1/completions", json=COMPLETION | fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "custom"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),  # of these letters
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {"user_location": None}}, "web_search_options"),
        ({"verbosity": "high"}, "verbosity"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param)


NOTHING: list[dict[str, Any]] = [
    {"kvc2": None},
    {"stop": None, "user": None, "n": None, "stream_options": None},
    {"audio": None, "prediction": {}, "functions": []},
    {"service_tier": None},
    {"service_tier": "flex", "safety_identifier": "a", "prompt_cache_key": "b"},
    {"store": True, "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0, "logit_bias": {}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
    {"prompt_cache_retention": "24h", "top_k": -1},
]
NOTHING_OF_A_CHAT: list[dict[str, Any]] = [
    {"tools": None, "tool_choice": "none", "parallel_tool_calls": False},
    {"tools": [], "parallel_tool_calls": True, "modalities": ["text"], "store": None},
    {"function_call": None, "reasoning_effort": None, "metadata": {}},
    {"prediction": {"type": "content", "content": "a"}, "verbosity": "medium"},
]


@pytest.mark.parametrize("fields", NOTHING)
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_member_that_asks_for_nothing_is_taken(
    client: TestClient, chat: bool, fields: dict[str, Any]
) -> None:
    body = (CHAT if chat else COMPLETION) | fields
    reply = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("fields", NOTHING_OF_A_CHAT)
def test_a_member_of_a_chat_that_asks_for_nothing_is_taken(
    client: TestClient, fields: dict[str, Any]
) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_an_unknown_field_is_ignored_and_told_once(
    client: TestClient, caplog: pytest.LogCaptureFixture, chat: bool
) -> None:
    name = f"no_such_field_{chat}"
    body = (CHAT if chat else COMPLETION) | {name: 1, "stream_options": {}, "stream": True}
    for _ in range(2):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        assert client.post(path, json=body).status_code == 200
    assert caplog.text.count(name) == 1


def test_an_unknown_field_is_refused_where_fields_are_strict() -> None:
    served = over(build_house(64, daemon=False), {}, strict_fields=True)
    client = next(served)
    messages = [{"role": "user", "content": "a", "mood": "good"}]
    for fields, param in [({"no_such_field": 1}, "no_such_field"), ({"x": None}, None)]:
        reply = client.post("/v1/completions", json=COMPLETION | fields)
        assert reply.status_code == (400 if param else 200)
        if param:
            assert reply.json()["error"]["param"] == param
            assert reply.json()["error"]["code"] == "unknown_parameter"
    reply = client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
    assert reply.json()["error"]["param"] == "messages.0.mood"


def test_an_answer_can_be_sent_back_as_a_client_dumps_it(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    message = ChatCompletion.model_validate(answer).choices[0].message
    for dumped in (message.model_dump(), message.model_dump(mode="json"), message.to_dict()):
        more = {"annotations": [], "tool_calls": None, "audio": None, "function_call": None}
        messages = [*CHAT["messages"], dumped | more, {"role": "user", "content": "b"}]
        reply = client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert reply.status_code == 200, reply.text


def test_what_a_message_asks_for_and_is_not_done_is_refused(client: TestClient) -> None:
    call = {"name": "f", "arguments": "{}"}
    for fields in ({"function_call": call}, {"content": [{"type": "image_url"}]}):
        messages = [{"role": "assistant", "content": None} | fields]
        reply = client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith(f"messages.0.{next(iter(fields))}")


def test_other_refusals(client: TestClient) -> None:
    post = client.post
    assert post("/v1/completions", json=COMPLETION | {"model": "x"}).status_code == 404
    assert post("/v1/completions", content=b"{nonsense").json()["error"]["code"] == "invalid_json"
    assert post("/v1/completions", content=b"x" * 5000).status_code == 413
    assert post("/v1/nothing", json={}).json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/models/x").status_code == 404
    too_long = post("/v1/completions", json=COMPLETION | {"max_tokens": 1000})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    nan = '{"model": "hash", "prompt": "a", "temperature": NaN}'
    assert post("/v1/completions", content=nan).status_code == 400


def test_an_answer_is_whole(client: TestClient) -> None:
    body = COMPLETION | {"logprobs": 2, "kvc2": {"details": True}}
    answer = client.post("/v1/completions", json=body).json()
    tokens = expected_tokens([65, 66, 67], 4)
    assert answer["choices"][0]["text"] == Letters().decode(tokens)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert [t["token_id"] for t in answer["kvc2"]["tokens"]] == tokens
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 4
    assert answer["usage"]["total_tokens"] == 7


@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_temperature_next_to_nothing_is_greedy(client: TestClient, temperature: float) -> None:
    wanted = client.post("/v1/completions", json=COMPLETION).json()["choices"][0]["text"]
    cold = COMPLETION | {"temperature": temperature}
    assert client.post("/v1/completions", json=cold).json()["choices"][0]["text"] == wanted


def test_a_stop_string_is_cut_off(client: TestClient) -> None:
    text = Letters().decode(expected_tokens([65, 66, 67], 8))
    body = COMPLETION | {"max_tokens": 8, "stop": text[2:4]}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[:2], "stop")


def test_a_stream_says_the_same_and_ends_with_done(client: TestClient) -> None:
    body = CHAT | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/chat/completions", json=body).text
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert '"prompt_tokens":3' in lines[-2]
    assert '"role":"assistant"' in lines[0]
    assert '"finish_reason":"length"' in lines[-3]


def test_health_metrics_and_models(client: TestClient) -> None:
    assert client.get("/health").json() == {
        "status": "ok",
        "attached": False,
        "daemon": None,
    }
    assert "kvc2_engine_requests_total" in client.get("/metrics").text
    assert client.get("/v1/models").json()["data"][0]["id"] == "hash"


@pytest.mark.parametrize("stream", [False, True])
def test_what_can_not_run_now_is_503(stream: bool) -> None:
    house = build_house(4, config=SchedulerConfig(8, 16, 4, starve_s=0.0))
    assert house.daemon is not None
    house.daemon.detach("silent")  # its pages may not be touched, and those granted are too few
    house.scheduler.running._clock = time.monotonic
    for client in over(house, {}):
        body = COMPLETION | {"prompt": "abc" * 6, "stream": stream}
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert "silent" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "unavailable"


def test_a_stopped_engine_is_503_at_once() -> None:
    house = build_house(64, daemon=False)
    for client in over(house, {}):
        house.scheduler.step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        health = client.get("/health")
        while health.status_code == 200:
            health = client.get("/health")
        assert health.json()["status"] == "failed"
        refused = client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")


def test_a_key_is_needed_where_there_are_keys() -> None:
    for client in serve({"secret": "tenant-a"}):
        assert client.get("/v1/models").status_code == 401
        wrong = client.post("/v1/completions", json={}, headers={"Authorization": "Bearer no"})
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer secret"}
        assert client.post("/v1/completions", json=COMPLETION, headers=right).status_code == 200


def test_a_full_queue_answers_429_before_a_body_is_tokenized() -> None:
    class Untouched(Letters):
        def encode(self, text: str, most: int, *, special: bool = True) -> list[int]:
            raise AssertionError("tokenized for nothing")

    house = build_house(64, daemon=False)
    for client in over(house, {}, tokenizer=Untouched(), max_queued=0):
        for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
            answer = client.post(f"/v1/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
