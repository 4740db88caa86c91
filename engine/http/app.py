"""The routes of the HTTP service, and how it begins and ends.

Not responsible for how a body becomes an answer (service).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from engine.http.dialects import anthropic, ollama
from engine.http.document import add_document
from engine.http.errors import ApiError
from engine.http.experts import Experts, add_experts
from engine.http.schema import DetokenizeBody, TokenizeBody
from engine.http.service import (
    CHAT,
    COMPLETION,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    Endpoint,
    Served,
    Service,
)
from engine.http.tokenizer import Tokenizer
from engine.worker import Worker


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
        return await service.answer(http, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await service.answer(http, CHAT)

    _add_dialects(app, service)
    _add_tokens(app, service)

    _add_models(app, service)

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

    strict, keys = served.strict_fields, served.keys
    add_document(app, served.model, strict_fields=strict, keys_needed=lambda: keys.needed)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        service.caller(http, None)
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(http: Request, name: str) -> Response:
        service.caller(http, None)
        service.prompts.check_model(name)
        return JSONResponse(service.model_card())


def _add_dialects(app: FastAPI, service: Service) -> None:
    """Other interfaces than OpenAI's first two."""
    posts = {
        "/v1/responses": RESPONSES,
        "/v1/messages": MESSAGES,
        "/api/chat": OLLAMA_CHAT,
        "/api/generate": OLLAMA_GENERATE,
    }
    for path, endpoint in posts.items():
        app.add_api_route(path, functools.partial(_answer, service, endpoint), methods=["POST"])

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        text = f"{service.model_card()['id']} makes no embeddings: serve a model that does"
        raise ApiError(404, text, code="model_not_found")

    @app.get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": metadata.version("kvc2")})

    @app.get("/api/tags")
    async def tags(http: Request) -> Response:
        service.caller(http, None)
        return JSONResponse({"models": [ollama.tag(service.model_card())]})

    @app.post("/api/show")
    async def show(http: Request) -> Response:
        service.caller(http, None)
        asked = await service.body(http, ollama.ShowBody)
        for name in [each for each in (asked.model, asked.name) if each is not None] or [""]:
            service.prompts.check_model(name.removesuffix(ollama.LATEST))
        return JSONResponse(ollama.shown(service.model_card(), service.template))


def _add_tokens(app: FastAPI, service: Service) -> None:
    """What others' servers of open models have beside an answer."""

    @app.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        service.caller(http, None)
        asked = await service.body(http, TokenizeBody)
        tokens = await service.apart(service.prompts.tokens, asked)
        count, most = len(tokens), service.model_card()["max_model_len"]
        return JSONResponse({"tokens": tokens, "count": count, "max_model_len": most})

    @app.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        service.caller(http, None)
        asked = await service.body(http, DetokenizeBody)
        return JSONResponse({"prompt": service.prompts.text(asked)})


async def _answer(service: Service, endpoint: Endpoint, http: Request) -> Response:
    return await service.answer(http, endpoint)


def _answer_errors(app: FastAPI) -> None:
    """Every refusal has the form of the interface that was asked."""

    def told(http: Request, error: ApiError) -> Response:
        path = http.url.path
        if path.startswith("/api/"):
            return error.response(ollama.error_body(error))
        if path.startswith("/v1/messages"):
            return error.response(anthropic.error_body(error))
        return error.response()

    @app.exception_handler(ApiError)
    async def refuse(http: Request, error: ApiError) -> Response:
        return told(http, error)

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        return told(http, ApiError(error.status_code, str(error.detail)))
