"""An engine's process: a pool on a device with random pages. `python -m tests.cuda.laws.engine FD
BYTES SEED [ORDINAL]`; FD is a socket, on which it first sends its pool's descriptor and the UUID.
Each datagram then is answered when a memfd, which came first, holds what the pool holds."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from tests import ROOT
from tests.cuda.laws.pools import Bytes

LIMIT_S = 60


def content(num_bytes: int, seed: int) -> Bytes:
    """What such an engine's pool holds at first."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


@dataclass
class EngineProcess:
    """One, as its test sees it. `memory_fd`: its pool's."""

    process: subprocess.Popen[bytes]
    side: socket.socket
    memory_fd: int
    uuid: str
    seen: Bytes

    def pool(self) -> Bytes:
        """What lies in its pool now, as it sees it."""
        self.side.send(b"?")
        assert self.side.recv(1) == b"!"
        return self.seen.copy()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.side.close()
        os.close(self.memory_fd)


def start(num_bytes: int, seed: int, ordinal: int = 0) -> EngineProcess:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [str(theirs.fileno()), str(num_bytes), str(seed), str(ordinal)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cuda.laws.engine", *words],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
    )
    theirs.close()
    ours.settimeout(LIMIT_S)
    seen_fd = os.memfd_create("seen")
    os.ftruncate(seen_fd, num_bytes)
    socket.send_fds(ours, [b"seen"], [seen_fd])
    uuid, fds, _, _ = socket.recv_fds(ours, 100, 1)
    seen = np.frombuffer(mmap.mmap(seen_fd, num_bytes), np.uint8)
    os.close(seen_fd)
    return EngineProcess(process, ours, fds[0], uuid.decode(), seen)


def main(fd: int, num_bytes: int, seed: int, ordinal: int) -> None:
    from kvc2.cuda.driver import ask, cu
    from kvc2.cuda.memory import DeviceMemory

    side = socket.socket(fileno=fd)
    _, fds, _, _ = socket.recv_fds(side, 10, 1)
    seen = np.frombuffer(mmap.mmap(fds[0], num_bytes), np.uint8)
    memory, first = DeviceMemory(num_bytes, ordinal), content(num_bytes, seed)
    ask(cu.cuMemcpyHtoD, memory.address, first.ctypes.data, num_bytes)
    socket.send_fds(side, [memory.device.encode()], [memory.fd])
    while side.recv(1):
        ask(cu.cuMemcpyDtoH, seen.ctypes.data, memory.address, num_bytes)
        side.send(b"!")


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:5]))
