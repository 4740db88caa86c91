"""Mutated messages of every rpc, in a valid session and outside of one, against a daemon process
with a bystander: each is answered, none is the daemon's failure, and nobody else notices.

KVC2_FUZZ_SEED repeats a run: the seed is printed."""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from kvc2.client import LeaseCommit, NamespaceHandle
from kvc2.server.wiring import SERVICES
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.engines import (
    LAYERS,
    NUM_PAGES,
    PAGE_SIZE,
    SEGMENT_BYTES,
    TinyEngine,
    identity,
)
from tests.doubles.mutations import Mutator, Spaces, first_messages, opened, valid, written
from tests.doubles.waiting import wait_until
from tests.doubles.wires import Wire, hello, memfd
from tests.kvc2.server.test_garbage import GARBAGE
from tests.system.daemon import DaemonProcess
from tests.system.test_abuse import settled

ANSWER_S = 30.0  # a call that takes longer hangs
AT_ONCE = 32
SHARED = (
    9  # memfds: the arena's, and of two sessions the pool, the progress page, its map, the arena
)
READ, WRITE = f"{SERVICES[1]}/Read", f"{SERVICES[1]}/Write"
PAYLOAD_BYTES = 2 * LAYERS * SEGMENT_BYTES
TURN = 500  # messages between two looks at the bystander
ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
}


class Bystander:
    """An engine that minds its own: what it commits it hits, its leased pages stay as they are,
    in its pool and in the arena."""

    def __init__(self, address: str) -> None:
        self.engine = TinyEngine(address, "bystander", arena=True)
        self._turn = 0

    def begin(self) -> None:
        client = self.engine.client
        assert client.wait_attached(10)
        self._namespace = client.open_namespace(identity().encode(), salt=b"bystander")
        self._keyed = client.open_handle(
            NamespaceHandle(identity().encode(), salt=b"bystander", opaque=True)
        )
        self._leased = self._store(b"leased", np.arange(97, dtype=np.uint32))
        for number, page in enumerate(self._leased):
            self._fill(page, number)
        self._begin_in_arena()

    def _begin_in_arena(self) -> None:
        client, tokens = self.engine.client, 7 + np.arange(65, dtype=np.uint32)
        self._copied(tokens, [b"one", b"two"], 7)
        self._offsets = client.acquire_in_arena(self._namespace, b"arena", tokens).offsets
        found = client.acquire_keys(self._keyed, b"keys", [b"one", b"two"])
        self._offsets = np.concatenate([self._offsets, found.offsets])
        assert self._offsets.size == 6

    def look(self) -> None:
        client = self.engine.client
        leased = np.arange(97, dtype=np.uint32)
        found = client.acquire(self._namespace, b"look", leased)
        assert found.prefix_pages.tolist() == self._leased
        for number, page in enumerate(self._leased):
            assert self.engine.pool.map[page * SEGMENT_BYTES] == number + 1
        self._turn += 1
        tokens = np.full(2 * PAGE_SIZE + 1, 1000 + self._turn, np.uint32)
        name = b"turn %d" % self._turn
        pages = self._store(name, tokens)
        assert client.acquire(self._namespace, b"again", tokens).prefix_pages.tolist() == pages
        client.release([b"look", b"again", name])
        self._look_in_arena()
        assert self.engine.detached == []

    def _look_in_arena(self) -> None:
        """What it has leased there is as it was; so is what it copies there now."""
        self._judge(self._offsets, [7, 8, 9, 10, 7, 8])
        client, first, key = self.engine.client, self._turn % 200, b"key %d" % self._turn
        tokens = np.full(PAGE_SIZE + 1, 5000 + self._turn, np.uint32)
        self._copied(tokens, [key], first)
        found = client.acquire_in_arena(self._namespace, b"turn", tokens)
        keyed = client.acquire_keys(self._keyed, b"turn of keys", [key])
        self._judge(np.concatenate([found.offsets, keyed.offsets]), [first, first])
        client.release([b"turn", b"turn of keys"])

    def _judge(self, offsets: NDArray[np.uint64], numbers: list[int]) -> None:
        into = np.zeros((offsets.size, PAYLOAD_BYTES), np.uint8)
        assert self.engine.client.arena.read(offsets, PAYLOAD_BYTES, into)
        assert into.tolist() == [[each + 1] * PAYLOAD_BYTES for each in numbers]

    def _copied(self, tokens: NDArray[np.uint32], keys: list[bytes], first: int) -> None:
        """Commits copies of both, whose bytes count up from `first`. While the arena is being made
        there may be no room."""
        client, blocks = self.engine.client, len(tokens) // PAGE_SIZE
        pages = client.grant(blocks)
        assert pages.size == blocks >= len(keys)
        for number, page in enumerate(pages.tolist()):
            self._fill(page, first + number)
        commit = LeaseCommit(b"", 0, tokens[: blocks * PAGE_SIZE], pages)

        def stored() -> bool:
            copies = client.commit_copies(self._namespace, [commit]).results[0]
            keyed = client.commit_keys(self._keyed, keys, pages[: len(keys)]).results[0]
            return set(copies.tolist()) | set(keyed.tolist()) <= {0, 1}

        wait_until(stored, ANSWER_S)
        client.release([], returned=pages)

    def _store(self, name: bytes, tokens: NDArray[np.uint32]) -> list[int]:
        client, blocks = self.engine.client, len(tokens) // PAGE_SIZE
        found = client.acquire(self._namespace, name, tokens, grant_pages=blocks)
        assert (found.matched_tokens, found.granted_pages.size) == (0, blocks)
        part = LeaseCommit(name, 0, tokens[: blocks * PAGE_SIZE], found.granted_pages)
        assert client.commit([part]).results[0].tolist() == [0] * blocks
        return list(found.granted_pages.tolist())

    def _fill(self, page: int, number: int) -> None:
        """All of it: a page has a segment for each part of each layer."""
        for segment in range(PAYLOAD_BYTES // SEGMENT_BYTES):
            start = (segment * NUM_PAGES + page) * SEGMENT_BYTES
            self.engine.pool.map[start : start + SEGMENT_BYTES] = (
                bytes([number + 1]) * SEGMENT_BYTES
            )


class Fuzz:
    """Sends messages on one connection, AT_ONCE at a time, in the session of `engine`."""

    def __init__(self, daemon: DaemonProcess, engine: TinyEngine, seed: int) -> None:
        self._daemon = daemon
        self._mutator = Mutator(seed)
        self._channel = grpc.insecure_channel(daemon.address)
        self._waiting: deque[Any] = deque()
        self._stubs: dict[str, Any] = {}
        self.statuses: Counter[str] = Counter()
        session = engine.client._keeper.connection
        assert session is not None
        self._head, self._spaces = session.head, self._opened(session.head)
        self._calls = valid(self._head, self._spaces)

    def _opened(self, head: pb.SessionRef) -> Spaces:
        stub = self._channel.unary_unary(
            f"/{SERVICES[1]}/OpenNamespace",
            pb.OpenNamespaceRequest.SerializeToString,
            pb.OpenNamespaceResponse.FromString,
        )
        return Spaces(*(stub(each, timeout=ANSWER_S).namespace_id for each in opened(head)))

    def send(self, count: int) -> None:
        beside = [self._drain, self._library, self._stream, self._side_socket]
        # a session that is cut off keeps the next one of this process waiting for half a second
        ways: list[Callable[[], None]] = [*[self._in_session] * 200, *beside * 10, self._session]
        for _ in range(count):
            self._mutator.random.choice(ways)()
        while self._waiting:
            self._answered(self._waiting.popleft())

    def _in_session(self) -> None:
        path = self._mutator.random.choice(list(self._calls))
        if path == WRITE:
            self._ask_stream(path, self._a_write())
        elif path == READ:
            self._ask_stream(path, [self._mutator.message(self._calls[path])])
        else:
            self._ask(path, self._mutator.message(self._calls[path]))

    def _a_write(self) -> list[bytes]:
        """A whole one, mostly with some messages mutated: of two blocks that are there, or not."""
        whole = written(self._head, self._spaces.tokens, self._mutator.random.randrange(100))
        return [
            each.SerializeToString()
            if self._mutator.random.random() < 0.8
            else self._mutator.message([each])
            for each in whole
        ]

    def _drain(self) -> None:
        """It would end the daemon: only what is no message."""
        self._ask(f"{SERVICES[1]}/Drain", GARBAGE + self._mutator.noise())

    def _library(self) -> None:
        self._ask("grpc.health.v1.Health/Check", self._mutator.noise())

    def _ask(self, path: str, data: bytes) -> None:
        if path not in self._stubs:
            self._stubs[path] = self._channel.unary_unary(f"/{path}", None, None)
        self._waiting.append((path, data, self._stubs[path].future(data, timeout=ANSWER_S)))
        if len(self._waiting) > AT_ONCE:
            self._answered(self._waiting.popleft())

    def _answered(self, call: tuple[str, bytes, Any]) -> None:
        path, data, future = call
        self._count(path, data, future.code(), future.details())

    def _count(self, path: str, data: bytes, code: grpc.StatusCode, details: str) -> None:
        self.statuses[code.name] += 1
        assert code.name in ALLOWED, f"{path} {data.hex()}: {code.name} {details}"

    def _stream(self) -> None:
        """Hello, and maybe a second message; who is attached hangs up."""
        self._ask_stream(
            f"{SERVICES[0]}/Attach", [self._mutator.message(first_messages()) for _ in range(2)]
        )

    def _ask_stream(self, path: str, messages: list[bytes]) -> None:
        """On the wire all kinds of calls are alike."""
        call = self._channel.stream_stream(f"/{path}", None, None)(iter(messages), timeout=ANSWER_S)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        self._count(path, messages[0], call.code(), call.details())

    def _session(self) -> None:
        """Another session, with and without a pool of its own, that is cut off in mid-call."""
        bare = self._mutator.random.random() < 0.5
        changes = {"num_pages": 0, "memory_bytes": 0} if bare else {}
        with Wire(self._daemon.address) as wire:
            attached = wire.attach(hello(arena=True, **changes))
            assert wire.side(attached, attached.nonce, [] if bare else [memfd()]) == b"ok"
            assert next(wire.stream).WhichOneof("message") == "ready"
            calls = valid(wire.head, self._opened(wire.head))
            for _ in range(8):
                path = self._mutator.random.choice(
                    [each for each in calls if each not in (READ, WRITE)]
                )
                self._ask(path, self._mutator.message(calls[path]))
            wire.stream.cancel()

    def _side_socket(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
            side.settimeout(ANSWER_S)
            side.connect(f"{self._daemon.folder / 'kvc2.sock'}.side")
            fds = [os.memfd_create("fuzz") for _ in range(self._mutator.random.randrange(4))]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            side.sendmsg([self._mutator.noise() or b"x"], rights)
            for fd in fds:
                os.close(fd)
            if self._mutator.random.random() < 0.9:  # the others don't wait for their answer
                assert side.recv(600).startswith(b"error: nonce")

    def close(self) -> None:
        self._channel.close()


@pytest.mark.parametrize(
    "messages",
    [3_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_mutated_messages_are_refused_and_nobody_else_notices(
    tmp_path: Path, messages: int
) -> None:
    seed = int(os.environ.get("KVC2_FUZZ_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"KVC2_FUZZ_SEED={seed}")
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.064")
    with DaemonProcess(tmp_path, *disk, "--log-format", "json") as daemon:
        bystander = Bystander(daemon.address)
        with bystander.engine, TinyEngine(daemon.address, "fuzz", arena=True) as engine:
            bystander.begin()
            fuzz = Fuzz(daemon, engine, seed)
            fuzz.send(messages // 10)
            before, rss = settled(daemon, SHARED), psutil.Process(daemon.pid).memory_info().rss
            for _ in range(0, messages, TURN):
                fuzz.send(TURN)
                bystander.look()
            fuzz.close()
            print(dict(fuzz.statuses))
            after = settled(daemon, SHARED)
            assert (after["memfds"], after["maps"]) == (before["memfds"], before["maps"])
            assert after["descriptors"] - before["descriptors"] < 8  # connections come and go
            grown = psutil.Process(daemon.pid).memory_info().rss - rss
            print(f"{grown / 2**20:.1f} MiB more")
            assert grown < 32 << 20
            assert fuzz.statuses["OK"] > messages // 20
            assert fuzz.statuses["INVALID_ARGUMENT"] > messages // 20
            assert engine.detached == []
        with daemon.admin() as admin:
            counters = admin.stats().counters
        assert counters["faults_total{kind=internal_error}"] == 0
        assert counters["faults_total{kind=refused_request}"] > 0
        assert daemon.stop() == 0
    assert '"library"' not in daemon.log.read_text()
