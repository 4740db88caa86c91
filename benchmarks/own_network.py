"""A network of one's own: loopback alone, for what opens ports on every address."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
REQUEST = struct.Struct("16sh14x")  # ifreq: name and flags


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and all that it starts meanwhile. Raises OSError where that is not allowed."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    kernel = ctypes.CDLL(None, use_errno=True)
    try:
        if kernel.unshare(CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"unshare: {os.strerror(code)}")
        try:
            _bring_up(b"lo")
            yield
        finally:
            kernel.setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def _bring_up(name: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        told = fcntl.ioctl(any_socket, SIOCGIFFLAGS, REQUEST.pack(name, 0))
        _, flags = REQUEST.unpack(told)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, REQUEST.pack(name, flags | IFF_UP))
