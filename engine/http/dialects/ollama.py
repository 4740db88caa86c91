"""Ollama's /api/chat and /api/generate, and what it tells of models: for its Python client.

Not responsible for what a chat becomes (service).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.http.errors import ApiError
from engine.http.fields import Ignored, NotDone, Strict
from engine.http.replies import Asked, Choice, Counts, Reply
from engine.http.schema import (
    MESSAGES_MAX,
    TOP_LOGPROBS_MAX,
    Asking,
    ChatBody,
    CompletionBody,
    StopString,
)
from engine.http.tools import CALLS_MAX, TOOLS_MAX, Tool, ToolName
from engine.request import Explanation

LATEST = ":latest"  # what Ollama's clients add to a name
NS = 1_000_000_000


class Options(Strict):
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    num_predict: int | None = None  # below 1: as much as there is room for
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    num_ctx: Ignored = None  # --kv-memory-gb says what fits
    num_keep: Ignored = None
    num_batch: Ignored = None
    num_gpu: Ignored = None
    main_gpu: Ignored = None
    num_thread: Ignored = None
    use_mmap: Ignored = None
    repeat_last_n: Ignored = None
    typical_p: Ignored = None


class Body(Asking):
    """What both endpoints take."""

    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options = Options()
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Ignored = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)

    @property
    def shared(self) -> dict[str, Any]:
        """What a chat and a completion of OpenAI's are told alike."""
        options = self.options
        predict = options.num_predict
        return {
            "model": self.model.removesuffix(LATEST),
            "stream": self.stream,
            "temperature": options.temperature,
            "top_p": options.top_p or None,
            "top_k": options.top_k,
            "min_p": options.min_p,
            "seed": options.seed,
            "max_tokens": predict if predict is not None and predict > 0 else None,
            "stop": options.stop or None,
            "repetition_penalty": options.repeat_penalty,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
        }

    @property
    def of_a_chat(self) -> dict[str, Any]:
        told = self.shared | {"logprobs": self.logprobs}
        if self.logprobs:
            told["top_logprobs"] = self.top_logprobs
        if isinstance(self.think, str):
            told["reasoning_effort"] = self.think
        elif self.think is not None:
            told["chat_template_kwargs"] = {"enable_thinking": self.think}
        if isinstance(self.format, dict):
            schema = {"name": "answer", "schema": self.format}
            told["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.format == "json":
            told["response_format"] = {"type": "json_object"}
        return told


class Called(Strict):
    name: ToolName
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: Ignored = None
    description: Ignored = None


class Call(Strict):
    function: Called
    id: str | None = None
    type: Ignored = None


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: NotDone = None
    tool_calls: Annotated[list[Call], Field(max_length=CALLS_MAX)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @property
    def for_chat(self) -> dict[str, Any]:
        calls = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                },
            }
            for call in self.tool_calls or ()
        ]
        told: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        return told | {
            "reasoning_content": self.thinking,
            "tool_calls": calls or None,
            "name": self.tool_name,
            "tool_call_id": self.tool_call_id,
        }


class ChatOfOllama(Body):
    """/api/chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None

    def asks(self) -> ChatBody:
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        messages = [message.for_chat for message in self.messages]
        return ChatBody.model_validate(
            self.of_a_chat | {"messages": messages, "tools": tools or None}
        )


class GenerateBody(Body):
    """/api/generate."""

    prompt: str = Field(min_length=1)
    system: str | None = None
    raw: bool = False
    suffix: NotDone = None
    images: NotDone = None
    template: NotDone = None
    context: NotDone = None  # the tokens of an earlier answer

    def asks(self) -> ChatBody | CompletionBody:
        if self.raw:
            return CompletionBody.model_validate(self.shared | {"prompt": self.prompt})
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt})
        return ChatBody.model_validate(self.of_a_chat | {"messages": messages})


class OllamaReply(Reply):
    """A line of JSON for each piece. `generate`: in the words of /api/generate."""

    media_type = "application/x-ndjson"
    generate = False

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._began = time.monotonic()
        self._first: float | None = None

    def whole(self, choices: Sequence[Choice], why: Explanation | None) -> dict[str, Any]:
        (choice,) = choices
        told = self._said(choice.text, choice.reasoning, _calls(choice, range(len(choice.calls))))
        return self._line(told) | self._end(choices)

    def opening(self) -> bytes:
        return b""

    def piece(self, choice: Choice, why: Explanation | None) -> bytes:
        if self._first is None:
            self._first = time.monotonic()
        news = choice.news
        if not news.text and not news.reasoning:
            return b""
        return _as_line(self._line(self._said(news.text, news.reasoning, [])) | {"done": False})

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """Calls come whole, since their arguments are objects."""
        (choice,) = choices
        calls = _calls(choice, range(len(choice.calls)))
        before = b""
        if calls:
            before = _as_line(self._line(self._said("", "", calls)) | {"done": False})
        return before + _as_line(self._line(self._said("", "", [])) | self._end(choices))

    def failed(self, error: ApiError) -> bytes:
        return _as_line(error_body(error))

    def _line(self, told: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self.asked.model, "created_at": now} | told

    def _said(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        if self.generate:
            return {"response": text} | ({"thinking": thinking} if thinking else {})
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _end(self, choices: Sequence[Choice]) -> dict[str, Any]:
        now, counts = time.monotonic(), Counts.of(choices)
        prefill = choices[0].stats.ttft_ms / 1000
        total = now - self._began
        return {
            "done": True,
            "done_reason": "length" if choices[0].finish == "length" else "stop",
            "total_duration": int(total * NS),
            "load_duration": 0,
            "prompt_eval_count": counts.prompt,
            "prompt_eval_duration": int(prefill * NS),
            "eval_count": counts.generated,
            "eval_duration": int(max(0.0, total - prefill) * NS),
        }


class GenerateReply(OllamaReply):
    generate = True


def _calls(choice: Choice, which: Sequence[int]) -> list[dict[str, Any]]:
    told = []
    for index in which:
        call = choice.calls[index]
        try:
            arguments = json.loads(call.arguments or "{}")
        except ValueError:  # it was cut off
            arguments = {}
        told.append({"function": {"index": index, "name": call.name, "arguments": arguments}})
    return told


def _as_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}


class ShowBody(Strict):
    """/api/show."""

    model: str | None = None
    name: str | None = None
    verbose: Ignored = None


def tag(card: dict[str, Any]) -> dict[str, Any]:
    """The served model in a list."""
    details = {"format": "safetensors", "family": "", "parameter_size": ""}
    began = "1970-01-01T00:00:00Z"
    name = card["id"]
    told = {"name": name, "model": name, "modified_at": began, "size": 0, "digest": ""}
    return told | {"details": details}


def shown(card: dict[str, Any], template: str) -> dict[str, Any]:
    """What is known of the served model."""
    capabilities = ["completion", "tools"]
    if "</think>" in template:
        capabilities.append("thinking")
    return tag(card) | {
        "template": template,
        "parameters": "",
        "license": "",
        "modelfile": "",
        "model_info": {
            "general.architecture": "kvc2",
            "kvc2.context_length": card["max_model_len"],
        },
        "capabilities": capabilities,
    }
