"""Who isn't attached says so, and why: the client's reasons, the log, a health page, counters."""

from __future__ import annotations

import http.server
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvc2.client import Counters
from kvc2.client.channel import absence
from kvc2.client.health import AGAIN_S, DaemonHealth
from kvc2.config import AttnConfig, LimitsConfig
from kvc2.errors import Detached, LimitReached, Unreachable
from kvc2.host.address import Address
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine


class Silence(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextmanager
def bound(path: Path, kind: int, backlog: int | None) -> Iterator[str]:
    """A socket that nobody reads; backlog None: that doesn't listen."""
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(path))
        if backlog is not None:
            listener.listen(backlog)
        yield f"unix:{path}"


@contextmanager
def nothing(path: Path) -> Iterator[str]:
    yield f"unix:{path}"


@contextmanager
def a_file(path: Path) -> Iterator[str]:
    path.write_text("")
    yield f"unix:{path}"


@contextmanager
def a_dead_daemon(path: Path) -> Iterator[str]:
    with bound(path, socket.SOCK_STREAM, 1):
        pass
    yield f"unix:{path}"


@contextmanager
def a_closed_port(path: Path) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens, as long as it is ours
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def an_http_server(path: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silence) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def another_grpc_server(path: Path) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    yield f"unix:{path}"
    server.stop(0).wait()


@contextmanager
def a_side_socket(path: Path) -> Iterator[str]:
    with ServedDaemon(serve_config(path.parent)) as served:
        yield f"{served.address}.side"


@contextmanager
def a_daemon_with_one_engine(path: Path) -> Iterator[str]:
    config = serve_config(path.parent, limits=LimitsConfig(max_sessions=1))
    with ServedDaemon(config) as served, TinyEngine(served.address):
        yield served.address


@contextmanager
def a_daemon_of_other_pages(path: Path) -> Iterator[str]:
    with ServedDaemon(serve_config(path.parent, attn=AttnConfig(page_size=256))) as served:
        yield served.address


@contextmanager
def a_full_backlog(path: Path) -> Iterator[str]:
    with bound(path, socket.SOCK_STREAM, 0) as address, ExitStack() as stack:
        for _ in range(8):  # the kernel takes one or two, however small the backlog
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            if waiting.connect_ex(str(path)):
                break
        yield address


@contextmanager
def a_listener_that_never_answers(path: Path) -> Iterator[str]:
    with bound(path, socket.SOCK_STREAM, 64) as address:
        yield address


CASES: list[tuple[Callable[[Path], object], str, str]] = [
    (nothing, "no_socket", "no such socket"),
    (lambda path: nothing(path / "folder/that/is/not/there"), "no_socket", "no such socket"),
    (a_file, "no_socket", "is no socket"),
    (a_dead_daemon, "nobody_listens", "nobody listens"),
    (a_closed_port, "nobody_listens", "nobody listens"),
    (an_http_server, "not_kvc2", "no kvc2 daemon"),
    (another_grpc_server, "not_kvc2", "no kvc2 daemon"),
    (a_side_socket, "not_kvc2", "another type"),
    (a_full_backlog, "no_answer", "not accepted"),
    (a_listener_that_never_answers, "no_answer", "doesn't answer"),
    (a_daemon_with_one_engine, "refused", "limits.max_sessions = 1"),
    (a_daemon_of_other_pages, "refused", "layout.page_size = 16"),
]


@pytest.mark.parametrize(("place", "reason", "words"), CASES)
def test_a_client_tells_why_it_is_not_attached(
    place: Callable[[Path], object], reason: str, words: str, tmp_path: Path
) -> None:
    with place(tmp_path / "s") as address:  # type: ignore[attr-defined]
        engine = TinyEngine(address)
        with engine.changed:
            assert engine.changed.wait_for(lambda: len(engine.failures) >= 2, 20)  # and goes on
        engine.client.close()
        engine.pool.close()
    health = DaemonHealth(address)
    health.failed(engine.failures[0])
    state = health.state()
    assert state is not None
    assert state["reason"] == reason
    assert words in state["message"]


def test_another_users_socket_is_told_as_such() -> None:
    folder = Path(tempfile.mkdtemp())  # not below a folder that only we can read
    try:
        folder.chmod(0o755)
        with bound(folder / "s", socket.SOCK_STREAM, 1) as address:
            place, us = Address.of_daemon(address), os.geteuid()
            (folder / "s").chmod(0)  # who isn't root is shut out even as its owner
            if us == 0:
                os.seteuid(65534)
            try:
                why = absence(place)
            finally:
                os.seteuid(us)
        assert why is not None
        assert why.reason == "no_permission"
        assert "no permission" in str(why)
        assert ("it is another user's, of id 0" in str(why)) == (us == 0)
    finally:
        shutil.rmtree(folder)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Counted(Counters):
    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self.sessions: list[str] = []

    def attached(self) -> None:
        self.sessions.append("attached")

    def detached(self, reason: str) -> None:
        self.sessions.append(reason)

    def attach_failed(self, reason: str) -> None:
        self.failures[reason] += 1


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [each.getMessage() for each in caplog.records]
    caplog.clear()
    return found


def test_the_log_has_a_line_at_first_and_then_one_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock, counted = Clock(), Counted()
    health = DaemonHealth("unix:/x", counted, clock)
    gone, full = Unreachable("no such socket: /x", "no_socket"), LimitReached("limits.x", 1, "open")
    health.failed(gone)
    (first,) = lines(caplog)
    assert "not attached to the daemon at unix:/x: no such socket: /x (no_socket)" in first
    for _ in range(599):
        clock.now += 1
        health.failed(gone)
    assert len(lines(caplog)) == 9
    clock.now += AGAIN_S
    health.failed(full)
    (other,) = lines(caplog)
    assert "limits.x = 1: open (refused)" in other
    health.begun(3, 5)
    (begun,) = lines(caplog)
    assert begun == "attached to the daemon at unix:/x: session 3, 5 pages granted"
    health.ended(Detached("dead"))
    assert len(lines(caplog)) == 1
    health.ended(Detached("dead", "can't attach"))  # of a session that did not begin
    assert lines(caplog) == []
    health.failed(gone)  # at once: this one is new
    assert len(lines(caplog)) == 1
    assert counted.failures == {"no_socket": 601, "refused": 1}
    assert counted.sessions == ["attached", "dead"]  # what did not begin did not end


def test_health_tells_of_the_daemon() -> None:
    health = DaemonHealth("unix:/x")
    asked = {"address": "unix:/x", "attached": False}
    assert health.state() == asked | {"reason": "not_tried_yet"}
    health.failed(Unreachable("nobody listens", "nobody_listens"))
    failed = asked | {"reason": "nobody_listens", "message": "nobody listens"}
    assert health.state() == failed
    health.begun(1, 0)
    assert health.state() == {"address": "unix:/x", "attached": True, "reason": None}
    health.ended(Detached("silent"))
    assert health.state() == asked | {
        "reason": "silent",
        "message": "detached: the daemon is silent",
    }
    assert DaemonHealth(None).state() is None
