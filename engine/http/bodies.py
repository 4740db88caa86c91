"""From the bytes of a body to the checked body, in time that is bounded before it is spent.

To make millions of Python objects, or millions of complaints about them, takes seconds in which no
other thread of the process runs. So the values of a body are counted first, and an unknown name or
a bad element is refused at the first one (schema.py).
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from engine.http.errors import ApiError, of_validation
from engine.http.fields import Strict, Unknown
from engine.http.schema import Asking, CacheOptions, ChatBody, CompletionBody

CONTAINERS_MAX = 1 << 16  # lists and objects of a body: the dearest to make, some 100 ns each
AnyBody = TypeVar("AnyBody", bound=Strict)
MEMBERS_MAX = 1 << 16  # elements and members of them, beside as many token ids as fit the model


def read(
    raw: bytes, kind: type[Asking], *, token_ids_max: int, unknown: Unknown | None = None
) -> ChatBody | CompletionBody:
    """What the body that these bytes are asks for; `unknown` gets the names of what was ignored.
    Holds the interpreter for some 10 ms at a time at most. Raises ApiError 400 that names the first
    field that is wrong."""
    body = checked(raw, kind, token_ids_max=token_ids_max, unknown=unknown)
    try:
        return body.asks()
    except ValidationError as error:
        raise of_validation(error) from error


def checked(
    raw: bytes, kind: type[AnyBody], *, token_ids_max: int, unknown: Unknown | None = None
) -> AnyBody:
    """The body that these bytes are. Raises ApiError as `read` does."""
    check_size(raw, members_max=MEMBERS_MAX + token_ids_max)
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    try:
        return kind.model_validate(value, context={"unknown": unknown or Unknown()})
    except ValidationError as error:
        raise of_validation(error, names=CacheOptions.model_fields) from error


def check_size(raw: bytes, *, members_max: int) -> None:
    """Raises ApiError 400 when the JSON holds more values than any request needs."""
    containers, members = _upper_bounds(raw)
    if containers <= CONTAINERS_MAX and members <= members_max:
        return
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # no quote is left but those of strings
    if raw.count(b'"') <= 4 * members_max + 2:  # a member has two strings at most; or it is one
        containers, members = _upper_bounds(b"".join(raw.split(b'"')[::2]))
        if containers <= CONTAINERS_MAX and members <= members_max:
            return
    text = (
        f"the body holds too many values: at most {CONTAINERS_MAX} lists and objects "
        f"and {members_max} elements of them are read"
    )
    raise ApiError(400, text, code="invalid_value")


def _upper_bounds(json: bytes) -> tuple[int, int]:
    """How many containers and how many members there can be; exact where no string is."""
    containers = json.count(b"[") + json.count(b"{")
    return containers, json.count(b",") + containers
