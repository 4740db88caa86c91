"""The OpenAPI document of what is served: every body, answer, refusal and stream.

Bodies come from what checks them (schema, dialects), and say the rule of fields too: a field that
is not required may be null, and one that is unknown is ignored; with --strict-fields only where it
is null or empty. Not responsible for what answers say (answers), nor for the routes (app).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from engine.http.answers import ANSWERS, EVENTS, Schema, maybe
from engine.http.dialects.anthropic import MessagesBody
from engine.http.dialects.ollama import LATEST, ChatOfOllama, GenerateBody, ShowBody
from engine.http.dialects.responses import ResponsesBody
from engine.http.fields import EMPTY, Strict
from engine.http.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

REFERENCE = "#/components/schemas/{model}"
SSE, LINES = "text/event-stream", "application/x-ndjson"
REFUSALS = {
    400: "The body, or a field of it that is named, can't be served",
    401: "No known key",
    404: "No such model, or no such route",
    408: "The rest of the request did not come in time",
    413: "The body is too long",
    429: "The queue is full; Retry-After says when to ask again",
    500: "The engine failed at this request",
    503: "The engine can't now: it loads, stops, or a deadline passed",
}
MODEL_FIELDS = {"model", "name"}
UNREAD = (401, 404)  # of a request without a body


@dataclass(frozen=True)
class Operation:
    """One way to ask. `stream`: the media type of its answer where it is told in pieces."""

    path: str
    method: str
    summary: str
    answer: str  # of ANSWERS; empty: text
    body: type[Strict] | None = None
    stream: str = ""
    keyed: bool = True  # whether it wants a key, where keys are given out
    more: Mapping[int, str] | None = None  # refusals that others don't have

    @property
    def error(self) -> str:
        if self.path.startswith("/api/"):
            return "OllamaError"
        return "MessagesError" if self.path == "/v1/messages" else "Error"


OPERATIONS = (
    Operation("/v1/completions", "post", "Complete text", "CompletionAnswer", CompletionBody, SSE),
    Operation("/v1/chat/completions", "post", "Answer a chat", "ChatAnswer", ChatBody, SSE),
    Operation("/v1/responses", "post", "Answer, as items", "ResponsesAnswer", ResponsesBody, SSE),
    Operation("/v1/messages", "post", "Answer a conversation", "MessagesAnswer", MessagesBody, SSE),
    Operation("/v1/models", "get", "The served model, in a list", "Models"),
    Operation("/v1/models/{name}", "get", "The served model", "Model"),
    Operation("/api/chat", "post", "Answer a chat", "OllamaChatAnswer", ChatOfOllama, LINES),
    Operation(
        "/api/generate", "post", "Answer a prompt", "OllamaGenerateAnswer", GenerateBody, LINES
    ),
    Operation("/api/tags", "get", "The served model, in a list", "OllamaTags"),
    Operation("/api/show", "post", "What is known of the model", "OllamaModel", ShowBody),
    Operation("/api/version", "get", "This release", "OllamaVersion", keyed=False),
    Operation("/tokenize", "post", "Token ids of a text or a chat", "Tokens", TokenizeBody),
    Operation("/detokenize", "post", "The text of token ids", "Text", DetokenizeBody),
    Operation("/health", "get", "Whether requests are answered", "Health", keyed=False),
    Operation("/metrics", "get", "Prometheus' text", "", keyed=False),
    Operation("/experts", "get", "Where experts lie, and their counts", "Experts"),
    Operation(
        "/experts/save",
        "post",
        "Keep the counts of experts in their file",
        "ExpertsSaved",
        more={409: "No file was named for them"},
    ),
)


class BodySchemas(GenerateJsonSchema):
    """Of bodies, as they are read: what asks for nothing may be null, and unknown names are let
    pass but where they are refused."""

    strict_fields = False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        told = super().model_schema(schema)
        kind = schema["cls"]
        if issubclass(kind, Strict):
            needed = told.get("required", ())
            for name, each in told.get("properties", {}).items():
                if name not in needed and not takes_null(each):
                    told["properties"][name] = maybe(each)
            refused = self.strict_fields or kind.ours
            told["additionalProperties"] = {"enum": list(EMPTY)} if refused else True
        return told


def takes_null(schema: Schema) -> bool:
    """Where it says so itself; anything is null too."""
    if not schema.keys() - {"title", "default", "description"}:
        return True
    return any(each.get("type") == "null" for each in schema.get("anyOf", ())) or None in (
        schema.get("enum") or ()
    )


class StrictBodySchemas(BodySchemas):
    strict_fields = True


@dataclass(frozen=True)
class Told:
    """What a document depends on beside the operations. `model`: the served one's name."""

    model: str
    strict_fields: bool = False
    keys_needed: bool = False


def add_document(
    app: FastAPI, model: str, *, strict_fields: bool, keys_needed: Callable[[], bool]
) -> None:
    """What /openapi.json tells of those operations that the application has; whether they want a
    key is asked anew each time."""
    served = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
    }
    operations = [each for each in OPERATIONS if (each.path, each.method) in served]

    @functools.cache
    def told(needed: bool) -> dict[str, Any]:
        return document(operations, Told(model, strict_fields, needed))

    app.openapi = lambda: told(keys_needed())  # type: ignore[method-assign]


def document(operations: Sequence[Operation], about: Told) -> dict[str, Any]:
    """Of these operations."""
    bodies = [each.body for each in operations if each.body is not None]
    generator = StrictBodySchemas if about.strict_fields else BodySchemas
    references, found = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies)],
        ref_template=REFERENCE,
        schema_generator=generator,
    )
    paths: dict[str, Any] = {}
    for each in operations:
        reference = None
        if each.body is not None:
            reference = references[each.body, "validation"]
            _name_model(found["$defs"][reference["$ref"].rsplit("/", 1)[1]], each, about.model)
        told = _operation(each, reference, about)
        paths.setdefault(each.path, {})[each.method] = told
    components: dict[str, Any] = {"schemas": found["$defs"] | ANSWERS}
    if about.keys_needed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "kvc2-engine", "version": metadata.version("kvc2")}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _name_model(schema: Schema, each: Operation, model: str) -> None:
    """The names of the served model are what its body's fields for that may be."""
    names = {"enum": [model, f"{model}{LATEST}"] if each.path.startswith("/api/") else [model]}
    for field in MODEL_FIELDS & schema["properties"].keys():
        needed = field in schema.get("required", ())
        schema["properties"][field] = names if needed else maybe(names)


def _operation(each: Operation, body: Any, about: Told) -> dict[str, Any]:
    answer: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if each.answer:
        answer = {"application/json": {"schema": {"$ref": REFERENCE.format(model=each.answer)}}}
    if each.stream:
        # of each event, as OpenAPI before 3.2 is read (itemSchema came with it)
        answer[each.stream] = {"schema": EVENTS.get(each.path, {"type": "string"})}
    refused = REFUSALS if each.body is not None else {s: REFUSALS[s] for s in UNREAD}
    refused = refused | dict(each.more or {})
    error = {"schema": {"$ref": REFERENCE.format(model=each.error)}}
    told: dict[str, Any] = {
        "summary": each.summary,
        "responses": {
            "200": {"description": "The answer", "content": answer},
            **{
                str(status): {"description": why, "content": {"application/json": error}}
                for status, why in refused.items()
            },
        },
    }
    if each.path == "/health":
        told["responses"]["503"] = {"description": "Not now", "content": answer}
    if body is not None:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if "{name}" in each.path:
        names = {"enum": [about.model]}
        name = {"name": "name", "in": "path", "required": True, "schema": names}
        told["parameters"] = [name]
    if about.keys_needed and each.keyed:
        told["security"] = [{"key": []}]
    return told
