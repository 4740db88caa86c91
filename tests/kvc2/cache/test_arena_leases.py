"""Leases in the arena, copied commits and polling, as a client sees them: bytes in the arena are
those that were committed, from memory and from disk, and nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2.client import (
    Admin,
    ArenaTerms,
    Client,
    LeaseCommit,
    NamespaceHandle,
    PoolMemory,
    SessionOptions,
)
from kvc2.errors import InvalidRequest, NotFound
from kvc2.layout import Layout, Segment
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, TinyEngine, identity
from tests.doubles.wires import Wire, hello

BLOCKS = 6
LAYOUT_BYTES = 2048
# keys and values of both layers side by side: a page is one record
RECORD = Layout(
    tuple(
        Segment(layer, kv, 512, 512 * (2 * layer + kv), LAYOUT_BYTES)
        for layer in (0, 1)
        for kv in (0, 1)
    ),
    PAGE_SIZE,
)


def prompt(seed: int, blocks: int = BLOCKS) -> NDArray[np.uint32]:
    tokens = np.random.default_rng(seed).integers(0, 1 << 20, blocks * PAGE_SIZE + 1)
    return tokens.astype(np.uint32)


def payloads(seed: int, blocks: int = BLOCKS) -> NDArray[np.uint8]:
    return np.random.default_rng(1000 + seed).integers(0, 256, (blocks, LAYOUT_BYTES), np.uint8)


class Reader(TinyEngine):
    """A client with a small staging pool, that reads in the arena."""

    def __init__(self, address: str, pages: int = 16, name: str = "reader") -> None:
        super().__init__(address, name)
        self.client.close()
        self.staging = PoolMemory(pages * LAYOUT_BYTES)
        self.client = Client(
            address,
            pool=self.staging,
            layout=RECORD,
            engine=self,
            options=SessionOptions(name, arena=True),
        )

    @property
    def handle(self) -> NamespaceHandle:
        return self.client.open_namespace(identity().encode())

    def store(self, seed: int, blocks: int = BLOCKS, *, durable: bool = False) -> list[int]:
        """Copied, without a lease."""
        pages = self.client.grant(blocks)
        rows = np.frombuffer(self.staging.map, np.uint8).reshape(-1, LAYOUT_BYTES)
        rows[pages] = payloads(seed, blocks)
        del rows
        commit = LeaseCommit(b"", 0, prompt(seed, blocks)[:-1], pages)
        answer = self.client.commit_copies(self.handle, [commit], durable=durable)
        assert answer.durable == durable
        self.client.release([], returned=pages)  # they stayed this client's
        return list(answer.results[0].tolist())

    def read(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint8]:
        into = np.zeros((offsets.size, LAYOUT_BYTES), np.uint8)
        assert self.client.arena.read(offsets, LAYOUT_BYTES, into)
        return into


@contextlib.contextmanager
def reading(folder: Path, **changes: object) -> Iterator[tuple[ServedDaemon, Reader]]:
    config = serve_config(folder, **{"disk": True, **changes})
    with ServedDaemon(config, cache=None) as served, Reader(served.address) as reader:
        yield served, reader
        served.on_loop(served.daemon.cache.index.check)


def leases(served: ServedDaemon) -> int:
    found = served.on_loop(served.daemon.cache.stats)
    return int(found.leases)


def test_what_was_committed_as_copies_is_read_in_the_arena(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader):
        assert reader.store(1) == [0] * BLOCKS
        assert reader.store(1) == [1] * BLOCKS  # it is there
        found = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1))
        assert (found.matched_tokens, found.tiers.cpu) == (BLOCKS * PAGE_SIZE,) * 2
        assert (found.transfer, found.prefix_pages.size) == (0, 0)
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1))
        again = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1))
        assert again.offsets.tolist() == found.offsets.tolist()
        reader.client.release([b"a"])
        assert leases(served) == 0


def test_what_only_the_disk_has_comes_into_the_arena(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        reader.store(1, durable=True)
        assert admin.evict("cpu").evicted_blocks == BLOCKS
        found = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1))
        assert (found.matched_tokens, found.tiers.disk) == (BLOCKS * PAGE_SIZE,) * 2
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1))


def test_a_poll_answers_what_is_there_and_the_same_number_the_same(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        reader.store(1, durable=True)
        admin.evict("cpu")
        client, handle, tokens = reader.client, reader.handle, prompt(1)
        first = client.acquire_in_arena(handle, b"a", tokens, ArenaTerms(poll=0))
        assert first.offsets.size + first.coming_blocks == BLOCKS
        number, found = 0, first
        while found.coming_blocks:
            number += 1
            found = client.acquire_in_arena(handle, b"a", tokens, ArenaTerms(poll=number))
        assert found.offsets.size == BLOCKS
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1))
        same = client.acquire_in_arena(handle, b"a", tokens, ArenaTerms(poll=0))
        assert same.offsets.tolist() == first.offsets.tolist()
        with pytest.raises(InvalidRequest, match="poll"):
            client.acquire_in_arena(handle, b"a", tokens, ArenaTerms(poll=number + 2))
        with pytest.raises(InvalidRequest, match="poll"):
            client.acquire_in_arena(handle, b"b", tokens, ArenaTerms(poll=1))


def test_blocks_that_the_client_has_are_matched_and_not_told(tmp_path: Path) -> None:
    with reading(tmp_path) as (_, reader):
        reader.store(1)
        terms = ArenaTerms(skip_blocks=2)
        found = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1), terms)
        assert (found.first_block, found.matched_tokens) == (2, BLOCKS * PAGE_SIZE)
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1)[2:])
        other = reader.client.acquire_in_arena(reader.handle, b"b", prompt(2), terms)
        assert (other.first_block, other.offsets.size) == (0, 0)


def test_a_lease_in_the_arena_takes_copies_where_its_prefix_ends(tmp_path: Path) -> None:
    with reading(tmp_path) as (_, reader):
        client, handle, tokens = reader.client, reader.handle, prompt(1)
        lease = client.acquire_in_arena(handle, b"a", tokens, ArenaTerms(grant_pages=BLOCKS))
        pages = lease.granted_pages
        rows = np.frombuffer(reader.staging.map, np.uint8).reshape(-1, LAYOUT_BYTES)
        rows[pages] = payloads(1)
        del rows
        for first in range(0, BLOCKS, 2):
            part = slice(first * PAGE_SIZE, (first + 2) * PAGE_SIZE)
            commit = LeaseCommit(b"a", first, tokens[part], pages[first : first + 2])
            assert client.commit_copies(handle, [commit]).results[0].tolist() == [0, 0]
        with pytest.raises(InvalidRequest, match=r"leases\[0\].request_id"):
            client.commit([LeaseCommit(b"a", 0, tokens[:PAGE_SIZE], pages[:1])])
        found = client.acquire_in_arena(handle, b"b", tokens)
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1))


def test_what_an_engine_computed_in_its_pool_is_read_by_another_in_the_arena(
    tmp_path: Path,
) -> None:
    """A page's payload is canonical: the pools of the two lie differently in memory."""
    with (
        reading(tmp_path) as (served, reader),
        TinyEngine(served.address) as engine,
        Admin(served.address) as admin,
    ):
        handle = engine.client.open_namespace(identity().encode())
        tokens = prompt(2)
        lease = engine.client.acquire(handle, b"e", tokens, grant_pages=BLOCKS)
        pages = lease.granted_pages
        segments = np.frombuffer(engine.pool.map, np.uint8).reshape(4, -1, 512)
        segments[:, pages] = payloads(2).reshape(BLOCKS, 4, 512).transpose(1, 0, 2)
        del segments
        engine.client.commit([LeaseCommit(b"e", 0, tokens[:-1], pages)])
        admin.flush(10)
        found = reader.client.acquire_in_arena(reader.handle, b"a", tokens)
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(2))


def test_leases_end_with_the_session_and_what_is_read_after_that_does_not_count(
    tmp_path: Path,
) -> None:
    with reading(tmp_path) as (served, reader):
        reader.store(1)
        found = reader.client.acquire_in_arena(reader.handle, b"a", prompt(1))
        arena = reader.client.arena
        into = np.zeros((BLOCKS, LAYOUT_BYTES), np.uint8)
        assert arena.read(found.offsets, LAYOUT_BYTES, into)
        session = next(iter(served.daemon.attachments.table))
        served.on_loop(session.give_up)
        assert reader.wait_detached(1)
        assert not arena.read(found.offsets, LAYOUT_BYTES, into)
        assert leases(served) == 0


def test_a_full_arena_has_no_room_for_copies_and_says_so(tmp_path: Path) -> None:
    with reading(tmp_path, disk=False) as (_, reader):
        held = 0
        for seed in range(2000):
            results = reader.store(seed, 4)
            reader.client.acquire_in_arena(reader.handle, b"%d" % seed, prompt(seed, 4))
            held += results.count(0)
            if 3 in results:
                break
        else:
            raise AssertionError("it took all")
        assert set(results) <= {0, 3}
        assert held > 100


def test_a_session_without_pages_reads_what_others_have_stored(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, writer), Reader(served.address, 0, "bare") as bare:
        writer.store(1)
        found = bare.client.acquire_in_arena(bare.handle, b"a", prompt(1))
        np.testing.assert_array_equal(bare.read(found.offsets), payloads(1))
        assert bare.client.grant(4).size == 0


def test_the_arena_is_not_handed_out_unasked(tmp_path: Path) -> None:
    with (
        reading(tmp_path) as (served, _),
        TinyEngine(served.address) as engine,
        pytest.raises(InvalidRequest, match=r"options\.arena"),
    ):
        _ = engine.client.arena


def test_a_daemon_without_a_cpu_tier_has_no_arena(tmp_path: Path) -> None:
    config = serve_config(tmp_path, gpu_only=True)
    with ServedDaemon(config, cache=None) as served, Wire(served.address) as wire:
        status, words = wire.stream_refusal(hello(arena=True))
        assert (status, "hello.arena" in words) == ("INVALID_ARGUMENT", True)
    with ServedDaemon(config, cache=None) as served, TinyEngine(served.address) as engine:
        handle = engine.client.open_namespace(identity().encode())
        with pytest.raises(InvalidRequest, match="place"):
            engine.client.acquire_in_arena(handle, b"a", prompt(1))


def test_a_request_in_the_arena_is_explained_by_the_tiers_of_its_chain(tmp_path: Path) -> None:
    """As its acquire found them: skipped blocks too, and what came later changes nothing."""
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        client = reader.client
        reader.store(1, durable=True)
        longer = np.concatenate([prompt(1)[:-1], prompt(2, 1)])

        def told(request: bytes) -> tuple[list[tuple[str, int]], str, int]:
            found = client.explain_request(request)
            runs = [(run.tier, run.blocks) for run in found.runs]
            return runs, found.why, found.tokens

        client.acquire_in_arena(reader.handle, b"cpu", prompt(1))
        assert told(b"cpu") == ([("cpu", BLOCKS)], "nothing", len(prompt(1)))
        client.release([b"cpu"])
        admin.evict("cpu", 2)
        terms = ArenaTerms(skip_blocks=BLOCKS - 1)
        client.acquire_in_arena(reader.handle, b"skips", longer, terms)
        mixed = [("cpu", BLOCKS - 2), ("disk", 2)]
        assert told(b"skips") == (mixed, "never_seen", len(longer))
        client.acquire_in_arena(reader.handle, b"all", longer)  # of what is in cpu by now
        assert told(b"all")[0] == [("cpu", BLOCKS - 2), ("disk", 1), ("cpu", 1)]
        assert told(b"skips")[0] == mixed
        at = client.open_handle(NamespaceHandle(identity().encode(), opaque=True))
        client.acquire_keys(at, b"keys", [b"k"])  # its answer tells it of each key
        with pytest.raises(NotFound, match="request_id"):
            client.explain_request(b"keys")
