"""The JSON schemas of answers, and of the events of streams, as the OpenAPI document shows them
(document).

Of each object those members that are always there, and their types; further ones may stand beside.
Not responsible for making answers (replies, dialects).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ANY_RECORD: Schema = {"type": "object"}


def record(**members: Schema) -> Schema:
    """One that has these members."""
    return {"type": "object", "properties": members, "required": sorted(members)}


def a_list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def maybe(schema: Schema) -> Schema:
    """Or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def exactly(value: Any) -> Schema:
    return {"const": value}


FUNCTION_CALL = record(
    id=TEXT, type=exactly("function"), function=record(name=TEXT, arguments=TEXT)
)
USAGE = record(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=record(cached_tokens=COUNT),
)
MODEL = record(id=TEXT, object=exactly("model"), created=COUNT, owned_by=TEXT, max_model_len=COUNT)


def _completion(kind: str, **of_a_choice: Schema) -> Schema:
    choice = record(index=COUNT, finish_reason=TEXT, logprobs=maybe(ANY_RECORD), **of_a_choice)
    return record(
        id=TEXT,
        object=exactly(kind),
        created=COUNT,
        model=TEXT,
        choices=a_list(choice),
        usage=USAGE,
    )


def _piece(kind: str, **of_a_choice: Schema) -> Schema:
    """Of a stream: the choices that have news; none in the last one, which has the usage."""
    choice = record(index=COUNT, finish_reason=maybe(TEXT), **of_a_choice)
    return record(id=TEXT, object=exactly(kind), created=COUNT, model=TEXT, choices=a_list(choice))


def _event(*values: Schema, done: bool = False, **named: Schema) -> Schema:
    """Of server-sent events: `data` is one of these in JSON. done: or OpenAI's [DONE], the last."""
    content = {"contentMediaType": "application/json", "contentSchema": {"anyOf": list(values)}}
    data: Schema = TEXT | content
    return record(data={"anyOf": [exactly("[DONE]"), data]} if done else data, **named)


OPENAI_ERROR = record(
    error=record(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT)),
)
MESSAGES_ERROR = record(type=exactly("error"), error=record(type=TEXT, message=TEXT))

# By the path that they are of. An interface that names its events does so in the data too.
EVENTS: dict[str, Schema] = {
    "/v1/completions": _event(_piece("text_completion", text=TEXT), OPENAI_ERROR, done=True),
    "/v1/chat/completions": _event(
        _piece("chat.completion.chunk", delta=ANY_RECORD), OPENAI_ERROR, done=True
    ),
    "/v1/responses": _event(record(type=TEXT, sequence_number=COUNT), event=TEXT),
    "/v1/messages": _event(
        record(
            type=one_of(
                *("message_start", "message_delta", "message_stop"),
                *("content_block_start", "content_block_delta", "content_block_stop"),
            )
        ),
        MESSAGES_ERROR,
        event=TEXT,
    ),
}

ANSWERS: dict[str, Schema] = {
    "CompletionAnswer": _completion("text_completion", text=TEXT),
    "ChatAnswer": _completion(
        "chat.completion",
        message={
            **record(role=exactly("assistant"), content=maybe(TEXT)),
            "properties": {
                "role": exactly("assistant"),
                "content": maybe(TEXT),
                "reasoning_content": TEXT,
                "tool_calls": a_list(FUNCTION_CALL),
            },
        },
    ),
    "ResponsesAnswer": record(
        id=TEXT,
        object=exactly("response"),
        created_at=COUNT,
        status=one_of("completed", "incomplete"),
        model=TEXT,
        output=a_list(record(type=one_of("message", "function_call", "reasoning"), id=TEXT)),
        usage=record(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
    ),
    "MessagesAnswer": record(
        id=TEXT,
        type=exactly("message"),
        role=exactly("assistant"),
        model=TEXT,
        content=a_list(record(type=one_of("text", "thinking", "tool_use"))),
        stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        usage=record(
            input_tokens=COUNT,
            cache_read_input_tokens=COUNT,
            cache_creation_input_tokens=COUNT,
            output_tokens=COUNT,
        ),
    ),
    "OllamaChatAnswer": record(
        model=TEXT, created_at=TEXT, message=record(role=TEXT, content=TEXT), done=FLAG
    ),
    "OllamaGenerateAnswer": record(model=TEXT, created_at=TEXT, response=TEXT, done=FLAG),
    "OllamaTags": record(models=a_list(record(name=TEXT, model=TEXT))),
    "OllamaModel": record(details=ANY_RECORD, model_info=ANY_RECORD, capabilities=a_list(TEXT)),
    "OllamaVersion": record(version=TEXT),
    "Tokens": record(tokens=a_list(COUNT), count=COUNT, max_model_len=COUNT),
    "Text": record(prompt=TEXT),
    "Models": record(object=exactly("list"), data=a_list(MODEL)),
    "Model": MODEL,
    "Health": record(status=one_of("ok", "failed", "loading"), attached=FLAG),
    "Experts": ANY_RECORD,
    "ExpertsSaved": record(saved=TEXT),
    "Error": OPENAI_ERROR,
    "MessagesError": MESSAGES_ERROR,
    "OllamaError": record(error=TEXT),
}
