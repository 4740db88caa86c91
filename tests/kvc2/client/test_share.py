"""Workers of one engine: real processes that map its pool, wait for its layers, see its ends."""

from __future__ import annotations

import multiprocessing
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import numpy as np
import pytest

from kvc2.client import BridgeConfig, Daemon, LeaseCommit, PoolMemory, Share, open_bridge
from kvc2.client.share import SharedPool
from kvc2.errors import Detached, InvalidRequest, Unreachable
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import NUM_PAGES, PAGE_SIZE, POOL_BYTES, TinyEngine, identity, layout
from tests.kvc2.cache.test_arena_leases import LAYOUT_BYTES, Reader, payloads, prompt
from tests.system.daemon import DaemonProcess, EngineProcess

TOKENS = np.arange(100, dtype=np.uint32)
LAST_LAYER = 1
WAIT_S = 20.0


def cache_some(address: str) -> None:
    """An engine commits six blocks and goes: they are in the cpu tier then."""
    with TinyEngine(address) as engine:
        engine.pool.map[:] = b"k" * POOL_BYTES
        handle = engine.client.open_namespace(identity().encode())
        granted = engine.client.acquire(handle, b"1", TOKENS, grant_pages=6).granted_pages
        engine.client.commit([LeaseCommit(b"1", 0, TOKENS[:96], granted)])


def break_session(served: ServedDaemon) -> None:
    (attachment,) = served.daemon.attachments._open.values()
    served.on_loop(lambda: attachment.end("broken"))


def work(share: Share, pipe: Connection) -> None:
    """A worker: is told (session, transfer, page), waits for all layers, tells what it reads and
    writes into another page; then waits for the session's end."""
    with share.open() as shared:
        session, transfer, page, other = pipe.recv()
        came = shared.wait_layer(session, transfer, LAST_LAYER, WAIT_S)
        begin = page * layout().segments[0].bytes
        pipe.send((came, bytes(shared.map[begin : begin + 4])))
        begin = other * layout().segments[0].bytes
        shared.map[begin : begin + 4] = b"made"
        pipe.send("written")
        pipe.recv()  # the session has ended
        deadline = time.monotonic() + WAIT_S
        while not shared.is_over(session) and time.monotonic() < deadline:
            shared.wait_layer(session, transfer + 1, 0, WAIT_S)
        pipe.send((shared.is_over(session), shared.wait_layer(session, transfer + 1, 0, WAIT_S)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_reads_what_was_promised_and_sees_the_end(method: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context(method)
    assert isinstance(context, SpawnContext | ForkContext)
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        cache_some(served.address)
        with TinyEngine(served.address) as engine:
            ours, theirs = context.Pipe()
            worker = context.Process(target=work, args=(engine.client.share(), theirs))
            worker.start()
            handle = engine.client.open_namespace(identity().encode())
            found = engine.client.acquire(handle, b"2", TOKENS, grant_pages=1)
            assert found.tiers.cpu == 96
            page, other = int(found.prefix_pages[-1]), int(found.granted_pages[0])
            ours.send((1, found.transfer, page, other))
            assert ours.poll(WAIT_S)
            assert ours.recv() == (True, b"kkkk")
            assert ours.poll(WAIT_S)
            ours.recv()
            begin = other * layout().segments[0].bytes
            assert bytes(engine.pool.map[begin : begin + 4]) == b"made"
            break_session(served)
            ours.send("ended")
            assert ours.poll(WAIT_S)
            assert ours.recv() == (True, False)
            worker.join(WAIT_S)
            assert worker.exitcode == 0


def test_sessions_have_the_numbers_of_leases_and_one_is_never_taken_for_another(
    tmp_path: Path,
) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        cache_some(served.address)
        pool = PoolMemory(POOL_BYTES)
        config = BridgeConfig(PAGE_SIZE, identity().encode(), low_water=8)
        bridge = open_bridge(NUM_PAGES, config, Daemon(served.address, pool, layout(), "shares"))
        share = bridge.share()
        assert share is not None
        assert bridge.wait_attached(WAIT_S)
        with share.open() as shared:
            first = bridge.acquire(b"1", TOKENS).result(WAIT_S)
            assert shared.wait_layer(first.session, first.transfer, LAST_LAYER, WAIT_S)
            assert not shared.is_over(first.session)
            break_session(served)
            while bridge.book.session != first.session + 1:
                bridge.wait_attached(0.1)
            assert bridge.wait_attached(WAIT_S)
            assert shared.is_over(first.session)
            again = bridge.acquire(b"2", TOKENS).result(WAIT_S)
            assert again.session == first.session + 1
            assert shared.wait_layer(again.session, again.transfer, LAST_LAYER, WAIT_S)
            assert not shared.is_over(again.session)
            # what the new session has done says nothing of the old one's transfers
            assert not shared.wait_layer(first.session, again.transfer, LAST_LAYER, 0.0)
        bridge.close()
        pool.close()


def read_arena(share: Share, pipe: Connection) -> None:
    """A worker: is told (session, offsets, bytes of a payload), tells what it reads; once more
    after the session's end, by the view that it has and by a new one."""
    with share.open() as shared:
        session, offsets, num_bytes = pipe.recv()
        arena = shared.arena(session, threads=2)
        into = bytearray(num_bytes * offsets.size)
        pipe.send((arena.read(offsets, num_bytes, into), bytes(into)))
        pipe.recv()  # the session has ended
        deadline = time.monotonic() + WAIT_S
        while arena.read(offsets, num_bytes, into) and time.monotonic() < deadline:
            pass
        again = arena.read(offsets, num_bytes, into)
        while True:  # until the engine has another session, or knows that it has none
            try:
                shared.arena(session)
            except Detached:
                break
        pipe.send(again)


@pytest.mark.parametrize("pages", [0, 16])
def test_a_worker_reads_the_arena_and_knows_when_it_does_not_count(
    pages: int, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    with (
        ServedDaemon(serve_config(tmp_path), cache=None) as served,
        Reader(served.address) as writer,
        Reader(served.address, pages, "parent") as reader,
    ):
        writer.store(1)
        ours, theirs = context.Pipe()
        worker = context.Process(target=read_arena, args=(reader.client.share(), theirs))
        worker.start()
        offsets = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1)).offsets
        ours.send((1, offsets, LAYOUT_BYTES))
        assert ours.poll(WAIT_S)
        assert ours.recv() == (True, payloads(1).tobytes())
        for attachment in list(served.daemon.attachments._open.values()):
            served.on_loop(lambda each=attachment: each.end("broken"))
        ours.send("ended")
        assert ours.poll(WAIT_S)
        assert ours.recv() is False
        worker.join(WAIT_S)
        assert worker.exitcode == 0


def test_an_engine_that_does_not_read_the_arena_does_not_share_it(tmp_path: Path) -> None:
    with (
        ServedDaemon(serve_config(tmp_path), cache=None) as served,
        TinyEngine(served.address) as engine,
        engine.client.share().open() as shared,
    ):
        with pytest.raises(InvalidRequest, match=r"options\.arena"):
            shared.arena(1)
        with pytest.raises(Detached):
            shared.arena(2)


def test_an_arena_is_not_held_by_what_is_shared(tmp_path: Path) -> None:
    """A daemon that has died would keep its memory: only a view that is in use may."""
    with (
        ServedDaemon(serve_config(tmp_path), cache=None) as served,
        Reader(served.address) as reader,
        reader.client.share().open() as shared,
    ):
        held = weakref.ref(reader.client.arena)
        assert shared.arena(1).num_bytes == reader.client.arena.num_bytes
        break_session(served)
        assert reader.wait_detached(1, WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while held() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held() is None


def test_a_worker_sees_a_session_of_a_silent_daemon_end(tmp_path: Path) -> None:
    with (
        DaemonProcess(tmp_path) as daemon,
        TinyEngine(daemon.address) as engine,
        engine.client.share().open() as shared,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(shared.wait_layer, 1, 1, 0, 600.0)
        assert not shared.is_over(1)
        daemon.freeze()
        assert engine.wait_detached(1, WAIT_S)
        assert not waiting.result(WAIT_S)
        assert shared.is_over(1)
        daemon.thaw()


def test_without_a_session_a_worker_has_the_pool(tmp_path: Path) -> None:
    engine = TinyEngine(f"unix:{tmp_path / 'none'}")
    with engine.client.share().open() as shared:
        shared.map[:3] = b"abc"
        assert bytes(engine.pool.map[:3]) == b"abc"
        assert shared.num_bytes == POOL_BYTES
        assert shared.is_over(1)
        assert not shared.wait_layer(1, 1, 0, WAIT_S)
    engine.client.close()
    engine.pool.close()


def test_a_worker_sees_its_engine_die(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        with EngineProcess(served.address) as engine:
            assert engine.ask(do="attach")["attached"]
            share = Share(engine.ask(do="share")["name"])
            with share.open() as shared, ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(shared.wait_layer, 1, 1 << 20, 0, 600.0)
                assert not shared.is_over(1)
                engine.kill()
                assert not waiting.result(WAIT_S)
                assert shared.is_over(1)
                assert not shared.wait_layer(2, 1, 0, WAIT_S)  # one that it can't ask about
        with pytest.raises(Unreachable, match="no engine shares"):
            share.open()


def test_an_engine_that_is_closed_shares_no_more(tmp_path: Path) -> None:
    engine = TinyEngine(f"unix:{tmp_path / 'none'}")
    share = engine.client.share()
    assert engine.client.share() == share
    with share.open():
        engine.client.close()
        with pytest.raises(Unreachable):
            share.open()
    engine.pool.close()


def test_only_ones_own_user_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TinyEngine(f"unix:{tmp_path / 'none'}")
    share = engine.client.share()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(Unreachable, match="of another user") as told:
        share.open()
    assert told.value.reason == "no_permission"
    monkeypatch.undo()
    monkeypatch.setattr("kvc2.client.share._is_ours", lambda peer: False)  # as the engine sees it
    with pytest.raises(Unreachable, match="refused"):
        share.open()
    engine.client.close()
    engine.pool.close()


def test_what_is_shared_is_closed_again(tmp_path: Path) -> None:
    engine = TinyEngine(f"unix:{tmp_path / 'none'}")
    share = engine.client.share()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        SharedPool(share).close()
    assert len(os.listdir("/proc/self/fd")) == before
    engine.client.close()
    engine.pool.close()
