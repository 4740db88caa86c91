"""A daemon process under clients that come and go and send rubbish: what it keeps, what it logs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grpc
import psutil
import pytest

from kvc2.layout import layer_major
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.engines import LAYERS, PAGE_SIZE
from tests.doubles.waiting import wait_until
from tests.doubles.wires import Wire, hello, memfd
from tests.kvc2.server.test_garbage import GARBAGE, raw_status
from tests.system.daemon import DaemonProcess

WITHOUT_COLLECTOR = ("-c", "import gc; gc.disable(); from kvc2.commands.cli import main; main()")
PAGES = 1024
SEGMENT_BYTES = 1024
POOL_BYTES = 2 * LAYERS * PAGES * SEGMENT_BYTES  # 4 MiB: 200 of them would be seen
# an engine's process as the side socket sees it: hands a pool over, tells the answer, waits
HANDS_OVER = """
import array, fcntl, os, socket, sys
fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, int(sys.argv[3]))
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
side.connect(sys.argv[1])
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
side.sendmsg([bytes.fromhex(sys.argv[2])], rights)
print(side.recv(600).decode(), flush=True)
sys.stdin.read()
"""


def big_hello(**changes: object) -> pb.AttachRequest:
    pool = layer_major(LAYERS, PAGES, segment_bytes=SEGMENT_BYTES, page_size=PAGE_SIZE)
    return hello(layout=pool.to_proto(), num_pages=PAGES, memory_bytes=POOL_BYTES, **changes)


def joined(wire: Wire) -> None:
    attached = wire.attach(big_hello())
    assert wire.side(attached, attached.nonce, [memfd(POOL_BYTES)]) == b"ok"
    assert next(wire.stream).WhichOneof("message") == "ready"


def in_order(wire: Wire) -> None:
    joined(wire)
    wire.send(pb.AttachRequest(detach=pb.Detach()))
    assert list(wire.stream) == []


def killed(wire: Wire) -> None:
    attached = wire.attach(big_hello())
    arguments = [attached.side_socket, attached.nonce.hex(), str(POOL_BYTES)]
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", HANDS_OVER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"ok\n"
        engine.kill()
    assert [each.WhichOneof("message") for each in wire.stream] == ["ready"]


def broken_stream(wire: Wire) -> None:
    joined(wire)
    wire.stream.cancel()


def refused_at_hello(wire: Wire) -> None:
    assert wire.stream_refusal(big_hello(kept_pages=b"", wire_version=1))[0] == "INVALID_ARGUMENT"


def nonce_never_used(wire: Wire) -> None:
    wire.attach(big_hello())
    wire.stream.cancel()


def refused_on_the_side_socket(wire: Wire) -> None:
    attached = wire.attach(big_hello(kept_pages=bytes(8)))
    assert b"kept_pages" in wire.side(attached, attached.nonce, [memfd(POOL_BYTES)])


ENDINGS = (
    in_order,
    killed,
    broken_stream,
    refused_at_hello,
    nonce_never_used,
    refused_on_the_side_socket,
)


def come_and_go(daemon: DaemonProcess, rounds: int) -> None:
    for _ in range(rounds):
        for ending in ENDINGS:
            with Wire(daemon.address) as wire:
                ending(wire)
    expiring = [Wire(daemon.address) for _ in range(8)]  # at once: each takes 3 s
    for wire in expiring:
        joined(wire)
    for wire in expiring:
        with pytest.raises(grpc.RpcError, match="no heartbeat"):
            list(wire.stream)
        wire.close()


def kept(pid: int) -> dict[str, int]:
    """What a process has open."""
    opened = []
    for each in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            opened.append(os.readlink(f"/proc/{pid}/fd/{each}"))
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {
        "descriptors": len(opened),
        "memfds": sum("memfd:" in each for each in opened),
        "maps": maps.count("memfd:"),
    }


def settled(daemon: DaemonProcess, shared: int = 1) -> dict[str, int]:
    """What is open once there are only so many memfds; one is the arena's."""
    with contextlib.suppress(AssertionError):  # what is there instead is told
        wait_until(lambda: kept(daemon.pid)["memfds"] <= shared, 20)
    return kept(daemon.pid)


def test_two_hundred_sessions_leave_nothing_in_a_daemon_without_a_collector(
    tmp_path: Path,
) -> None:
    with DaemonProcess(tmp_path, python=WITHOUT_COLLECTOR) as daemon:
        come_and_go(daemon, 2)  # its pools of threads reach their size
        process = psutil.Process(daemon.pid)
        before, threads, rss = settled(daemon), process.num_threads(), process.memory_info().rss
        come_and_go(daemon, 32)
        assert settled(daemon) == before
        assert (
            process.num_threads() - threads < 16
        )  # pools of threads; a session has one of its own
        # what gRPC itself leaves to the collector of each call is some 2 KB
        assert process.memory_info().rss - rss < 16 << 20


def rubbish_on_the_side_socket(daemon: DaemonProcess) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
        side.settimeout(10)
        side.connect(f"{daemon.folder / 'kvc2.sock'}.side")
        side.send(os.urandom(20))
        assert b"nonce" in side.recv(600)


def rubbish_on_the_socket(daemon: DaemonProcess) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(daemon.folder / "kvc2.sock"))
        with contextlib.suppress(OSError):
            connection.sendall(os.urandom(4096))
            while connection.recv(4096):
                pass


def half_a_call(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()


def rubbish_in_a_call(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(daemon.address) as channel:
        assert raw_status(channel, "kvc2.v1.Cache/Acquire", GARBAGE)[0] == "INVALID_ARGUMENT"
        assert raw_status(channel, "kvc2.v1.Sessions/Attach", GARBAGE)[0] == "INVALID_ARGUMENT"
        assert raw_status(channel, "grpc.health.v1.Health/Check", GARBAGE)[0] == "INVALID_ARGUMENT"
        assert raw_status(channel, "no.such/Call", GARBAGE)[0] == "UNIMPLEMENTED"


def test_no_client_can_flood_the_log(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "--log-format", "json") as daemon:
        for _ in range(100):
            rubbish_on_the_side_socket(daemon)
            rubbish_on_the_socket(daemon)
            half_a_call(daemon)
            rubbish_in_a_call(daemon)
            with Wire(daemon.address) as wire:
                refused_at_hello(wire)
            with Wire(daemon.address) as wire:
                in_order(wire)
        assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    seconds = Counter((each["event"], each.get("pid"), each["time"][:19]) for each in lines)
    # a second of the daemon's clock lies in two of the wall's
    assert max(seconds.values()) <= 2, seconds.most_common(5)
    assert sum(each.get("left_out_before", 0) for each in lines) > len(lines)
    assert "library" not in {each["event"] for each in lines}, lines
