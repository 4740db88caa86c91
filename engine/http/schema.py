"""The bodies of OpenAI's endpoints, checked field by field, by the rule of fields.py.

`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`: as other
servers of open models have them. `cache_salt` narrows whose cache is shared. `kvc2` tells the cache
what will become of the prompt, and its `details` ask for the answer's member of that name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from engine.http.fields import Ignored, NotDone, Strict, few
from engine.http.tools import CALLS_MAX, TOOLS_MAX, Tool, ToolCall, Tooled
from kvc2.answers import Hints

STOP_STRINGS_MAX = 16
STOP_CHARACTERS_MAX = 1024
STOP_TOKENS_MAX = 128
TOP_LOGPROBS_MAX = 20
BIAS_MAX = 1024  # tokens that one request biases
SALT_BYTES_MAX = 256  # the daemon's limit
PRIORITY_MAX = 7  # the daemon's
SECONDS_MAX = (1 << 32) - 1  # what the wire holds
CHOICES_MAX = 128  # of one request, all its prompts together
MESSAGES_MAX = 4096  # templates walk them more than once
METADATA_MAX = 16  # OpenAI's
# what a template's rendering is told by us, or by its tokenizer
TEMPLATE_ARGUMENTS = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
        *("conversations", "documents", "max_length", "messages", "padding", "return_dict"),
        *("return_assistant_tokens_mask", "return_tensors", "tokenize", "tokenizer_kwargs"),
        *("tools", "truncation", "sanitize_control_tokens"),
    }
)

TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS_MAX)]
Seconds = Annotated[int, Field(ge=0, le=SECONDS_MAX)]


class Asking(Strict, ABC):
    """A body that asks for a chat or a completion."""

    @abstractmethod
    def asks(self) -> ChatBody | CompletionBody:
        """Raises pydantic's ValidationError for what only the whole shows."""


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Ignored = None  # none is added


class CacheOptions(Strict):
    """`kvc2`: hints for the daemon, accepted and ignored without one, and `details`: whether the
    answer tells where its prompt was found, and why not more of it. `deadline_s`: how long the
    request may take, also before it runs."""

    ours: ClassVar[bool] = True
    priority: int = Field(default=0, ge=0, le=PRIORITY_MAX)
    session_end: bool = False
    expect_return_within_s: Seconds = 0
    ttl_s: Seconds = 0
    deadline_s: int | None = Field(default=None, ge=1, le=SECONDS_MAX)
    details: bool = False

    @property
    def hints(self) -> Hints:
        return Hints(**self.model_dump(exclude={"details", "deadline_s"}))


def _biases(value: Any) -> Any:
    """Token ids are the names of a JSON object's members: strings."""
    if not isinstance(value, dict):
        return value
    bad = next((name for name in value if not (name.isascii() and name.isdigit())), None)
    if bad is not None:
        raise ValueError(f"its names are token ids, as strings; {bad[:20]!r} is none")
    return {int(name): bias for name, bias in value.items()}


def _several(value: Any) -> Any:
    """A list is one prompt's tokens, or several prompts: of these few, before one is looked at."""
    if isinstance(value, list) and len(value) > CHOICES_MAX and isinstance(value[0], str | list):
        raise ValueError(f"at most {CHOICES_MAX} prompts")
    return value


Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(Asking):
    """What both of OpenAI's endpoints take."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)  # -1: all, as other servers have it
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=STOP_STRINGS_MAX, fail_fast=True)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=STOP_TOKENS_MAX, fail_fast=True)] | None
    ) = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=CHOICES_MAX)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_biases), few(BIAS_MAX)] | None = (
        None
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # of OpenAI's hosts: every prompt is looked up here
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    metadata: Annotated[dict[str, str], few(METADATA_MAX)] | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None
    kvc2: CacheOptions = CacheOptions()

    @field_validator("cache_salt")
    @classmethod
    def _short_salt(cls, value: str | None) -> str | None:
        if value is not None and not 1 <= len(value.encode()) <= SALT_BYTES_MAX:
            raise ValueError(f"1 to {SALT_BYTES_MAX} bytes")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """How many answers a prompt gets."""
        return self.n or 1

    @property
    def generated_choices(self) -> int:
        """Of how many those are the best."""
        return self.choices


class CompletionBody(Body):
    """/v1/completions."""

    def asks(self) -> CompletionBody:
        return self

    prompt: Annotated[
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        BeforeValidator(_several),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=CHOICES_MAX)
    suffix: NotDone = None

    @model_validator(mode="after")
    def _what_goes_together(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError("best_of must be n or more")
        if self.stream and self.generated_choices > self.choices:
            raise ValueError("stream is not allowed where best_of is more than n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def generated_choices(self) -> int:
        return self.best_of or self.choices

    @property
    def prompt_logprobs_asked(self) -> int | None:
        """As `top_logprobs_asked`, of the prompt's tokens."""
        return self.logprobs if self.echo else None

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs_asked(self) -> int | None:
        """None: no log-probabilities; else how many beside the chosen token's."""
        return self.logprobs


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=CALLS_MAX, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: Ignored = None  # the same, under another name
    refusal: str | None = None
    function_call: NotDone = None
    audio: NotDone = None
    annotations: Ignored = None

    @model_validator(mode="after")
    def _who_calls(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only the assistant calls tools")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""  # what the assistant said instead
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @property
    def for_template(self) -> dict[str, Any]:
        """As the chat template sees it."""
        more: dict[str, Any] = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        said = {name: value for name, value in more.items() if value is not None}
        if self.tool_calls:
            said["tool_calls"] = [call.for_template for call in self.tool_calls]
        return {"role": self.role, "content": self.text} | said


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it is kept in any case


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True)
class Mark:
    """A place in a chat: its first `messages`, of which the last may be cut off, and its first
    `tools`. What stands before it is to be kept for `ttl_s` seconds."""

    messages: Sequence[Message]
    tools: int
    ttl_s: int


class ChatBody(Body, Tooled):
    """/v1/chat/completions."""

    _marks: tuple[Mark, ...] = PrivateAttr(())  # what another interface's body says beside it

    @property
    def marks(self) -> tuple[Mark, ...]:
        return self._marks

    def marked(self, marks: Sequence[Mark]) -> ChatBody:
        self._marks = tuple(marks)
        return self

    def asks(self) -> ChatBody:
        return self

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: Annotated[list[Literal["text"]], few(1)] | None = None
    prediction: Ignored = None  # it makes an answer faster, never another
    audio: NotDone = None
    functions: NotDone = None  # before there were tools
    function_call: NotDone = None
    web_search_options: NotDone = None
    verbosity: Literal["medium"] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_templates(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        ours = next((name for name in value or () if name in TEMPLATE_ARGUMENTS), None)
        if ours is not None:
            raise ValueError(f"{ours!r} is the engine's to say")
        return value

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompt_logprobs_asked(self) -> int | None:
        return None

    @property
    def top_logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(Strict):
    """/tokenize, as vLLM has it: of a text, or of a chat by the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)] | None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self

    def chat(self) -> ChatBody:
        """Of messages. Raises pydantic's ValidationError."""
        asked = {"model": self.model or "", "chat_template_kwargs": self.chat_template_kwargs}
        body = ChatBody.model_validate(asked | {"messages": [{"role": "user", "content": ""}]})
        return body.model_copy(update={"messages": self.messages, "tools": self.tools})


class DetokenizeBody(Strict):
    """/detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
