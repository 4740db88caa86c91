"""Refusals in OpenAI's words: {"error": {message, type, param, code}} with a 4xx or 5xx status."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

VALUE_TEXT_MAX = 80  # a refused value is quoted, but a forged megabyte is not echoed

# pydantic's kinds of errors that have a code of their own at OpenAI
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}


class ApiError(Exception):
    """What a caller did wrong, or what the engine can't do now; `param` names the field."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

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

    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body(), self.status, headers)


def refused(param: str, value: object, allowed: str, code: str = "invalid_value") -> ApiError:
    """400 that names the field, its value and what is allowed."""
    text = repr(value)
    shown = text if len(text) <= VALUE_TEXT_MAX else text[:VALUE_TEXT_MAX] + "..."
    return ApiError(400, f"{param} = {shown}: {allowed}", param=param, code=code)


def of_validation(error: ValidationError, *, names: Iterable[str] = ()) -> ApiError:
    """The first field that pydantic refused. Names of union branches are no part of the path.
    `names`: those allowed in `kvc2`, of which an unknown one is told the nearest."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if _is_field(part)]
    param = ".".join(path) or None
    code = CODES.get(first["type"], "invalid_value")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg']}", code=code)
    if first["type"] == "extra_forbidden" and path[:-1] == ["kvc2"]:
        allowed = sorted(names)
        near = get_close_matches(path[-1][:VALUE_TEXT_MAX], allowed, 1, cutoff=0.0)
        text = f"{param}: unknown; did you mean {near[0]}? Allowed: {', '.join(allowed)}"
        return ApiError(400, text, param=param, code=code)
    if first["type"] in CODES:
        return ApiError(400, f"{param}: {first['msg']}", param=param, code=code)
    if param is None:
        return ApiError(400, f"the body: {first['msg']}", code=code)
    return refused(param, first["input"], first["msg"], code)


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "list"))
