"""Refusals in OpenAI's words: {"error": {message, type, param, code}} with a 4xx or 5xx status."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

VALUE_TEXT_MAX = 80  # a refused value is quoted, but a forged megabyte is not echoed
QUOTED_MAX = 4  # elements of a refused list: all of a million would take seconds to write

# pydantic's kinds of errors that have a code of their own at OpenAI
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}


class ApiError(Exception):
    """What a caller did wrong, or what the engine can't do now; `param` names the field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, body: dict[str, Any] | None = None) -> JSONResponse:
        """`body`: in the words of another interface."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(self.body() if body is None else body, self.status, headers)


def refused(param: str, value: object, allowed: str, code: str = "invalid_value") -> ApiError:
    """400 that names the field, its value and what is allowed."""
    return ApiError(400, f"{param} = {quoted(value)}: {allowed}", param=param, code=code)


def quoted(value: object) -> str:
    """A value as an error shows it: its beginning, in time that doesn't grow with it."""
    text = _QUOTES.repr(value)
    return text if len(text) <= VALUE_TEXT_MAX else text[:VALUE_TEXT_MAX] + "..."


def _quotes() -> reprlib.Repr:
    quotes = reprlib.Repr()
    quotes.maxlevel = 3
    quotes.maxlist = quotes.maxdict = QUOTED_MAX
    quotes.maxstring = quotes.maxother = quotes.maxlong = VALUE_TEXT_MAX
    return quotes


_QUOTES = _quotes()


def of_validation(error: ValidationError, *, names: Iterable[str] = ()) -> ApiError:
    """The first field that pydantic refused, where its branches of a union got furthest. Names of
    those branches are no part of the path. `names`: those allowed in `kvc2`, of which an unknown
    one is told the nearest."""
    found = error.errors(include_url=False, include_context=False)
    branches = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    first = max(branches, key=lambda each: len(each["loc"]))
    path = [str(part)[:VALUE_TEXT_MAX] for part in first["loc"] if _is_field(part)]
    param = ".".join(path) or None
    code = CODES.get(first["type"], "invalid_value")
    allowed = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" and path[:-1] == ["kvc2"]:
        known = sorted(names)
        near = get_close_matches(path[-1], known, 1, cutoff=0.0)
        text = f"{param}: unknown; did you mean {near[0]}? Allowed: {', '.join(known)}"
        return ApiError(400, text, param=param, code=code)
    if first["type"] in CODES:
        return ApiError(400, f"{param}: {first['msg']}", param=param, code=code)
    if param is None:
        return ApiError(400, f"the body: {allowed}", code=code)
    return refused(param, first["input"], allowed, code)


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (
        part.isidentifier() and part not in ("str", "int", "list", "dict")
    )
