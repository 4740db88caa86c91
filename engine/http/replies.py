"""The answers, whole and in pieces, as OpenAI words them.

Not responsible for where the tokens come from (routes).
"""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.request import Explanation, Output, RequestStats, ScoredToken

DONE = b"data: [DONE]\n\n"
# Line breaks that JSON allows in a string; some clients would end an event's line at them.
LINE_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event, on one line in every reading of Unicode."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text.translate(LINE_BREAKS)}\n\n".encode()


@dataclass(frozen=True)
class Asked:
    """What shapes an answer beside its tokens."""

    model: str
    logprobs: int | None  # beside the chosen token's; None: none
    details: bool
    token_bytes: Callable[[int], bytes]
    decode: Callable[[Sequence[int]], str]  # text, without special tokens
    special: Container[int]  # their ids


class Reply:
    """One answer under way. `chat` chooses between the two endpoints' shapes."""

    def __init__(self, asked: Asked, *, chat: bool) -> None:
        self._asked = asked
        self._chat = chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._offsets = Offsets()

    def whole(self, outputs: Sequence[Output], why: Explanation | None) -> dict[str, Any]:
        """The answer at once; the last output has `finish` and `stats`. `why`: with details."""
        text = "".join(output.text for output in outputs)
        choice: dict[str, Any] = {"index": 0, "finish_reason": outputs[-1].finish}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(outputs)
        if choice["logprobs"] and not self._chat:  # a stop string cuts the text, not the tokens
            offsets = choice["logprobs"]["text_offset"]
            choice["logprobs"]["text_offset"] = [min(offset, len(text)) for offset in offsets]
        answer = self._head("chat.completion" if self._chat else "text_completion", [choice])
        stats = outputs[-1].stats
        assert stats is not None
        answer["usage"] = usage(stats)
        if self._asked.details:
            answer["kvc2"] = self._details(outputs, stats, why)
        return answer

    def opening(self, with_usage: bool) -> bytes:
        """The first piece of a chat: who speaks. Completions have none."""
        if not self._chat:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return event(self._piece([choice], with_usage))

    def piece(self, seen: Sequence[Output], with_usage: bool, why: Explanation | None) -> bytes:
        """What the last output of all that were `seen` adds; empty when that is nothing yet."""
        output = seen[-1]
        if not output.text and output.finish is None and self._asked.logprobs is None:
            return b""
        choice: dict[str, Any] = {"index": 0, "finish_reason": output.finish}
        if self._chat:
            choice["delta"] = {"content": output.text} if output.text else {}
        else:
            choice["text"] = output.text
        choice["logprobs"] = self._logprobs([output])
        value = self._piece([choice], with_usage)
        if output.stats is not None and self._asked.details:
            value["kvc2"] = self._details(seen, output.stats, why)
        return event(value)

    def closing(self, stats: RequestStats, with_usage: bool) -> bytes:
        """After the last piece: usage, where asked for, and the end mark."""
        if not with_usage:
            return DONE
        value = self._piece([], with_usage)
        value["usage"] = usage(stats)
        return event(value) + DONE

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "choices": choices,
        }

    def _piece(self, choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        value = self._head("chat.completion.chunk" if self._chat else "text_completion", choices)
        if with_usage:
            value["usage"] = None
        return value

    def _details(
        self, outputs: Sequence[Output], stats: RequestStats, why: Explanation | None
    ) -> dict[str, Any]:
        """Where the prompt's KV came from, why no more of it, and each token's logit beside the
        two best ones."""
        tokens = [
            {
                "token_id": output.token_id,
                "logit": output.chosen.logit if output.chosen else None,
                "top": [{"token_id": t.token_id, "logit": t.logit} for t in output.top[:2]],
            }
            for output in outputs
            if output.token_id is not None
        ]
        explanation = None if why is None else asdict(why)
        return asdict(stats) | {"explanation": explanation, "tokens": tokens}

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any] | None:
        count = self._asked.logprobs
        if count is None:
            return None
        scored = [(output.chosen, output.top[:count]) for output in outputs if output.chosen]
        if self._chat:
            content = [
                self._entry(chosen) | {"top_logprobs": [self._entry(t) for t in top]}
                for chosen, top in scored
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(chosen) for chosen, _ in scored],
            "token_logprobs": [chosen.logprob for chosen, _ in scored],
            # of tokens that look alike, the best one
            "top_logprobs": [
                {self._name(t): t.logprob for t in reversed(top)} for _, top in scored
            ],
            "text_offset": [self._offset(chosen.token_id) for chosen, _ in scored],
        }

    def _name(self, token: ScoredToken) -> str:
        return name_of(self._asked.token_bytes(token.token_id))

    def _offset(self, token_id: int) -> int:
        shown = b"" if token_id in self._asked.special else self._asked.token_bytes(token_id)
        return self._offsets.next(shown, self._asked.decode([token_id]))

    def _entry(self, token: ScoredToken) -> dict[str, Any]:
        data = self._asked.token_bytes(token.token_id)
        return {"token": name_of(data), "logprob": token.logprob, "bytes": list(data)}


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


def usage(stats: RequestStats) -> dict[str, Any]:
    """Tokens as OpenAI counts them; `cached_tokens` are the ones that were not computed."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.matched_tokens},
    }
