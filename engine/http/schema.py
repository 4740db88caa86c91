"""The bodies that callers send, checked field by field: OpenAI's, and some of our own.

`top_k`, `ignore_eos`: as other servers of open models have them. `cache_salt` narrows whose cache
is shared. `kvc2` tells the cache what will become of the prompt, and its `details` ask for the
answer's member of that name. A field that OpenAI has and the engine doesn't do is refused by name
unless its value asks for nothing, as is an unknown one: what is null or empty asks for nothing.

Lists are checked up to the first bad element, and one unknown name is enough: see bodies.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from kvc2.answers import Hints

STOP_STRINGS_MAX = 16
STOP_CHARACTERS_MAX = 1024
TOP_LOGPROBS_MAX = 20
SALT_BYTES_MAX = 256  # the daemon's limit
PRIORITY_MAX = 7  # the daemon's
SECONDS_MAX = (1 << 32) - 1  # what the wire holds

MESSAGES_MAX = 4096  # templates walk them more than once
METADATA_MAX = 16  # OpenAI's
EMPTY: tuple[Any, ...] = (None, "", [], {})


def few(most: int) -> BeforeValidator:
    """Refuses an object or list of more than `most` before it looks at any."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"at most {most}")
        return value

    return BeforeValidator(check)


TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS_MAX)]


class Strict(BaseModel):
    """No coercion ("5" is no number), no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_something(cls, value: Any) -> Any:
        """Without members that ask for nothing, and with the first unknown name alone."""
        if not isinstance(value, dict):
            return value
        asked: dict[str, Any] = {}
        unknown: dict[str, Any] = {}
        for name, each in value.items():
            field = cls.model_fields.get(name)
            if field is None:
                if not unknown and each not in EMPTY:
                    unknown[name] = each
            elif each is not None or field.is_required():
                asked[name] = each
        return asked | unknown


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Seconds = Annotated[int, Field(ge=0, le=SECONDS_MAX)]


class CacheOptions(Strict):
    """`kvc2`: hints for the daemon, accepted and ignored without one, and `details`: whether the
    answer tells where its prompt was found, and why not more of it."""

    priority: int = Field(default=0, ge=0, le=PRIORITY_MAX)
    session_end: bool = False
    expect_return_within_s: Seconds = 0
    ttl_s: Seconds = 0
    details: bool = False

    @property
    def hints(self) -> Hints:
        return Hints(**self.model_dump(exclude={"details"}))


class Body(Strict):
    """What both endpoints take."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=STOP_STRINGS_MAX, fail_fast=True)]
        | None
    ) = None
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], few(0)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # of OpenAI's hosts: every prompt is looked up here
    service_tier: Literal["auto", "default"] | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None
    kvc2: CacheOptions = CacheOptions()

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        return 0 if isinstance(value, float) and value == 0 else value

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


class CompletionBody(Body):
    """/v1/completions."""

    prompt: str | TokenIds
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        """OpenAI also takes a list of prompts; here it holds one."""
        if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
            return value
        if len(value) > 1:
            raise ValueError("a list of prompts may hold one")
        return value[0]

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


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""  # what the assistant said instead
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @property
    def for_template(self) -> dict[str, str]:
        """As the chat template sees it."""
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        said = {name: value for name, value in more.items() if value is not None}
        return {"role": self.role, "content": self.text} | said


class TextFormat(Strict):
    type: Literal["text"]


class ChatBody(Body):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], few(0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # of none
    modalities: Annotated[list[Literal["text"]], few(1)] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], few(METADATA_MAX)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
