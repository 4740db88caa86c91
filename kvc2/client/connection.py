"""The engine's end of one session: hello, hand-over on the side socket, the stream's messages.

Not here: when to attach again and what the engine is told (keeper.py).
"""

from __future__ import annotations

import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import ComponentPages, Limits, pages_of
from kvc2.client.channel import Channel, absence_of, code, probe, translated
from kvc2.client.memory import ArenaView, EngineMemory, OverSignal, Progress
from kvc2.host.address import Address
from kvc2.layout import Layout
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message, packed

WIRE_VERSION = 2
ATTACHED_S = 3.0  # for the daemon's first answer
READY_S = 10.0  # it may first have to end our earlier session, which takes up to 2 s
SIDE_S = 10.0
SERVES_S = 1.0  # asked first: a frozen daemon must not take pages off the engine's hands
DEATH_S = 0.3  # between a process's sockets closing and its pidfd saying so
_CREDENTIALS = struct.Struct("iII")


@dataclass(eq=False)
class NamespaceHandle:
    """An identity, tenant, salt and time to live, opened in whichever session there is. `layout`:
    of its pages; None: the session's pool's. `opaque`: keys name its blocks, not tokens."""

    identity: bytes
    tenant: str = ""
    salt: bytes = b""
    ttl_s: int = 0
    layout: Layout | None = None
    opaque: bool = False
    opened: tuple[bytes, int] = (b"", 0)  # (key of the session, id in it)


@dataclass(frozen=True)
class SessionOptions:
    """What an engine asks for with each session. `arena`: to read the cpu tier in place, for
    processes of the daemon's own user. `expiry_s`: for how long it may send no heartbeat, at most
    30 s; 0: the daemon's 3 s. `copy_threads`: of reads from the arena."""

    engine_name: str
    arena: bool = False
    expiry_s: float = 0.0
    copy_threads: int = 1


@dataclass(frozen=True)
class EnginePool:
    """What an engine brings to each of its sessions, one after the other, and asks for."""

    memory: EngineMemory
    layout: Layout
    options: SessionOptions


class Over:
    """The stream has ended: the exception that it ended with, if a daemon said why."""

    def __init__(self, error: errors.Kvc2Error | None) -> None:
        self.error = error


Message = cache_pb2.AttachResponse | Over


class Silence:
    """How long a peer has not answered, counted over time in which this process itself ran: after
    a wait that took longer than it was to take, nothing is known of the peer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self.seconds = 0.0

    def waited(self, at_most_s: float) -> None:
        """Nothing came since the last call here, which was to take so long."""
        now = self._clock()
        self.seconds += min(now - self._at, at_most_s)
        self._at = now

    def answered(self) -> None:
        self._at, self.seconds = self._clock(), 0.0


class Connection:
    """Attaches when it is made: raises a Kvc2Error when the daemon refuses, Unreachable when it
    does not answer. `close` it in any case. Calls may use `head` and `channel` from any thread.
    kept_pages: asked right before the hello."""

    def __init__(
        self, address: Address, pool: EnginePool, kept_pages: Callable[[], NDArray[np.uint32]]
    ) -> None:
        self.channel = Channel(address)
        if (why := self.channel.absence(SERVES_S)) is not None:
            self.channel.close()
            raise why
        self._over = OverSignal()
        self.processes = Processes()
        self.progress: Progress | None = None
        self.arena: ArenaView | None = None
        self.ended = False
        self._beat: _core.Beat | None = None
        self._outbox: queue.SimpleQueue[cache_pb2.AttachRequest | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._stream = self.channel.attach(iter(self._outbox.get, None))
        reader = threading.Thread(target=self._read, name="kvc2-stream", daemon=True)
        reader.start()
        try:
            self._attach(pool, kept_pages)
        except BaseException:
            self.close()
            raise

    def _attach(self, pool: EnginePool, kept_pages: Callable[[], NDArray[np.uint32]]) -> None:
        hello = cache_pb2.Hello(
            engine_name=pool.options.engine_name,
            wire_version=WIRE_VERSION,
            arena=pool.options.arena,
            expiry_ms=round(1000 * pool.options.expiry_s),
            pools=[
                cache_pb2.Pool(
                    parts=1,
                    layout=pool.layout.to_proto(),
                    num_pages=pool.memory.num_bytes // pool.layout.payload_bytes,
                    kept_pages=packed(kept_pages()),
                    memory_bytes=pool.memory.num_bytes,
                    memory_kind=pool.memory.kind,
                    device=pool.memory.device,
                )
            ],
        )
        self._outbox.put(cache_pb2.AttachRequest(hello=hello))
        attached = self._expect("attached", ATTACHED_S).attached
        self.head = cache_pb2.SessionRef(
            secret=attached.secret, session_epoch=attached.session_epoch
        )
        self.key = self.head.SerializeToString()
        self._attached = attached
        arena_fd = self._join(attached, pool)
        try:
            ready = self._expect("ready", READY_S).ready
        except BaseException:
            if arena_fd >= 0:
                os.close(arena_fd)
            raise
        if arena_fd >= 0 and self.progress is not None:
            self.arena = ArenaView(
                arena_fd, ready.arena_bytes, self.progress, threads=pool.options.copy_threads
            )
        self.granted = pages_of(tuple(from_message(ComponentPages, each) for each in ready.granted))

    @property
    def heartbeat_s(self) -> float:
        return max(0.05, self._attached.heartbeat_interval_ms / 1000)

    @cached_property
    def limits(self) -> Limits:
        """What one call may be, as the daemon told."""
        return from_message(Limits, self._attached.limits)

    def _expect(self, kind: str, timeout_s: float) -> cache_pb2.AttachResponse:
        message = self.receive(timeout_s)
        if isinstance(message, Over):
            raise message.error or errors.Unreachable("the daemon ended the stream")
        if message is None or message.WhichOneof("message") != kind:
            told = f"no `{kind}` from the daemon within {timeout_s} s"
            raise errors.Unreachable(told, "no_answer")
        return message

    def _join(self, attached: cache_pb2.Attached, pool: EnginePool) -> int:
        """Hand the pool over, learn who the daemon is, get the progress page, and go on beating on
        the side socket: the stream's heartbeats wait for the GIL, which others may hold for long.
        Answers the arena's descriptor, or -1.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
            side.settimeout(SIDE_S)
            try:
                side.connect(attached.side_socket)
                passed = [pool.memory.fd] if pool.memory.num_bytes else []
                socket.send_fds(side, [attached.nonce], passed)
                packed = side.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                pid = _CREDENTIALS.unpack(packed)[0]
                self.processes.add([os.pidfd_open(pid)] if pid > 0 else [])
                answer, fds, _, _ = socket.recv_fds(side, 600, 4)
            except OSError as error:
                raise absence_of(Address(Path(attached.side_socket)), error) from error
            for fd in fds:
                os.set_inheritable(fd, False)
            on_device = pool.memory.kind != 0
            if answer != b"ok" or len(fds) != 2 + pool.options.arena + on_device:
                for fd in fds:
                    os.close(fd)
                told = f"side socket: {answer.decode(errors='replace')}"
                raise errors.Unreachable(told, "refused")
            self.progress = Progress(fds[0], fds[1], self._over)
            self._beat = _core.Beat(side.fileno(), self.heartbeat_s)
            if on_device and self.processes:
                self.processes.add(fds[-1:])
            elif on_device:
                os.close(fds[-1])
            return fds[2] if pool.options.arena else -1

    def _read(self) -> None:
        error: errors.Kvc2Error | None = None
        try:
            for message in self._stream:
                self._inbox.put(message)
        except grpc.RpcError as broken:
            error = translated(broken)
            if isinstance(error, errors.Unreachable) and code(broken) == "UNIMPLEMENTED":
                error = errors.Unreachable("what serves there has no Attach", "not_kvc2")
            without_traceback(broken)  # it is the stream itself, which this connection holds
        self.ended = True
        self._over.set()
        self._inbox.put(Over(error))

    def receive(self, timeout_s: float) -> Message | None:
        """The stream's next message; None when none came in time."""
        try:
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def end_waits(self) -> None:
        """Nobody waits any more for layers that it promised, in any process."""
        self._over.set()

    def wake(self) -> None:
        """Make a `receive` under way return None."""
        self._inbox.put(None)

    def send_heartbeat(self) -> None:
        self._outbox.put(cache_pb2.AttachRequest(heartbeat=cache_pb2.Heartbeat()))

    def daemon_is_dead(self, wait_s: float = DEATH_S) -> bool:
        """Whether all that may write into the pool is known to be gone."""
        return self.processes.are_dead(wait_s)

    def detach(self, timeout_s: float) -> None:
        """End the session in order and wait until the daemon has closed the stream: it copies what
        it holds nowhere else, so the pool's pages must not change before."""
        self._outbox.put(cache_pb2.AttachRequest(detach=cache_pb2.Detach()))
        deadline = time.monotonic() + timeout_s
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            self.receive(left)

    def close(self) -> None:
        """Break the stream and the connection. A daemon that has heard no detach sees a crash. The
        progress page goes with its last waiter."""
        if self._beat is not None:
            self._beat.close()
            self._beat = None
        self.progress, self.arena = None, None
        self._outbox.put(None)
        self._stream.cancel()
        self.channel.close()
        self.processes.close()


def without_traceback(error: BaseException) -> None:
    """Takes away where it and its causes were raised: who keeps an error would keep what was on the
    way, here a connection with its descriptors."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


class Processes:
    """Those of a daemon that may write into an engine's pool: itself, and for a pool on a device
    the one that copies there. None where the kernel names no daemon."""

    def __init__(self, pidfds: Sequence[int] = ()) -> None:
        self._pidfds = list(pidfds)

    def add(self, pidfds: Sequence[int]) -> None:
        """Takes them over."""
        self._pidfds += pidfds

    def __bool__(self) -> bool:
        return bool(self._pidfds)

    def are_dead(self, wait_s: float) -> bool:
        """Whether they are all known to be, each within wait_s."""
        return bool(self) and all(process_is_dead(each, wait_s) for each in self._pidfds)

    def copy(self) -> Processes:
        return Processes([os.dup(each) for each in self._pidfds])

    def close(self) -> None:
        for each in self._pidfds:
            os.close(each)
        self._pidfds = []


class SilentDaemon:
    """The processes of a daemon that fell silent, remembered after its connection was closed."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._processes = Processes()

    def remember(self, processes: Processes) -> None:
        self.forget()
        self._processes = processes.copy()

    def forget(self) -> None:
        self._processes.close()

    def is_dead(self) -> bool:
        """Where the kernel named no process: nothing listens any more."""
        return self._processes.are_dead(0) if self._processes else not probe(self._address)


def process_is_dead(pidfd: int, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))
