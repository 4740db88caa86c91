"""The HTTP service: from a body to a request for the worker, and from its outputs to an answer.

Not responsible for what runs when (scheduler), nor for the shapes of bodies (schema, replies).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from engine import request as engine_request
from engine.errors import ContextLengthError, InvalidRequestError
from engine.http import bodies
from engine.http.errors import ApiError
from engine.http.experts import Experts, add_experts
from engine.http.replies import Asked, Reply, event
from engine.http.schema import ChatBody, CompletionBody
from engine.http.template import TemplateError
from engine.http.tokenizer import TextTooLongError, Tokenizer
from engine.request import Caller, Explanation, Output, SamplingParams
from engine.text import IncrementalText
from engine.worker import StoppedError, TooBusyError, Worker

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for /v1/completions; a chat may fill the context
STOP_S = 10.0  # for the step under way
DETAIL_SCORES = 2  # details report the two best tokens
EXPLAIN_WAIT_S = 1.0  # a silent daemon must not hold an answer back for longer


@dataclass(frozen=True)
class Served:
    """What the service needs to know. `tenants`: API key -> tenant; empty: no key is needed, all
    are `tenant`."""

    model: str
    end_token_ids: frozenset[int]
    tenant: str = ""
    tenants: Mapping[str, str] = field(default_factory=dict)
    max_body_bytes: int = 8 << 20


def build(
    served: Served,
    *,
    worker: Worker,
    tokenizer: Tokenizer,
    registry: CollectorRegistry,
    daemon: Callable[[], dict[str, Any] | None],
    experts: Experts | None = None,
) -> FastAPI:
    """The application. `daemon` tells of the session with the daemon (Attachment.state)."""

    service = Service(served, worker, tokenizer)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="kvc2-engine", lifespan=lifespan, docs_url=None, redoc_url=None)

    _answer_errors(app)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await service.answer(http, CompletionBody)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await service.answer(http, ChatBody)

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        service.caller(http, None)
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(http: Request, name: str) -> Response:
        service.caller(http, None)
        service.check_model(name)
        return JSONResponse(service.model_card())

    @app.get("/health")
    async def health() -> Response:
        ok = worker.healthy
        found = daemon()
        attached = found is not None and found["attached"]
        body = {"status": "ok" if ok else "failed", "attached": attached, "daemon": found}
        return JSONResponse(body, 200 if ok else 503)

    if experts is not None:
        add_experts(app, experts, lambda http: service.caller(http, None))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _answer_errors(app: FastAPI) -> None:
    """Every refusal has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()


class Service:
    """Answers both endpoints."""

    def __init__(self, served: Served, worker: Worker, tokenizer: Tokenizer) -> None:
        self._served = served
        self._worker = worker
        self._tokenizer = tokenizer
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

    async def answer(self, http: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        """One request from its bytes to its answer. Raises ApiError for what is refused."""
        self.caller(http, None)  # before anything of the body is looked at
        with _refusals("body"):
            self._worker.check_room()
        raw = await self._read(http)
        loop = asyncio.get_running_loop()
        body, prompt = await loop.run_in_executor(self._readers, self._understood, raw, kind)
        del raw  # the answer may take minutes
        reply = Reply(
            Asked(
                model=self._served.model,
                logprobs=body.top_logprobs_asked,
                details=body.kvc2.details,
                token_bytes=self._tokenizer.token_bytes,
                decode=self._tokenizer.decode,
                special=self._tokenizer.special_tokens,
            ),
            chat=isinstance(body, ChatBody),
        )
        outputs = self._run(http, body, prompt, reply.id)
        first = await anext(outputs)  # so that a request that fails at once has a status of its own
        if first.finish == "error":
            raise _failed(first)
        if body.stream:
            pieces = self._pieces(reply, first, outputs, body)
            return StreamingResponse(pieces, media_type="text/event-stream")
        return await self._whole(reply, first, outputs)

    def caller(self, http: Request, salt: str | None) -> Caller:
        """Whose request this is, by its API key. Raises ApiError 401."""
        salt_bytes = b"" if salt is None else salt.encode()
        if not self._served.tenants:
            return Caller(self._served.tenant, salt_bytes)
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        found = [
            tenant
            for key, tenant in self._served.tenants.items()
            if hmac.compare_digest(key.encode(), given.strip().encode())
        ]
        if kind.lower() != "bearer" or not found:
            message = "Authorization: a known key is needed (Bearer KEY)"
            raise ApiError(401, message, param="Authorization", code="invalid_api_key")
        return Caller(found[0], salt_bytes)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 unless it is the served one."""
        if name != self._served.model:
            text = f"model = {name[:80]!r}: the model served here is {self._served.model!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    async def _read(self, http: Request) -> bytes:
        limit = self._served.max_body_bytes
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > limit:
                text = f"the body is longer than {limit} bytes"
                raise ApiError(413, text, code="request_too_large")
        return bytes(body)

    def _understood(
        self, raw: bytes, kind: type[CompletionBody] | type[ChatBody]
    ) -> tuple[CompletionBody | ChatBody, list[int]]:
        """The body and its prompt's tokens: all that takes longer the longer the body is. It runs
        on the readers' threads, so that streams and /health don't wait for it."""
        most = self._worker.bounds.context_tokens
        body = bodies.read(raw, kind, token_ids_max=most)
        self.check_model(body.model)
        try:
            return body, self._tokens(body)
        except TextTooLongError as error:
            param = "messages" if isinstance(body, ChatBody) else "prompt"
            text = f"{param}: {error}"
            raise ApiError(400, text, param=param, code="context_length_exceeded") from error

    def _tokens(self, body: CompletionBody | ChatBody) -> list[int]:
        """Raises TextTooLongError before it makes more tokens than fit."""
        most = self._worker.bounds.context_tokens
        if isinstance(body, ChatBody):
            try:
                return self._tokenizer.chat([m.for_template for m in body.messages], most)
            except TemplateError as error:
                raise ApiError(400, str(error), param=error.param, code="invalid_value") from error
        if isinstance(body.prompt, str):
            return self._tokenizer.encode(body.prompt, most)
        return body.prompt

    def _output_tokens(self, body: ChatBody | CompletionBody, prompt_tokens: int) -> int:
        """How many to generate at most: what is asked for, or what there is room for, but one at
        least, so that a prompt without room is refused by its length."""
        if body.output_tokens_max is not None:
            return body.output_tokens_max
        room = max(1, self._worker.bounds.context_tokens - prompt_tokens)
        return room if isinstance(body, ChatBody) else min(room, COMPLETION_TOKENS_DEFAULT)

    def _request(
        self, http: Request, body: ChatBody | CompletionBody, prompt: list[int], request_id: str
    ) -> tuple[engine_request.Request, asyncio.Queue[Output]]:
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(output: Output) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        scores = body.top_logprobs_asked
        if body.kvc2.details:
            scores = max(scores or 0, DETAIL_SCORES)
        request = engine_request.Request(
            request_id=request_id,
            tokens=np.array(prompt, np.uint32),
            max_tokens=self._output_tokens(body, len(prompt)),
            sampling=SamplingParams(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=body.top_k or 0,
                seed=body.seed,
            ),
            text=IncrementalText(
                self._tokenizer.decode, body.stop_strings, self._tokenizer.special_tokens
            ),
            deliver=deliver,
            caller=self.caller(http, body.cache_salt),
            end_token_ids=frozenset() if body.ignore_eos else self._served.end_token_ids,
            top_scores=scores if scores is None else min(scores, self._worker.bounds.vocab_size),
            hints=body.kvc2.hints,
            explain=body.kvc2.details,
        )
        return request, outputs

    async def _run(
        self, http: Request, body: ChatBody | CompletionBody, prompt: list[int], request_id: str
    ) -> AsyncIterator[Output]:
        """The request's outputs as they come; leaving early, or a caller who hangs up, cancels
        it."""
        request, outputs = self._request(http, body, prompt, request_id)
        with _refusals("messages" if isinstance(body, ChatBody) else "prompt"):
            self._worker.submit(request)
        gone = asyncio.create_task(_hung_up(http))
        ended = False
        try:
            while not ended:
                news = asyncio.create_task(outputs.get())
                await asyncio.wait((news, gone), return_when=asyncio.FIRST_COMPLETED)
                if not news.done():
                    news.cancel()
                    raise ApiError(499, "the caller hung up")
                ended = news.result().finish is not None
                yield news.result()
        finally:
            gone.cancel()
            if not ended:
                self._worker.cancel(request_id)

    @staticmethod
    async def _whole(reply: Reply, first: Output, outputs: AsyncIterator[Output]) -> Response:
        seen = [first]
        async for output in outputs:
            seen.append(output)
        if seen[-1].finish == "error":
            raise _failed(seen[-1])
        return JSONResponse(reply.whole(seen, await _explanation(seen[-1])))

    @staticmethod
    async def _pieces(
        reply: Reply, first: Output, outputs: AsyncIterator[Output], body: ChatBody | CompletionBody
    ) -> AsyncIterator[bytes]:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        seen = [first]
        yield reply.opening(with_usage) + reply.piece(seen, with_usage, await _explanation(first))
        try:
            async for output in outputs:
                seen.append(output)
                if output.finish == "error":
                    yield event(_failed(output).body())
                    return
                piece = reply.piece(seen, with_usage, await _explanation(output))
                if piece:
                    yield piece
        except ApiError:  # the caller hung up: nobody reads this
            return
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # it is a generator: cancels
        stats = seen[-1].stats
        assert stats is not None
        yield reply.closing(stats, with_usage)


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
        raise ApiError(429, str(error), code="queue_full") from error
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


async def _hung_up(http: Request) -> None:
    """Returns when the caller's connection is gone."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return
