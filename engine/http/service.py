"""From a body to requests for the worker, and from their outputs to an answer.

Not responsible for what runs when (scheduler), nor for the shapes of bodies and answers (schema,
replies).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from engine import request as engine_request
from engine.errors import ContextLengthError, InvalidRequestError
from engine.http.dialects.anthropic import MessagesBody, MessagesReply
from engine.http.dialects.ollama import ChatOfOllama, GenerateBody, GenerateReply, OllamaReply
from engine.http.dialects.responses import ResponsesBody, ResponsesReply
from engine.http.errors import ApiError
from engine.http.fields import Strict
from engine.http.prompts import AnyBody, ModelServed, Prompts, Understood
from engine.http.replies import Asked, ChatReply, Choice, CompletionReply, Reply
from engine.http.run import Run
from engine.http.schema import Asking, ChatBody, CompletionBody
from engine.http.speech.reader import Tools
from engine.http.tokenizer import Tokenizer
from engine.request import SEED_LIMIT, Caller, Explanation, Output, SamplingParams
from engine.text import IncrementalText
from engine.worker import StoppedError, TooBusyError, Worker
from kvc2.keyring import Keyring

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for /v1/completions; a chat may fill the context
STOP_S = 10.0  # for the step under way
DETAIL_SCORES = 2  # details report the two best tokens
EXPLAIN_WAIT_S = 1.0  # a silent daemon must not hold an answer back for longer
RETRY_AFTER_S = 1  # a queue may have room by then

AnyStrict = TypeVar("AnyStrict", bound=Strict)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Served:
    """What the service needs to know. `keys`: whose a request is; without any no key is needed,
    and all are `tenant`. `strict_fields`: an unknown field is refused."""

    model: str
    end_token_ids: frozenset[int]
    tenant: str = ""
    keys: Keyring = field(default_factory=lambda: Keyring({}))
    max_body_bytes: int = 8 << 20
    strict_fields: bool = False


@dataclass(frozen=True)
class Endpoint:
    """One interface: its bodies, what each of them asks for, and the words of its answers."""

    body: type[Asking]
    reply: Callable[[Asked], Reply]


CHAT = Endpoint(ChatBody, ChatReply)
COMPLETION = Endpoint(CompletionBody, CompletionReply)
MESSAGES = Endpoint(MessagesBody, MessagesReply)
RESPONSES = Endpoint(ResponsesBody, ResponsesReply)
OLLAMA_CHAT = Endpoint(ChatOfOllama, OllamaReply)
OLLAMA_GENERATE = Endpoint(GenerateBody, GenerateReply)


class Service:
    """Answers all endpoints."""

    def __init__(self, served: Served, worker: Worker, tokenizer: Tokenizer) -> None:
        self._served = served
        self._worker = worker
        self._tokenizer = tokenizer
        model = ModelServed(served.model, served.end_token_ids, served.strict_fields)
        self.prompts = Prompts(model, worker.bounds, tokenizer)
        # two: so that a short body needn't wait for a long one, and a core is left for the model
        self._readers = ThreadPoolExecutor(2, "kvc2-reader")

    def close(self) -> None:
        """Ends what still runs with an error; no request may follow."""
        self._readers.shutdown(wait=False)
        self._worker.stop(STOP_S)

    def model_card(self) -> dict[str, Any]:
        served = self._served
        card = {"id": served.model, "object": "model", "created": 0, "owned_by": "kvc2"}
        return card | {"max_model_len": self._worker.bounds.context_tokens}

    @property
    def template(self) -> str:
        return self._tokenizer.template_source

    async def body(self, http: Request, kind: type[AnyStrict]) -> AnyStrict:
        """A body that asks for no answer. Raises ApiError for what is refused."""
        return self.prompts.checked(await self._read(http), kind)

    async def apart(self, call: Callable[[Any], Found], given: Any) -> Found:
        """What may take long, on the readers' threads: streams and /health don't wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, call, given)

    async def answer(self, http: Request, endpoint: Endpoint) -> Response:
        """One request from its bytes to its answer. Raises ApiError for what is refused."""
        self.caller(http, None)  # before anything of the body is looked at
        with _refusals("body"):
            self._worker.check_room()
        raw = await self._read(http)
        understood = await self.apart(lambda raw: self.prompts.understood(raw, endpoint.body), raw)
        del raw  # the answer may take minutes
        body = understood.body
        reply = endpoint.reply(self._asked(understood))
        run = Run(self._worker, tells_held=reply.tells_created)
        choices = [
            self._choice(understood, index)
            for index in range(len(understood.prompts) * body.generated_choices)
        ]
        requests = [self._request(http, understood, reply.id, run, choice) for choice in choices]
        news = self._news(run.outputs(http, requests), choices)
        with _refusals("messages" if isinstance(body, ChatBody) else "prompt"):
            # so that a request that fails at once has a status of its own
            first = await anext(news)
        if first.outputs[-1].finish == "error":
            raise _failed(first.outputs[-1])
        if body.stream:
            pieces = self._pieces(reply, first, news, choices)
            return StreamingResponse(pieces, media_type=reply.media_type)
        return await self._whole(reply, news, choices)

    def caller(self, http: Request, salt: str | None) -> Caller:
        """Whose request this is, by its API key. Raises ApiError 401."""
        salt_bytes = b"" if salt is None else salt.encode()
        if not self._served.keys.needed:
            return Caller(self._served.tenant, salt_bytes)
        given = http.headers.get("x-api-key", "")  # as Anthropic's clients say it
        kind, _, token = http.headers.get("authorization", f"Bearer {given}").partition(" ")
        tenant = self._served.keys.owner(token.strip())
        if kind.lower() != "bearer" or tenant is None:
            message = "Authorization: a known key is needed (Bearer KEY)"
            raise ApiError(401, message, param="Authorization", code="invalid_api_key")
        return Caller(tenant, salt_bytes)

    async def _read(self, http: Request) -> bytes:
        limit = self._served.max_body_bytes
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > limit:
                text = f"the body is longer than {limit} bytes"
                raise ApiError(413, text, code="request_too_large")
        return bytes(body)

    def _asked(self, understood: Understood) -> Asked:
        body = understood.body
        return Asked(
            model=self._served.model,
            logprobs=body.top_logprobs_asked,
            details=body.kvc2.details,
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
            token_bytes=self._tokenizer.token_bytes,
            decode=self._tokenizer.decode,
            special=self._tokenizer.special_tokens,
            choices=body.choices,
            echoed=understood.echoed,
            prompts=understood.prompts,
        )

    def _choice(self, understood: Understood, index: int) -> Choice:
        body, voice = understood.body, self._tokenizer.voice
        prompt = index // body.generated_choices
        if not isinstance(body, ChatBody):
            return Choice(index, prompt)
        speech = voice.speech(tools_of(body), must_call=body.must_call, inside=understood.inside)
        return Choice(index, prompt, speech, voice.make_call_id)

    def _text(self, body: AnyBody) -> IncrementalText:
        special, shown = self._tokenizer.special_tokens, frozenset[int]()
        if isinstance(body, ChatBody):
            shown = self._tokenizer.voice.shown(special, tools=bool(body.callable_tools))
        return IncrementalText(
            lambda ids: self._tokenizer.decode(ids, shown),
            body.stop_strings,
            {i: text for i, text in special.items() if i not in shown},
            min_tokens=body.min_tokens or 0,
        )

    def _output_tokens(self, body: AnyBody, prompt_tokens: int) -> int:
        """How many to generate at most: what is asked for, or what there is room for, but one at
        least, so that a prompt without room is refused by its length."""
        if body.output_tokens_max is not None:
            return body.output_tokens_max
        room = max(1, self._worker.bounds.context_tokens - prompt_tokens)
        return room if isinstance(body, ChatBody) else min(room, COMPLETION_TOKENS_DEFAULT)

    def _request(
        self, http: Request, understood: Understood, reply_id: str, run: Run, choice: Choice
    ) -> engine_request.Request:
        body, prompt = understood.body, understood.prompts[choice.prompt]
        scores = body.top_logprobs_asked
        if body.kvc2.details:
            scores = max(scores or 0, DETAIL_SCORES)
        if body.generated_choices > body.choices:
            scores = scores or 0  # the best ones are known by their log-probabilities
        constraint = understood.constraint
        ends = self._served.end_token_ids
        if body.ignore_eos and constraint is None:  # behind the end a grammar has nothing to say
            ends = frozenset()
        return engine_request.Request(
            # the first one's is the answer's, by which `kvc2 explain` finds it
            request_id=f"{reply_id}.{choice.index}" if choice.index else reply_id,
            tokens=np.array(prompt, np.uint32),
            max_tokens=self._output_tokens(body, len(prompt)),
            sampling=sampling_of(body, choice.index % body.generated_choices),
            text=self._text(body),
            deliver=run.deliver(choice.index),
            caller=self.caller(http, body.cache_salt),
            end_token_ids=ends | frozenset(body.stop_token_ids or ()),
            top_scores=self._at_most_all(scores),
            prompt_scores=self._at_most_all(body.prompt_logprobs_asked),
            hints=body.kvc2.hints,
            pins=understood.pins,
            tell_held=run.tells_held,
            explain=body.kvc2.details and choice.index == 0,
            deadline_s=body.kvc2.deadline_s,
            constraint=None if constraint is None else constraint.copy(),
        )

    def _at_most_all(self, count: int | None) -> int | None:
        """Of the best tokens."""
        return None if count is None else min(count, self._worker.bounds.vocab_size)

    @staticmethod
    async def _news(
        outputs: AsyncIterator[tuple[int, Output]], choices: Sequence[Choice]
    ) -> AsyncIterator[Choice]:
        """The choices as outputs are added to them."""
        try:
            async for index, output in outputs:
                choices[index].add(output)
                yield choices[index]
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # it is a generator: cancels

    @staticmethod
    async def _whole(
        reply: Reply, news: AsyncIterator[Choice], choices: Sequence[Choice]
    ) -> Response:
        async for choice in news:
            if choice.outputs[-1].finish == "error":
                raise _failed(choice.outputs[-1])
        await _learn_held(choices)
        return JSONResponse(reply.whole(choices, await _explanation(choices[0].outputs[-1])))

    @staticmethod
    async def _pieces(
        reply: Reply, first: Choice, news: AsyncIterator[Choice], choices: Sequence[Choice]
    ) -> AsyncIterator[bytes]:
        yield reply.opening() + reply.piece(first, await _explanation(first.outputs[-1]))
        try:
            async for choice in news:
                output = choice.outputs[-1]
                if output.finish == "error":
                    yield reply.failed(_failed(output))
                    return
                piece = reply.piece(choice, await _explanation(output))
                if piece:
                    yield piece
        except ApiError:  # the caller hung up: nobody reads this
            return
        finally:
            await news.aclose()  # type: ignore[attr-defined]  # it is a generator: cancels
        await _learn_held(choices)
        yield reply.closing(choices)


def sampling_of(body: AnyBody, choice: int) -> SamplingParams:
    """How the tokens of a prompt's choice are drawn: choice i by the i-th seed from the body's."""
    seed = body.seed
    if seed is not None:
        seed = (seed + choice + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=body.logit_bias or {},
        min_tokens=body.min_tokens or 0,
    )


def tools_of(body: ChatBody) -> Tools | None:
    """What an answer may call; None: nothing."""
    callable_tools = body.callable_tools
    if not callable_tools:
        return None
    schemas = {t.function.name: t.function.schema_of_arguments for t in callable_tools}
    return Tools(schemas, parallel=body.calls_max is None)


@contextmanager
def _refusals(prompt_field: str) -> Iterator[None]:
    """What the worker doesn't take, as its status. `prompt_field`: where its tokens came from."""
    try:
        yield
    except InvalidRequestError as error:
        param = prompt_field if error.field == "tokens" else error.field
        too_long = isinstance(error, ContextLengthError)
        code = "context_length_exceeded" if too_long else "invalid_value"
        raise ApiError(400, f"{param}: {error}", param=param, code=code) from error
    except TooBusyError as error:
        raise ApiError(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S) from error
    except StoppedError as error:
        raise ApiError(503, str(error), code="unavailable") from error


def _failed(output: Output) -> ApiError:
    """503 where another try may succeed, else 500."""
    text = output.error or "the request failed"
    return ApiError(503, text, code="unavailable") if output.unavailable else ApiError(500, text)


async def _explanation(output: Output) -> Explanation | None:
    """What was asked when the request began, which is there since long unless it was short."""
    if output.explanation is None:
        return None
    asked = asyncio.wrap_future(output.explanation)
    try:
        return await asyncio.wait_for(asked, EXPLAIN_WAIT_S)
    except TimeoutError:
        return Explanation("unknown")


async def _learn_held(choices: Sequence[Choice]) -> None:
    """What the daemon has of each, where that is to be told; of a silent one nothing is known."""
    for choice in choices:
        held = choice.outputs[-1].held
        if held is not None:
            with suppress(TimeoutError):
                asked = asyncio.wrap_future(held)
                choice.held_tokens = await asyncio.wait_for(asked, EXPLAIN_WAIT_S)
