"""From a body to the tokens of its prompts, and to what its answers are held to.

Not responsible for what runs (service), nor for a template's or tokenizer's words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.grammar import Constraint, GrammarError, Grammars
from engine.http import bodies
from engine.http.errors import ApiError, refused
from engine.http.fields import Strict, Told, Unknown
from engine.http.grammars import grammar_of
from engine.http.schema import (
    Asking,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from engine.http.template import TemplateError
from engine.http.tokenizer import TextTooLongError, Tokenizer
from engine.request import Bounds, Pin

AnyBody = ChatBody | CompletionBody
AnyStrict = TypeVar("AnyStrict", bound=Strict)


@dataclass(frozen=True)
class ModelServed:
    """`name`: as bodies say it. `strict_fields`: an unknown field is refused."""

    name: str
    end_token_ids: frozenset[int]
    strict_fields: bool = False


@dataclass(frozen=True)
class Understood:
    """A body, the tokens of its prompts, their texts where the answer repeats them, and what its
    answers are held to."""

    body: AnyBody
    prompts: list[list[int]]
    echoed: tuple[str, ...] | None = None
    inside: bool = False  # the prompt ends in the middle of reasoning
    constraint: Constraint | None = None  # each answer gets a copy
    pins: tuple[Pin, ...] = ()


class Prompts:
    """Understands bodies. All of it may take long, and may run on several threads at once."""

    def __init__(self, model: ModelServed, bounds: Bounds, tokenizer: Tokenizer) -> None:
        self._model = model
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._told = Told()
        self._grammars: Grammars | None = None
        if tokenizer.json is not None:
            ends = sorted(model.end_token_ids)
            self._grammars = Grammars(tokenizer.json, bounds.vocab_size, ends)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 unless it is the served one."""
        if name != self._model.name:
            text = f"model = {name[:80]!r}: the model served here is {self._model.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    def checked(self, raw: bytes, kind: type[AnyStrict]) -> AnyStrict:
        """A body that asks for no answer; unknown fields of it are refused, or told in the log.
        Raises ApiError."""
        unknown = Unknown(refused=self._model.strict_fields)
        most = self._bounds.context_tokens
        body = bodies.checked(raw, kind, token_ids_max=most, unknown=unknown)
        self._told.tell(unknown.names)
        return body

    def understood(self, raw: bytes, kind: type[Asking]) -> Understood:
        """The body and its prompts' tokens: all that takes longer the longer the body is. It runs
        on the readers' threads, so that streams and /health don't wait for it."""
        most = self._bounds.context_tokens
        unknown = Unknown(refused=self._model.strict_fields)
        body = bodies.read(raw, kind, token_ids_max=most, unknown=unknown)
        self._told.tell(unknown.names)
        self.check_model(body.model)
        try:
            return self._chat(body) if isinstance(body, ChatBody) else self._completion(body)
        except TextTooLongError as error:
            param = "messages" if isinstance(body, ChatBody) else "prompt"
            text = f"{param}: {error}"
            raise ApiError(400, text, param=param, code="context_length_exceeded") from error

    def _chat(self, body: ChatBody) -> Understood:
        """Raises TextTooLongError before it makes more tokens than fit."""
        tokenizer, most = self._tokenizer, self._bounds.context_tokens
        variables = template_variables(body, tokenizer.template_source)
        try:
            prompt = tokenizer.chat(
                [m.for_template for m in body.messages],
                most,
                tools=[tool.for_template for tool in body.offered],
                variables=variables,
            )
        except TemplateError as error:
            raise ApiError(400, str(error), param=error.param, code="invalid_value") from error
        voice = tokenizer.voice
        inside = voice.ends_inside(tokenizer.end_of(prompt))
        grammar = grammar_of(body, voice.form.marks, tokenizer.token_of)
        constraint = None
        if grammar is not None:
            constraint = self._constraint(body, grammar, inside)
        pins = self._pins(body, prompt, variables)
        return Understood(body, [prompt], inside=inside, constraint=constraint, pins=pins)

    def _pins(
        self, body: ChatBody, prompt: list[int], variables: dict[str, Any]
    ) -> tuple[Pin, ...]:
        """What the body's marks stand behind: the tokens that the prompt shares with a chat that
        ends there. Where the template has no such chat, a mark asks for nothing."""
        found: dict[int, int] = {}
        for mark in body.marks:
            tools = [tool.for_template for tool in body.offered[: mark.tools]]
            messages = [each.for_template for each in mark.messages]
            most = self._bounds.context_tokens
            try:
                cut = self._tokenizer.chat(messages, most, tools=tools, variables=variables)
            except (TemplateError, TextTooLongError):
                continue
            tokens = shared(prompt, cut)
            found[tokens] = max(mark.ttl_s, found.get(tokens, 0))
        return tuple(Pin(tokens, ttl_s) for tokens, ttl_s in sorted(found.items()))

    def _constraint(self, body: ChatBody, grammar: str, inside: bool) -> Constraint:
        param = "tools" if body.must_call else "response_format"
        if self._grammars is None:
            text = f"{param}: this model's tokenizer is none that grammars are made for"
            raise ApiError(400, text, param=param, code="invalid_value")
        marks = self._tokenizer.voice.marks
        after = self._tokenizer.token_of(marks.end) if inside and marks is not None else None
        try:
            return self._grammars.constraint(grammar, begins_after=after)
        except GrammarError as error:
            text = f"{param}: no answer can be held to this schema: {error}"
            raise ApiError(400, text, param=param, code="invalid_value") from error

    def _completion(self, body: CompletionBody) -> Understood:
        """Raises TextTooLongError before it makes more tokens than fit."""
        most = self._bounds.context_tokens
        prompts = [
            self._tokenizer.encode(each, most) if isinstance(each, str) else each
            for each in body.prompts
        ]
        echoed = None
        if body.echo:
            echoed = tuple(
                each if isinstance(each, str) else self._tokenizer.decode(each)
                for each in body.prompts
            )
        return Understood(body, prompts, echoed)

    def tokens(self, asked: TokenizeBody) -> list[int]:
        """Raises ApiError for what is refused."""
        if asked.model is not None:
            self.check_model(asked.model)
        most = self._bounds.context_tokens
        try:
            if asked.prompt is not None:
                special = asked.add_special_tokens
                return self._tokenizer.encode(asked.prompt, most, special=special)
            return self._chat(asked.chat()).prompts[0]
        except TextTooLongError as error:
            param = "prompt" if asked.prompt is not None else "messages"
            text = f"{param}: {error}"
            raise ApiError(400, text, param=param, code="context_length_exceeded") from error

    def text(self, asked: DetokenizeBody) -> str:
        """Raises ApiError for what is refused."""
        if asked.model is not None:
            self.check_model(asked.model)
        vocabulary = self._bounds.vocab_size
        wrong = next((token for token in asked.tokens if token >= vocabulary), None)
        if wrong is not None:
            raise refused("tokens", wrong, f"the model has tokens below {vocabulary} only")
        return self._tokenizer.decode(asked.tokens, range(vocabulary))


def shared(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(np.array(one[:most]) != np.array(other[:most]))
    return int(differs[0]) if len(differs) else most


def template_variables(body: ChatBody, template: str) -> dict[str, Any]:
    """What a template is told beside messages and tools; a caller's own words go first."""
    told: dict[str, Any] = {}
    effort = body.reasoning_effort
    if effort is not None:
        told = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        told["thinking"] = told["enable_thinking"]
    told = {name: value for name, value in told.items() if name in template}
    return told | (body.chat_template_kwargs or {})
