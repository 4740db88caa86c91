"""While the model is loaded: whoever asks is told so at once, with 503, instead of being kept.

Not responsible for binding the port, nor for what is served afterwards (app).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from engine.http.connection import ClientLimits
from engine.http.errors import ApiError
from engine.http.server import Server

RETRY_AFTER_S = 1
STOP_S = 1  # for answers under way when the model is there


@contextmanager
def refused_meanwhile(listener: socket.socket, limits: ClientLimits) -> Iterator[None]:
    """Every request to `listener` is answered with 503 while the block runs, on a thread of its
    own. `listener` stays open: who connects after the block waits for the server that follows."""
    # a copy, since the server closes what it was given
    server = Server(_loading, listener.dup(), limits, stop_s=STOP_S)
    thread = threading.Thread(target=server.run, name="kvc2-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] == "/health":
        answer = JSONResponse({"status": "loading", "attached": False}, 503)
    else:
        answer = ApiError(503, "the model is being loaded", code="unavailable").response()
    answer.headers["Retry-After"] = str(RETRY_AFTER_S)
    await answer(scope, receive, send)
