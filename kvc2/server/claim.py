"""Where the daemon listens: the folder, the lock, the stale socket of a dead daemon.

A second gRPC server silently takes over a bound unix path, so a lock is taken before the bind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc

from kvc2 import errors
from kvc2.config import SIDE_ENDING, default_listen, listen_address
from kvc2.host.address import SOCKET_PATH_BYTES_MAX
from kvc2.server.tls import ServerTls

LOCK_ENDING = ".lock"


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Sockets bound inside are 0600 from the moment they exist."""
    mask = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(mask)


class Claim:
    """One daemon's claim on what it listens at, held until `close`. Raises StartRefused and
    InvalidConfig. `path` is the socket's, None on TCP; `side_path` is the side socket's. `tls`:
    of a port."""

    def __init__(self, listen: str, tls: ServerTls | None = None) -> None:
        self._listen, self._tls = listen, tls
        address = listen_address(listen)
        if address.host == "localhost":  # one address, where the name may have two
            address = replace(address, host="127.0.0.1")
        self._target = address.grpc_target
        self.path = address.path
        if self.path is None:
            beside = listen_address(default_listen()).path
            assert beside is not None
            # the port may be 0, so the process id tells two daemons apart
            self.side_path = beside.with_name(f"kvc2-{os.getpid()}{SIDE_ENDING}")
            owned = self.side_path
        else:
            self.side_path = self.path.with_name(self.path.name + SIDE_ENDING)
            owned = self.path
        if (size := len(os.fsencode(self.side_path))) > SOCKET_PATH_BYTES_MAX:
            raise errors.StartRefused(
                f"listen: the side socket {self.side_path} has {size} bytes, at most "
                f"{SOCKET_PATH_BYTES_MAX} are possible: give a shorter XDG_RUNTIME_DIR"
            )
        own_folder(owned.parent)
        self._lock = lock(owned.with_name(owned.name + LOCK_ENDING))
        for each in (self.path, self.side_path):
            if each is not None:
                unlink_stale(each)

    def bind(self, server: grpc.aio.Server) -> int:
        """Its port; of a unix path gRPC says 1. Raises StartRefused and InvalidConfig."""
        try:
            if self._tls is not None:
                return server.add_secure_port(self._target, self._tls.credentials())
            with private_files():
                return server.add_insecure_port(self._target)
        except RuntimeError as error:
            if self.path is None:
                allowed = "a port that nobody has: this one can't be bound"
                raise errors.InvalidConfig("listen", self._listen, allowed) from error
            raise errors.StartRefused(f"listen: can't bind {self._listen}") from error

    def close(self) -> None:
        """Remove the sockets, then give up the lock. The lock's file stays: unlinking it would let
        two daemons hold one lock each."""
        for each in (self.path, self.side_path):
            if each is not None:
                each.unlink(missing_ok=True)
        os.close(self._lock)


def own_folder(folder: Path, field: str = "listen") -> None:
    """Makes it if it is missing. Raises StartRefused where others may write in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise errors.StartRefused(f"{field}: {folder}: {error.strerror}") from error
    if facts.st_uid not in (os.getuid(), 0) or stat.S_IMODE(facts.st_mode) & 0o022:
        raise errors.StartRefused(
            f"{field}: {folder} belongs to another user or is writable by others; "
            "use a folder of mode 0700"
        )


def lock(path: Path, field: str = "listen") -> int:
    """Its descriptor, which holds the lock. Raises StartRefused where another daemon has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.StartRefused(f"{field}: {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise errors.StartRefused(
            f"{field}: another daemon serves here ({path} is locked)"
        ) from None
    return fd


def unlink_stale(path: Path, field: str = "listen") -> None:
    """We hold the lock, so a socket here is a dead daemon's. Anything else is someone's file."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(facts.st_mode):
        raise errors.StartRefused(f"{field}: {path} exists and is not a socket")
    path.unlink()
