"""Several answers to one request: n, best_of and several prompts, whole and in a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.http.replies import Choice, best
from engine.request import Output, ScoredToken
from tests.doubles.engine_doubles import VOCABULARY, House, expected_tokens
from tests.doubles.engine_doubles import build as build_house
from tests.engine.test_http import CHAT, COMPLETION, Letters, over


@pytest.fixture
def house() -> House:
    return build_house(256, daemon=True)


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    yield from over(house, {}, max_queued=64)


def text_of(prompt: str, count: int) -> str:
    letters = Letters()
    return letters.decode(expected_tokens(letters.encode(prompt, 1000), count))


def ask(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return reply.json()
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def streamed(pieces: list[dict[str, Any]]) -> dict[int, str]:
    """Text by choice."""
    found: dict[int, str] = {}
    for piece in pieces:
        for choice in piece["choices"]:
            said = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            found[choice["index"]] = found.get(choice["index"], "") + said
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["abc", "xyz"], [[65, 66, 67], [88, 89, 90]]])
def test_each_prompt_gets_its_answers_in_order(
    client: TestClient, prompts: list[Any], stream: bool
) -> None:
    body = COMPLETION | {"prompt": prompts, "n": 2, "stream": stream}
    answer = ask(client, "completions", body)
    wanted = [text_of(prompt, 4) for prompt in ("abc", "abc", "xyz", "xyz")]
    if stream:
        assert streamed(answer) == dict(enumerate(wanted))
        ends = [c for piece in answer for c in piece["choices"] if c["finish_reason"]]
        assert sorted(c["index"] for c in ends) == [0, 1, 2, 3]
    else:
        assert [choice["text"] for choice in answer["choices"]] == wanted
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == 6
        assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_chat_are_drawn_apart_and_the_same_each_time(
    client: TestClient, stream: bool
) -> None:
    body = CHAT | {"n": 3, "temperature": 2, "seed": 5, "max_tokens": 20, "stream": stream}

    def texts(body: dict[str, Any]) -> list[str]:
        answer = ask(client, "chat/completions", body)
        if stream:
            return list(streamed(answer).values())
        return [choice["message"]["content"] for choice in answer["choices"]]

    found = texts(body)
    assert texts(body) == found
    assert len(set(found)) == 3
    assert texts(body | {"n": 1, "seed": 6}) == found[1:2]  # choice i has the i-th seed


def test_choices_share_their_prompts_pages(client: TestClient, house: House) -> None:
    """The prompt is computed once, but for the tokens of its last block."""
    prompt = "the same long prompt of many a letter" * 3
    ask(client, "completions", COMPLETION | {"prompt": prompt, "n": 8, "max_tokens": 1})
    computed = sum(len(batch.token_ids) for batch in house.model.batches)
    size = house.bridge.config.page_size
    assert computed <= len(prompt) + 7 * size


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_begins_each_answer(client: TestClient, stream: bool) -> None:
    body = COMPLETION | {"prompt": ["abc", "xyz"], "echo": True, "stream": stream}
    answer = ask(client, "completions", body)
    wanted = [prompt + text_of(prompt, 4) for prompt in ("abc", "xyz")]
    if stream:
        assert list(streamed(answer).values()) == wanted
    else:
        assert [choice["text"] for choice in answer["choices"]] == wanted


def logprob(prefix: list[int], token: int) -> float:
    """What the hash model's logits say: 10 for the one that follows, 0 for all others."""
    (follows,) = expected_tokens(prefix, 1)
    total = math.log(math.exp(10) + VOCABULARY - 1)
    return (10 if token == follows else 0) - total


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_own_log_probabilities(client: TestClient, stream: bool) -> None:
    """The first token has none, since nothing stands before it. A cached prompt has them too."""
    text = "".join(chr(32 + i % 90) for i in range(40))  # several chunks
    body = COMPLETION | {"prompt": [text, "xyz", "q"], "echo": True, "logprobs": 2}
    for _ in range(2):
        answer = ask(client, "completions", body | {"stream": stream})
        told: dict[int, dict[str, list[Any]]] = {}
        for piece in answer if stream else [answer]:
            for choice in piece["choices"]:
                mine = told.setdefault(choice["index"], {})
                for name, values in (choice["logprobs"] or {}).items():
                    mine.setdefault(name, []).extend(values)
        for index, prompt in enumerate(body["prompt"]):
            whole = prompt + text_of(prompt, 4)
            ids = [ord(letter) - 32 for letter in whole]
            found = told[index]
            assert found["tokens"] == list(whole)
            assert found["text_offset"] == list(range(len(whole)))
            assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
            wanted = [logprob(ids[:i], ids[i]) for i in range(1, len(ids))]
            assert found["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
            for i, best_ones in enumerate(found["top_logprobs"][1:], 1):
                assert len(best_ones) == 2
                (follows,) = expected_tokens(ids[:i], 1)
                assert max(best_ones, key=best_ones.__getitem__) == chr(32 + follows)


def test_a_scored_prompt_that_is_set_back_is_scored_once() -> None:
    house = build_house(6, low_water=0)  # too few pages for both
    asked = [house.ask(range(first, first + 9), 8, prompt_scores=1) for first in (0, 50)]
    house.run()
    assert house.scheduler._metrics.preemptions._value.get() > 0
    for each in asked:
        tokens = each.request.tokens.tolist()
        told = [scored for output in each.outputs for scored in output.prompt]
        assert [token.token_id for token, _ in told] == tokens[1:]
        wanted = [logprob(tokens[:i], tokens[i]) for i in range(1, len(tokens))]
        assert [token.logprob for token, _ in told] == pytest.approx(wanted, abs=1e-4)


def test_the_best_of_several_are_told(client: TestClient) -> None:
    body = COMPLETION | {"best_of": 5, "n": 2, "temperature": 2, "seed": 1, "logprobs": 0}
    answer = ask(client, "completions", body)
    every = ask(client, "completions", body | {"best_of": 5, "n": 5})

    def score(choice: dict[str, Any]) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return float(sum(scores) / len(scores))

    ranked = sorted(every["choices"], key=score, reverse=True)
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in ranked[:2]]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 20
    for fields in ({"stream": True}, {"n": 6}):
        assert client.post("/v1/completions", json=body | fields).status_code == 400


def test_the_likeliest_a_token_is_the_best() -> None:
    def choice(index: int, *logprobs: float) -> Choice:
        made = Choice(index, 0)
        for each in logprobs:
            made.add(Output(chosen=ScoredToken(0, 0.0, each)))
        return made

    choices = [choice(0, -2.0, -2.0), choice(1, -1.0, -1.5, -1.0), choice(2, -1.4)]
    assert [each.index for each in best(choices, 2)] == [1, 2]
    assert [each.index for each in best(choices, 3)] == [0, 1, 2]


def test_a_failing_choice_ends_all_and_frees_what_they_hold(
    client: TestClient, house: House
) -> None:
    house.model.poison = frozenset({65})
    reply = client.post("/v1/completions", json=COMPLETION | {"prompt": ["abc", "xyz"], "n": 2})
    assert reply.status_code == 500
    house.model.poison = frozenset()
    answer = ask(client, "completions", COMPLETION)
    assert answer["choices"][0]["text"] == text_of("abc", 4)
    assert house.scheduler.requests == 0


def test_what_the_queue_has_no_room_for_is_taken_whole_or_not_at_all(house: House) -> None:
    served = over(house, {}, max_queued=4)
    client = next(served)
    body = COMPLETION | {"prompt": ["a", "b", "c", "d", "e"]}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert "at most 4" in reply.json()["error"]["message"]
    body["prompt"].pop()
    assert len(ask(client, "completions", body)["choices"]) == 4


def test_stop_token_ids_end_an_answer_and_min_tokens_hold_it_open(client: TestClient) -> None:
    tokens = expected_tokens(Letters().encode("abc", 10), 6)
    body = COMPLETION | {"max_tokens": 6, "stop_token_ids": [tokens[2]]}
    choice = ask(client, "completions", body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == Letters().decode(tokens[:2])
    choice = ask(client, "completions", body | {"min_tokens": 4})["choices"][0]
    assert len(choice["text"]) >= 4
    stop = {"stop": Letters().decode(tokens[1:2])}
    assert ask(client, "completions", COMPLETION | stop)["choices"][0]["text"] == text_of("abc", 1)
    kept = ask(client, "completions", COMPLETION | stop | {"min_tokens": 3})["choices"][0]["text"]
    assert kept.startswith(text_of("abc", 2))


def test_a_bias_decides_and_log_probabilities_stay_the_models(client: TestClient) -> None:
    body = COMPLETION | {"logit_bias": {"33": 100}, "logprobs": 1}
    choice = ask(client, "completions", body)["choices"][0]
    assert choice["text"] == "AAAA"
    assert all(score < -5 for score in choice["logprobs"]["token_logprobs"])
