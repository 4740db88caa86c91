"""HTTP/1.1 itself, mutated, against an engine process: what is answered is HTTP, none is a 5xx,
every connection ends, requests are not smuggled, and the process stays as large as it was.

KVC2_FUZZ_SEED repeats a run: the seed is printed."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import h11
import psutil
import pytest

from tests.system.engine import EngineProcess, small_model

WAITS_S = 0.5  # of the server, for each thing that a client may be slow at
END_S = 20.0  # a connection that takes longer hangs
AT_ONCE = 32
GROWTH_BYTES = 48 << 20
CLIENT_ERRORS = {400, 404, 405, 408, 413, 415}
SECOND = b"GET /api/version HTTP/1.1\r\nhost: x\r\n\r\n"  # a request behind another


@dataclass
class Sent:
    """A request as bytes: a line, headers, a body."""

    method: bytes = b"POST"
    target: bytes = b"/v1/completions"
    version: bytes = b"HTTP/1.1"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    colon: bytes = b": "
    end: bytes = b"\r\n"

    def encoded(self) -> bytes:
        line = b" ".join([self.method, self.target, self.version])
        headers = [name + self.colon + value for name, value in self.headers]
        return self.end.join([line, *headers, b"", self.body])


def asked(model: str) -> Sent:
    body = {"model": model, "prompt": [70, 71], "max_tokens": 1, "temperature": 0}
    raw = json.dumps(body).encode()
    headers = [
        (b"host", b"x"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(raw)),
        (b"connection", b"close"),
    ]
    return Sent(headers=headers, body=raw)


METHODS = [
    b"GET",
    b"PUT",
    b"OPTIONS",
    b"CONNECT",
    b"TRACE",
    b"post",
    b"P\x00ST",
    b"",
    b"X" * 9000,
]
TARGETS = [
    *(
        b"*",
        b"/",
        b"",
        b"//",
        b"/v1/completions?a=%00&b",
        b"/v1/%2e%2e/health",
        b"/\xff\xfe",
        b"/a b",
    ),
    *(
        b"http://x/v1/completions",
        b"http://[::1",
        b"/" + b"a" * 20_000,
        b"/v1/completions#x",
        b"/%zz",
    ),
]
VERSIONS = [
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.1 ",
    b"HTTP/11",
    b"http/1.1",
    b"",
    b"ICY",
]
LENGTHS = [
    *(b"-1", b"+5", b"0x10", b"1e3", b"5, 5", b"5, 6", b"9" * 40, b"", b" ", b"0", b"1", b"100000"),
    *(b"1_0", b"\xb2", b"12 12", b"18446744073709551616"),
]
CODINGS = [
    b"chunked",
    b"chunked, chunked",
    b"gzip, chunked",
    b"identity",
    b"xchunked",
    b"chunked\x0b",
    b"",
]
CHUNKED = [
    b"0\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;x=y\r\nhello\r\n0\r\na: b\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"zz\r\nhello\r\n0\r\n\r\n",
    b"-5\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\nhello\r\n",
    b"5\r\nhel",
    b"5\r\nhello!\r\n0\r\n\r\n",
    b"0" * 5000 + b"\r\n\r\n",
]
HEADERS = [
    *((b"host", b"y"), (b"host", b""), (b"expect", b"100-continue"), (b"expect", b"other")),
    *((b"upgrade", b"h2c"), (b"upgrade", b"websocket"), (b"connection", b"upgrade")),
    *((b"connection", b"keep-alive"), (b"connection", b"content-length"), (b"te", b"trailers")),
    *((b"", b"nameless"), (b"a b", b"c"), (b"x", b"a\x00b"), (b"x", b"a\rb"), (b"x", b"\xff\xfe")),
    *(
        (b" folded", b"x"),
        (b"x", b"a\r\n more"),
        (b"long", b"a" * 20_000),
        (b"content-type", b"\x7f"),
    ),
    *((b"authorization", b"Bearer \xe9"), (b"cookie", b"a=" * 3000), (b"x-request-id", b"\x01")),
    *((b"content-encoding", b"gzip"), (b"range", b"bytes=0-"), (b"origin", b"null")),
]


def mutated(model: str, chance: random.Random) -> bytes:
    """One request with some of its parts changed, perhaps another one behind it."""
    sent = asked(model)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        match chance.randrange(10):
            case 0:
                sent.method = chance.choice(METHODS)
            case 1:
                sent.target = chance.choice(TARGETS)
            case 2:
                sent.version = chance.choice(VERSIONS)
            case 3:
                sent.headers.insert(
                    chance.randrange(5), (b"content-length", chance.choice(LENGTHS))
                )
            case 4:
                sent.headers.insert(
                    chance.randrange(5), (b"transfer-encoding", chance.choice(CODINGS))
                )
                sent.body = chance.choice(CHUNKED)
            case 5 | 6:
                sent.headers.insert(chance.randrange(5), chance.choice(HEADERS))
            case 7:
                sent.headers.pop(chance.randrange(len(sent.headers)))
            case 8:
                sent.colon = chance.choice([b":", b" : ", b"", b":\t", b":: "])
                sent.end = chance.choice([b"\r\n", b"\n", b"\r", b"\r\r\n"])
            case _:
                sent.headers += [(b"x-%d" % i, b"y") for i in range(chance.choice([50, 300, 2000]))]
    raw = bytearray(sent.encoded())
    for _ in range(chance.choice((0, 0, 0, 1, 5))):
        at = chance.randrange(len(raw))
        raw[at : at + chance.randrange(2)] = chance.choice(
            [b"", b"\x00", b"\r\n", b"\n", b"\xff", b" "]
        )
    if chance.random() < 0.1:
        del raw[chance.randrange(len(raw)) :]
    if chance.random() < 0.2:
        raw += SECOND
    return bytes(raw)


def exchange(port: int, raw: bytes, *, pieces: int = 1) -> bytes:
    """What the server says until it ends the connection, or would wait for another request."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), END_S) as client:
        size = max(1, -(-len(raw) // pieces))
        with suppress(ConnectionResetError, BrokenPipeError):  # it ends while we still send:
            for begin in range(0, len(raw), size):
                client.sendall(raw[begin : begin + size])
        with suppress(ConnectionResetError):  # what it said by then is read all the same
            while more := client.recv(1 << 16):
                answer += more
    return answer


def statuses(raw: bytes, answer: bytes) -> list[int]:
    """Of each response in the answer, which is nothing but whole responses."""
    found: list[int] = []
    while answer:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=b"GET", target=b"/", headers=[(b"host", b"x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(answer)
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:  # its body goes on to the end of the connection
                reader.receive_data(b"")
                event = reader.next_event()
            assert event not in (h11.NEED_DATA, h11.PAUSED), (raw[:500], answer[:500])
            if isinstance(event, h11.Response):
                found.append(event.status_code)
            if isinstance(event, h11.EndOfMessage):
                break
        answer = reader.trailing_data[0]
    return found


def judged(port: int, raw: bytes, pieces: int) -> list[int]:
    answer = exchange(port, raw, pieces=pieces)
    try:
        found = statuses(raw, answer)
    except h11.RemoteProtocolError as error:
        raise AssertionError(f"no HTTP for {raw[:500]!r}: {answer[:500]!r}") from error
    wrong = [each for each in found if each not in {200, *CLIENT_ERRORS}]
    assert not wrong, (raw[:1000], answer[:500])
    return found


def use(engine: EngineProcess) -> tuple[int, int, int]:
    """Bytes of memory, descriptors and threads."""
    process = psutil.Process(engine.process.pid)
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def run(engine: EngineProcess, count: int) -> Counter[int]:
    """How often each status was seen; 0: no answer at all."""
    seed = int(os.environ.get("KVC2_FUZZ_SEED", time.time_ns() % 1_000_000))
    print(f"KVC2_FUZZ_SEED={seed}")
    chance, port = random.Random(seed), int(engine.url.rpartition(":")[2])
    model = engine.model_name
    seen: Counter[int] = Counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asks = [
            partial(judged, port, mutated(model, chance), chance.choice((1, 1, 1, 2, 7)))
            for _ in range(count)
        ]
        for found in pool.map(lambda ask: ask(), asks):
            seen.update(found or [0])
    assert exchange(port, asked(model).encoded()).startswith(b"HTTP/1.1 200 ")
    return seen


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("framing")
    waits = ("--header-timeout-s", "--body-timeout-s", "--idle-timeout-s", "--write-timeout-s")
    flags = [word for name in waits for word in (name, str(WAITS_S))]
    with EngineProcess(small_model(folder / "model"), folder / "engine.log", *flags) as process:
        yield process


def test_no_framing_is_a_5xx(engine: EngineProcess) -> None:
    seen = run(engine, 600)
    assert min(seen[200], seen[400]) > 30, seen  # both sides of the line are tried
    log = engine.log.read_text()
    assert "Traceback" not in log
    assert "Fatal error" not in log


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"4"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"chunked"), (b"content-length", b"4")],
        [(b"content-length", b"4"), (b"content-length", b"5")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"identity")],
        [(b"content-length", b"-1")],
        [(b"transfer-encoding", b"gzip")],
    ],
)
def test_behind_a_body_whose_end_can_be_read_in_two_ways_nothing_is_answered(
    engine: EngineProcess, headers: list[tuple[bytes, bytes]]
) -> None:
    """A proxy that reads the other end would pass the rest on as somebody's request (RFC 9112,
    6.1: the server answers the first at most, and closes)."""
    port = int(engine.url.rpartition(":")[2])
    sent = Sent(target=b"/tokenize", headers=[(b"host", b"x"), *headers], body=b"0\r\n\r\n")
    raw = sent.encoded() + SECOND
    assert len(judged(port, raw, 1)) <= 1


def test_what_is_no_http_is_told_as_an_error_is(engine: EngineProcess) -> None:
    port = int(engine.url.rpartition(":")[2])
    for raw in (
        b"GET / HTTP/1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n",
    ):
        head, _, body = exchange(port, raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json")
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_requests_behind_one_another_are_each_answered(engine: EngineProcess) -> None:
    port = int(engine.url.rpartition(":")[2])
    assert judged(port, 3 * SECOND, 1) == [200] * 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_framing_of_20000_is_a_5xx_and_the_process_stays_as_it_was(
    engine: EngineProcess,
) -> None:
    run(engine, 2_000)
    time.sleep(2 * WAITS_S)
    before = use(engine)
    seen = run(engine, 20_000)
    time.sleep(2 * WAITS_S)
    after = use(engine)
    print(seen, before, after)
    assert after[0] - before[0] < GROWTH_BYTES
    assert after[1:] == before[1:]
