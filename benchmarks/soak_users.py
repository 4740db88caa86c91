"""The users of soak.py: some want an answer, which is compared; some vanish, stall or send garbage.

Each is a thread that asks one engine after the other, by HTTP as written here, so that it can stop
in the middle. What an engine may say while others kill it is judged here; what leaks is not (soak).
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clients import Kept
from benchmarks.processes import Engine

SHARED, SHARED_TOKENS = 6, 320  # beginnings that several prompts have
OWN_TOKENS = (20, 200)
OUTPUT_TOKENS = 16
TOKEN_IDS = (100, 250)  # letters in any byte-level vocabulary
HANG_S = 120.0  # without a byte of an answer: nobody is frozen for that long
STALL_S = (0.5, 3.0)
REST_S = 0.2  # after an engine was not there
AT_ONCE = 4  # of the answers to compare with
COMPLETIONS = "/v1/completions"
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Wanted:
    """A prompt and the greedy answer of an engine without a cache."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Some share a beginning."""
    chance = random.Random(seed)
    begins = [chance.choices(range(*TOKEN_IDS), k=SHARED_TOKENS) for _ in range(SHARED)]
    return [
        (
            *begins[number % SHARED],
            *chance.choices(range(*TOKEN_IDS), k=chance.randint(*OWN_TOKENS)),
        )
        for number in range(count)
    ]


def truth(engine: Engine, count: int, seed: int) -> list[Wanted]:
    """`count` first turns, and a second one that goes on from each."""

    def answered(prompt: tuple[int, ...]) -> Wanted:
        answer = engine.complete(prompt, OUTPUT_TOKENS)
        return Wanted(prompt, answer.tokens, answer.text)

    def talk(prompt: tuple[int, ...]) -> list[Wanted]:
        first = answered(prompt)
        return [first, answered((*prompt, *first.tokens, *prompt[-OWN_TOKENS[0] :]))]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        talks = list(pool.map(talk, prompts(count, seed)))
    return [turn for each in talks for turn in each]


@dataclass
class Told:
    """What became of what was asked, and how many tokens right answers had, prompts included."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # what must not be, in words
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, tokens: int = 0) -> None:
        with self.lock:
            self.counts[what] += 1
            self.tokens += tokens

    def fail(self, text: str) -> None:
        with self.lock:
            self.counts["WRONG"] += 1
            self.wrong.append(text)


class Lost(Exception):
    """The connection broke, which is right where the engine was killed meanwhile."""


class Users:
    """Threads that ask until `stop`, and rest between `pause` and `resume`. `engines`: those that
    serve now."""

    def __init__(
        self, engines: Callable[[], Sequence[Engine]], wanted: list[Wanted], told: Told, seed: int
    ) -> None:
        self._engines, self._wanted, self._told, self._seed = engines, wanted, told, seed
        self._may_ask = threading.Event()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._asking: set[int] = set()

    def start(self, count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._ask_on, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self.resume()

    def resume(self) -> None:
        self._may_ask.set()

    def pause(self) -> None:
        """Waits until none of them asks any more."""
        self._may_ask.clear()
        deadline = time.monotonic() + 2 * HANG_S
        while self._asking and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._asking:
            self._told.fail(f"{len(self._asking)} users have no answer after {2 * HANG_S:.0f} s")

    def stop(self) -> None:
        self._ended.set()
        self.resume()
        for thread in self._threads:
            thread.join(HANG_S)

    def _ask_on(self, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        while not self._ended.is_set():
            self._may_ask.wait()
            self._asking.add(number)
            try:
                if self._may_ask.is_set() and not self._ended.is_set():
                    self._ask(chance)
            finally:
                self._asking.discard(number)

    def _ask(self, chance: random.Random) -> None:
        engine = chance.choice(self._engines())
        visit = Visit(engine, chance, self._told)
        wanted = self._wanted[int(len(self._wanted) * chance.random() ** 2)]  # some more often
        kinds = [visit.whole, visit.streamed, visit.vanished, visit.stalled]
        (kind,) = chance.choices(kinds, (6, 3, 1, 1))
        try:
            if chance.random() < 0.15:
                visit.garbage()
            else:
                kind(wanted)
        except (Lost, OSError) as error:
            if isinstance(error, TimeoutError):
                self._told.fail(f"{engine.name}: no answer in {HANG_S:.0f} s")
            elif engine.child.poll() is None and engine in self._engines():
                time.sleep(REST_S)  # a kill is seen here before the fleet tells of it
                if engine.child.poll() is None and engine in self._engines():
                    self._told.fail(f"{engine.name}: {error!r}, and it runs")
            else:
                self._told.count("lost with a killed engine")
            time.sleep(REST_S)


class Visit:
    """One user at one engine, once. Raises Lost and OSError where the connection breaks."""

    def __init__(self, engine: Engine, chance: random.Random, told: Told) -> None:
        self._engine, self._chance, self._told = engine, chance, told

    def whole(self, wanted: Wanted) -> None:
        kept = Kept(self._engine.port)
        try:
            response = kept.post(COMPLETIONS, self._body(wanted, stream=False))
            status, raw = response.status, response.read()
        except OSError:
            raise
        except Exception as error:  # half an answer
            raise Lost(repr(error)) from error
        finally:
            kept.close()
        if self._answered("whole", status, raw):
            answer = json.loads(raw)
            tokens = [each["token_id"] for each in answer["kvc2"]["tokens"]]
            self._compare("whole", wanted, tokens)

    def streamed(self, wanted: Wanted) -> None:
        last: dict[str, Any] = {}
        text = ""
        for event in self._events("streamed", wanted):
            last = event
            text += event["choices"][0]["text"]
        if last:
            if "kvc2" not in last:
                raise Lost("a stream without its end")
            tokens = [each["token_id"] for each in last["kvc2"]["tokens"]]
            if text != wanted.text:
                self._told.fail(f"streamed: {text!r}, not {wanted.text!r}")
            self._compare("streamed", wanted, tokens)

    def vanished(self, wanted: Wanted) -> None:
        """Reads some pieces and goes."""
        text, pieces = "", self._chance.randrange(4)
        for event in self._events("vanished", wanted):
            text += event["choices"][0]["text"]
            pieces -= 1
            if pieces < 0:
                break
        if not wanted.text.startswith(text):
            self._told.fail(f"vanished: {text!r} does not begin {wanted.text!r}")
        self._told.count("vanished")

    def stalled(self, wanted: Wanted) -> None:
        """Sends half a request, or reads nothing, and goes after a while."""
        body = self._body(wanted, stream=True)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        sent = whole if self._chance.random() < 0.5 else whole[: self._chance.randrange(len(whole))]
        with socket.create_connection(("127.0.0.1", self._engine.port), HANG_S) as connection:
            connection.sendall(sent)
            time.sleep(self._chance.uniform(*STALL_S))
        self._told.count("stalled")

    def garbage(self) -> None:
        """Anything but a request. The answer is a 4xx, or none."""
        chance = self._chance
        body = json.dumps({"model": self._engine.served, "prompt": "a", "max_tokens": 2}).encode()
        cut = bytearray(body)
        cut[chance.randrange(len(cut))] = chance.randrange(256)
        bodies = [
            chance.randbytes(chance.randrange(300)),
            body[: chance.randrange(1, len(body))],
            bytes(cut),
            b"[" * 3000,
            body.replace(b'"a"', b'{"a": [1e999]}'),
            body.replace(b"2}", b"2e2}"),
        ]
        if chance.random() < 0.3:
            self._noise(chance.randbytes(chance.randrange(1, 3000)))
            return
        kept = Kept(self._engine.port)
        try:
            response = kept.post(COMPLETIONS, chance.choice(bodies))
            status, raw = response.status, response.read()
        finally:
            kept.close()
        if status >= 500 and status != 503:
            self._told.fail(f"garbage: {status} {raw[:200]!r}")
        self._told.count(f"garbage: {status}")

    def _noise(self, data: bytes) -> None:
        """No HTTP at all."""
        connection = socket.create_connection(("127.0.0.1", self._engine.port), HANG_S)
        with connection, suppress(ConnectionError):  # it may be refused while it is sent
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        self._told.count("garbage: no HTTP")

    def _body(self, wanted: Wanted, *, stream: bool) -> bytes:
        body = {
            "model": self._engine.served,
            "prompt": list(wanted.prompt),
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "stream": stream,
            "kvc2": {"details": True},
        }
        return json.dumps(body).encode()

    def _events(self, kind: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
        """A stream's, until its end; none where the request was refused for now."""
        kept = Kept(self._engine.port)
        try:
            response = kept.post(COMPLETIONS, self._body(wanted, stream=True))
            if response.status != 200:
                self._answered(kind, response.status, response.read())
                return
            while line := response.readline():
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        code = event["error"].get("code")
                        self._answered(kind, 503 if code == "unavailable" else 500, line)
                        return
                    yield event
        except OSError:
            raise
        except Exception as error:  # half an answer
            raise Lost(repr(error)) from error
        finally:
            kept.close()

    def _answered(self, kind: str, status: int, raw: bytes) -> bool:
        if status in (429, 503):  # it may be asked again
            self._told.count(f"{kind}: {status}")
            time.sleep(REST_S)
        elif status != 200:
            self._told.fail(f"{kind}: {status} {raw[:300]!r}")
        return status == 200

    def _compare(self, kind: str, wanted: Wanted, tokens: Sequence[int]) -> None:
        if tuple(tokens) != wanted.tokens:
            self._told.fail(f"{kind}: {tokens}, not {wanted.tokens}")
        self._told.count(f"{kind}: equal", len(wanted.prompt) + len(tokens))
