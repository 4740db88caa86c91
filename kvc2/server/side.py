"""The side socket: file descriptors pass here, and here the kernel says who the engine is.

One datagram each way on a SOCK_SEQPACKET connection: the engine's is the nonce of its Attach
stream with the descriptor of its pool's memory, unless the pool has no pages; the daemon's is `ok`
with the progress memfd, an eventfd, then, where its Hello asked for that, the arena to be read,
then, for a pool on a device, a pidfd of the process that copies there, or `error: ...`. The
first 8 bytes of the progress page are the progress word; the next 8 are not zero once the session
is over, and that before any page that it had leased may get another block.
The connection stays open with the session: each further datagram of the engine, of any content, is
a heartbeat. An engine that closes it beats on its stream alone.
A memfd is mapped only when it is sealed against a change of its size and has the declared size: one
that its owner truncates would kill this process with SIGBUS. A descriptor of a device's memory is
passed on to a process that may die of it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from kvc2 import errors, events
from kvc2.metrics import Metrics

NONCE_BYTES = 16
PROGRESS_BYTES = 4096
PENDING_MAX = 32  # connections that have not sent their datagram yet
PENDING_S = 2.0
RETRY_S = 1.0  # after descriptors ran out, or the loop would try without end
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10  # not named by the module
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(eq=False)
class Handover:
    """What a session shares with its engine. `pidfd` is -1 where the kernel names no process.
    `memory_fd`: of a pool on a device, whose `memory` is empty here; `worker_fd`: of the process
    that copies there. -1: of neither."""

    pid: int
    uid: int
    pidfd: int
    memory: mmap.mmap
    progress: mmap.mmap
    progress_fd: int
    event_fd: int
    arena_fd: int = -1
    memory_fd: int = -1
    worker_fd: int = -1
    beats: socket.socket | None = None  # the connection, once all is handed over

    async def died(self, within_s: float) -> bool:
        """Whether the engine's process is known to be dead, or dies within_s from now."""
        if self.pidfd < 0:
            return False
        loop = asyncio.get_running_loop()
        dead: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.pidfd, _finish, dead)  # instead of the one that ends the session
        try:
            async with asyncio.timeout(within_s):
                await dead
            return True
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self.pidfd)

    def close(self) -> None:
        """Close the descriptors and the maps. Idempotent. BufferError: someone still uses a map."""
        for name in ("pidfd", "progress_fd", "event_fd", "arena_fd", "memory_fd", "worker_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)
        self.close_beats()
        self.memory.close()
        self.progress.close()

    def fence(self) -> None:
        """Tell whoever reads the arena that what it reads from now on may be another block's."""
        self.progress[8:16] = (1).to_bytes(8, "little")

    def close_beats(self) -> None:
        if self.beats is not None:
            asyncio.get_running_loop().remove_reader(self.beats)
            self.beats.close()
            self.beats = None


@dataclass(frozen=True)
class Expected:
    """Of an engine: the bytes of its pool's memory (0: it sends none) and whether a device has it,
    and a descriptor of the arena that it gets (-1: none), which is the caller's to close."""

    memory_bytes: int
    on_device: bool = False
    arena_fd: int = -1


# (nonce, uid) -> what comes and what goes. Raises a Kvc2Error for an unknown nonce.
Expect = Callable[[bytes, int], Expected]
# (nonce, handover): takes the handover over unless it raises a Kvc2Error. What it answers is called
# at each heartbeat on the side socket.
Join = Callable[[bytes, Handover], Awaitable[Callable[[], None]]]


class SideSocket:
    """Listens at `path`, 0600. All of it runs on the event loop that opened it."""

    def __init__(self, path: Path, expect: Expect, join: Join, metrics: Metrics) -> None:
        self._expect = expect
        self._join = join
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[socket.socket, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(PENDING_MAX)
        self._retry: asyncio.TimerHandle | None = None
        self._listen()

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        for each in list(self._pending):
            self._drop(each)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # it went away again, or waits until there are descriptors
            if error.errno in OUT_OF_RESOURCES:
                self._loop.remove_reader(self._listener)
                self._retry = self._loop.call_later(RETRY_S, self._listen)
            return
        connection.setblocking(False)
        if len(self._pending) >= PENDING_MAX:
            connection.close()
            return
        self._pending[connection] = self._loop.call_later(PENDING_S, self._drop, connection)
        self._loop.add_reader(connection, self._receive, connection)

    def _drop(self, connection: socket.socket) -> None:
        timer = self._pending.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._loop.remove_reader(connection)
            connection.close()

    def _receive(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._pending[connection].cancel()
        fds: list[int] = []
        try:
            nonce, fds = _read_datagram(connection)
            handover = self._admit(connection, nonce, fds)
        except (errors.Kvc2Error, OSError, ValueError) as error:
            self._refuse(connection, error)
        else:
            task = self._loop.create_task(self._finish(connection, nonce, handover))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        finally:
            for fd in fds:
                os.close(fd)

    async def _finish(self, connection: socket.socket, nonce: bytes, handover: Handover) -> None:
        try:
            heard = await self._join(nonce, handover)
        except asyncio.CancelledError:  # the daemon stops
            handover.close()
            raise
        except Exception as error:  # also a fault of our own: the engine must not be left waiting
            if not isinstance(error, errors.Kvc2Error):
                self._metrics.fault("internal_error")
            self._refuse(connection, error)
            handover.close()
            return
        try:
            _send_descriptors(connection, handover)
        except OSError as error:  # the engine died: its pidfd and its stream end the session
            events.warning("side_socket_broken", reason=str(error))
            self._drop(connection)
            return
        del self._pending[connection]
        handover.beats = connection
        self._loop.add_reader(connection, _hear, handover, heard)

    def _refuse(self, connection: socket.socket, error: Exception) -> None:
        self._metrics.fault("side_socket_refused")
        events.warning("side_socket_refused", reason=str(error))
        with contextlib.suppress(OSError):  # the peer is gone: nobody is left to tell
            connection.send(b"error: " + str(error).encode()[:500])
        self._drop(connection)

    def _admit(self, connection: socket.socket, nonce: bytes, fds: list[int]) -> Handover:
        """Check and map what came; nothing is kept when it raises."""
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(packed)
        expected = self._expect(nonce, uid)
        empty = mmap.mmap(-1, PROGRESS_BYTES)  # in the place of what isn't there
        handover = Handover(pid, uid, -1, empty, empty, -1, -1, expected.arena_fd)
        try:
            if len(fds) != (expected.memory_bytes > 0):
                allowed = (
                    "that of the pool's memory"
                    if expected.memory_bytes
                    else "none: the pool is empty"
                )
                raise errors.InvalidRequest("side socket", f"{len(fds)} descriptors", allowed)
            if fds and expected.on_device:
                handover.memory_fd = os.dup(fds[0])
            elif fds:
                handover.memory = map_sealed(fds[0], expected.memory_bytes)
            handover.pidfd = os.pidfd_open(pid) if pid > 0 else -1
            handover.progress_fd = _progress_memfd()
            handover.progress = mmap.mmap(handover.progress_fd, PROGRESS_BYTES)
            handover.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            handover.close()
            raise
        return handover


def _hear(handover: Handover, heard: Callable[[], None]) -> None:
    assert handover.beats is not None  # no reader is left without it
    try:
        beat = handover.beats.recv(1)
    except BlockingIOError:
        return
    except OSError:  # the engine died: its pidfd and its stream end the session
        beat = b""
    if beat:
        heard()
    else:
        handover.close_beats()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def map_sealed(fd: int, size: int) -> mmap.mmap:
    """Map a client's memfd of exactly `size` bytes, read-write. Raises InvalidRequest."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise errors.InvalidRequest("pool memory", "a descriptor", "a memfd with seals") from error
    if seals & SIZE_SEALS != SIZE_SEALS:
        raise errors.InvalidRequest("pool memory", f"seals {seals:#x}", "sealed SHRINK|GROW|SEAL")
    if seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        raise errors.InvalidRequest("pool memory", f"seals {seals:#x}", "writable")
    actual = os.fstat(fd).st_size
    if actual != size:
        raise errors.InvalidRequest("pool memory", f"{actual} bytes", f"memory_bytes = {size}")
    return mmap.mmap(fd, size)


def _progress_memfd() -> int:
    fd = os.memfd_create("kvc2-progress", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PROGRESS_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
    return fd


def _read_datagram(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The nonce and what descriptors came with it, at most four: the rest the kernel closes."""
    room = socket.CMSG_SPACE(4 * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(NONCE_BYTES + 1, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def _send_descriptors(connection: socket.socket, handover: Handover) -> None:
    passed = array.array("i", [handover.progress_fd, handover.event_fd])
    passed.extend(each for each in (handover.arena_fd, handover.worker_fd) if each >= 0)
    connection.sendmsg([b"ok"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
