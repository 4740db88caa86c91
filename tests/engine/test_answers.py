"""What leaves the engine: stop strings of special tokens, split characters, what JSON and lines of
events can't hold."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tokenizers
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from engine.http.replies import Offsets, event, name_of
from engine.http.tokenizer import Tokenizer
from engine.scores import scores
from engine.settings import EngineConfig
from engine.text import IncrementalText
from kvc2.errors import InvalidConfig
from tests.doubles.byte_tokenizer import END, TEMPLATE, TURN
from tests.doubles.engine_doubles import build as build_house
from tests.doubles.engine_doubles import expected_tokens
from tests.engine.test_chat_template import model
from tests.engine.test_http import COMPLETION, Letters, over

TURN_ID, END_ID = 1, 2


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(model(tmp_path_factory.mktemp("model"), TEMPLATE))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As SentencePiece's models with a token for each byte."""
    folder: Path = model(tmp_path_factory.mktemp("model"), TEMPLATE)
    words = ["<unk>", TURN, END, "▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "a")]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([TURN, END])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


TEXTS = ["aé b", "€😀a", "😀😀", " a", "ab\n", "é"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, 1000, special=False)
    data = b"".join(tokenizer.token_bytes(token) for token in tokens)
    assert data.decode() in (text, " " + text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_begins_where_its_character_begins(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, 1000, special=False)
    shown = tokenizer.decode(tokens)
    offsets = Offsets()
    begins = [offsets.next(tokenizer.token_bytes(t), tokenizer.decode([t])) for t in tokens]
    data = [tokenizer.token_bytes(token) for token in tokens]
    lead = len(b"".join(data).decode()) - len(shown)  # the space that no answer begins with
    before = [b"".join(data[:i]).decode(errors="ignore") for i in range(len(data))]
    assert begins == [max(0, len(each) - lead) for each in before]
    assert offsets.next(b"", "") == len(shown)


def test_part_of_a_character_is_shown_by_its_bytes() -> None:
    assert name_of("é".encode()) == "é"
    assert name_of(b"\xf0\x9f") == "bytes:\\xf0\\x9f"
    assert name_of(b"") == ""


def test_special_tokens_have_their_literals(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(TURN_ID) == TURN.encode()
    assert tokenizer.token_bytes(10_000) == b""


def stopped(text: IncrementalText, tokens: Sequence[int]) -> tuple[str, str | None]:
    """What is shown, and the stop string that ended it."""
    shown = ""
    for token in tokens:
        piece = text.push(token)
        shown += piece.text
        if piece.stop is not None:
            return shown, piece.stop
    return shown + text.flush(), None


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ([TURN], "ab"),
        (["b" + TURN], "a"),
        ([TURN + "cd"], "ab"),
        ([TURN + END], "abcd<|turn|>"),
        ([END], "abcd"),
        ([END + "x"], "abcd<|turn|>"),
        (["<|turn|>", "d"], "ab"),
        (["|turn"], "abcd<"),
        (["no"], "abcd<|turn|>"),
    ],
)
def test_a_stop_string_may_hold_special_tokens(
    byte_level: Tokenizer, stop: list[str], shown: str
) -> None:
    """The tokens: a, b, the special one, c, d, another, and its literal spelled in letters."""
    letters = [byte_level.encode(each, 10, special=False)[0] for each in "abcd" + TURN[:1]]
    spelled = [byte_level._inner.token_to_id(each) for each in TURN]
    tokens = [*letters[:2], TURN_ID, *letters[2:4], END_ID, *spelled]
    text = IncrementalText(byte_level.decode, stop, byte_level.special_tokens)
    said, ended = stopped(text, tokens)
    assert said == shown
    assert ended in (stop if shown != "abcd<|turn|>" else [None])


@given(
    tokens=st.lists(st.integers(0, 258), max_size=12),
    stop=st.lists(st.sampled_from([TURN, END, TURN + END, "a" + END]), max_size=2),
)
def test_text_is_the_same_whether_or_not_special_tokens_may_stop_it(
    byte_level: Tokenizer, tokens: list[int], stop: list[str]
) -> None:
    plain, _ = stopped(IncrementalText(byte_level.decode), tokens)
    text = IncrementalText(byte_level.decode, stop, byte_level.special_tokens)
    found, ended = stopped(text, tokens)
    if ended is None and not {TURN_ID, END_ID} & set(tokens):  # they end an unfinished character
        assert found == plain
    found.encode()  # no mark is left


def test_an_event_is_one_line_in_every_reading_of_unicode() -> None:
    text = "a\u2028b\u2029c\x85d\ne\x0b\x1c"
    line, *rest = event({"text": text}).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_an_event_holds_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        event({"logprob": float("nan")})


def test_a_token_that_is_never_chosen_has_a_score_that_json_can_hold() -> None:
    logits = torch.tensor([1.0, float("-inf"), 0.0])
    ((_, top),) = scores(logits[None], [0], 3)
    assert [each.token_id for each in top] == [0, 2, 1]
    json.dumps([(each.logit, each.logprob) for each in top], allow_nan=False)


def test_a_model_name_that_is_no_text_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="served_model_name"):
        EngineConfig(model=tmp_path / "a\udcffb")
    EngineConfig(model=tmp_path / "a\udcffb", served_model_name="ab")


class Special(Letters):
    """Each second letter stands for a special token, which its text leaves out."""

    special_tokens: ClassVar[dict[int, str]] = {t: f"<{t}>" for t in range(0, 97, 2)}

    def decode(self, token_ids: Sequence[int], shown: Container[int] = ()) -> str:
        return super().decode([t for t in token_ids if t % 2 or t in shown])


@pytest.fixture
def client() -> Iterator[TestClient]:
    yield from over(build_house(64, daemon=False), {}, tokenizer=Special())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_at_a_special_token_that_is_a_stop_string(
    client: TestClient, stream: bool
) -> None:
    tokens = expected_tokens([65, 66, 67], 20)
    at = next(i for i, token in enumerate(tokens) if i > 2 and token % 2 == 0)
    body = COMPLETION | {"max_tokens": 20, "stop": f"<{tokens[at]}>", "stream": stream}
    reply = client.post("/v1/completions", json=body | {"logprobs": 1})
    pieces: list[dict[str, Any]]
    if stream:
        lines = [line for line in reply.text.split("\n\n") if line.startswith("data: {")]
        pieces = [json.loads(line[6:])["choices"][0] for line in lines]
    else:
        pieces = [reply.json()["choices"][0]]
    assert "".join(piece["text"] for piece in pieces) == Special().decode(tokens[:at])
    assert pieces[-1]["finish_reason"] == "stop"
    offsets = [o for piece in pieces for o in piece["logprobs"]["text_offset"]]
    wanted = [len(Special().decode(tokens[:i])) for i in range(at + 1)]
    assert offsets == wanted
