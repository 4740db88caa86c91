"""Of a session that is over nothing is kept, however it ended, and nothing waits for Python's
cyclic collector: a pool of gigabytes would lie in memory until that happens to run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvc2.config import LimitsConfig
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine
from tests.doubles.wires import Wire, granted, grants, hello, memfd, pages, u32
from tests.kvc2.server.test_server import acquire

SESSIONS = 4  # of each ending: one too many of anything shows
SETTLED_S = 20.0


class Clocked:
    """A daemon in this process on a clock that is set by hand."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.served = ServedDaemon(serve_config(folder), cache=None, clock=lambda: self.now)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.served.on_loop(self.served.daemon.attachments.expire)


def until_over(wire: Wire) -> None:
    with contextlib.suppress(grpc.RpcError):
        for _ in wire.stream:
            pass


def detached(wire: Wire, _: Clocked) -> None:
    wire.open()
    wire.call("Acquire", acquire(wire))
    wire.send(pb.AttachRequest(detach=pb.Detach()))
    until_over(wire)


def broken(wire: Wire, _: Clocked) -> None:
    wire.open()
    wire.call("Acquire", acquire(wire))
    wire.stream.cancel()


def misused(wire: Wire, _: Clocked) -> None:
    wire.open().send(hello())
    until_over(wire)


def expired(wire: Wire, daemon: Clocked) -> None:
    wire.open()
    wire.call("Acquire", acquire(wire))
    daemon.pass_s(3.0)
    until_over(wire)


def broken_in_mid_stream(wire: Wire, _: Clocked) -> None:
    """A Write that waits for the rest of a block, when its session ends."""
    wire.open()
    sent: queue.SimpleQueue[pb.WriteRequest | None] = queue.SimpleQueue()
    commit = pb.LeaseCommit(namespace_id=wire.namespace_id, tokens=u32(*range(16)))
    sent.put(pb.WriteRequest(session=wire.head, commit=commit))
    sent.put(pb.WriteRequest(payload=bytes(100)))
    write = wire._channel.stream_unary(
        "/kvc2.v1.Cache/Write", request_serializer=pb.WriteRequest.SerializeToString
    )
    call = write.future(iter(sent.get, None), timeout=20)
    wire.call("Acquire", acquire(wire))
    wire.stream.cancel()
    assert call.code().name == "FAILED_PRECONDITION"
    sent.put(None)


def given_up(wire: Wire, daemon: Clocked) -> None:
    wire.open()
    daemon.served.on_loop(next(iter(daemon.served.daemon.attachments.table)).give_up)
    until_over(wire)


def refused_at_hello(wire: Wire, _: Clocked) -> None:
    wire.send(hello(num_pages=0))
    wire.stream_refusal(hello(num_pages=0))


def nonce_never_used(wire: Wire, _: Clocked) -> None:
    wire.attach()
    wire.stream.cancel()


def nonce_not_used_in_time(wire: Wire, daemon: Clocked) -> None:
    wire.attach()
    daemon.pass_s(10.0)
    until_over(wire)


def refused_on_the_side_socket(wire: Wire, _: Clocked) -> None:
    attached = wire.attach(hello(kept_pages=bytes(8)))  # page 0 twice
    assert b"kept_pages" in wire.side(attached, attached.nonce, [memfd()])


def pool_of_another_size(wire: Wire, _: Clocked) -> None:
    attached = wire.attach()
    assert b"memory_bytes" in wire.side(attached, attached.nonce, [memfd(4096)])


def reading(wire: Wire, _: Clocked) -> None:
    """It has the arena, a lease there whose poll goes on, and a copied commit."""
    attached = wire.attach(hello(arena=True))
    assert wire.side(attached, attached.nonce, [memfd()]) == b"ok"
    assert next(wire.stream).WhichOneof("message") == "ready"
    wire.open_namespace()
    wire.call("Acquire", acquire(wire, place=1, at_once=True))
    grant = pb.GrantRequest(session=wire.head, grants=grants(1))
    copied = pb.LeaseCommit(tokens=u32(*range(16)), namespace_id=wire.namespace_id)
    copied.pages.extend(pages(granted(wire.call("Grant", grant))))
    wire.call("Commit", pb.CommitRequest(session=wire.head, leases=[copied], copied=True))
    wire.stream.cancel()


ENDINGS = (
    detached,
    reading,
    broken,
    misused,
    expired,
    broken_in_mid_stream,
    given_up,
    refused_at_hello,
    nonce_never_used,
    nonce_not_used_in_time,
    refused_on_the_side_socket,
    pool_of_another_size,
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clocked]:
    clocked = Clocked(tmp_path_factory.mktemp("daemon"))
    with clocked.served:
        yield clocked


def kept(served: ServedDaemon) -> dict[str, int]:
    """What this process, the daemon's and its engines', has open."""
    descriptors = []
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this listing
            descriptors.append(os.readlink(f"/proc/self/fd/{each}"))
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    return {
        "descriptors": len(descriptors),
        "memfds": sum("memfd:" in each for each in descriptors),
        "maps": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "tasks": served.on_loop(lambda: len(asyncio.all_tasks())),
        "attachments": len(served.daemon.attachments._open),
        "nonces": len(served.daemon.attachments._by_nonce),
        "closing": len(served.daemon.attachments._closing),
    }


@contextlib.contextmanager
def left_to_the_collector() -> Iterator[Counter[str]]:
    """Types of ours of which objects made inside are in cycles afterwards, once it is left."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        for each in gc.garbage:
            name = f"{type(each).__module__}.{type(each).__qualname__}"
            if name.startswith(("kvc2.", "mmap.")) and not name.startswith("kvc2.v1."):
                found[name] += 1
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def wait_settled(served: ServedDaemon, before: dict[str, int]) -> None:
    """Until no more is open than before; what it is, if that does not come."""
    deadline = time.monotonic() + SETTLED_S
    while grown := {
        name: (before[name], count) for name, count in kept(served).items() if count > before[name]
    }:
        assert time.monotonic() < deadline, f"kept (before, after): {grown}"
        time.sleep(0.02)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_nothing_is_kept_of_a_session_that_is_over(
    daemon: Clocked, ending: Callable[[Wire, Clocked], None]
) -> None:
    def sessions() -> None:
        for _ in range(SESSIONS):
            with Wire(daemon.served.address) as wire:
                ending(wire, daemon)
            del wire

    sessions()  # pools of threads reach their size
    with left_to_the_collector() as left:
        before = kept(daemon.served)
        sessions()
        wait_settled(daemon.served, before)
    assert not left


def test_a_session_keeps_nothing_of_the_namespaces_that_it_has_let_go_of(tmp_path: Path) -> None:
    limits = LimitsConfig(max_namespaces=2)
    config = serve_config(tmp_path, limits=limits)
    with ServedDaemon(config, cache=None) as served, Wire(served.address) as wire:
        wire.open()
        for number in range(5):
            wire.open_namespace(salt=b"%d" % number)
        session = next(iter(served.daemon.attachments.table))
        assert set(session.layouts) == set(session.namespaces)
        assert len(session.layouts) == 2
        for number in range(2):
            wire.open_namespace(salt=b"leased %d" % number)
            wire.call("Acquire", acquire(wire, request_id=b"%d" % number))
        with pytest.raises(grpc.RpcError, match="max_namespaces"):
            wire.open_namespace(salt=b"one too many")
        assert len(session.layouts) == 2


def test_an_engine_keeps_nothing_of_its_earlier_sessions(tmp_path: Path) -> None:
    with (
        ServedDaemon(serve_config(tmp_path), cache=None) as served,
        TinyEngine(served.address) as engine,
    ):

        def attach_again(times: int) -> None:
            for _ in range(times):
                count = len(engine.detached)
                attachments = served.daemon.attachments
                served.on_loop(
                    lambda a=attachments: [each.end("broken") for each in a._open.values()]
                )
                assert engine.wait_detached(count + 1)
                assert engine.client.wait_attached(10)

        attach_again(2)
        with left_to_the_collector() as left:
            before = kept(served)
            attach_again(SESSIONS)
            wait_settled(served, before)
        assert not left
