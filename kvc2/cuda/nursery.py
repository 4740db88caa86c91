"""The process that forks workers, itself forked from the daemon before any thread is there.

    daemon ──fork at its start──► nursery ──fork on demand──► worker of a device
      maps the arena, and seals it   maps it before it is sealed    inherits that map

The arena is sealed against new maps that can write, so a process that came later could only read
it, and demote nothing. The nursery has neither threads nor gRPC nor LMDB, and never calls CUDA, so
that what it forks may. Each dies with its parent (PR_SET_PDEATHSIG): after a daemon's kill -9
nothing copies into an engine's pages. Not here: what a worker does (worker.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from kvc2.cuda.faults import NoWorker

BINDINGS = "cuda.bindings"
ASK_S = 5.0  # for the nursery's answers: it only maps and forks
FOUND_S = 20.0  # for the driver to say what devices there are; it wakes them up first
PR_SET_PDEATHSIG = 1
CHANNELS = 3  # of a worker
_ARENA = struct.Struct("<cQQ")  # b"a", bytes of the arena, of a piece of it
_PID = struct.Struct("<I")


@dataclass(frozen=True)
class Found:
    """What CUDA devices there are: uuid -> name. `why` there are none, else empty."""

    devices: dict[str, str]
    why: str = ""


@dataclass(frozen=True)
class CudaHost:
    """What there is of CUDA when a daemon starts: a nursery, or `why` there is none."""

    nursery: Nursery | None = None
    why: str = "this daemon was started without looking for CUDA"

    def give_arena(self, fd: int, num_bytes: int, piece: int) -> None:
        """Before it is sealed. A nursery that doesn't take it starts no worker either."""
        if self.nursery is not None and num_bytes:
            with contextlib.suppress(NoWorker):
                self.nursery.give_arena(fd, num_bytes, piece)


NO_CUDA = CudaHost()


def look() -> CudaHost:
    """Looks for CUDA; called before this process has a thread. What the driver says is awaited
    when somebody asks (`Nursery.found`)."""
    try:
        there = importlib.util.find_spec(BINDINGS) is not None
    except ImportError:
        there = False
    if not there:
        return CudaHost(why="cuda-bindings is not installed (pip install 'kvc2[cuda]')")
    return CudaHost(Nursery())


class Nursery:
    """The daemon's end. Made before the process has a thread. Threads may share it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        found, telling = os.pipe()
        me = os.getpid()
        if (child := os.fork()) == 0:
            ours.close()
            os.close(found)
            _run(_nursery, me, theirs, telling)
        theirs.close()
        os.close(telling)
        ours.settimeout(ASK_S)
        self._pid = child
        self._socket = ours
        self._found_fd = found
        self._found: Found | None = None
        self._lock = threading.Lock()
        self._finding = threading.Lock()

    def give_arena(self, fd: int, num_bytes: int, piece: int) -> None:
        """Before it is sealed. Raises NoWorker."""
        with self._lock:
            try:
                socket.send_fds(self._socket, [_ARENA.pack(b"a", num_bytes, piece)], [fd])
                if self._socket.recv(1) == b"a":
                    return
            except OSError as error:
                raise NoWorker(f"the nursery doesn't map the arena: {error}") from error
        raise NoWorker("the nursery is gone")

    def found(self, timeout_s: float = FOUND_S) -> Found:
        """What devices there are, asked for at the start. Blocks until it is told."""
        with self._finding:
            if self._found is None:
                self._found = _read_found(self._found_fd, timeout_s)
                os.close(self._found_fd)
            return self._found

    def start(self, uuid: str) -> tuple[list[socket.socket], int]:
        """A worker of this device: the channels to it, and a pidfd. Raises NoWorker."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(CHANNELS)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        try:
            with self._lock:
                socket.send_fds(
                    self._socket, [b"w" + uuid.encode()], [each.fileno() for each in theirs]
                )
                _, fds, _, _ = socket.recv_fds(self._socket, _PID.size, 1, socket.MSG_CMSG_CLOEXEC)
            if len(fds) != 1:
                raise NoWorker("the nursery is gone")
            return ours, fds[0]
        except (OSError, NoWorker) as error:
            for each in ours:
                each.close()
            raise NoWorker(f"no worker was started: {error}") from error
        finally:
            for each in theirs:
                each.close()

    def close(self) -> None:
        """It ends, and with it its workers. Idempotent."""
        self._socket.close()
        self.found(ASK_S)  # what asks the driver ends too
        with self._lock:
            if self._pid:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
            self._pid = 0


def _read_found(fd: int, timeout_s: float) -> Found:
    deadline, text = time.monotonic() + timeout_s, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            continue
        part = os.read(fd, 1 << 16)
        if not part:
            break
        text += part
    try:
        told = json.loads(text)
        return Found(told["devices"], told["why"])
    except (ValueError, KeyError, TypeError):
        return Found({}, f"the driver said nothing within {timeout_s:g} s")


# ---- the nursery's own process, and those that it forks


def _run(work: Callable[..., None], parent: int, *args: object) -> NoReturn:
    """In a fork of ours: never returns into the code of its parent."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else it died before we asked
            for number in (signal.SIGINT, signal.SIGTERM):  # the daemon's: it drains by our hands
                signal.signal(number, signal.SIG_IGN)
            work(*args)
            code = 0
    except BaseException as error:
        print(f"kvc2: {work.__name__}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _nursery(channel: socket.socket, telling: int) -> None:
    me = os.getpid()
    if os.fork() == 0:
        channel.close()
        _run(_probe, me, telling)
    os.close(telling)
    arena, piece = np.empty(0, np.uint8), mmap.PAGESIZE
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        _reap()
        asked, fds, _, _ = socket.recv_fds(channel, 256, CHANNELS, socket.MSG_CMSG_CLOEXEC)
        if not asked:
            return
        if asked[:1] == b"a":
            _, num_bytes, piece = _ARENA.unpack(asked)
            arena = np.frombuffer(mmap.mmap(fds[0], num_bytes), np.uint8)
            channel.send(b"a")
        else:
            if (child := os.fork()) == 0:
                channel.close()
                _run(_worker, me, asked[1:].decode(), fds, arena, piece)
            pidfd = os.pidfd_open(child)
            socket.send_fds(channel, [_PID.pack(child)], [pidfd])
            os.close(pidfd)
        for fd in fds:
            os.close(fd)


def _reap() -> None:
    """Those that have died since: a pidfd tells of a death without it."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _probe(telling: int) -> None:
    """Which devices there are, in a process that then ends: the nursery itself stays clean."""
    try:
        ctypes.CDLL("libcuda.so.1")  # quicker than the bindings, where there is no driver
        from kvc2.cuda.driver import devices

        found = Found({each.uuid: each.name for each in devices()})
        if not found.devices:
            found = Found({}, "the driver sees no device")
    except Exception as error:
        found = Found({}, str(error))
    with os.fdopen(telling, "w") as pipe:
        json.dump(asdict(found), pipe)


def _worker(uuid: str, fds: list[int], arena: NDArray[np.uint8], piece: int) -> None:
    from kvc2.cuda.messages import Channel
    from kvc2.cuda.worker import Worker, WorkerChannels

    pools, promoting, demoting = (Channel(socket.socket(fileno=fd)) for fd in fds)
    Worker(uuid, arena, piece).run(WorkerChannels(pools, promoting, demoting))
