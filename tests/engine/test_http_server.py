"""What a client may take its time for, over real sockets: each wait ends, and nobody else notices.

Every test runs beside a bystander, whose stream gets a piece before, meanwhile and after.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.flood import LINES_PER_SECOND, OncePerSecond
from engine.http import connection
from engine.http.connection import ClientLimits
from engine.http.server import SPARE_CONNECTIONS, Server
from engine.serve import _bind
from tests.doubles.accepted import no_delay

LONG = 60.0  # of what is not to end in a test
WAIT_S = 20.0  # of a test for what must come
PIECE = b"data: piece\n\n"
HEAD = b"POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: "


class Serving:
    """A server on a thread of its own. `app`: /health, /length of a body, /stream of pieces that
    `give` releases, /flood of bytes without end."""

    def __init__(self, **limits: Any) -> None:
        waits = ("header_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s")
        patient = dict.fromkeys(waits, LONG)
        self.listener = _bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        routes = [
            Route("/health", self._health),
            Route("/length", self._length, methods=["POST"]),
            Route("/stream", self._stream),
            Route("/flood", self._flood),
        ]
        app = Starlette(routes=routes)
        self.server = Server(app, self.listener, ClientLimits(**(patient | limits)))
        self.flood_ended = threading.Event()
        self.bodies_begun = threading.Semaphore(0)
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    async def _health(self, _: Request) -> Response:
        self.loop = asyncio.get_running_loop()
        return PlainTextResponse("ok")

    async def _length(self, http: Request) -> Response:
        total = 0
        async for part in http.stream():
            total += len(part)
            self.bodies_begun.release()
        return PlainTextResponse(str(total))

    async def _stream(self, _: Request) -> Response:
        async def pieces() -> Any:
            while True:
                yield await self._pieces.get()

        return StreamingResponse(pieces())

    async def _flood(self, _: Request) -> Response:
        async def pieces() -> Any:
            try:
                while True:
                    yield bytes(1 << 16)
                    await asyncio.sleep(0)  # what is written to a lost connection returns at once
            finally:
                self.flood_ended.set()

        return StreamingResponse(pieces())

    def connect(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        client.sendall(sent)
        return client

    def get(self, path: str) -> tuple[int, bytes]:
        with self.connect(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode()) as client:
            return answer(client)

    def give(self) -> None:
        self.loop.call_soon_threadsafe(self._pieces.put_nowait, PIECE)

    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@contextmanager
def serving(**limits: Any) -> Iterator[Serving]:
    """A server, and a bystander whose stream goes on through all of the block."""
    served = Serving(**limits)
    try:
        assert served.get("/health") == (200, b"ok")
        with served.connect(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n") as bystander:
            served.give()
            until(bystander, PIECE)
            wait_for(lambda: served.connections() == 1)
            yield served
            served.give()
            until(bystander, PIECE)
    finally:
        served.stop()


def until(client: socket.socket, wanted: bytes) -> bytes:
    """What comes up to `wanted`, and with it."""
    seen = b""
    while wanted not in seen:
        more = client.recv(1 << 16)
        assert more, f"the connection ended after {seen!r}"
        seen += more
    return seen


def rest(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    seen = b""
    try:
        while more := client.recv(1 << 16):
            seen += more
    except ConnectionResetError:
        pass
    return seen


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of one response with a content-length."""
    head, _, body = until(client, b"\r\n\r\n").partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(1 << 16)
    return int(head.split()[1]), body


def told(response: bytes) -> tuple[int, str]:
    """Status and code of a whole refusal."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_what_is_written_to_a_kept_connection_leaves_at_once() -> None:
    with serving() as served:
        assert set(no_delay(served.port)) == {True}


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_a_header_that_is_never_whole_ends(sent: bytes) -> None:
    with serving(header_timeout_s=0.2) as served, served.connect(sent) as client:
        response = rest(client)
        assert told(response) == (408, "request_timeout") if sent else response == b""


def test_a_second_header_that_is_never_whole_ends() -> None:
    with serving(header_timeout_s=0.2) as served, served.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(client) == (200, b"ok")
        client.sendall(b"GET /health HT")
        assert told(rest(client)) == (408, "request_timeout")


def test_a_header_that_comes_byte_by_byte_ends_all_the_same() -> None:
    with serving(header_timeout_s=0.3) as served, served.connect(b"GET /health HTTP/1.1") as client:
        client.settimeout(0.01)
        seen = None
        while seen is None:  # a byte every 10 ms: progress is no excuse
            try:
                client.sendall(b"x")
                seen = client.recv(1 << 16)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                seen = b""


def test_a_body_that_stalls_ends() -> None:
    with serving(body_timeout_s=0.2) as served, served.connect(HEAD + b"9\r\n\r\nabc") as client:
        assert served.bodies_begun.acquire(timeout=WAIT_S)
        assert told(rest(client)) == (408, "request_timeout")


def test_a_body_that_never_begins_ends() -> None:
    with serving(body_timeout_s=0.2) as served, served.connect(HEAD + b"9\r\n\r\n") as client:
        assert told(rest(client)) == (408, "request_timeout")


def test_a_body_that_only_trickles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_BYTES_PER_S", 1e9)
    head = HEAD + b"1000000\r\n\r\n"
    with serving(body_timeout_s=0.3) as served, served.connect(head) as client:
        client.settimeout(0.01)
        seen = None
        while seen is None:
            try:
                client.sendall(b"x")
                seen = client.recv(1 << 16)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                seen = b""


def test_a_body_that_comes_is_waited_for() -> None:
    """As long as bytes come, each by some way within the limit."""
    with serving(body_timeout_s=1.0) as served, served.connect(HEAD + b"40\r\n\r\n") as client:
        for _ in range(40):
            client.sendall(b"x")
            assert served.bodies_begun.acquire(timeout=WAIT_S)
        assert answer(client) == (200, b"40")


def test_a_body_that_comes_after_its_answer_is_thrown_away_for_a_while_only() -> None:
    with serving(body_timeout_s=0.3) as served:
        head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        with served.connect(head) as client:
            assert answer(client)[0] == 404
            client.settimeout(0.01)
            ended = False
            while not ended:
                try:
                    client.sendall(b"4\r\nbody\r\n")
                    ended = client.recv(1) == b""
                except TimeoutError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    ended = True


def test_an_idle_connection_ends() -> None:
    with serving(idle_timeout_s=0.2) as served, served.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(client) == (200, b"ok")
        assert rest(client) == b""


def test_a_client_that_never_reads_its_stream_is_let_go() -> None:
    ask = b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n"
    with serving(write_timeout_s=0.3) as served, served.connect(ask) as client:
        assert served.flood_ended.wait(WAIT_S)
        rest(client)


def test_beyond_the_limit_only_a_supervisor_is_answered_and_a_place_is_taken_again() -> None:
    with serving(max_connections=3) as served:
        held = [served.connect(b"POST /length HTTP/1.1\r\n") for _ in range(2)]
        wait_for(lambda: served.connections() == 3)
        assert served.get("/health") == (200, b"ok")
        status, body = served.get("/stream")
        assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
        held[0].close()
        wait_for(lambda: served.connections() == 2)
        with served.connect(HEAD + b"3\r\n\r\nabc") as client:
            assert answer(client) == (200, b"3")
        held[1].close()


def test_beyond_the_spare_ones_nobody_is_let_in() -> None:
    with serving(max_connections=1) as served:
        held = [served.connect(b"POST /length HTTP/1.1\r\n") for _ in range(SPARE_CONNECTIONS)]
        wait_for(lambda: served.connections() == 1 + SPARE_CONNECTIONS)
        with served.connect() as client:
            assert rest(client) == b""
        for each in held:  # those that hold a spare place are let go of soon
            rest(each)
            each.close()
        assert served.get("/health") == (200, b"ok")


def test_at_the_limit_the_connection_that_idled_longest_makes_room() -> None:
    with serving(max_connections=3) as served:
        kept = [served.connect(), served.connect()]
        for each in kept:
            each.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer(each) == (200, b"ok")
        with served.connect(HEAD + b"3\r\n\r\nabc") as client:
            assert answer(client) == (200, b"3")
        assert rest(kept[0]) == b""
        kept[1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(kept[1]) == (200, b"ok")
        for each in kept:
            each.close()


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving() as served:
        with served.connect(HEAD + b"9\r\n\r\nabc"):
            assert served.bodies_begun.acquire(timeout=WAIT_S)
        wait_for(lambda: served.connections() == 1)
        wait_for(lambda: len(served.server.server_state.tasks) == 1)  # the bystander's
    assert not [each for each in caplog.records if each.exc_info]
    assert not [each for each in caplog.records if each.levelno > logging.INFO]


def wait_for(condition: Any) -> None:
    """Polls what another thread is about to bring."""
    ready = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        ready.wait(0.01)
    raise AssertionError("in vain")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_the_log_keeps_one_of_the_same_line_a_second_and_counts_the_rest() -> None:
    now = [5.0]
    handler = Lines()
    handler.addFilter(OncePerSecond(lambda: now[0]))
    log = logging.Logger("flood")
    log.addHandler(handler)

    def same(count: int) -> None:
        for _ in range(count):
            log.warning("out of %s", "files")

    def different(count: int) -> None:
        for number in range(count):
            log.warning("request %d", number)

    same(100_000)
    assert handler.lines == ["out of files"]
    different(1000)
    assert len(handler.lines) == 1 + LINES_PER_SECOND
    now[0] += 1
    same(2)
    different(1)
    assert handler.lines[-2:] == [
        "out of files (99999 more lines like it were left out)",
        f"request 0 ({1000 - LINES_PER_SECOND} more lines like it were left out)",
    ]
    now[0] += 1
    same(1)
    assert handler.lines[-1] == "out of files (1 more lines like it were left out)"
