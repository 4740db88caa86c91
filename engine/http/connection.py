"""One client's connection, and how long the client may still take for what it is at.

    header     a request's header isn't whole: from the connection on, or the header's first byte
    body       its body isn't whole: it may stall, but not for long, nor be very slow
    discarded  it was answered before its body was whole: what still comes is thrown away
    ours       it is whole, and we compute: the client may wait as long as we take
    idle       it is answered, and no other has begun: uvicorn's own timer ends it
    closing    the answer's last bytes are on their way

Beside each of these: what we write may be left unread for some time only, so that what is kept of
it stays within asyncio's buffer of 64 KiB. Not responsible for when the clock is looked at
(server), nor for HTTP itself: that is uvicorn's on h11, which bounds the header to 16 KiB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from engine.http.errors import ApiError

# A body may take body_timeout_s, and a second more for each of so many bytes that came: what is
# slower than any real link is not waited for.
BODY_BYTES_PER_S = 10_000


@dataclass(frozen=True)
class ClientLimits:
    """How long a client may take, in seconds, and how many connections there may be."""

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0  # without a byte
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0  # without reading what we wrote
    max_connections: int = 1000


class Phase(Enum):
    header = "its header"
    body = "its body"
    discarded = "a body that nobody reads"
    ours = "nothing"
    idle = "another request"
    closing = "the end of the connection"


class Connection(H11Protocol):
    """uvicorn's connection, which also knows its phase and since when it is in it."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limits: ClientLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.phase = Phase.header
        self.since = clock()
        self._limits = limits
        self._clock = clock
        self._received = 0  # bytes in this phase
        self._progress = self.since  # when the last of them came, or reading was paused by us
        self._unread_since: float | None = None  # asyncio's buffer is full

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received += len(data)
        self._progress = self._clock()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self._clock()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    def end_if_overdue(self) -> None:
        """Close the connection if its client has taken too long; what was asked for is told 408."""
        self._look()
        now, limits = self._clock(), self._limits
        if self.flow.read_paused:  # it is we who don't read
            self._progress = now
        unread = (
            self._unread_since is not None and now - self._unread_since > limits.write_timeout_s
        )
        if unread or (self.phase is Phase.closing and now - self.since > limits.write_timeout_s):
            self.transport.abort()
        elif now > self._deadline():
            self._refuse()

    def _look(self) -> None:
        phase = self._phase()
        if phase is not self.phase:
            self.phase = phase
            self._received = 0
            self.since = self._progress = self._clock()

    def _phase(self) -> Phase:
        if self.transport.is_closing():
            return Phase.closing
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.discarded if self.conn.our_state is h11.DONE else Phase.body
        if self.conn.their_state is not h11.IDLE:
            return Phase.ours
        begun = bool(self.conn.trailing_data[0])
        return Phase.header if begun or self.cycle is None else Phase.idle

    def _deadline(self) -> float:
        limits = self._limits
        match self.phase:
            case Phase.header:
                return self.since + limits.header_timeout_s
            case Phase.body:
                earned = self._received / BODY_BYTES_PER_S
                return limits.body_timeout_s + min(self._progress, self.since + earned)
            case Phase.discarded:
                return self.since + limits.body_timeout_s
        return float("inf")

    def _refuse(self) -> None:
        """Tell 408, unless nothing was asked or an answer has begun, and close."""
        asked = bool(self.conn.trailing_data[0]) or self.phase is Phase.body
        text = f"the rest of the request did not come in time ({self.phase.value})"
        self._end(ApiError(408, text, code="request_timeout") if asked else None)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or a body is none (uvicorn calls it, and has logged why)."""
        text = "what came is not a whole HTTP/1.1 request: its line, a header or its body's framing"
        self._end(ApiError(400, text, code="invalid_http"))

    def _end(self, error: ApiError | None) -> None:
        """Tell it, unless an answer has begun, and close."""
        if error is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            self.transport.write(_whole_response(self.conn, error.status, body))
        if self.cycle is not None:  # the application learns that nobody waits any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _whole_response(conn: h11.Connection, status: int, body: bytes) -> bytes:
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    reason = HTTPStatus(status).phrase.encode()
    events = (
        h11.Response(status_code=status, headers=headers, reason=reason),
        h11.Data(data=body),
        h11.EndOfMessage(),
    )
    return b"".join(conn.send(event) or b"" for event in events)
