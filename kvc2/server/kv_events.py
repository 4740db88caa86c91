"""Tells routers what is cached where: ZeroMQ PUB with replay, as vLLM's publisher does.

    index ──take──► one thread ──► PUB     (topic, number, batch)
                        └──► the last batches ──► ROUTER  on "from this number on"

A batch's number is 8 bytes, big-endian, from 0 and without a gap. Who sees a gap asks for a replay:
an empty frame and the first number; the answers are (empty, topic, number, batch), and in the end
number -1. Where the batches are not kept any more, AllBlocksCleared stands in their place, and what
is there is told anew, to all. So it is where more changes wait than may: the index drops them.

No reader is waited for: one that is slow loses batches, and sees the gap. Events tell prompts'
tokens, so the sockets are their owner's alone. Not here: which block is where (csrc/index), how an
event looks (kv_event_messages.py).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from kvc2 import _core, errors, events
from kvc2.config import REPLAY_ENDING, KvEventsConfig
from kvc2.metrics import Metrics
from kvc2.server.claim import LOCK_ENDING, lock, own_folder, private_files, unlink_stale
from kvc2.server.kv_event_messages import AllBlocksCleared, Event, EventBatch, events_of

END = (-1).to_bytes(8, "big", signed=True)
FIELD = "kv_events.listen"
IDLE_MS = 20  # between two looks at the index; a router decides with facts so old
BATCHES_WAITING = 100_000  # for one slow reader
RANK = 0  # of data-parallel engines: a daemon is one
NUMBER_BYTES = 8
CHUNKS_AT_ONCE = 64  # between two looks at the replay socket


class Source(Protocol):
    """Where changes come from: an index."""

    def take_kv_events(self) -> tuple[_core.KvEvents, bool]: ...
    def tell_kv_events_anew(self) -> None: ...
    def kv_event_overflows(self) -> int: ...


class Kept:
    """The last batches, of at most so many bytes, for replay."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max, self._bytes = bytes_max, 0
        self._batches: deque[tuple[int, bytes]] = deque()

    def append(self, number: int, batch: bytes) -> None:
        self._batches.append((number, batch))
        self._bytes += len(batch)
        while self._bytes > self._bytes_max and len(self._batches) > 1:
            self._bytes -= len(self._batches.popleft()[1])

    @property
    def oldest(self) -> int:
        return self._batches[0][0] if self._batches else 0

    def since(self, number: int) -> list[tuple[int, bytes]]:
        return [each for each in self._batches if each[0] >= number]


class Sockets:
    """PUB at `path`, ROUTER beside it, both their owner's alone, till `close`. Raises StartRefused
    where they can't be bound."""

    def __init__(self, path: Path) -> None:
        self._paths = [path, path.with_name(path.name + REPLAY_ENDING)]
        own_folder(path.parent, FIELD)
        self._lock = lock(path.with_name(path.name + LOCK_ENDING), FIELD)
        self._context = zmq.Context()
        try:
            self.pub = self._bound(zmq.PUB, self._paths[0])
            self.replay = self._bound(zmq.ROUTER, self._paths[1])
        except (errors.StartRefused, zmq.ZMQError) as error:
            self._context.destroy(linger=0)
            os.close(self._lock)
            raise errors.StartRefused(f"{FIELD}: {path}: {error}") from error

    def _bound(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        unlink_stale(path, FIELD)
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(BATCHES_WAITING)
        with private_files():
            socket.bind(f"ipc://{path}")
        return socket

    def close(self) -> None:
        self._context.destroy(linger=0)
        for path in self._paths:
            path.unlink(missing_ok=True)
        os.close(self._lock)


class KvEvents:
    """Publishes from construction until `close`, on sockets that it closes then."""

    def __init__(
        self, config: KvEventsConfig, sockets: Sockets, source: Source, metrics: Metrics
    ) -> None:
        self._sockets, self._source, self._metrics = sockets, source, metrics
        self._topic, self._salted = config.topic.encode(), config.salted
        self._kept = Kept(config.buffer_bytes)
        self._encoder = msgspec.msgpack.Encoder()
        self._number = self._overflows = 0
        self._telling = self._anew = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvc2-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._sockets.close()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if self._sockets.replay.poll(IDLE_MS if not self._telling else 0):
                    self._answer()
                self._publish()
            except Exception as error:
                self._metrics.fault("internal_error")
                events.warning("kv_events_failed", error=repr(error))
                self._over.wait(IDLE_MS / 1000)

    def _publish(self) -> None:
        if self._anew and not self._telling:
            self._anew = False
            self._source.tell_kv_events_anew()
        for _ in range(CHUNKS_AT_ONCE):
            taken, self._telling = self._source.take_kv_events()
            if len(taken.kinds):
                self._send(self._encode(events_of(taken, salted=self._salted)))
            if not self._telling:
                break
        overflows = self._source.kv_event_overflows()
        for _ in range(overflows - self._overflows):
            self._metrics.fault("kv_events_lost")
        self._overflows = overflows

    def _encode(self, told: list[Event]) -> bytes:
        return self._encoder.encode(EventBatch(time.time(), told, RANK))

    def _send(self, batch: bytes) -> None:
        number, self._number = self._number, self._number + 1
        self._kept.append(number, batch)
        self._sockets.pub.send_multipart((self._topic, _bytes_of(number), batch))

    def _answer(self) -> None:
        """To one request for a replay; to none that is not one."""
        client, *request = self._sockets.replay.recv_multipart()
        if len(request) != 2 or request[0] or len(request[1]) != NUMBER_BYTES:
            self._metrics.fault("refused_request")
            return
        first = int.from_bytes(request[1], "big")
        if first < self._kept.oldest:
            self._anew = True
            cleared = self._encode([AllBlocksCleared()])
            self._reply(client, _bytes_of(self._kept.oldest - 1), cleared)
        for number, batch in self._kept.since(first):
            self._reply(client, _bytes_of(number), batch)
        self._reply(client, END, b"")

    def _reply(self, client: bytes, number: bytes, batch: bytes) -> None:
        """A client that is gone, or doesn't read, loses it."""
        with contextlib.suppress(zmq.ZMQError):
            self._sockets.replay.send_multipart((client, b"", self._topic, number, batch))


def _bytes_of(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big")
