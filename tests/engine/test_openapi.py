"""The served OpenAPI document, and what schemathesis makes of it: requests that it allows and some
that it doesn't, to every operation. None is a 5xx, and each answer is one that the document tells.

What the document allows may be refused all the same: what two fields may be together, and whether a
prompt fits, no schema says. What it forbids never is answered.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from schemathesis import checks
from schemathesis.generation import GenerationMode

from engine.http.document import OPERATIONS
from tests.engine.test_http import COMPLETION, over
from tests.engine.test_tools import THINKING, Spoken

checks.load_all_checks()
JUDGED = [
    checks.CHECKS.get_one(name)
    for name in (
        *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
        *("response_schema_conformance", "negative_data_rejection"),
    )
]
REFUSED = {"expected-statuses": ["400", "404", "413"]}  # a field; a model; a body too long
CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": REFUSED}})
EMPTY = [None, "", [], {}]
PATHS = [each.path for each in OPERATIONS if not each.path.startswith("/experts")]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return served(tmp_path_factory.mktemp("model"))


def served(folder: Path) -> Spoken:
    """Unknown fields are refused, so that what is asked is made of fields that count."""
    sizes = {"context_tokens": 400, "max_body_bytes": 1 << 20}
    return Spoken(folder, THINKING, strict_fields=True, **sizes)


def operation(document: Any, path: str) -> Any:
    drop_shared_names(document)
    told = schemathesis.openapi.from_dict(document, config=CONFIG)
    return next(each.ok() for each in told.get_all_operations() if each.ok().path == path)


def drop_shared_names(told: Any) -> None:
    """Without discriminators that have several names for one schema: schemathesis keeps one name of
    each, and takes the others for wrong. What the schema says of its names is still judged."""
    if isinstance(told, dict):
        mapping = told.get("discriminator", {})
        names = mapping.get("mapping", {}) if isinstance(mapping, dict) else {}
        if len(set(names.values())) < len(names):
            del told["discriminator"]
    for each in told.values() if isinstance(told, dict) else told if isinstance(told, list) else ():
        drop_shared_names(each)


def judge(spoken: Spoken, path: str, mode: GenerationMode, count: int) -> Counter[int]:
    """The statuses of so many answers, each of which was judged."""
    seen: Counter[int] = Counter()
    asked = operation(spoken.client.get("/openapi.json").json(), path)

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=asked.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url="http://testserver")
        sent.pop("cookies", None)
        reply = spoken.client.request(**sent)
        seen[reply.status_code] += 1
        case.validate_response(reply, checks=JUDGED)

    each()
    return seen


def test_the_document_has_every_route(spoken: Spoken) -> None:
    document = spoken.client.get("/openapi.json").json()
    app: Any = spoken.client.app
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
    }
    hidden = {("/openapi.json", "get"), ("/openapi.json", "head"), ("/v1/embeddings", "post")}
    told = {(path, method) for path, each in document["paths"].items() for method in each}
    assert told == routes - hidden
    schemas = document["components"]["schemas"]
    assert set(schemas) >= {"ChatBody", "ChatAnswer", "Error"}
    text = spoken.client.get("/openapi.json").text
    assert text.count('"$ref"') > 50
    for reference in {each.split('"')[0] for each in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas


def test_it_says_which_fields_there_are_and_whether_others_pass() -> None:
    from tests.doubles.engine_doubles import build

    for strict in (False, True):
        for client in over(build(64), {"k": "t"}, strict_fields=strict):
            document = client.get("/openapi.json").json()
            body = document["components"]["schemas"]["CompletionBody"]
            assert body["additionalProperties"] == ({"enum": EMPTY} if strict else True)
            ours = document["components"]["schemas"]["CacheOptions"]
            assert ours["additionalProperties"] == {"enum": EMPTY}
            assert body["properties"]["model"] == {"enum": ["hash"]}
            assert body["properties"]["suffix"]["enum"] == [None, "", [], {}, False]
            assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
            assert "security" not in document["paths"]["/health"]["get"]
            headers = {"authorization": "Bearer k"}
            reply = client.post("/v1/completions", json=COMPLETION | {"x": 1}, headers=headers)
            assert reply.status_code == (400 if strict else 200)
            for nothing in EMPTY:
                reply = client.post(
                    "/v1/completions", json=COMPLETION | {"x": nothing}, headers=headers
                )
                assert reply.status_code == 200


HELLO = [{"role": "user", "content": "hello"}]
STREAMS: dict[str, tuple[dict[str, Any], str]] = {  # a body, and what its events all have
    "/v1/completions": ({"prompt": ["a", "b"], "logprobs": 1}, "model"),
    "/v1/chat/completions": (
        {"messages": HELLO, "stream_options": {"include_usage": True}},
        "model",
    ),
    "/v1/responses": ({"input": "hello"}, "sequence_number"),
    "/v1/messages": ({"messages": HELLO, "max_tokens": 5}, "type"),
}


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_is_told_event_by_event(spoken: Spoken, path: str) -> None:
    """And what is no such event is seen to be none."""
    body, member = STREAMS[path]
    asked = operation(spoken.client.get("/openapi.json").json(), path)
    case = asked.Case(body={"model": "hash", "stream": True, **body})
    sent = case.as_transport_kwargs(base_url="http://testserver")
    sent.pop("cookies", None)
    reply = spoken.client.request(**sent)
    assert reply.status_code == 200
    case.validate_response(reply, checks=JUDGED)
    for good, bad in (("data: {", 'data: {"'), (f'"{member}":', '"x":')):
        assert good in reply.text
        text = reply.text.replace(good, bad)
        broken = httpx.Response(200, headers=reply.headers, text=text, request=reply.request)
        broken.elapsed = reply.elapsed
        with pytest.raises(schemathesis.core.failures.FailureGroup, match="SSE event"):
            case.validate_response(broken, checks=JUDGED)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_asked_by_the_document_is_answered_by_it(
    spoken: Spoken, path: str, mode: GenerationMode
) -> None:
    try:
        seen = judge(spoken, path, mode, 12)
    except hypothesis.errors.Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # of an operation that takes nothing
        return
    print(path, mode.value, dict(seen))
    assert seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20000_requests_by_the_document(tmp_path: Path) -> None:
    spoken, seen = served(tmp_path), Counter[int]()
    posts = [each.path for each in OPERATIONS if each.body is not None]
    for path in posts:
        for mode in GenerationMode:
            found = judge(spoken, path, mode, 20_000 // (2 * len(posts)))
            print(path, mode.value, dict(found), flush=True)
            seen += found
    print(dict(seen))
    assert seen.total() >= 19_000
    assert min(seen[200], seen[400]) > 1000
