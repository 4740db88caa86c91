"""What counts as a sign of life: on the stream or on the side socket, and seconds of one's own."""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvc2.client.connection import Silence
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, memfd


class Beaten:
    """A session over a daemon on a clock set by hand; `side` is its open side socket."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.served = ServedDaemon(serve_config(folder), cache=None, clock=lambda: self.now)

    def join(self, wire: Wire) -> None:
        attached = wire.attach()
        self.side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side.settimeout(20)
        self.side.connect(attached.side_socket)
        pool = memfd()
        passed = array.array("i", [pool])
        self.side.sendmsg([attached.nonce], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
        answer, fds, _, _ = socket.recv_fds(self.side, 600, 2)
        assert answer == b"ok"
        for fd in [pool, *fds]:
            os.close(fd)
        assert next(wire.stream).WhichOneof("message") == "ready"

    def pass_s(self, seconds: float) -> int:
        """Sessions that are left then."""
        self.now += seconds
        self.served.on_loop(self.served.daemon.attachments.expire)
        return len(self.served.daemon.attachments.table)

    def wait_heard(self) -> None:
        (session,) = self.served.daemon.attachments.table
        deadline = time.monotonic() + 20
        while session.last_heartbeat != self.now:
            assert time.monotonic() < deadline, "the beat was not counted"
            time.sleep(0.005)


@pytest.fixture
def beaten(tmp_path: Path) -> Iterator[Beaten]:
    beaten = Beaten(tmp_path)
    with beaten.served:
        yield beaten


def test_a_datagram_on_the_side_socket_is_a_heartbeat(beaten: Beaten) -> None:
    with Wire(beaten.served.address) as wire:
        beaten.join(wire)
        for _ in range(3):
            assert beaten.pass_s(2.0) == 1
            beaten.side.send(b"any")
            beaten.wait_heard()
        assert beaten.pass_s(3.0) == 0
        assert beaten.side.recv(1) == b""  # what is over is not listened to
        beaten.side.close()


def test_an_engine_that_closes_its_side_socket_lives_by_its_stream(beaten: Beaten) -> None:
    with Wire(beaten.served.address) as wire:
        beaten.join(wire)
        beaten.side.close()
        for _ in range(3):
            assert beaten.pass_s(2.0) == 1
            wire.send(pb.AttachRequest(heartbeat=pb.Heartbeat()))
            assert next(wire.stream).WhichOneof("message") == "heartbeat"
        assert beaten.pass_s(3.0) == 0


def test_silence_is_counted_only_over_time_in_which_the_listener_ran() -> None:
    now = [0.0]
    silence = Silence(lambda: now[0])
    for _ in range(4):
        now[0] += 0.25
        silence.waited(0.25)
    assert silence.seconds == 1.0
    now[0] += 8.0  # the interpreter's lock was held, or the process frozen
    silence.waited(0.25)
    assert silence.seconds == 1.25
    silence.answered()
    assert silence.seconds == 0.0
