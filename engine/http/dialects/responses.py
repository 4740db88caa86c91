"""OpenAI's /v1/responses, without any state: what agents need of it.

What is kept between calls (`previous_response_id`, `conversation`, `background`) is refused by
name; `store` is ignored, since nothing is. Not responsible for what a chat becomes (service).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from engine.http.errors import ApiError
from engine.http.fields import Ignored, NotDone, Strict, few
from engine.http.parts import Change, Part, Parts, parts_of
from engine.http.replies import Asked, Choice, Counts, Reply, named_event
from engine.http.schema import (
    MESSAGES_MAX,
    METADATA_MAX,
    TOP_LOGPROBS_MAX,
    Asking,
    CacheOptions,
    ChatBody,
    ReasoningEffort,
)
from engine.http.tools import TOOLS_MAX, ToolName
from engine.request import Explanation


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = (
    str
    | Annotated[
        list[Annotated[InputText | Refusal, Field(discriminator="type")]], Field(fail_fast=True)
    ]
)


class AnyItem(Strict):
    """What an earlier answer names its items by, which changes nothing here."""

    id: Ignored = None
    status: Ignored = None


class MessageItem(AnyItem):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    phase: Ignored = None


class CallItem(AnyItem):
    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str


class OutputItem(AnyItem):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(AnyItem):
    """What an answer reasoned: it goes back with calls that follow it."""

    type: Literal["reasoning"]
    content: Annotated[list[dict[str, Any]], Field(max_length=MESSAGES_MAX)] | None = None
    summary: Ignored = None
    encrypted_content: Ignored = None

    @property
    def text(self) -> str:
        return "".join(str(each.get("text", "")) for each in self.content or ())


def _type_of(item: Any) -> str:
    """A message needs none."""
    return str(item.get("type") or "message") if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Strict):
    type: Literal["function"]
    name: str


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=TOOLS_MAX)]


Chosen = Annotated[NamedChoice | AllowedChoice, Field(discriminator="type")]


class TextForm(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: Ignored = None
    description: Ignored = None


class TextOptions(Strict):
    format: TextForm | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    effort: ReasoningEffort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponsesBody(Asking):
    """/v1/responses."""

    model: str
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Item], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    metadata: Annotated[dict[str, str], few(METADATA_MAX)] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: NotDone = None
    conversation: NotDone = None
    background: NotDone = None
    prompt: NotDone = None
    max_tool_calls: Ignored = None  # of hosted tools, of which there is none
    include: Ignored = None
    store: Ignored = None
    stream_options: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None
    cache_salt: str | None = None
    kvc2: CacheOptions = CacheOptions()

    def asks(self) -> ChatBody:
        """The same as a chat."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "cache_salt": self.cache_salt,
            "kvc2": self.kvc2.model_dump(),
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _choice(self.tool_choice) if self.tools else None,
        }
        form = self.text.format if self.text else None
        if form is not None:
            asked["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                schema = {"name": form.name, "schema": form.schema_}
                asked["response_format"]["json_schema"] = schema
        return ChatBody.model_validate(asked)

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        said: dict[str, Any] | None = None  # the assistant's, which calls and reasoning join
        for item in self.input:
            mine = isinstance(item, CallItem | ReasoningItem) or (
                isinstance(item, MessageItem) and item.role == "assistant"
            )
            if said is not None and not mine:
                yield said
                said = None
            if isinstance(item, OutputItem):
                content = _text(item.output)
                yield {"role": "tool", "tool_call_id": item.call_id, "content": content}
            elif isinstance(item, MessageItem) and not mine:
                yield {"role": item.role, "content": _text(item.content)}
            else:
                said = _joined(said or {"role": "assistant", "content": ""}, item)
        if said is not None:
            yield said


def _joined(said: dict[str, Any], item: Item) -> dict[str, Any]:
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        return said | {"tool_calls": [*said.get("tool_calls", []), call]}
    if isinstance(item, ReasoningItem):
        return said | {"reasoning_content": said.get("reasoning_content", "") + item.text}
    if isinstance(item, MessageItem):
        return said | {"content": said["content"] + _text(item.content)}
    return said


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _choice(choice: str | NamedChoice | AllowedChoice | None) -> Any:
    if isinstance(choice, NamedChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedChoice):
        tools = [_choice(each) for each in choice.tools]
        allowed = {"mode": choice.mode, "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


class ResponsesReply(Reply):
    """The answer as items, whole and as events."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.id = f"resp_{self.id}"
        self._parts = Parts()
        self._number = 0

    def whole(self, choices: Sequence[Choice], why: Explanation | None) -> dict[str, Any]:
        return self._response(choices, parts_of(choices[0]))

    def _response(self, choices: Sequence[Choice], parts: Sequence[Part]) -> dict[str, Any]:
        done = bool(choices)
        cut = done and choices[0].finish == "length"
        status = "incomplete" if cut else "completed" if done else "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self.asked.model,
            "output": [self._item(part, status="completed") for part in parts],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "instructions": None,
            "metadata": {},
            "temperature": None,
            "top_p": None,
            "usage": _usage(choices) if done else None,
        }

    def _item(self, part: Part, *, status: str) -> dict[str, Any]:
        of = f"{self.id.removeprefix('resp_')}_{part.index}"
        if part.call is not None:
            return {
                "type": "function_call",
                "id": f"fc_{of}",
                "call_id": part.call.id,
                "name": part.call.name,
                "arguments": part.whole,
                "status": status,
            }
        text = part.whole
        if part.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            return {"type": "reasoning", "id": f"rs_{of}", "summary": [], "content": content}
        return {
            "type": "message",
            "id": f"msg_{of}",
            "role": "assistant",
            "status": status,
            "content": [_output_text(text)] if status == "completed" else [],
        }

    def opening(self) -> bytes:
        response = self._response((), ())
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, choice: Choice, why: Explanation | None) -> bytes:
        return b"".join(self._told(change) for change in self._parts.news(choice))

    def closing(self, choices: Sequence[Choice]) -> bytes:
        last = b"".join(self._told(change) for change in self._parts.close())
        response = self._response(choices, self._parts.all)
        return last + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        told = self._response((), self._parts.all) | {
            "status": "failed",
            "error": {"code": "server_error", "message": error.message},
        }
        return self._event("response.failed", response=told)

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event(kind, {"type": kind, "sequence_number": number} | values)

    def _told(self, change: Change) -> bytes:
        part = change.part
        place = {"output_index": part.index}
        if change.what == "begins":
            empty = Part(part.index, part.kind, part.call)
            item = self._item(empty, status="in_progress")
            told = self._event("response.output_item.added", **place, item=item)
            if part.kind == "text":
                begun = {"content_index": 0, "part": _output_text("")}
                told += self._of_item("response.content_part.added", part, **begun)
            return told
        if change.what == "adds":
            return self._of_item(f"{_NAMES[part.kind]}.delta", part, delta=change.text)
        value = {"arguments" if part.kind == "call" else "text": part.whole}
        if part.call is not None:
            value["name"] = part.call.name
        told = self._of_item(f"{_NAMES[part.kind]}.done", part, **value)
        if part.kind == "text":
            told += self._of_item("response.content_part.done", part, part=_output_text(part.whole))
        item = self._item(part, status="completed")
        return told + self._event("response.output_item.done", **place, item=item)

    def _of_item(self, kind: str, part_: Part, **values: Any) -> bytes:
        item = self._item(part_, status="in_progress")
        place: dict[str, Any] = {"item_id": item["id"], "output_index": part_.index}
        if part_.kind != "call":
            place["content_index"] = 0
        if kind.startswith("response.output_text"):
            place["logprobs"] = []
        return self._event(kind, **(place | values))


_NAMES = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(choices: Sequence[Choice]) -> dict[str, Any]:
    counts = Counts.of(choices)
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached},
        "output_tokens": counts.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.prompt + counts.generated,
    }
