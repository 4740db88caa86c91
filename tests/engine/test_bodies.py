"""Bodies of any size are refused by their length, at the first bad element, in few words and on
threads of their own: what a caller sends costs nobody else time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.http import bodies
from engine.http.errors import QUOTED_MAX, ApiError, quoted
from engine.http.fields import UNKNOWN_MAX, Unknown
from engine.http.schema import ChatBody, CompletionBody
from engine.http.tokenizer import PIECE_CHARACTERS, TextTooLongError, Tokenizer
from tests.doubles.byte_tokenizer import TURN, add_tokenizer
from tests.doubles.engine_doubles import build as build_house
from tests.engine.test_http import CHAT, COMPLETION, Letters, over

MANY = 50_000
STRICT = Unknown(refused=True)
ANSWER_BYTES_MAX = 1000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model: Path = add_tokenizer(tmp_path_factory.mktemp("model"))
    (model / "config.json").write_text('{"model_type": "mixtral"}')
    return Tokenizer(model)


json_values = st.recursive(
    st.none() | st.integers(0, 9) | st.text(st.sampled_from('a,[]{}:"\\'), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.sampled_from('a,[{"\\'), max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


def members(value: Any) -> int:
    """Elements and members in all of it; an empty container counts as if it had one."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return max(1, len(value)) + sum(members(each) for each in value)


@given(value=json_values, most=st.integers(0, 12))
def test_a_body_is_refused_if_it_holds_more_values_than_are_read(value: Any, most: int) -> None:
    raw = json.dumps(value).encode()
    if members(value) <= most:
        bodies.check_size(raw, members_max=most)
    else:
        with pytest.raises(ApiError, match="too many values"):
            bodies.check_size(raw, members_max=most)


@pytest.mark.parametrize("value", [[[]] * 70_000, [{}] * 70_000, {"a": [{"b": []}] * 40_000}])
def test_lists_and_objects_have_a_limit_of_their_own(value: Any) -> None:
    with pytest.raises(ApiError, match="too many values"):
        bodies.check_size(json.dumps(value).encode(), members_max=1 << 30)


def test_what_stands_in_a_text_is_no_value() -> None:
    text = '[{"a": [1, 2, "\\\\"]}, ' * 70_000
    body = bodies.read(
        json.dumps({"model": "m", "prompt": text}).encode(), CompletionBody, token_ids_max=10
    )
    assert body.prompt == text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [1.5] * MANY}, "prompt.0"),
    ({"prompt": [1] * MANY + [-1] * 9}, f"prompt.{MANY}"),
    ({"prompt": [[1.5] * MANY]}, "prompt.0.0"),
    ({"prompt": ["a"] * MANY}, "prompt"),
    ({"prompt": [[1]] * MANY}, "prompt"),
    ({"prompt": [1 << 32]}, "prompt.0"),
    ({"messages": [{}] * MANY}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a"}] * MANY}, "messages"),
    ({"messages": [{"role": "user", "content": [{}] * MANY}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user"} | {f"n{i}": 1 for i in range(MANY)}]}, "messages.0.n0"),
    ({f"n{i}": 1 for i in range(MANY)}, "n0"),
    ({"stop_token_ids": [1] * MANY}, "stop_token_ids"),
    ({"stop": [1] * MANY}, "stop.0"),
    ({"metadata": {f"n{i}": 1 for i in range(MANY)}}, "metadata"),
    ({"logit_bias": {f"n{i}": "a" for i in range(MANY)}}, "logit_bias"),
    ({"tools": [1] * MANY}, "tools.0"),
    ({"modalities": [1] * MANY}, "modalities"),
    ({"kvc2": {f"n{i}": 1 for i in range(MANY)}}, "kvc2.n0"),
    ({"n" * 100_000: 1}, "n" * 80),
    ({"user": ["x" * 100_000] * 100}, "user"),
    ({"temperature": "x" * 100_000}, "temperature"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param[:30] for _, param in WRONG])
def test_a_body_is_refused_at_its_first_fault_and_in_few_words(
    fields: dict[str, Any], param: str
) -> None:
    chat = "messages" in fields or {"metadata", "tools", "modalities"} & set(fields)
    kind, start = (ChatBody, CHAT) if chat else (CompletionBody, COMPLETION)
    with pytest.raises(ApiError) as refused:
        bodies.read(
            json.dumps(start | fields).encode(), kind, token_ids_max=MANY * 2, unknown=STRICT
        )
    assert refused.value.param == param
    assert len(refused.value.response().body) < ANSWER_BYTES_MAX
    cause = refused.value.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() <= 5  # some for each branch of a union, none for each element


def test_of_unknown_names_few_are_kept() -> None:
    unknown = Unknown()
    raw = json.dumps(CHAT | {f"n{i}" * 100: 1 for i in range(MANY)}).encode()
    bodies.read(raw, ChatBody, token_ids_max=10, unknown=unknown)
    assert len(unknown.names) == UNKNOWN_MAX
    assert max(map(len, unknown.names)) == 80


def test_a_quote_costs_no_more_than_what_it_shows() -> None:
    written = []

    class Value:
        def __repr__(self) -> str:
            written.append(1)
            return "value"

    assert quoted([Value() for _ in range(1000)]).startswith("[value, value")
    assert len(written) <= QUOTED_MAX
    assert len(quoted({"a" * 10_000: ["b" * 10_000] * 1000})) < 100
    assert len(quoted(10**4000)) < 100


@pytest.mark.parametrize("word", ["word ", "a", " ", "\n", "é"])
@pytest.mark.parametrize("known", [True, False], ids=["longest token known", "not known"])
def test_a_text_is_tokenized_only_until_it_is_surely_too_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, word: str, known: bool
) -> None:
    if not known:
        monkeypatch.setattr(tokenizer, "_longest_token", None)
    lengths: list[int] = []
    encoded = tokenizer._encoded

    def counting(text: str, special: bool) -> list[int]:
        lengths.append(len(text))
        return encoded(text, special)

    monkeypatch.setattr(tokenizer, "_encoded", counting)
    with pytest.raises(TextTooLongError, match="and at most 1000 fit"):
        tokenizer.encode(word * (4_000_000 // len(word)), 1000)
    assert sum(lengths) <= (0 if known else PIECE_CHARACTERS)


def test_a_text_of_the_longest_tokens_is_not_refused_by_its_characters(
    tokenizer: Tokenizer,
) -> None:
    assert len(TURN) == tokenizer._longest_token
    assert len(tokenizer.encode(TURN * 50_000, 50_000)) == 50_000
    with pytest.raises(TextTooLongError):
        tokenizer.encode(TURN * 50_001, 50_000)


def test_a_text_that_may_fit_is_encoded_whole(tokenizer: Tokenizer) -> None:
    text = "a" * (3 * PIECE_CHARACTERS)
    assert tokenizer.encode(text, len(text)) == tokenizer.encode(text, len(text) // 20 * 19)
    assert len(tokenizer.encode(text, len(text))) == len(text)


class Slow(Letters):
    """Tokenizing takes until it is told to end."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.threads: list[str] = []

    def encode(self, text: str, most: int, *, special: bool = True) -> list[int]:
        self.threads.append(threading.current_thread().name)
        if text == "wait":
            self.entered.set()
            assert self.opened.wait(20)
        return super().encode(text, most)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def client(slow: Slow) -> Iterator[TestClient]:
    yield from over(build_house(64, daemon=False), {}, tokenizer=slow)


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_others_are_answered_while_a_body_is_read(
    client: TestClient, slow: Slow, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    read = bodies.read

    def reading(*arguments: Any, **fields: Any) -> Any:
        slow.threads.append(threading.current_thread().name)
        return read(*arguments, **fields)

    monkeypatch.setattr(bodies, "read", reading)
    said: dict[str, Any] = {}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"messages": [{"role": "user", "content": "wait"}]} if chat else {"prompt": "wait"}
    body = (CHAT if chat else COMPLETION) | asked
    waiting = threading.Thread(target=lambda: said.update(reply=client.post(path, json=body)))
    waiting.start()
    assert slow.entered.wait(20)
    assert client.get("/health").status_code == 200
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200
    slow.opened.set()
    waiting.join(20)
    assert said["reply"].status_code == 200
    assert slow.threads
    assert all(name.startswith("kvc2-reader") for name in slow.threads)
