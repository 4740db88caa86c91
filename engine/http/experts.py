"""GET /experts and POST /experts/save: where experts lie, and their counts kept.

Not responsible for either: see models/placed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from engine.http.errors import ApiError


class Experts(Protocol):
    """engine.models.placed.PlacedModel, as it is used here."""

    def state(self) -> dict[str, Any]: ...

    def save(self) -> str | None: ...


def add_experts(app: FastAPI, experts: Experts, check: Callable[[Request], object]) -> None:
    """Both routes. `check` raises ApiError for who may not ask."""

    @app.get("/experts")
    async def state(http: Request) -> Response:
        check(http)
        return JSONResponse(experts.state())

    @app.post("/experts/save")
    async def save(http: Request) -> Response:
        check(http)
        try:
            path = await asyncio.to_thread(experts.save)
        except OSError as error:
            raise ApiError(500, f"the counts can't be saved: {error.strerror}") from error
        if path is None:
            text = "--expert-statistics FILE is not given, so that there is no file to save to"
            raise ApiError(409, text, code="no_expert_statistics")
        return JSONResponse({"saved": path})
