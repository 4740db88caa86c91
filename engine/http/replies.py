"""The answers, whole and in pieces, as OpenAI words them.

Not responsible for where the tokens come from (service), nor for what of a text is said (speech).
"""

from __future__ import annotations

import codecs
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.http.errors import ApiError
from engine.http.speech.reader import CallPiece, Prose, Said, Speech
from engine.request import Explanation, Output, RequestStats, ScoredToken

DONE = b"data: [DONE]\n\n"
# Line breaks that JSON allows in a string; some clients would end an event's line at them.
LINE_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def named_event(name: str, value: dict[str, Any]) -> bytes:
    """One that says its name too."""
    return f"event: {name}\n".encode() + event(value)


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event, on one line in every reading of Unicode."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text.translate(LINE_BREAKS)}\n\n".encode()


@dataclass(frozen=True)
class Asked:
    """What shapes an answer beside its tokens. `echoed`: the prompts' texts, where `echo` wants
    them; `prompts`: their tokens."""

    model: str
    logprobs: int | None  # beside the chosen token's; None: none
    details: bool
    with_usage: bool  # in a stream
    token_bytes: Callable[[int], bytes]
    decode: Callable[[Sequence[int]], str]  # text, without special tokens
    special: Container[int]  # their ids
    choices: int = 1  # of each prompt, in the answer
    echoed: tuple[str, ...] | None = None
    prompts: Sequence[Sequence[int]] = ()


@dataclass
class Call:
    """A tool's call, as far as it came."""

    id: str
    name: str
    arguments: str = ""


class Choice:
    """One of the answers to one prompt, under way. `prompt`: which of the prompts; `make_call_id`
    for calls that the model gives none."""

    def __init__(
        self,
        index: int,
        prompt: int,
        speech: Speech | None = None,
        make_call_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}",
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.outputs: list[Output] = []
        self.news = Said()  # what the last output says
        self.calls: list[Call] = []
        self.held_tokens = 0  # leading ones that the daemon has, as far as it told
        self.offsets = Offsets()
        self._said: list[Said] = []
        self._speech = speech or Prose()
        self._make_call_id = make_call_id

    def add(self, output: Output) -> None:
        news = self._speech.push(output.text)
        if output.finish is not None:
            last = self._speech.flush()
            news = Said(
                news.text + last.text, news.reasoning + last.reasoning, news.calls + last.calls
            )
        self.outputs.append(output)
        self.news = news
        self._said.append(news)
        for each in news.calls:
            if each.name is not None:
                self.calls.append(Call(each.call_id or self._make_call_id(), each.name))
            self.calls[each.index].arguments += each.arguments

    @property
    def text(self) -> str:
        return "".join(said.text for said in self._said)

    @property
    def reasoning(self) -> str:
        return "".join(said.reasoning for said in self._said)

    @property
    def ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish is not None

    @property
    def finish(self) -> str | None:
        """As OpenAI says it: stop, length or tool_calls; None while it runs."""
        finish = self.outputs[-1].finish
        return "tool_calls" if finish == "stop" and self.calls else finish

    @property
    def stats(self) -> RequestStats:
        """Once it has ended."""
        stats = self.outputs[-1].stats
        assert stats is not None
        return stats

    @property
    def created_tokens(self) -> int:
        """Of the prompt, those that the daemon has now and had not before."""
        return max(0, min(self.held_tokens, self.stats.prompt_tokens) - self.stats.matched_tokens)

    @property
    def mean_logprob(self) -> float:
        scores = [output.chosen.logprob for output in self.outputs if output.chosen]
        return sum(scores) / len(scores) if scores else 0.0


class Reply(ABC):
    """One answer under way, in the words of an interface; `why`: with details."""

    media_type = "text/event-stream"
    tells_created = False  # whether usage says what the cache was given

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.id = uuid.uuid4().hex
        self.created = int(time.time())

    @abstractmethod
    def whole(self, choices: Sequence[Choice], why: Explanation | None) -> dict[str, Any]:
        """The answer at once; each choice has ended."""

    @abstractmethod
    def opening(self) -> bytes:
        """What a stream begins with."""

    @abstractmethod
    def piece(self, choice: Choice, why: Explanation | None) -> bytes:
        """What the last output of a choice adds; empty when that is nothing yet."""

    @abstractmethod
    def closing(self, choices: Sequence[Choice]) -> bytes:
        """What a stream ends with."""

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that can't go on."""
        return event(error.body())


class OpenAiReply(Reply):
    """What both of OpenAI's endpoints have in common."""

    kind = ""
    piece_kind = ""

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        }

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        value = self._head(self.piece_kind, choices)
        if self.asked.with_usage:
            value["usage"] = None
        return value

    def whole(self, choices: Sequence[Choice], why: Explanation | None) -> dict[str, Any]:
        told = best(choices, self.asked.choices)
        answer = self._head(self.kind, [self._whole(index, c) for index, c in enumerate(told)])
        answer["usage"] = usage(choices)
        if self.asked.details:
            answer["kvc2"] = details(choices[0], why)
        return answer

    def piece(self, choice: Choice, why: Explanation | None) -> bytes:
        said = self._said(choice)
        if said is None:
            return b""
        value = self._piece([{"index": choice.index, "finish_reason": choice.finish} | said])
        if choice.ended and self.asked.details:
            value["kvc2"] = details(choice, why)
        return event(value)

    def closing(self, choices: Sequence[Choice]) -> bytes:
        if not self.asked.with_usage:
            return DONE
        value = self._piece([])
        value["usage"] = usage(choices)
        return event(value) + DONE

    @abstractmethod
    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abstractmethod
    def _said(self, choice: Choice) -> dict[str, Any] | None:
        """What a choice's last output adds to a stream; None: nothing yet."""

    def name(self, token: ScoredToken) -> str:
        return name_of(self.asked.token_bytes(token.token_id))

    def scored(self, outputs: Sequence[Output]) -> list[tuple[ScoredToken, Sequence[ScoredToken]]]:
        """Each output's token and the best ones, as many as were asked for."""
        count = self.asked.logprobs or 0
        return [(output.chosen, output.top[:count]) for output in outputs if output.chosen]


class ChatReply(OpenAiReply):
    """/v1/chat/completions."""

    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.id = f"chatcmpl-{self.id}"

    def opening(self) -> bytes:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return event(
            self._piece(
                [
                    {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                    for index in range(self.asked.choices)
                ]
            )
        )

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in choice.calls
            ]
        return {
            "index": index,
            "finish_reason": choice.finish,
            "message": message,
            "logprobs": self._logprobs(choice.outputs),
        }

    def _said(self, choice: Choice) -> dict[str, Any] | None:
        news = choice.news
        if not news and not choice.ended and self.asked.logprobs is None:
            return None
        delta: dict[str, Any] = {"content": news.text} if news.text else {}
        if news.reasoning:
            delta["reasoning_content"] = news.reasoning
        if news.calls:
            delta["tool_calls"] = [self._piece_of_call(choice, piece) for piece in news.calls]
        return {"delta": delta, "logprobs": self._logprobs(choice.outputs[-1:])}

    @staticmethod
    def _piece_of_call(choice: Choice, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        return {
            "index": piece.index,
            "id": choice.calls[piece.index].id,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        content = [
            self._entry(chosen) | {"top_logprobs": [self._entry(t) for t in top]}
            for chosen, top in self.scored(outputs)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: ScoredToken) -> dict[str, Any]:
        data = self.asked.token_bytes(token.token_id)
        return {"token": name_of(data), "logprob": token.logprob, "bytes": list(data)}


class CompletionReply(OpenAiReply):
    """/v1/completions."""

    kind = piece_kind = "text_completion"

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.id = f"cmpl-{self.id}"

    def opening(self) -> bytes:
        return b""

    def _echoed(self, choice: Choice) -> str:
        return "" if self.asked.echoed is None else self.asked.echoed[choice.prompt]

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = self._echoed(choice) + choice.text
        logprobs = self._logprobs(choice, choice.outputs)
        if logprobs:  # a stop string cuts the text, not the tokens
            logprobs["text_offset"] = [min(each, len(text)) for each in logprobs["text_offset"]]
        return {
            "index": index,
            "finish_reason": choice.finish,
            "text": text,
            "logprobs": logprobs,
        }

    def _said(self, choice: Choice) -> dict[str, Any] | None:
        text = choice.news.text
        if len(choice.outputs) == 1:
            text = self._echoed(choice) + text
        if not text and not choice.ended and self.asked.logprobs is None:
            return None
        return {"text": text, "logprobs": self._logprobs(choice, choice.outputs[-1:])}

    def _logprobs(self, choice: Choice, outputs: Sequence[Output]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        scored = self.scored(outputs)
        if self.asked.echoed is not None and outputs[0] is choice.outputs[0]:
            first = self.asked.prompts[choice.prompt][0]  # nothing stands before it
            told["tokens"].append(name_of(self.asked.token_bytes(first)))
            told["token_logprobs"].append(None)
            told["top_logprobs"].append(None)
            told["text_offset"].append(self._offset(choice, first))
            count = self.asked.logprobs
            scored = [(token, top[:count]) for token, top in outputs[0].prompt] + scored
        for chosen, top in scored:
            told["tokens"].append(self.name(chosen))
            told["token_logprobs"].append(chosen.logprob)
            # of tokens that look alike, the best one
            told["top_logprobs"].append({self.name(t): t.logprob for t in reversed(top)})
            told["text_offset"].append(self._offset(choice, chosen.token_id))
        return told

    def _offset(self, choice: Choice, token_id: int) -> int:
        shown = b"" if token_id in self.asked.special else self.asked.token_bytes(token_id)
        return choice.offsets.next(shown, self.asked.decode([token_id]))


def best(choices: Sequence[Choice], wanted: int) -> list[Choice]:
    """Of each prompt's choices the `wanted` likeliest a token, the likeliest first; all of them in
    their order where no more were made."""
    told: list[Choice] = []
    for prompt in sorted({choice.prompt for choice in choices}):
        mine = [choice for choice in choices if choice.prompt == prompt]
        if len(mine) > wanted:
            mine = sorted(mine, key=lambda choice: -choice.mean_logprob)[:wanted]
        told += mine
    return told


def details(choice: Choice, why: Explanation | None) -> dict[str, Any]:
    """Where the prompt's KV came from, why no more of it, and each token's logit beside the two
    best ones."""
    tokens = [
        {
            "token_id": output.token_id,
            "logit": output.chosen.logit if output.chosen else None,
            "top": [{"token_id": t.token_id, "logit": t.logit} for t in output.top[:2]],
        }
        for output in choice.outputs
        if output.token_id is not None
    ]
    explanation = None if why is None else asdict(why)
    return asdict(choice.stats) | {"explanation": explanation, "tokens": tokens}


def name_of(data: bytes) -> str:
    """A token as OpenAI shows it: its text, or its bytes where they are part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where in the answer's text each of its tokens begins, in characters. A token that goes on
    with a character begins where that does."""

    def __init__(self) -> None:
        self._shown = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def next(self, data: bytes, alone: str) -> int:
        """`data`: the token's bytes, none of a special one; `alone`: its text alone, which lacks
        the space that some models' words begin with, as the answer's first token does."""
        begin = self._shown
        if data:
            self._shown += len(self._decoder.decode(data))
            if self._first and data.startswith(b" ") and not alone.startswith(" "):
                self._shown -= 1
            self._first = False
        return begin


@dataclass(frozen=True)
class Counts:
    """Tokens of one HTTP request. A prompt with several choices counts once, and as cached what its
    first choice found."""

    prompt: int
    cached: int
    created: int  # of the computed ones, those that the cache has now
    generated: int

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Counts:
        firsts = {choice.prompt: choice.stats for choice in reversed(choices)}.values()
        created = {choice.prompt: choice.created_tokens for choice in reversed(choices)}
        return cls(
            prompt=sum(stats.prompt_tokens for stats in firsts),
            cached=sum(stats.matched_tokens for stats in firsts),
            created=sum(created.values()),
            generated=sum(choice.stats.generated_tokens for choice in choices),
        )


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens as OpenAI counts them; `cached_tokens` are the ones that were not computed."""
    counts = Counts.of(choices)
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }
