"""Connections to the daemon that never go on: each ends, their number is limited, nobody waits."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvc2.config import LimitsConfig
from kvc2.metrics import Metrics
from kvc2.server import scrapes, side, wiring
from tests.doubles.accepted import no_delay
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire
from tests.kvc2.server.test_server import acquire

WAIT_S = 20.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedDaemon]:
    """A daemon on a port with /metrics, whose waits for clients are short."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(wiring, "HANDSHAKE_MS", 300)
    monkeypatch.setattr(wiring, "IDLE_MS", 1000)  # gRPC's least
    limits = LimitsConfig(max_sessions=1)
    config = serve_config(tmp_path, listen="127.0.0.1:0", metrics_port=0, limits=limits)
    with ServedDaemon(config) as running:
        yield running


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), WAIT_S)
    client.sendall(sent)
    return client


def ends(client: socket.socket) -> bool:
    """Whether the daemon ends the connection in time."""
    try:
        while client.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def scraped(served: ServedDaemon) -> str:
    url = f"http://127.0.0.1:{served.daemon.metrics_port}/metrics"
    return str(urllib.request.urlopen(url, timeout=WAIT_S).read().decode())


def test_what_the_daemon_writes_leaves_at_once(served: ServedDaemon) -> None:
    with Wire(f"127.0.0.1:{served.daemon.port}") as wire:
        wire.open()
        assert set(no_delay(served.daemon.port)) == {True}
    with connect(served.daemon.metrics_port):
        scraped(served)  # accepted after it
        assert set(no_delay(served.daemon.metrics_port)) == {True}


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE])
def test_who_connects_and_calls_nothing_is_let_go(served: ServedDaemon, sent: bytes) -> None:
    with Wire(f"127.0.0.1:{served.daemon.port}") as bystander:
        bystander.open()
        with connect(served.daemon.port, sent) as client:
            assert ends(client)
        bystander.call("Acquire", acquire(bystander))


def test_connections_have_a_limit_and_a_session_goes_on_beyond_it(served: ServedDaemon) -> None:
    most = 2 * wiring.CONNECTIONS_PER_SESSION
    with Wire(f"127.0.0.1:{served.daemon.port}") as bystander:
        bystander.open()
        clients = [connect(served.daemon.port, PREFACE) for _ in range(3 * most)]
        bystander.call("Acquire", acquire(bystander))
        assert all(ends(client) for client in clients)
        for client in clients:
            client.close()


@contextmanager
def short_scrapes(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    monkeypatch.setattr(scrapes.Scrapes.__init__, "__kwdefaults__", {"request_s": seconds})
    yield


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nhost: x\r\n"])
def test_a_scrape_that_is_never_whole_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    with (
        short_scrapes(monkeypatch, 0.3),
        ServedDaemon(serve_config(tmp_path, metrics_port=0)) as served,
        connect(served.daemon.metrics_port, sent) as client,
    ):
        assert "kvc2_sessions" in scraped(served)
        assert ends(client)


def test_beyond_the_limit_the_oldest_scrape_gives_up_its_place(served: ServedDaemon) -> None:
    port = served.daemon.metrics_port
    clients = [connect(port) for _ in range(scrapes.CONNECTIONS_MAX)]
    assert "kvc2_sessions" in scraped(served)
    assert ends(clients[0])
    for client in clients:
        client.close()


def test_what_is_no_scrape_is_refused(served: ServedDaemon) -> None:
    with connect(served.daemon.metrics_port, b"POST / HTTP/1.1\r\n\r\n") as client:
        assert client.recv(1 << 10).startswith(b"HTTP/1.1 405 ")
    with connect(served.daemon.metrics_port, b"x" * (scrapes.HEAD_BYTES_MAX + 1000)) as client:
        assert ends(client)
    assert "kvc2_sessions" in scraped(served)


class CountedSide(side.SideSocket):
    accepts = 0

    def _accept(self) -> None:
        self.accepts += 1
        super()._accept()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can't open any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_out_of_descriptors_the_side_socket_waits_and_does_not_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def session() -> None:
        async def join(nonce: bytes, handover: side.Handover) -> None:
            raise AssertionError("nobody joins here")

        path = tmp_path / "side"
        listening = CountedSide(path, lambda nonce, uid: 0, join, Metrics())
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as engine:
            engine.connect(str(path))
            with no_descriptors():
                for _ in range(20):
                    await asyncio.sleep(0)
                assert listening.accepts == 1
            while listening.accepts == 1:
                await asyncio.sleep(0.01)
            assert len(listening._pending) == 1
        listening.close()

    monkeypatch.setattr(side, "RETRY_S", 0.2)
    asyncio.run(session())
