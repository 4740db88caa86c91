"""What each request gets whatever it asks: an id, and a line in the access log where there is one.

Not responsible for who may ask (service).
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

HEADER = b"x-request-id"
GIVEN = re.compile(rb"[!-~]{1,128}")  # of a caller: what a line of a log can hold


def with_ids(app: ASGIApp, *, access_log: bool) -> ASGIApp:
    """`app`, whose answers have the caller's `x-request-id`, or one of ours."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        request_id = given if GIVEN.fullmatch(given) else uuid.uuid4().hex.encode()
        began, status = time.monotonic(), 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        try:
            await app(scope, receive, with_id)
        finally:
            if access_log:
                seconds = time.monotonic() - began
                path, method = scope["path"][:200], scope["method"]
                line = "%s %r %d %.3f s %s"
                log.info(line, method, path, status, seconds, request_id.decode())

    return answer


def with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    """`app`, which pages of these origins, with commas between, may ask; *: of all."""
    return CORSMiddleware(
        app,
        allow_origins=[each.strip() for each in origins.split(",")],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[HEADER.decode()],
    )
