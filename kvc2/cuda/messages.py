"""What the daemon and a worker say to one another over a socket: a head, a body, descriptors.

One call at a time on a channel, and an answer to each. Not here: who calls (workers.py), what a
worker does (worker.py).
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

FDS_MAX = 3
ANSWER_BYTES_MAX = 1 << 16
_HEAD = struct.Struct("<BQQQ")  # what, pool, progress base, bytes of the body
_ANSWER = struct.Struct("<BQ")  # outcome, bytes of the text


class What(IntEnum):
    OPEN, CLOSE, WRITE, READ = range(4)


class Outcome(IntEnum):
    """`LOST`: the context is poisoned, the worker is of no use any more."""

    DONE, REFUSED, LOST = range(3)


@dataclass(frozen=True)
class PoolShape:
    """Of an engine's pool: the bytes that its descriptor stands for, `segments` (offset, stride,
    bytes) in canonical order, and how many of them there are up to the end of each layer."""

    memory_bytes: int
    segments: tuple[tuple[int, int, int], ...]
    layer_ends: tuple[int, ...]

    def packed(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def of(body: bytes) -> PoolShape:
        told = json.loads(body)
        segments = tuple((each[0], each[1], each[2]) for each in told["segments"])
        return PoolShape(told["memory_bytes"], segments, tuple(told["layer_ends"]))


@dataclass(frozen=True)
class Pages:
    """pages [n] of a pool, payloads [n] where theirs begin in the arena."""

    pages: NDArray[np.uint32]
    payloads: NDArray[np.uint64]

    def packed(self) -> bytes:
        return self.pages.astype("<u4").tobytes() + self.payloads.astype("<u8").tobytes()

    @staticmethod
    def of(body: bytes) -> Pages:
        count = len(body) // 12
        return Pages(
            np.frombuffer(body, "<u4", count).astype(np.uint32),
            np.frombuffer(body, "<u8", count, 4 * count).astype(np.uint64),
        )


@dataclass
class Message:
    """To a worker. Whoever received it closes its descriptors."""

    what: What
    pool: int
    base: int = 0
    body: bytes = b""
    fds: list[int] = field(default_factory=list)

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Channel:
    """One end. Threads may `call`, one after the other."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()

    def call(self, message: Message, timeout_s: float) -> tuple[Outcome, str]:
        """The answer. Raises OSError, also when it doesn't come in time (TimeoutError): the channel
        is of no use then."""
        with self._lock:
            deadline = time.monotonic() + timeout_s
            self._send(message, deadline)
            outcome, length = _ANSWER.unpack(self._exactly(_ANSWER.size, deadline))
            text = self._exactly(min(length, ANSWER_BYTES_MAX), deadline)
            return Outcome(outcome), text.decode(errors="replace")

    def receive(self) -> Message | None:
        """The next call; None: the other end has closed."""
        head, fds, _, _ = socket.recv_fds(
            self._socket, _HEAD.size, FDS_MAX, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
        )
        if len(head) < _HEAD.size:
            return None
        what, pool, base, length = _HEAD.unpack(head)
        return Message(What(what), pool, base, self._exactly(length), list(fds))

    def answer(self, outcome: Outcome, text: str = "") -> None:
        told = text.encode()[:ANSWER_BYTES_MAX]
        self._socket.sendall(_ANSWER.pack(outcome, len(told)) + told)

    def close(self) -> None:
        self._socket.close()

    def _send(self, message: Message, deadline: float) -> None:
        head = _HEAD.pack(message.what, message.pool, message.base, len(message.body))
        self._wait(deadline)
        socket.send_fds(self._socket, [head], message.fds)
        self._wait(deadline)
        self._socket.sendall(message.body)

    def _exactly(self, count: int, deadline: float | None = None) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            self._wait(deadline)
            part = self._socket.recv(count - len(parts))
            if not part:
                raise ConnectionResetError("the other end has closed")
            parts += part
        return bytes(parts)

    def _wait(self, deadline: float | None) -> None:
        """The next operation may take until then."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("no answer in time")
        self._socket.settimeout(left)
