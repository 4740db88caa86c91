"""What the worker processes of one engine share with the process that has its client: the pool, and
waits for layers of the session under way.

    share = client.share()                                  in the engine, with or without a session
    multiprocessing.Process(target=work, args=(share, ...))  forked, spawned, or told in a message

    with share.open() as pool:                              in the worker
        kv = numpy.frombuffer(pool.map, ...)
        pool.wait_layer(lease.session, lease.transfer, layer, timeout_s)
        pool.arena(session).read(offsets, num_bytes, into)   where the engine reads the arena

A `Share` is the name of a socket, so that a worker may be older than the client and may outlive a
session: it asks again when it is told of a session that it doesn't know. The descriptors go only to
processes of the engine's own user. Not here: what a worker is to do with which page (the engine's).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from kvc2 import errors
from kvc2.client.memory import ArenaView, EngineMemory, OverSignal, Progress

BACKLOG = 64  # workers that ask at once
ASK_S = 10.0  # for the engine's answer
LOOK_S = 0.1  # how often a wait looks whether the engine's process still lives
RETRY_S = 0.1  # after descriptors ran out
PROGRESS_FDS = 3
FDS_MAX = 1 + PROGRESS_FDS + 1  # the pool's and the arena's
# bytes of the pool, number of the session (0: there was none yet), bytes of the arena; a descriptor
# of what has none isn't sent
_TOLD = struct.Struct("<QQQ")
_CREDENTIALS = struct.Struct("iII")


class Sharing:
    """The engine's side: answers every process of its user that asks, on a thread of its own, from
    the first `share` on. `begin` and `close` are the client's."""

    def __init__(self, pool: EngineMemory) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._session = 0  # how many there have been
        self._progress: Progress | None = None  # of the last one
        # not held: a daemon that has died would keep its memory
        self._arena: Callable[[], ArenaView | None] = _no_arena
        self._name = ""
        self._listener: socket.socket | None = None

    def begin(self, progress: Progress | None, arena: ArenaView | None) -> None:
        """A session begins. It is over when its progress says so."""
        with self._lock:
            self._session += 1
            self._progress = progress
            self._arena = _no_arena if arena is None else weakref.ref(arena)

    def share(self) -> Share:
        """Where it answers. Raises InvalidRequest for a pool that no process can map as memory."""
        if self._pool.kind:
            raise errors.InvalidRequest("memory", self._pool.device, "a memfd, to be shared")
        with self._lock:
            if self._listener is None:
                self._name = f"kvc2-{os.getpid()}-{secrets.token_hex(8)}"
                self._listener = _socket()
                self._listener.bind(f"\0{self._name}")
                self._listener.listen(BACKLOG)
                answering = threading.Thread(
                    target=self._answer, args=(self._listener,), name="kvc2-share", daemon=True
                )
                answering.start()
            return Share(self._name)

    def close(self) -> None:
        """Answer nobody from now on. What was opened stays open."""
        with self._lock:
            if self._listener is not None:
                with contextlib.suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread, also its forks'
            self._progress = None

    def _answer(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError as error:
                    if error.errno == errno.EINVAL:  # it was shut down
                        return
                    time.sleep(RETRY_S)
                    continue
                with peer, contextlib.suppress(OSError):  # it is gone again
                    if _is_ours(peer):
                        self._tell(peer)

    def _tell(self, peer: socket.socket) -> None:
        with self._lock:
            session, progress, arena = self._session, self._progress, self._arena()
        fds = [self._pool.fd] if self._pool.num_bytes else []
        if progress is not None:
            fds += progress.descriptors()
        arena_bytes = 0
        if progress is not None and arena is not None:
            fds += arena.descriptors()
            arena_bytes = arena.num_bytes
        told = _TOLD.pack(self._pool.num_bytes, session, arena_bytes)
        socket.send_fds(peer, [told], fds)


@dataclass(frozen=True)
class Share:
    """What a worker opens: picklable, a name in this network namespace's abstract sockets."""

    name: str

    def open(self) -> SharedPool:
        """The engine's pool. Raises Unreachable, whose reason says whether the engine is gone,
        doesn't answer, or one of the two is another user's."""
        return SharedPool(self)


class SharedPool:
    """A worker's view of its engine's pool: `map`, a writable memoryview of `num_bytes`. An array
    over it must be dropped before `close`. Threads may share it."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._session = 0
        self._progress: Progress | None = None
        with _Answer(share.name, ASK_S) as told:
            self.num_bytes = told.num_bytes
            self._mmap = told.map_pool()
            self.map = memoryview(self._mmap)
            self._engine = told.take_engine()
            self._learn(told)

    def wait_layer(self, session: int, transfer: int, layer: int, timeout_s: float) -> bool:
        """Wait until `layer` of a transfer of this session is in the pool: no call, no spinning.
        False after timeout_s, or when the session is over or the engine's process gone."""
        deadline = time.monotonic() + timeout_s
        progress = self._of(session, timeout_s)
        while progress is not None:
            left = deadline - time.monotonic()
            if progress.wait(transfer, layer, min(max(left, 0.0), LOOK_S)):
                return True
            if left <= 0 or progress.over or self._engine_is_dead():
                return progress.reached(transfer, layer)
        return False

    def is_over(self, session: int) -> bool:
        """Whether this session has ended, or the engine's process has."""
        progress = self._of(session, ASK_S)
        return progress is None or progress.over or self._engine_is_dead()

    def arena(self, session: int, threads: int = 1) -> ArenaView:
        """The daemon's cpu tier as this session reads it; `threads` copy at a time. Drop it when
        the session is over. Raises Detached when it is, or the engine doesn't say; InvalidRequest
        when the engine doesn't read the arena."""
        try:
            with _Answer(self._share.name, ASK_S) as told:
                progress = told.take_progress()
                if told.session != session or progress is None or progress.over:
                    raise errors.Detached("dead", f"session {session} is over")
                arena = told.take_arena(progress, threads)
        except errors.Unreachable as error:
            raise errors.Detached("dead", str(error)) from error
        if arena is None:
            raise errors.InvalidRequest("options.arena", False, "True, to read the arena")
        return arena

    def close(self) -> None:
        """BufferError while an array still lies over `map`."""
        self.map.release()
        if isinstance(self._mmap, mmap.mmap):
            self._mmap.close()
        if self._engine >= 0:
            os.close(self._engine)
            self._engine = -1

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _of(self, session: int, timeout_s: float) -> Progress | None:
        """The progress of that session; None: it is over, or the engine doesn't say."""
        with self._lock:
            if session > self._session:
                try:
                    with _Answer(self._share.name, min(timeout_s, ASK_S)) as told:
                        self._learn(told)
                except errors.Kvc2Error:
                    return None
            return self._progress if session == self._session else None

    def _learn(self, told: _Answer) -> None:
        self._session, self._progress = told.session, told.take_progress()

    def _engine_is_dead(self) -> bool:
        return self._engine >= 0 and _readable(self._engine, 0.0)


class _Answer:
    """One answer of the engine, with descriptors of which some are taken and the rest closed."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.fds: list[int] = []
        self._engine = -1
        try:
            with _socket() as asking:
                asking.connect(f"\0{name}")
                pid, uid = _peer(asking)
                if uid != os.geteuid():
                    raise errors.Unreachable(f"{name} is of another user, {uid}", "no_permission")
                self._engine = os.pidfd_open(pid) if pid > 0 else -1  # 0: of another pid namespace
                if not _readable(asking.fileno(), timeout_s, self._engine):
                    raise errors.Unreachable("the engine doesn't answer", "no_answer")
                told, self.fds, _, _ = socket.recv_fds(
                    asking, _TOLD.size, FDS_MAX, socket.MSG_CMSG_CLOEXEC
                )
            if len(told) != _TOLD.size:
                raise errors.Unreachable("the engine refused to share", "refused")
            self.num_bytes, self.session, self._arena_bytes = _TOLD.unpack(told)
            pools, arenas = int(self.num_bytes > 0), int(self._arena_bytes > 0)
            if len(self.fds) - pools - arenas not in (0, PROGRESS_FDS):
                raise errors.Unreachable("the engine refused to share", "refused")
        except (OSError, errors.Unreachable) as error:
            self.close()
            if isinstance(error, errors.Unreachable):
                raise
            told_why = f"no engine shares at {name}: {error}"
            raise errors.Unreachable(told_why, "nobody_listens") from error

    def take_engine(self) -> int:
        """Its process; -1 where the kernel doesn't name it."""
        taken, self._engine = self._engine, -1
        return taken

    def map_pool(self) -> mmap.mmap | bytearray:
        """Of no bytes where the engine has none."""
        return mmap.mmap(self.fds[0], self.num_bytes) if self.num_bytes else bytearray()

    def take_progress(self) -> Progress | None:
        """None: there is no session."""
        begin = int(self.num_bytes > 0)
        progress, self.fds[begin:] = (
            self.fds[begin : begin + PROGRESS_FDS],
            self.fds[begin + PROGRESS_FDS :],
        )
        if not progress:
            return None
        return Progress(progress[0], progress[1], OverSignal(progress[2]))

    def take_arena(self, progress: Progress, threads: int) -> ArenaView | None:
        """None: the engine doesn't read it. Taken after the progress."""
        if not self._arena_bytes:
            return None
        return ArenaView(self.fds.pop(), self._arena_bytes, progress, threads=threads)

    def close(self) -> None:
        for fd in [*self.fds, *([self._engine] if self._engine >= 0 else [])]:
            os.close(fd)
        self.fds, self._engine = [], -1

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _no_arena() -> None:
    return None


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _peer(connected: socket.socket) -> tuple[int, int]:
    """pid and user id of the other side."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def _is_ours(connected: socket.socket) -> bool:
    return _peer(connected)[1] == os.geteuid()


def _readable(fd: int, timeout_s: float, *ends: int) -> bool:
    """Whether `fd` is, or becomes so in time and before one of `ends` does."""
    poll = select.poll()
    for each in (fd, *ends):
        if each >= 0:
            poll.register(each, select.POLLIN)
    return fd in [ready for ready, _ in poll.poll(max(0.0, timeout_s) * 1000)]
