"""Anthropic's /v1/messages: its bodies as chats, its answers whole and as events.

Every prompt is cached; what stands before a `cache_control` mark is evicted last for its time. Not
responsible for what a chat becomes (service), nor for which tokens stand there (prompts).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.http.errors import ApiError
from engine.http.fields import Ignored, NotDone, Strict
from engine.http.parts import Change, Part, Parts, parts_of
from engine.http.replies import Asked, Choice, Counts, Reply, named_event
from engine.http.schema import MESSAGES_MAX, Asking, CacheOptions, ChatBody, Mark, StopString
from engine.http.schema import Message as ChatMessage
from engine.http.tools import TOOLS_MAX, ToolName
from engine.request import Explanation

STOPS_MAX = 16
MARKS_MAX = 4  # Anthropic's
TTL_S = {"5m": 300, "1h": 3600}


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class Marked(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Marked):
    type: Literal["text"]
    text: str
    citations: NotDone = None


class ToolUse(Marked):
    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: dict[str, Any] = Field(default_factory=dict)
    caller: Ignored = None


class ToolResult(Marked):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    is_error: bool = False


class Thinking(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: Ignored = None


class RedactedThinking(Strict):
    type: Literal["redacted_thinking"]
    data: Ignored = None


Block = Annotated[
    TextBlock | ToolUse | ToolResult | Thinking | RedactedThinking, Field(discriminator="type")
]


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class Tool(Marked):
    type: Literal["custom"] = "custom"
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Ignored = None
    eager_input_streaming: Ignored = None
    input_examples: Ignored = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingChoice(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Ignored = None
    display: Ignored = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class MessagesBody(Asking):
    """/v1/messages."""

    cache_control: CacheControl | None = None
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    max_tokens: int = Field(ge=1)
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=STOPS_MAX)] | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    inference_geo: Ignored = None
    container: NotDone = None
    mcp_servers: NotDone = None
    context_management: NotDone = None
    kvc2: CacheOptions = CacheOptions()

    @model_validator(mode="after")
    def _few_marks(self) -> MessagesBody:
        if len(list(islice(self._marked(), MARKS_MAX + 1))) > MARKS_MAX:
            raise ValueError(f"at most {MARKS_MAX} marks of cache_control")
        return self

    def _marked(self) -> Iterator[tuple[CacheControl, MessagesBody]]:
        """Each mark, and the body up to what it is on. A template tells tools together with what
        the system says, so that a tool's is behind both."""
        tools = self.tools or []
        for end, tool in enumerate(tools, 1):
            if tool.cache_control is not None:
                cut = {"tools": tools[:end], "messages": []}
                yield tool.cache_control, self.model_copy(update=cut)
        for control, system in _cuts(self.system or ""):
            yield control, self.model_copy(update={"system": system, "messages": []})
        for index, message in enumerate(self.messages):
            for control, content in _cuts(message.content):
                last = message.model_copy(update={"content": content})
                until = [*self.messages[:index], last]
                yield control, self.model_copy(update={"messages": until})
        if self.cache_control is not None:
            yield self.cache_control, self

    def _mark(self, ttl: str) -> Mark:
        """At the end of this body."""
        told = self.chat_messages()
        if not told or told[-1]["role"] == "system":  # templates want somebody who asks
            told.append({"role": "user", "content": ""})
        messages = [ChatMessage.model_validate(each) for each in told]
        return Mark(messages, len(self.tools or ()), TTL_S[ttl])

    def chat_messages(self) -> list[dict[str, Any]]:
        told = [{"role": "system", "content": _text(self.system)}] if self.system else []
        return told + [each for message in self.messages for each in _messages(message)]

    def asks(self) -> ChatBody:
        """The same as OpenAI's chat has it."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": self.chat_messages(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences or None,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "kvc2": self.kvc2.model_dump(),
        }
        if self.tool_choice is not None:
            asked |= _choice(self.tool_choice)
        if self.thinking is not None:
            asked["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        config = self.output_config or OutputConfig()
        if config.effort is not None:
            asked["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
        form = config.format or self.output_format
        if form is not None:
            schema = {"name": "answer", "schema": form.schema_}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
        marks = [body._mark(control.ttl) for control, body in self._marked()]
        return ChatBody.model_validate(asked).marked(marks)


def _cuts(content: Any) -> Iterator[tuple[CacheControl, list[Any]]]:
    """Each mark in a list of blocks, and the blocks up to it."""
    if isinstance(content, str):
        return
    for index, block in enumerate(content):
        if isinstance(block, ToolResult):
            for control, inner in _cuts(block.content):
                yield control, [*content[:index], block.model_copy(update={"content": inner})]
        if isinstance(block, Marked) and block.cache_control is not None:
            yield block.cache_control, content[: index + 1]


def _text(content: str | list[TextBlock] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content)


def _messages(message: Message) -> Iterator[dict[str, Any]]:
    """A message's blocks as OpenAI's messages: answers of tools first, each one of its own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    text, thought, calls = "", "", []
    for block in message.content:
        if isinstance(block, ToolResult):
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": _text(block.content),
            }
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, Thinking):
            thought += block.thinking
        elif isinstance(block, TextBlock):
            text += block.text
    if text or calls or thought or not message.content:
        said: dict[str, Any] = {"role": message.role, "content": text}
        if calls:
            said["tool_calls"] = calls
        if thought:
            said["reasoning_content"] = thought
        yield said


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    told: Any = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
    if choice.type == "tool":
        told = {"type": "function", "function": {"name": choice.name or ""}}
    return {"tool_choice": told, "parallel_tool_calls": not choice.disable_parallel_tool_use}


STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesReply(Reply):
    """The answer, in Anthropic's words."""

    tells_created = True

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.id = f"msg_{self.id}"
        self._parts = Parts()
        self._begun = False

    def whole(self, choices: Sequence[Choice], why: Explanation | None) -> dict[str, Any]:
        (choice,) = choices
        return self._message() | {
            "content": [_block(part) for part in parts_of(choice)],
            "usage": _usage(choices),
            **_stop(choice),
        }

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.asked.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def opening(self) -> bytes:
        usage = {"input_tokens": 0, "output_tokens": 0}
        return _event("message_start", message=self._message() | {"usage": usage})

    def piece(self, choice: Choice, why: Explanation | None) -> bytes:
        return b"".join(_told(change) for change in self._parts.news(choice))

    def closing(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        last = b"".join(_told(change) for change in self._parts.close())
        last += _event("message_delta", delta=_stop(choice), usage=_usage(choices))
        return last + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return named_event("error", error_body(error))


def _event(kind: str, **values: Any) -> bytes:
    return named_event(kind, {"type": kind} | values)


def _stop(choice: Choice) -> dict[str, Any]:
    """Why it ended, and the stop sequence that ended it."""
    sequence = choice.outputs[-1].stop
    if sequence is not None and not choice.calls:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": STOP_REASONS[choice.finish or "stop"], "stop_sequence": None}


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.whole, "signature": ""}
    if part.call is None:
        return {"type": "text", "text": part.whole}
    try:
        arguments = json.loads(part.whole or "{}")
    except ValueError:  # it was cut off
        arguments = {}
    return {
        "type": "tool_use",
        "id": part.call.id,
        "name": part.call.name,
        "input": arguments if isinstance(arguments, dict) else {},
    }


def _told(change: Change) -> bytes:
    part = change.part
    if change.what == "ends":
        return _event("content_block_stop", index=part.index)
    if change.what == "begins":
        empty = Part(part.index, part.kind, part.call)
        return _event("content_block_start", index=part.index, content_block=_block(empty))
    delta: dict[str, Any] = {"type": "text_delta", "text": change.text}
    if part.kind == "reasoning":
        delta = {"type": "thinking_delta", "thinking": change.text}
    elif part.kind == "call":
        delta = {"type": "input_json_delta", "partial_json": change.text}
    return _event("content_block_delta", index=part.index, delta=delta)


def _usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """`input_tokens` are those that were neither read from the cache nor written to it."""
    counts = Counts.of(choices)
    return {
        "input_tokens": counts.prompt - counts.cached - counts.created,
        "cache_read_input_tokens": counts.cached,
        "cache_creation_input_tokens": counts.created,
        "output_tokens": counts.generated,
    }


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
