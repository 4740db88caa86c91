"""The engine's heartbeat on the side socket: sent without the GIL, and silent with its process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys

import pytest

from kvc2 import _core


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(20)
    return ours, theirs


def heard(theirs: socket.socket) -> int:
    """Beats that have come by now."""
    count = 0
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while theirs.recv(16):
            count += 1
    theirs.settimeout(20)
    return count


def test_it_beats_at_once_and_while_others_hold_the_gil(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    beat = _core.Beat(ours.fileno(), 0.005)
    ours.close()  # it has a copy
    assert len(theirs.recv(16)) == 1
    heard(theirs)
    ctypes.PyDLL(None).usleep(900_000)
    assert heard(theirs) > 1
    beat.close()


def test_nothing_is_sent_once_it_is_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    beat = _core.Beat(ours.fileno(), 0.001)
    assert theirs.recv(16)
    for _ in range(2):
        beat.close()
    heard(theirs)
    del beat
    ours.close()
    assert theirs.recv(16) == b""  # no copy of the descriptor is left


def test_it_ends_with_its_peer_and_waits_for_none_that_does_not_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"full")
    stuck = _core.Beat(ours.fileno(), 0.001)
    stuck.close()
    theirs.close()
    alone = _core.Beat(ours.fileno(), 3600)  # neither SIGPIPE nor an error
    alone.close()
    ours.close()


def test_a_forked_child_does_not_end_its_parents_beat(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    code = """
import os, socket, sys
from kvc2 import _core
beat = _core.Beat(int(sys.argv[1]), 0.001)
child = os.fork()
if child == 0:
    del beat
    os._exit(0)
os.waitpid(child, 0)
sys.stdin.read()
beat.close()
"""
    ours, theirs = pair
    with subprocess.Popen(
        [sys.executable, "-c", code, str(ours.fileno())],
        pass_fds=[ours.fileno()],
        stdin=subprocess.PIPE,
    ) as parent:
        ours.close()
        for _ in range(500):
            assert theirs.recv(16)
        assert parent.stdin is not None
        parent.stdin.close()
    assert parent.returncode == 0


@pytest.mark.parametrize("interval_s", [0, -1.0, float("nan"), 1e9])
def test_what_it_can_not_do_is_refused_by_name(interval_s: float) -> None:
    with pytest.raises(ValueError, match="interval_s"):
        _core.Beat(0, interval_s)
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(OSError):
        _core.Beat(closed, 1.0)
