"""What an answer's form may be: the grammar that a body asks for.

llguidance's words for grammars: a JSON schema, or Lark with JSON schemas in it. Not responsible
for what a grammar allows next (engine.grammar).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from engine.http.schema import ChatBody, JsonFormat, SchemaFormat
from engine.http.tools import Tool

ANY_OBJECT: dict[str, Any] = {"type": "object"}
REST = "REST: /(.|\\n)*/"
# no spaces but these: else a model could go on with spaces for ever
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(
    body: ChatBody, marks: Sequence[str], token_of: Callable[[str], int | None]
) -> str | None:
    """None: the answer is free. `marks`: what calls begin with where the model may call or answer;
    `token_of`: the one token that a mark is."""
    if body.must_call:
        return _of_schema(calls_schema(body.callable_tools, body.calls_max))
    form = body.response_format
    if not isinstance(form, JsonFormat | SchemaFormat):
        return None
    schema = form.json_schema.schema_ if isinstance(form, SchemaFormat) else ANY_OBJECT
    if not body.callable_tools:
        return _of_schema(schema)
    begins = [_literal(mark, token_of(mark)) for mark in marks]
    calls = "".join(f" | {begin} REST" for begin in begins)
    return f"start: answer{calls}\nanswer: %json {_spaced(schema)}\n{REST}\n"


def calls_schema(tools: Sequence[Tool], most: int | None) -> dict[str, Any]:
    """Of an array of calls, as speech.formats.ARRAY reads it."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.schema_of_arguments,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": items, "minItems": 1}
    return schema if most is None else schema | {"maxItems": most}


def _of_schema(schema: dict[str, Any]) -> str:
    return f"start: %json {_spaced(schema)}\n"


def _spaced(schema: dict[str, Any]) -> str:
    return json.dumps(schema | {"x-guidance": SPACING})


def _literal(mark: str, token: int | None) -> str:
    return json.dumps(mark, ensure_ascii=False) if token is None else f"<[{token}]>"
