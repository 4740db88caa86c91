"""The model directory's tokenizer and chat template. Threads may share it.

Not responsible for text as it is generated (engine.text).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError
from engine.http.literals import Literals
from engine.http.speech.voice import AUTO, ParseResponse, Voice
from engine.http.template import ChatTemplate, Conversation, TemplateError
from engine.http.token_bytes import TokenBytes

# A text of fewer characters a token than this is encoded at once: that takes no longer than some
# texts that fit. A longer one may be spaces, which some vocabularies have by the dozen.
DENSE_CHARACTERS = 8
PIECE_CHARACTERS = 1 << 16  # some 20 ms
END_TOKENS = 16  # of a prompt: a mark that it may end with is shorter


class TextTooLongError(Exception):
    """A text makes more tokens than it may. They were counted as far as that took."""


class Tokenizer:
    """Calls the Rust tokenizer itself where there is one: it takes no lock and keeps no state."""

    def __init__(
        self, model_dir: Path, *, parse_special: bool = False, tool_format: str = AUTO
    ) -> None:
        """`parse_special`: a chat's messages may hold special tokens by their literals;
        `tool_format`: how the model writes calls, where its template doesn't tell."""
        from transformers import AutoTokenizer  # slow to import, and only needed here

        try:
            self._outer: Any = AutoTokenizer.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for a directory without one
            raise CheckpointError(f"{model_dir} holds no readable tokenizer: {error}") from error
        self._inner: Any = getattr(self._outer, "backend_tokenizer", None)
        if self._inner is not None:  # a prompt is never cut or filled up in silence
            self._inner.no_truncation()
            self._inner.no_padding()
        self.end_token_id: int | None = self._outer.eos_token_id
        self.special_tokens = self._special_tokens()
        self._token_bytes = TokenBytes(self._inner, self._named, self._added_tokens())
        self._longest_token = self._longest()
        self._parse_special = parse_special
        self._literals = Literals(self.special_tokens.values())
        self._reader: Any = None  # of texts with hidden literals
        if self._inner is not None:
            made = self._literals.reader(self._inner.to_str())
            self._reader = type(self._inner).from_str(made)
        self._template = ChatTemplate(self._render)
        self.template_source = self._template_source()
        self.voice = Voice.of(self.template_source, tool_format, self._parse_response())

    def _template_source(self) -> str:
        """All the templates that the tokenizer has, for what they show of the model."""
        found = self._outer.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    def _parse_response(self) -> ParseResponse | None:
        """How the tokenizer itself reads an answer; None: it doesn't say."""
        outer = self._outer
        names = ("response_template", "response_schema")
        if not any(getattr(outer, name, None) for name in names):
            return None
        parse: ParseResponse = outer.parse_response
        return parse

    @property
    def json(self) -> str | None:
        """The tokenizer.json of the Rust tokenizer, if there is one."""
        return None if self._inner is None else str(self._inner.to_str())

    def token_of(self, literal: str) -> int | None:
        """The one token that this text is; None: there is none."""
        found = self._outer.get_added_vocab().get(literal)
        return None if found is None else int(found)

    def _longest(self) -> int | None:
        """Characters that a token covers at most, where text is taken as it is, byte by byte. None:
        no such length is known, since characters may be dropped or one token may take many."""
        inner = self._inner
        if inner is None or inner.normalizer is not None or "ByteLevel" not in repr(inner.decoder):
            return None
        added = inner.get_added_tokens_decoder().values()
        drops = re.search("Removed|Whitespace", repr(inner.pre_tokenizer))
        if drops or any(token.lstrip or token.rstrip for token in added):
            return None
        return max(map(len, inner.get_vocab()))  # a letter of the vocabulary is a byte

    def _special_tokens(self) -> dict[int, str]:
        """Their literals by token id."""
        if self._inner is not None:
            added = self._inner.get_added_tokens_decoder().items()
            return {token_id: token.content for token_id, token in added if token.special}
        tokens = zip(self._outer.all_special_ids, self._outer.all_special_tokens, strict=True)
        return dict(tokens)

    def _added_tokens(self) -> dict[int, str]:
        if self._inner is None:
            return self.special_tokens
        added = self._inner.get_added_tokens_decoder().items()
        return {token_id: token.content for token_id, token in added}

    def encode(self, text: str, most: int, *, special: bool = True) -> list[int]:
        """Token ids; with the model's begin token where `special`. Takes time for some `most`
        tokens, however long the text is, and lets other threads run meanwhile. Raises
        TextTooLongError for a text that surely makes more; one that makes hardly more is
        encoded."""
        self._check_length(text, most)
        return self._encoded(text, special)

    def _check_length(self, text: str, most: int) -> None:
        """Counts tokens of a long text piece by piece until there are too many. A cut through a
        word makes some more of it, so that only a clear excess is one."""
        if len(text) <= DENSE_CHARACTERS * most:
            return
        if self._longest_token is not None and len(text) > self._longest_token * most:
            raise TextTooLongError(
                f"its {len(text)} characters make more tokens, and at most {most} fit this engine"
            )
        count, surely = 0, most + most // 8 + PIECE_CHARACTERS // 64
        for start in range(0, len(text), PIECE_CHARACTERS):
            count += len(self._encoded(text[start : start + PIECE_CHARACTERS], special=False))
            if count > surely:
                read = min(len(text), start + PIECE_CHARACTERS)
                raise TextTooLongError(
                    f"its first {read} of {len(text)} characters make some {count} tokens, and at "
                    f"most {most} fit this engine"
                )

    def _encoded(self, text: str, special: bool) -> list[int]:
        if self._inner is None:
            return self._encoded_apart(text, special)
        tokenizer = self._reader if self._literals.hides(text) else self._inner
        # of a batch, since `encode` holds the interpreter as long as it takes
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def _encoded_apart(self, text: str, special: bool) -> list[int]:
        """By a tokenizer written in Python, which can't be told what is hidden: each hidden literal
        is cut behind its first character. A cut may make some more tokens of a text."""
        return [
            token
            for index, piece in enumerate(self._literals.pieces(text))
            for token in self._outer.encode(piece, add_special_tokens=special and index == 0)
        ]

    def decode(self, token_ids: Sequence[int], shown: Container[int] = ()) -> str:
        """Text, without special tokens but those that are `shown`, by their literals."""
        if shown:
            kept = [i for i in token_ids if i in shown or i not in self.special_tokens]
            decoder = self._outer if self._inner is None else self._inner
            return str(decoder.decode(kept, skip_special_tokens=False))
        if self._inner is not None:
            return str(self._inner.decode(list(token_ids), skip_special_tokens=True))
        return str(self._outer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones by their literals; maybe part of a character."""
        return self._token_bytes.of(token_id)

    def _named(self, token_id: int) -> str:
        return str(self._outer.decode([token_id], skip_special_tokens=False))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        most: int,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks. What callers wrote makes no
        special token unless `parse_special`. Raises TemplateError, and TextTooLongError as
        `encode` does."""
        given = (messages, tools, variables)
        for text in texts_of(given):
            self._check_length(text, most)
        if not self._parse_special:
            given = mapped(given, self._literals.hidden)
        text = self._template.text(Conversation(*given))
        self._check_length(text, most)
        return self._encoded(text, special=False)  # the template writes special tokens itself

    def end_of(self, token_ids: Sequence[int]) -> str:
        """The last text of a prompt, special tokens by their literals."""
        last = list(token_ids[-END_TOKENS:])
        return str(self._outer.decode(last, skip_special_tokens=False))

    def _render(self, conversation: Conversation) -> str:
        if not self._outer.chat_template:
            raise TemplateError("the model has no chat template; use /v1/completions")
        try:
            text: str = self._outer.apply_chat_template(
                [dict(each) for each in conversation.messages],
                tools=[dict(each) for each in conversation.tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **conversation.variables,
            )
        except Exception as error:  # templates raise what they like
            raise TemplateError(f"the model's chat template refuses them: {error}") from error
        return text


def texts_of(value: Any) -> Iterator[str]:
    """All strings of a JSON value, names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from texts_of(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from texts_of(each)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its strings changed, names of members too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): mapped(each, change) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [mapped(each, change) for each in value]
    return value
