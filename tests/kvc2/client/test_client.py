"""The client over a daemon in the same process: calls, callbacks, re-attach, waiting for layers."""

from __future__ import annotations

import errno
import gc
import os
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from kvc2.client import Admin, Client, LeaseCommit, SessionOptions
from kvc2.client.memory import OverSignal, PoolMemory, Progress
from kvc2.errors import Detached, InvalidRequest, NotFound, Unreachable
from kvc2.layout import Layout
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.doubles.fakes import FakeCache

TOKENS = np.arange(100, dtype=np.uint32)


@pytest.fixture(params=["fake", "real"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServedDaemon]:
    cache = FakeCache.opened if request.param == "fake" else None
    with ServedDaemon(serve_config(tmp_path), cache=cache) as daemon:
        yield daemon


def test_what_one_request_commits_the_next_one_hits(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine:
        client = engine.client
        handle = client.open_namespace(identity().encode())
        first = client.acquire(handle, b"1", TOKENS, grant_pages=6)
        assert (first.matched_tokens, len(first.granted_pages)) == (0, 6)
        commit = LeaseCommit(b"1", 0, TOKENS[:96], first.granted_pages)
        committed = client.commit([commit], grant_pages=2)
        assert committed.results[0].tolist() == [0] * 6
        assert len(committed.granted_pages) == 2
        assert not committed.durable
        assert client.commit([commit]).results[0].tolist() == [0] * 6  # idempotent
        second = client.acquire(handle, b"2", TOKENS)
        assert second.matched_tokens == 96
        assert second.prefix_pages.tolist() == first.granted_pages.tolist()
        assert client.match(handle, TOKENS).matched_tokens == 96
        other = client.open_namespace(identity().encode(), salt=b"x")
        assert client.match(other, TOKENS).matched_tokens == 0
        granted = client.grant(3)
        released = client.release([b"1", b"2", b"never"], returned=granted, grant_pages=1)
        assert len(released.granted_pages) == 1


def test_the_last_prefill_rate_that_an_engine_told_is_in_the_stats(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine, Admin(served.address) as admin:
        assert admin.stats().sessions[0].prefill_tokens_per_s == 0
        engine.client.commit([], prefill_tokens_per_s=512.5)
        engine.client.commit([])  # it doesn't know any more: what was told stays
        found = admin.stats()
        assert found.sessions[0].prefill_tokens_per_s == 512.5
        (name,) = [each for each in found.counters if each.startswith("prefill_tokens_per_s")]
        assert found.counters[name] == 512.5


def test_a_refused_call_is_an_exception_with_the_field(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine:
        client = engine.client
        handle = client.open_namespace(identity().encode())
        with pytest.raises(InvalidRequest, match="tokens"):
            client.acquire(handle, b"1", np.zeros(0, np.uint32))
        with pytest.raises(NotFound, match="request_id"):
            client.commit([LeaseCommit(b"?", 0, TOKENS[:16], np.zeros(1, np.uint32))])
        with pytest.raises(InvalidRequest, match="identity"):
            client.open_namespace(b"{}")


def test_a_broken_stream_is_noticed_and_the_engine_attached_again(tmp_path: Path) -> None:
    config = serve_config(tmp_path)
    engine = TinyEngine(config.listen)
    assert engine.client.state == "detached"
    with pytest.raises(Detached):
        engine.client.grant(1)
    handle = engine.client.open_namespace(identity().encode())
    with ServedDaemon(config) as served, engine:
        assert engine.client.acquire(handle, b"1", TOKENS).matched_tokens == 0
        engine.kept = [5, 6]
        served.on_loop(lambda: served.daemon.attachments._open[1].end("broken"))
        assert engine.wait_detached(1)
        assert engine.detached == ["silent"]  # the process lives: its promises may not be void
        assert engine.client.wait_attached(5)
        assert engine.client.acquire(handle, b"1", TOKENS).matched_tokens == 0
        assert set(engine.granted[1]).isdisjoint(engine.kept)


def test_a_daemon_that_stops_ends_the_session(tmp_path: Path) -> None:
    config = serve_config(tmp_path)
    with ServedDaemon(config):
        engine = TinyEngine(config.listen)
        assert engine.client.wait_attached(10)
    assert engine.wait_detached(1)
    with pytest.raises(Detached):
        engine.client.grant(1)
    with ServedDaemon(config):
        started = time.monotonic()
        assert engine.client.wait_attached(10)
        assert time.monotonic() - started < 4  # 2 s on a quiet machine; tests/system measures it
        engine.client.close()
    engine.pool.close()


def test_a_layout_that_the_daemon_refuses_leaves_the_pages_to_the_engine(tmp_path: Path) -> None:
    class Odd(TinyEngine):
        def __init__(self, address: str) -> None:
            super().__init__(address)
            self.client.close()
            right = self.client._keeper._pool.layout
            reversed_kv = object.__new__(Layout)
            values = {**vars(right), "page_size": 48}
            for name, value in values.items():
                object.__setattr__(reversed_kv, name, value)
            self.detached.clear()
            self.client = Client(
                address,
                pool=self.pool,
                layout=reversed_kv,
                engine=self,
                options=SessionOptions("odd"),
            )

    with ServedDaemon(serve_config(tmp_path)) as served:
        engine = Odd(served.address)
        assert engine.wait_detached(1)
        assert engine.detached[0] == "dead"
        assert "layout.page_size" in str(engine.client.last_refusal)
        assert engine.client.state == "detached"
        engine.client.close()
        engine.pool.close()


def test_admin_of_no_daemon_is_unreachable(tmp_path: Path) -> None:
    with Admin(f"unix:{tmp_path / 'none'}") as admin, pytest.raises(Unreachable):
        admin.stats()


def progress() -> tuple[Progress, int, int, OverSignal]:
    fd = os.memfd_create("progress")
    os.ftruncate(fd, 4096)
    event = os.eventfd(0)
    over = OverSignal()
    return Progress(os.dup(fd), os.dup(event), over), fd, event, over


def test_a_layer_is_there_when_the_word_says_so() -> None:
    found, fd, event, _ = progress()
    assert not found.wait(1, 0, 0.01)
    os.pwrite(fd, struct.pack("<Q", 65536 + 1), 0)
    assert found.wait(1, 0, 0)
    assert not found.reached(1, 1)
    assert not found.reached(2, 0)
    late = threading.Timer(
        0.02, lambda: (os.pwrite(fd, struct.pack("<Q", 131074), 0), os.eventfd_write(event, 1))
    )
    late.start()
    assert found.wait(2, 1, 5.0)
    assert found.reached(1, 500)
    late.join()
    os.close(fd)
    os.close(event)


def test_a_wait_ends_with_its_session() -> None:
    found, fd, event, over = progress()
    threading.Timer(0.02, over.set).start()
    started = time.monotonic()
    assert not found.wait(1, 0, 30.0)
    assert time.monotonic() - started < 10
    os.close(fd)
    os.close(event)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_process_out_of_descriptors_is_told_so_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "eventfd", none_left)
    with pytest.raises(OSError, match="Too many"):
        OverSignal()
    gc.collect()


def test_two_threads_wait_for_a_layer_at_once() -> None:
    found, fd, event, _ = progress()
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(found.wait, 1, 0, 20.0) for _ in range(2)]
        assert not wait(waits, timeout=0.2, return_when=FIRST_COMPLETED).done
        os.pwrite(fd, struct.pack("<Q", 65536 + 1), 0)
        os.eventfd_write(event, 1)
        assert [each.result(20) for each in waits] == [True, True]
    os.close(fd)
    os.close(event)


def test_nobody_can_resize_a_pool() -> None:
    pool = PoolMemory(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 4096)
    pool.map[8191] = 7
    pool.close()


def test_a_call_whose_channel_closes_under_it_finds_the_client_detached(tmp_path: Path) -> None:
    """The thread that sees the daemon die closes the channel, and a call may be about to use it."""
    with ServedDaemon(serve_config(tmp_path)) as served, TinyEngine(served.address) as engine:
        handle = engine.client.open_namespace(identity().encode())
        session = engine.client._keeper.connection
        assert session is not None
        session.channel.close()
        with pytest.raises(Detached):
            engine.client.acquire(handle, b"1", TOKENS)
