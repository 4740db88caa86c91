"""KV events over the wire: what a router that reads vLLM's schema learns of a daemon's blocks."""

from __future__ import annotations

import contextlib
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from kvc2 import _core, errors
from kvc2.config import KvEventsConfig
from kvc2.metrics import Metrics
from kvc2.server.kv_event_messages import BlockRemoved, BlockStored, events_of, salt_of
from kvc2.server.kv_events import KvEvents, Sockets
from tests.doubles.routers import Listener
from tests.doubles.waiting import wait_until

SPACE, SIZE = b"n" * 32, 4
SALT = salt_of(SPACE)


class Blocks:
    """An index with a gpu pool over a cpu one, as a daemon has it."""

    def __init__(self, kv_event_bytes: int = 1 << 20, pages: int = 64) -> None:
        self.index = _core.Index(kv_event_bytes=kv_event_bytes)
        shape: dict[str, Any] = {"page_size": SIZE, "pages_per_slab": pages, "durable": False}
        self.cpu = self.index.add_pool(**shape, below=None, tier=1)
        self.gpu = self.index.add_pool(**shape, below=self.cpu, tier=0)
        for pool in (self.cpu, self.gpu):
            self.index.add_slab(pool)
        self.space = self.index.open_namespace(SPACE, SIZE)
        self.keyed = self.index.open_namespace(b"k" * 32, SIZE, opaque=True)

    def put(self, tokens: list[int], extras: _core.PromptExtras | None = None) -> None:
        prompt = np.array(tokens, np.uint32)
        blocks = len(tokens) // SIZE
        lease = self.index.acquire(self.space, self.gpu, prompt, blocks, extras=extras)
        pages = self.index.grant(self.gpu, blocks - lease.matched)
        self.index.commit(lease.id, lease.matched, prompt[SIZE * lease.matched :], pages, extras)
        self.index.release(lease.id)

    def put_keys(self, keys: list[bytes]) -> None:
        pages = self.index.grant(self.gpu, len(keys))
        self.index.commit_keys(self.keyed, self.gpu, keys, pages)

    def demote(self) -> None:
        while (plan := self.index.plan_demote(self.gpu, 64)) is not None:
            self.index.complete(plan.id, len(plan.target_pages))

    def events(self, *, salted: bool = True) -> list[Any]:
        return events_of(self.index.take_kv_events()[0], salted=salted)


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


@contextlib.contextmanager
def published(
    source: Any, folder: Path, buffer_mb: int = 64, **more: Any
) -> Iterator[tuple[KvEvents, Listener]]:
    config = KvEventsConfig(listen=f"unix:{folder}/events", buffer_mb=buffer_mb, **more)
    told = KvEvents(config, Sockets(folder / "events"), source, Metrics())
    listener = Listener(folder / "events", config.topic)
    try:
        yield told, listener
    finally:
        listener.close()
        told.close()


def prompt(blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + SIZE * blocks))


# How an event looks


def test_blocks_of_one_path_are_one_event_which_names_namespace_and_parent(blocks: Blocks) -> None:
    blocks.put(prompt(3))
    blocks.put([*prompt(2), *prompt(1, 900)])
    cleared, stored, branch = blocks.events()
    names = _core.chain_keys(SPACE, np.arange(12, dtype=np.uint32), 4)
    keys = [int.from_bytes(each.tobytes()[8:], "big") for each in names]
    assert type(cleared).__name__ == "AllBlocksCleared"
    assert (stored.block_hashes, stored.parent_block_hash) == (keys, None)
    assert (stored.token_ids, stored.block_size, stored.medium) == (prompt(3), SIZE, "GPU")
    assert stored.extra_keys == [(SALT,), None, None]
    assert branch.parent_block_hash == keys[1]
    assert branch.token_ids == prompt(1, 900)
    assert branch.extra_keys is None


def test_an_unsalted_event_names_no_namespace(blocks: Blocks) -> None:
    blocks.put(prompt(2))
    assert blocks.events(salted=False)[1].extra_keys is None


def test_a_block_in_which_an_image_begins_names_it(blocks: Blocks) -> None:
    digest = np.full((1, 32), 7, np.uint8)
    blocks.put(prompt(3), _core.PromptExtras(np.array([1], np.uint32), digest))
    stored = blocks.events()[1]
    assert stored.extra_keys == [(SALT,), (("07" * 32, 0),), None]


def test_opaque_keys_are_their_own_hashes_and_follow_from_nothing(blocks: Blocks) -> None:
    keys = [b"a", b"k" * 64, b"a\0", bytes(range(32))]
    hashes = [0x61, 0x6B6B6B6B6B6B6B6B, 0x6100, 0x18191A1B1C1D1E1F]
    blocks.put_keys(keys)
    blocks.index.evict(blocks.gpu, 4)
    _, stored, removed = blocks.events()
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.parent_block_hash) == (hashes, None)
    assert (stored.token_ids, stored.block_size) == ([], SIZE)
    assert isinstance(removed, BlockRemoved)
    assert sorted(removed.block_hashes) == sorted(hashes)


def test_each_tier_is_a_medium(blocks: Blocks) -> None:
    blocks.put(prompt(2))
    blocks.demote()
    blocks.index.evict(blocks.gpu, 2)
    told = [(type(each).__name__, each.medium) for each in blocks.events()[1:]]
    assert told == [("BlockStored", "GPU"), ("BlockStored", "CPU"), ("BlockRemoved", "GPU")]


# The wire


def test_who_subscribes_late_has_all_by_replay(blocks: Blocks, tmp_path: Path) -> None:
    blocks.put(prompt(5))
    with published(blocks.index, tmp_path) as (_, listener):
        wait_until(lambda: listener.catch_up().cached_blocks(prompt(9), SIZE, SALT) == 5)
        blocks.index.evict(blocks.gpu, 2)
        wait_until(lambda: listener.catch_up().cached_blocks(prompt(9), SIZE, SALT) == 3)
        assert listener.replica.orphans == 0
        assert [number for number, _ in listener.replay(0)] == list(range(listener.last + 1))


def test_who_listens_hears_of_each_change_and_sees_what_it_missed(
    blocks: Blocks, tmp_path: Path
) -> None:
    with published(blocks.index, tmp_path, topic="kv@here") as (_, listener):
        first = 0
        while not listener.listen(50):  # till the subscription has come
            blocks.put(prompt(1, first := first + SIZE))
        blocks.put(prompt(5, 100_000))
        wait_until(
            lambda: (
                listener.listen(100)
                and listener.replica.cached_blocks(prompt(5, 100_000), SIZE, SALT) == 5
            )
        )
        there = {block for at in listener.replica.there.values() for block in at}
        assert len(there) == first // SIZE + 5  # those that were published before it came, too


def test_a_request_for_batches_that_are_not_kept_has_all_told_anew(
    blocks: Blocks, tmp_path: Path
) -> None:
    big = Blocks(1 << 26, pages=2048)
    with published(big.index, tmp_path, buffer_mb=1) as (_, listener):
        for first in range(300):  # 2,000 blocks of some 40 bytes each time
            big.put(prompt(2000, 100_000 * first))
            if first == 0:
                wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 2000)
            big.index.evict(big.gpu, 2000)
            if listener.replay(0)[0][0] > 0:  # the first ones are not kept any more
                break
        else:
            raise AssertionError("all is kept")
        big.put(prompt(7))
        late = Listener(tmp_path / "events")
        numbers = [number for number, _ in late.replay(0)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] > 0
        late.catch_up()
        assert late.replica.cleared > 0
        wait_until(lambda: late.catch_up().cached_blocks(prompt(7), SIZE, SALT) == 7)
        wait_until(lambda: len(late.catch_up().there.get("GPU", ())) == 7)
        wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 7)
        late.close()


def test_more_changes_than_may_wait_are_told_anew_and_counted(tmp_path: Path) -> None:
    source = Blocks(1 << 16, pages=4096)
    source.put(prompt(4000))
    metrics = Metrics()
    config = KvEventsConfig(listen=f"unix:{tmp_path}/events")
    told = KvEvents(config, Sockets(tmp_path / "events"), source.index, metrics)
    listener = Listener(tmp_path / "events")
    try:
        wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 4000)
        lost = metrics.registry.get_sample_value("kvc2_faults_total", {"kind": "kv_events_lost"})
        assert lost
    finally:
        listener.close()
        told.close()


@pytest.mark.parametrize("request_", [[], [b""], [b"", b"1"], [b"x", bytes(8)], [b"", b"9" * 9]])
def test_what_is_no_request_is_not_answered_and_harms_nobody(
    blocks: Blocks, tmp_path: Path, request_: list[bytes]
) -> None:
    blocks.put(prompt(2))
    with published(blocks.index, tmp_path) as (_, listener):
        listener._asking.send_multipart(request_ or [b"nothing"])
        wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 2)


def test_a_reader_that_reads_nothing_holds_up_nobody(blocks: Blocks, tmp_path: Path) -> None:
    with published(blocks.index, tmp_path) as (_, listener):
        asleep = Listener(tmp_path / "events")
        for _ in range(20):
            asleep._asking.send_multipart([b"", bytes(8)])
        blocks.put(prompt(8))
        wait_until(lambda: listener.catch_up().cached_blocks(prompt(8), SIZE, SALT) == 8)
        asleep.close()


def test_a_source_that_fails_is_counted_and_asked_again(blocks: Blocks, tmp_path: Path) -> None:
    class Failing:
        failures = 3

        def take_kv_events(self) -> tuple[_core.KvEvents, bool]:
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("planted")
            return blocks.index.take_kv_events()

        def tell_kv_events_anew(self) -> None:
            blocks.index.tell_kv_events_anew()

        def kv_event_overflows(self) -> int:
            return 0

    blocks.put(prompt(2))
    with published(Failing(), tmp_path) as (_, listener):
        wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 2)


# The sockets


def test_the_sockets_are_their_owner_s_alone_and_go_with_the_daemon(
    blocks: Blocks, tmp_path: Path
) -> None:
    paths = [tmp_path / "events", tmp_path / "events.replay"]
    with published(blocks.index, tmp_path):
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(path.exists() for path in paths)


def test_a_second_daemon_does_not_take_the_sockets_over(blocks: Blocks, tmp_path: Path) -> None:
    with published(blocks.index, tmp_path) as (_, listener):
        with pytest.raises(errors.StartRefused, match="another daemon"):
            Sockets(tmp_path / "events")
        blocks.put(prompt(1))
        wait_until(lambda: len(listener.catch_up().there.get("GPU", ())) == 1)


def test_a_dead_daemon_s_sockets_are_no_obstacle_and_another_file_is(
    blocks: Blocks, tmp_path: Path
) -> None:
    context = zmq.Context()
    with context.socket(zmq.PUB) as dead:
        dead.bind(f"ipc://{tmp_path}/events")
        with published(blocks.index, tmp_path):
            pass
    context.destroy(linger=0)
    (tmp_path / "events").write_text("mine")
    for _ in range(2):  # it lets go of the lock
        with pytest.raises(errors.StartRefused, match="not a socket"):
            Sockets(tmp_path / "events")
    assert (tmp_path / "events").read_text() == "mine"


@pytest.mark.parametrize("listen", ["127.0.0.1:5557", "tcp://*:5557", "unix:"])
def test_tcp_and_what_is_no_path_are_refused_by_name(listen: str) -> None:
    with pytest.raises(errors.InvalidConfig, match=r"kv_events\.listen"):
        KvEventsConfig(listen=listen)


def test_a_daemon_without_the_extra_says_what_to_install(tmp_path: Path) -> None:
    """Everything else of it needs neither library."""
    script = f"""
import asyncio, sys
sys.modules["zmq"] = None
from pathlib import Path
from kvc2 import errors
from kvc2.server.daemon import running
from tests.doubles.daemons import serve_config
from kvc2.config import KvEventsConfig
async def main(**more):
    async with running(serve_config(Path({str(tmp_path)!r}), **more)):
        print("served")
asyncio.run(main())
try:
    asyncio.run(main(kv_events=KvEventsConfig(listen="unix:{tmp_path}/events")))
except errors.StartRefused as refused:
    print(refused)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    served, refused = run.stdout.splitlines()
    assert served == "served", run.stderr
    assert "kvc2[events]" in refused
