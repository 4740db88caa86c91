"""Whatever is asked of the engine, whoever else is being answered gets the same tokens, and the
engine goes on: arbitrary requests at the worker, arbitrary bodies over HTTP, beside a bystander."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.request import Bounds, Output, Request, SamplingParams
from engine.worker import StoppedError, TooBusyError, Worker
from tests.doubles.engine_doubles import VOCABULARY, House, NoText, build, expected_tokens
from tests.engine.test_http import CHAT, COMPLETION, Letters, over

PROMPT, LENGTH = [5, 6, 7], 40
BOUNDS = Bounds(VOCABULARY, context_tokens=100)
POISON = 94  # a token that no step survives, as if a kernel had a bug; no bystander's answer has it
SHARED = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Asker:
    """A request of its own, and the wait for its end."""

    def __init__(self, request_id: str, tokens: list[int], **fields: Any) -> None:
        self.outputs: list[Output] = []
        self.ended = threading.Event()
        self.request = Request(
            request_id=request_id,
            tokens=np.array(tokens, np.uint32),
            max_tokens=fields.pop("max_tokens", LENGTH),
            sampling=fields.pop("sampling", SamplingParams(temperature=0)),
            text=NoText(),
            deliver=self.deliver,
            **fields,
        )

    def deliver(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        assert self.ended.wait(20), "no answer"
        return [o.token_id for o in self.outputs if o.token_id is not None]


@pytest.fixture
def house() -> House:
    house = build(64, daemon=False)
    house.model.poison = frozenset({POISON, *range(VOCABULARY, VOCABULARY + 9)})
    return house


@pytest.fixture
def worker(house: House) -> Iterator[Worker]:
    worker = Worker(house.scheduler, 8, BOUNDS)
    worker.start()
    yield worker
    worker.stop(10)


token = st.integers(0, VOCABULARY + 3) | st.sampled_from([POISON, (1 << 32) - 1])
requests = st.fixed_dictionaries(
    {
        "tokens": st.lists(token, max_size=110),
        "max_tokens": st.integers(-1, 120),
        "top_scores": st.none() | st.integers(-1, VOCABULARY + 2),
        "sampling": st.builds(
            SamplingParams,
            temperature=st.floats(0, 2),
            top_p=st.floats(0, 1, exclude_min=True),
            top_k=st.integers(0, 200),
            seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        ),
    }
)


@SHARED
@given(asked=st.lists(requests, min_size=1, max_size=3))
def test_no_request_changes_what_its_neighbour_is_answered(
    worker: Worker, asked: list[dict[str, Any]]
) -> None:
    bystander = Asker("bystander", PROMPT)
    worker.submit(bystander.request)
    taken = []
    for index, fields in enumerate(asked):
        asker = Asker(f"r{index}", fields.pop("tokens"), **fields)
        try:
            worker.submit(asker.request)
        except InvalidRequestError:
            continue
        taken.append(asker)
    assert bystander.tokens == expected_tokens(PROMPT, LENGTH)
    for asker in taken:
        fails = POISON in asker.request.tokens
        assert (len(asker.tokens) == asker.request.max_tokens) or POISON in asker.tokens or fails
    assert worker.healthy


class OddLetters(Letters):
    """Letters, with texts that make no token, and ones that make tokens beyond the vocabulary."""

    def chat(self, messages: Any, most: int, **more: Any) -> list[int]:
        return self.encode("".join(message["content"] for message in messages), most)


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    yield from over(house, {}, tokenizer=OddLetters())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
known_fields = st.sampled_from(
    [
        *("prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n"),
        *("logprobs", "top_logprobs", "stream", "stream_options", "kvc2", "tools", "user"),
        *("cache_salt", "metadata", "ignore_eos", "logit_bias", "response_format"),
    ]
)
text = st.text(st.characters(min_codepoint=32, max_codepoint=32 + VOCABULARY + 3), max_size=120)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "prompt": text | st.lists(token, max_size=110),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.just("user"), "content": text}), max_size=3
        ),
        "logprobs": st.integers(0, 20) | st.booleans(),
        "max_tokens": st.integers(0, 120),
        "temperature": st.floats(0, 2),
        "stream": st.booleans(),
    },
)


@SHARED
@given(
    chat=st.booleans(),
    fields=bodies,
    others=st.dictionaries(known_fields | st.text(max_size=9), json_values, max_size=2),
)
def test_no_body_changes_what_a_neighbour_is_answered(
    client: TestClient, chat: bool, fields: dict[str, Any], others: dict[str, Any]
) -> None:
    said: dict[str, Any] = {}

    def bystander() -> None:
        body = COMPLETION | {"prompt": "abc", "max_tokens": LENGTH}
        said["reply"] = client.post("/v1/completions", json=body)

    beside = threading.Thread(target=bystander)
    beside.start()
    body = (CHAT if chat else COMPLETION) | fields | others
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reply = client.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"))
    beside.join()
    wanted = Letters().decode(expected_tokens([65, 66, 67], LENGTH))
    assert said["reply"].json()["choices"][0]["text"] == wanted
    assert client.get("/health").status_code == 200
    if reply.status_code == 500:
        # the poison was in its prompt, or is its own answer's next token
        assert "step that computed this request" in reply.json()["error"]["message"]
    else:
        assert reply.status_code in (200, 400, 404), reply.text


def test_the_worker_alone_decides_what_may_run(worker: Worker) -> None:
    for tokens, field in (([], "tokens"), ([VOCABULARY], "tokens"), ([1] * 61, "tokens")):
        with pytest.raises(InvalidRequestError) as refused:
            worker.submit(Asker("r", tokens).request)
        assert refused.value.field == field
    worker.stop(10)
    with pytest.raises((StoppedError, TooBusyError)):
        worker.submit(Asker("r", [1]).request)


@pytest.mark.parametrize("content", ["", chr(VOCABULARY + 32)])
def test_a_chat_that_makes_no_token_or_one_without_weights_names_its_messages(
    client: TestClient, content: str
) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": content}]}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
