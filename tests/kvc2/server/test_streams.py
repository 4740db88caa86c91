"""Read and Write: payloads of blocks over the wire, for clients without shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2 import _core, answers
from kvc2.answers import LeaseCommit
from kvc2.client import (
    Admin,
    ArenaTerms,
    Client,
    NamespaceHandle,
    PoolMemory,
    SessionOptions,
    Streams,
)
from kvc2.config import CpuConfig, LimitsConfig
from kvc2.errors import InvalidRequest, LimitReached, NotFound
from kvc2.layout import Layout, Segment
from kvc2.payloads import with_payload
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import LAYERS, PAGE_SIZE, TinyEngine, identity
from tests.doubles.mutations import Mutator, written

MIB = 1 << 20
BLOCKS = 4
SMALL, LARGE = 2048, 3 * MIB + 4096  # bytes of a payload: a part of a message, and four messages


def record(payload_bytes: int) -> Layout:
    """A page lies in one piece."""
    size = payload_bytes // (2 * LAYERS)
    parts = [(layer, kv, size * (2 * layer + kv)) for layer in range(LAYERS) for kv in (0, 1)]
    segments = tuple(Segment(layer, kv, size, at, payload_bytes) for layer, kv, at in parts)
    return Layout(segments, PAGE_SIZE)


def prompt(seed: int, blocks: int = BLOCKS) -> NDArray[np.uint32]:
    tokens = np.random.default_rng(seed).integers(0, 1 << 20, blocks * PAGE_SIZE + 1)
    return tokens.astype(np.uint32)


class Remote(TinyEngine):
    """A client without a pool and without the arena."""

    def __init__(self, address: str, payload_bytes: int) -> None:
        super().__init__(address)
        self.client.close()
        self.payload_bytes = payload_bytes
        self.client = Client(
            address,
            pool=PoolMemory(0),
            layout=record(payload_bytes),
            engine=self,
            options=SessionOptions("remote", expiry_s=30),  # a busy machine is no fault of it
        )
        self.streams = Streams(self.client)

    @property
    def _identity(self) -> bytes:
        segment_bytes = self.payload_bytes // (2 * LAYERS)
        return identity(head_size=segment_bytes // (4 * PAGE_SIZE)).encode()

    @property
    def tokens(self) -> NamespaceHandle:
        return self.client.open_namespace(self._identity)

    @property
    def keys(self) -> NamespaceHandle:
        return self.client.open_handle(NamespaceHandle(self._identity, opaque=True))

    def payloads(self, seed: int, blocks: int = BLOCKS) -> NDArray[np.uint8]:
        rows = np.random.default_rng(1000 + seed).bytes(blocks * self.payload_bytes)
        return np.frombuffer(rows, np.uint8).reshape(blocks, -1)

    def store(self, seed: int, blocks: int = BLOCKS) -> list[int]:
        commit = LeaseCommit(b"", 0, prompt(seed, blocks)[:-1], answers.NO_PAGES)
        return list(self.streams.write(self.tokens, commit, self.payloads(seed, blocks)))

    def lease(self, request_id: bytes, seed: int, blocks: int = BLOCKS) -> answers.Acquired:
        return self.client.acquire_in_arena(self.tokens, request_id, prompt(seed, blocks))

    def rows(self, blocks: int = BLOCKS) -> NDArray[np.uint8]:
        return np.zeros((blocks, self.payload_bytes), np.uint8)

    def found(self, seed: int, blocks: int = BLOCKS) -> int:
        """Blocks of a prompt that are cached."""
        matched = self.client.match(self.tokens, prompt(seed, blocks)).matched_tokens
        return matched // PAGE_SIZE


@contextlib.contextmanager
def remote(
    folder: Path, payload_bytes: int = SMALL, **changes: Any
) -> Iterator[tuple[ServedDaemon, Remote]]:
    large = {"cpu": CpuConfig.of_bytes(64 * MIB), "slab_bytes": 8 * MIB}
    changes = {**(large if payload_bytes > MIB else {}), **changes}
    config = serve_config(folder, disk=True, **changes)
    with ServedDaemon(config, cache=None) as served, Remote(served.address, payload_bytes) as one:
        yield served, one
        nothing_is_held(served, leases=len(session_of(served).leases))


def session_of(served: ServedDaemon) -> Any:
    return next(iter(served.daemon.attachments.table))


def streams_under_way(served: ServedDaemon) -> int:
    return len(served.daemon.calls.streams.under_way)


def nothing_is_held(served: ServedDaemon, *, leases: int = 0) -> None:
    """No page is private, no lease open but these, and no stream counted."""
    served.on_loop(served.daemon.cache.index.check)
    stats = served.on_loop(served.daemon.cache.stats)
    cpu = next(each for each in stats.tiers if each.tier == "cpu")
    assert (cpu.private_pages, stats.leases) == (0, leases)
    assert streams_under_way(served) == 0


def until(served: ServedDaemon, condition: Any) -> None:
    """On the daemon's loop, looked at whenever it has turned."""
    done = threading.Event()

    def look() -> None:
        if condition():
            done.set()
        elif not done.is_set():
            served.loop.call_later(0.001, look)

    served.loop.call_soon_threadsafe(look)
    assert done.wait(20)


SIZES = pytest.mark.parametrize("payload_bytes", [SMALL, LARGE])


@SIZES
def test_what_was_written_is_read_byte_by_byte_from_memory_and_from_disk(
    tmp_path: Path, payload_bytes: int
) -> None:
    with remote(tmp_path, payload_bytes) as (served, one), Admin(served.address) as admin:
        assert one.store(1) == [0] * BLOCKS
        assert one.store(1) == [1] * BLOCKS  # it is there
        for evict in (False, True):
            if evict:
                admin.flush(10)
                assert admin.evict("cpu").evicted_blocks == BLOCKS
            assert one.lease(b"a", 1).matched_tokens == BLOCKS * PAGE_SIZE
            into = one.rows()
            assert one.streams.read(b"a", into).tolist() == [0, 1, 2, 3]
            np.testing.assert_array_equal(into, one.payloads(1))
            into = one.rows(2)
            assert one.streams.read(b"a", into, first_block=1, blocks=2).tolist() == [1, 2]
            np.testing.assert_array_equal(into, one.payloads(1)[1:3])
            one.client.release([b"a"])


@SIZES
def test_keys_are_written_and_read_and_those_that_are_not_there_are_left_out(
    tmp_path: Path, payload_bytes: int
) -> None:
    with remote(tmp_path, payload_bytes) as (served, one), Admin(served.address) as admin:
        keys = [b"one", b"two", b"three"]
        payloads = one.payloads(1, 3)
        assert one.streams.write_keys(one.keys, keys, payloads).tolist() == [0] * 3
        again = one.streams.write_keys(one.keys, [b"new", b"two"], one.payloads(2, 2))
        assert again.tolist() == [0, 1]
        for evict in (False, True):
            if evict:
                admin.flush(10)
                assert admin.evict("cpu").evicted_blocks == 4
            one.client.acquire_keys(one.keys, b"k", [b"three", b"absent", b"two"])
            into = one.rows(2)
            assert one.streams.read(b"k", into).tolist() == [0, 2]
            np.testing.assert_array_equal(into, payloads[[2, 1]])
            one.client.release([b"k"])


def test_a_lease_takes_blocks_where_its_prefix_ends_and_the_same_again(tmp_path: Path) -> None:
    with remote(tmp_path) as (_, one):
        one.store(1, 2)
        assert one.lease(b"a", 1).matched_tokens == 2 * PAGE_SIZE
        rest = LeaseCommit(b"a", 2, prompt(1)[2 * PAGE_SIZE : -1], answers.NO_PAGES)
        payloads = one.payloads(1)[2:]
        with pytest.raises(InvalidRequest, match=r"commit\.first_block"):
            one.streams.write(
                one.tokens, LeaseCommit(b"", 2, rest.tokens, answers.NO_PAGES), payloads
            )
        assert one.streams.write(one.tokens, rest, payloads).tolist() == [0, 0]
        assert one.streams.write(one.tokens, rest, payloads).tolist() == [0, 0]
        assert one.lease(b"b", 1).matched_tokens == BLOCKS * PAGE_SIZE
        into = one.rows(1)
        assert one.streams.read(b"b", into, first_block=3).tolist() == [3]
        np.testing.assert_array_equal(into, one.payloads(1)[3:])


def test_blocks_that_the_client_skipped_are_not_read(tmp_path: Path) -> None:
    with remote(tmp_path) as (_, one):
        one.store(1)
        found = one.client.acquire_in_arena(one.tokens, b"a", prompt(1), ArenaTerms(skip_blocks=1))
        assert found.first_block == 1
        with pytest.raises(InvalidRequest, match="first_block = 0: 1 to 3"):
            one.streams.read(b"a", one.rows())
        into = one.rows(3)
        assert one.streams.read(b"a", into, first_block=1).tolist() == [1, 2, 3]
        np.testing.assert_array_equal(into, one.payloads(1)[1:])


def test_several_streams_at_once_do_not_mix(tmp_path: Path) -> None:
    with remote(tmp_path, LARGE, limits=LimitsConfig(max_tokens=1 << 17, max_streams=8)) as (
        _,
        one,
    ):

        def both(seed: int) -> None:
            assert one.store(seed, 2) == [0, 0]
            name = b"%d" % seed
            one.lease(name, seed, 2)
            into = one.rows(2)
            assert one.streams.read(name, into).tolist() == [0, 1]
            np.testing.assert_array_equal(into, one.payloads(seed, 2))
            one.client.release([name])

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(both, range(6)))


# ---- streams by hand


class Hand:
    """Messages of a Write as a client never sends them."""

    def __init__(self, served: ServedDaemon, one: Remote, seed: int = 1) -> None:
        self.one, self.payloads = one, one.payloads(seed)
        self.channel = grpc.insecure_channel(
            served.address,
            [("grpc.http2.bdp_probe", 0)],  # the window doesn't grow
        )
        connection = one.client._keeper.current()
        self.commit = pb.LeaseCommit(
            namespace_id=one.client._keeper.number(connection, one.tokens),
            tokens=prompt(seed)[:-1].tobytes(),
        )
        self.first = pb.WriteRequest(session=connection.head, commit=self.commit)
        self.head = connection.head

    def message(self, block: int, offset: int = 0, **changes: Any) -> pb.WriteRequest:
        """A whole block in one message."""
        payload = self.payloads[block % BLOCKS].tobytes()
        values = {"payload": payload, "checksum": _core.xxh3_128(payload)}
        return pb.WriteRequest(block=block, offset=offset, **{**values, **changes})

    def begin(self, messages: Iterator[pb.WriteRequest]) -> Any:
        stub = self.channel.stream_unary(
            "/kvc2.v1.Cache/Write",
            request_serializer=pb.WriteRequest.SerializeToString,
            response_deserializer=pb.WriteResponse.FromString,
        )
        return stub.future(messages, timeout=20)

    def refusal(self, *messages: pb.WriteRequest) -> tuple[str, str]:
        call = self.begin(iter(messages))
        return call.code().name, call.details()

    def read(self, request_id: bytes, **fields: int) -> Any:
        stub = self.channel.unary_stream(
            "/kvc2.v1.Cache/Read",
            request_serializer=pb.ReadRequest.SerializeToString,
            response_deserializer=pb.ReadResponse.FromString,
        )
        return stub(pb.ReadRequest(session=self.head, request_id=request_id, **fields), timeout=20)

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


BAD = {
    "another hash": ((1, 0, {"checksum": bytes(16)}), "checksum"),
    "no hash": ((1, 0, {"checksum": b""}), "checksum"),
    "a hash too soon": ((1, 0, {"payload": b"abc", "checksum": bytes(16)}), "checksum"),
    "another block": ((2, 0, {}), "block = 2: 1, the next one"),
    "the same block again": ((0, 0, {}), "block = 0: 1, the next one"),
    "a gap": ((1, 8, {}), "offset = 8: 0"),
    "too many bytes": ((1, 0, {"payload": bytes(SMALL + 1)}), f"1 to {SMALL}"),
    "nothing": ((1, 0, {"payload": b""}), "payload = '0 bytes'"),
    "a commit": ((1, 0, {"commit": pb.LeaseCommit(tokens=b"1234")}), "commit = 'set'"),
    "a session": ((1, 0, {"session": pb.SessionRef()}), "session = 'set'"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_block_is_refused_by_name_and_what_was_whole_before_stays(
    tmp_path: Path, what: str
) -> None:
    (block, offset, changes), words = BAD[what]
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        bad = hand.message(block, offset, **changes)
        status, said = hand.refusal(hand.first, hand.message(0), bad)
        assert (status, words in said) == ("INVALID_ARGUMENT", True), said
        nothing_is_held(served)
        assert one.found(1) == 1
        assert one.store(1) == [1, 0, 0, 0]  # and the rest can come
        one.lease(b"a", 1)
        into = one.rows()
        one.streams.read(b"a", into)
        np.testing.assert_array_equal(into, one.payloads(1))


def test_half_a_stream_is_no_block(tmp_path: Path) -> None:
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        half = hand.message(1, payload=bytes(100), checksum=b"")
        for messages, found in (((), 0), ((hand.message(0),), 1), ((hand.message(0), half), 1)):
            status, said = hand.refusal(hand.first, *messages)
            assert (status, "the stream ended" in said) == ("INVALID_ARGUMENT", True)
            assert one.found(1) == found
        whole = [hand.message(block) for block in range(BLOCKS)]
        status, said = hand.refusal(hand.first, *whole, hand.message(4))
        assert (status, "more than 4 blocks" in said) == ("INVALID_ARGUMENT", True)
        assert hand.begin(iter([hand.first, *whole])).result().results == bytes([1] * BLOCKS)


def several(hand: Hand, first: int, end: int, **changes: Any) -> pb.WriteRequest:
    """Whole blocks in one message."""
    each = [hand.message(block) for block in range(first, end)]
    values = {
        "payload": b"".join(message.payload for message in each),
        "checksum": b"".join(message.checksum for message in each),
    }
    return pb.WriteRequest(block=first, **{**values, **changes})


def test_a_message_may_hold_several_blocks_and_those_before_a_bad_one_stay(tmp_path: Path) -> None:
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        right = several(hand, 1, 4)
        wrong = right.checksum[:16] + bytes(16) + right.checksum[32:]
        status, said = hand.refusal(
            hand.first, hand.message(0), several(hand, 1, 4, checksum=wrong)
        )
        assert (status, "block 2" in said) == ("INVALID_ARGUMENT", True), said
        assert one.found(1) == 2
        for bad, words in (
            (several(hand, 1, 4, checksum=right.checksum[:-1]), "payload = '6144 bytes'"),
            (several(hand, 1, 4, payload=right.payload[:-1]), "payload = '6143 bytes'"),
            (several(hand, 1, 4, offset=8), "offset = 8: 0"),
            (several(hand, 2, 4), "block = 2: 1, the next one"),
            (several(hand, 1, 5), "more than 4 blocks"),
        ):
            status, said = hand.refusal(hand.first, hand.message(0), bad)
            assert (status, words in said) == ("INVALID_ARGUMENT", True), said
        nothing_is_held(served)
        call = hand.begin(iter([hand.first, hand.message(0), right]))
        assert call.result().results == bytes([1] * BLOCKS)


def test_small_blocks_are_read_several_to_a_message(tmp_path: Path) -> None:
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        one.store(1)
        one.lease(b"a", 1)
        (message,) = hand.read(b"a")
        assert (message.block, message.payload) == (0, one.payloads(1).tobytes())
        assert message.checksum == several(hand, 0, BLOCKS).checksum


COMMIT_FIELDS = set(pb.LeaseCommit.DESCRIPTOR.fields_by_name)
FIRST = {
    "no session": ({"session": pb.SessionRef()}, "FAILED_PRECONDITION", "session"),
    "a payload": ({"payload": b"1"}, "INVALID_ARGUMENT", "payload"),
    "no commit": ({"commit": pb.LeaseCommit()}, "NOT_FOUND", "namespace_id"),
    "pages": ({"pages": [pb.ComponentPages(pages=b"1234")]}, "INVALID_ARGUMENT", "commit.pages"),
    "half a block": ({"tokens": bytes(4 * 17)}, "INVALID_ARGUMENT", "commit.tokens"),
    "no tokens": ({"tokens": b""}, "INVALID_ARGUMENT", "commit.tokens"),
    "keys": ({"keys": [b"k"]}, "INVALID_ARGUMENT", "commit.keys"),
    "nobody's lease": ({"request_id": b"r", "namespace_id": 0}, "NOT_FOUND", "commit.request_id"),
    "extras": ({"extras": [pb.Media()]}, "INVALID_ARGUMENT", "commit.extras[0].num_tokens"),
}


@pytest.mark.parametrize("what", FIRST)
def test_a_first_message_that_can_t_be_is_refused_by_name(tmp_path: Path, what: str) -> None:
    changes, wanted, words = FIRST[what]
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        commit = {each.name: value for each, value in hand.commit.ListFields()}
        commit |= {name: each for name, each in changes.items() if name in COMMIT_FIELDS}
        values = {"session": hand.head, "commit": pb.LeaseCommit(**commit)}
        values |= {name: each for name, each in changes.items() if name not in COMMIT_FIELDS}
        status, said = hand.refusal(pb.WriteRequest(**values))
        assert (status, words in said) == (wanted, True), said
        assert hand.refusal()[0] == "INVALID_ARGUMENT"


def test_reads_name_what_they_refuse(tmp_path: Path) -> None:
    with remote(tmp_path) as (_, one):
        one.store(1)
        one.lease(b"a", 1)
        for fields, words in (
            ({"first_block": 4}, "first_block = 4: 0 to 3"),
            ({"blocks": 5}, "blocks = 5: at most 4"),
            ({"first_block": 2, "blocks": 3}, "blocks = 3: at most 2"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                one.streams.read(b"a", one.rows(), **fields)
        with pytest.raises(NotFound, match="request_id"):
            one.streams.read(b"nobody", one.rows())
        with pytest.raises(InvalidRequest, match="request_id"):
            one.streams.read(b"", one.rows())
        with pytest.raises(InvalidRequest, match="into = '3 rows'"):
            one.streams.read(b"a", one.rows(3))
        with pytest.raises(InvalidRequest, match="into = 'rows of 2047 bytes'"):
            one.streams.read(b"a", np.zeros((4, SMALL - 1), np.uint8))


def test_a_block_that_comes_damaged_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote(tmp_path) as (_, one):
        one.store(1)
        one.lease(b"a", 1)
        bad = _core.xxh3_128(one.payloads(1)[1])

        async def wrong(payload: memoryview) -> bytes:
            found = _core.xxh3_128(payload)
            return bytes(16) if found == bad else found

        monkeypatch.setattr("kvc2.server.streams.hash_of", wrong)
        into = one.rows()
        assert one.streams.read(b"a", into).tolist() == [0, 2, 3]
        np.testing.assert_array_equal(into[:3], one.payloads(1)[[0, 2, 3]])


def test_a_lease_that_holds_nothing_reads_as_nothing(tmp_path: Path) -> None:
    with remote(tmp_path) as (_, one):
        one.lease(b"a", 1)
        assert one.streams.read(b"a", one.rows()).tolist() == []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an element for each message that a Read has made."""
    counted: list[int] = []

    def count(message: Any, *rest: Any) -> bytes:
        counted.append(message.block)
        return with_payload(message, *rest)

    monkeypatch.setattr("kvc2.payloads.with_payload", count)
    return counted


def stalled(hand: Hand, served: ServedDaemon, made: list[int]) -> Any:
    """A Read that waits: its client has taken one message, and there is no room for another."""
    del made[:]
    call = hand.read(b"a")
    next(call)
    until(served, lambda: len(made) >= 2)
    return call


def rest_of(call: Any) -> tuple[list[Any], str, str]:
    messages = []
    with contextlib.suppress(grpc.RpcError):
        messages.extend(call)
    return messages, call.code().name, call.details()


def test_a_lease_that_is_released_ends_its_read_and_no_byte_is_wrong(
    tmp_path: Path, made: list[int]
) -> None:
    with remote(tmp_path, LARGE) as (served, one), Hand(served, one) as hand:
        one.store(1)
        one.lease(b"a", 1)
        call = stalled(hand, served, made)
        one.client.release([b"a"])
        until(served, lambda: streams_under_way(served) == 0)
        with Admin(served.address) as admin:
            admin.flush(10)
            admin.evict("cpu")
        one.store(2, 8)  # over what was there
        messages, status, said = rest_of(call)
        assert (status, "released during the stream" in said) == ("NOT_FOUND", True)
        truth = one.payloads(1)
        for each in messages:
            part = truth[each.block, each.offset : each.offset + len(each.payload)]
            assert part.tobytes() == each.payload


def test_a_session_that_ends_ends_its_streams(tmp_path: Path, made: list[int]) -> None:
    config = serve_config(tmp_path, cpu=CpuConfig.of_bytes(64 * MIB), slab_bytes=8 * MIB)
    with ServedDaemon(config, cache=None) as served, Remote(served.address, LARGE) as one:
        one.store(1)
        one.lease(b"a", 1)
        session, go_on = session_of(served), threading.Event()
        with Hand(served, one, seed=3) as hand:
            call = stalled(hand, served, made)

            def messages() -> Iterator[pb.WriteRequest]:
                yield hand.first
                yield hand.message(0, payload=bytes(10), checksum=b"")
                go_on.wait(20)

            write = hand.begin(messages())
            until(served, lambda: streams_under_way(served) == 2)
            served.on_loop(session.give_up)
            assert write.code().name == "FAILED_PRECONDITION"
            until(served, lambda: streams_under_way(served) == 0)
            assert rest_of(call)[1] == "FAILED_PRECONDITION"
            go_on.set()
        assert one.wait_detached(1)
        assert one.client.wait_attached(10)
        nothing_is_held(served)


@pytest.mark.parametrize("rpc", ["Read", "Write"])
def test_a_cancelled_stream_leaves_nothing(tmp_path: Path, rpc: str, made: list[int]) -> None:
    with remote(tmp_path, LARGE) as (served, one), Hand(served, one, seed=3) as hand:
        one.store(1)
        one.lease(b"a", 1)
        go_on = threading.Event()

        def messages() -> Iterator[pb.WriteRequest]:
            yield hand.first
            yield hand.message(0, payload=bytes(MIB), checksum=b"")
            go_on.wait(20)

        if rpc == "Read":
            call = stalled(hand, served, made)
        else:
            call = hand.begin(messages())
            until(served, lambda: private_pages(served) == 1)
        call.cancel()
        go_on.set()
        until(served, lambda: streams_under_way(served) == 0)
        assert one.found(3) == 0


def private_pages(served: ServedDaemon) -> int:
    """On the daemon's loop."""
    tiers = served.daemon.cache.stats().tiers
    return sum(each.private_pages for each in tiers if each.tier == "cpu")


def test_a_client_that_sends_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        monkeypatch.setattr("kvc2.server.streams.SILENT_S", 0.05)
        for start in ([], [hand.first], [hand.first, hand.message(0)]):
            go_on = threading.Event()

            def messages(start: Any = start, go_on: Any = go_on) -> Iterator[pb.WriteRequest]:
                yield from start
                go_on.wait(20)

            call = hand.begin(messages())
            assert call.code().name == "INVALID_ARGUMENT"
            assert "message = 'nothing': within 0.05 s" in call.details()
            go_on.set()
        nothing_is_held(served)


def test_a_full_arena_answers_no_room_at_once_and_works_again(tmp_path: Path) -> None:
    config = serve_config(tmp_path, cpu=CpuConfig.of_bytes(2 * MIB))
    with ServedDaemon(config, cache=None) as served, Remote(served.address, SMALL) as one:
        held = []
        for seed in range(1000):
            results = one.store(seed, 16)
            held.append(b"%d" % seed)
            one.lease(held[-1], seed, 16)
            if 3 in results:
                break
        else:
            raise AssertionError("it took all")
        assert sorted(results) == results  # none after the first without room
        assert set(results) <= {0, 3}
        assert one.store(5000) == [3] * BLOCKS
        nothing_is_held(served, leases=len(held))
        one.client.release(held[:4])
        assert one.store(5000) == [0] * BLOCKS


def test_one_stream_too_many_is_refused_by_name(tmp_path: Path, made: list[int]) -> None:
    limits = LimitsConfig(max_tokens=1 << 17, max_streams=1)
    with remote(tmp_path, LARGE, limits=limits) as (served, one), Hand(served, one) as hand:
        assert one.client.limits.max_streams == 1
        one.store(1)
        one.lease(b"a", 1)
        call = stalled(hand, served, made)
        with pytest.raises(LimitReached, match=r"limits\.max_streams = 1"):
            one.store(2)
        with pytest.raises(LimitReached, match=r"limits\.max_streams = 1"):
            one.streams.read(b"a", one.rows())
        call.cancel()
        until(served, lambda: streams_under_way(served) == 0)
        assert one.store(2) == [0] * BLOCKS


def test_blocks_of_another_layout_than_the_pool_s_go_both_ways(tmp_path: Path) -> None:
    foreign = b'{"engine":"other","fields":{"page_size":16},"schema":"foreign/1","weights":"w"}'
    with remote(tmp_path) as (_, one):
        other = NamespaceHandle(foreign, layout=record(2 * SMALL), opaque=True)
        at = one.client.open_handle(other)
        payloads = np.arange(2 * SMALL, dtype=np.uint32).astype(np.uint8)[None]
        assert one.streams.write_keys(at, [b"k"], payloads).tolist() == [0]
        one.client.acquire_keys(at, b"k", [b"k"])
        into = np.zeros_like(payloads)
        assert one.streams.read(b"k", into).tolist() == [0]
        np.testing.assert_array_equal(into, payloads)


def test_a_write_through_is_answered_when_it_is_on_disk(tmp_path: Path) -> None:
    with remote(tmp_path, write_policy="through") as (served, one):
        assert one.store(1) == [0] * BLOCKS
        stats = served.on_loop(served.daemon.cache.stats)
        on_disk = next(each for each in stats.tiers if each.tier == "disk")
        assert on_disk.resident_pages == BLOCKS


KILLED = """
import sys, threading
from pathlib import Path
from tests.kvc2.server.test_streams import LARGE, Remote, Hand, ServedDaemon
class Served: address = sys.argv[1]
with Remote(sys.argv[1], LARGE) as one, Hand(Served, one, seed=3) as hand:
    one.store(1); one.lease(b"a", 1)
    read = hand.read(b"a"); next(read)
    def messages():
        yield hand.first
        yield hand.message(0, payload=bytes(1 << 20), checksum=b"")
        threading.Event().wait()
    write = hand.begin(messages())
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_a_client_that_is_killed_in_mid_stream_leaves_nothing(tmp_path: Path) -> None:
    config = serve_config(tmp_path, cpu=CpuConfig.of_bytes(64 * MIB), slab_bytes=8 * MIB)
    with ServedDaemon(config, cache=None) as served:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, served.address], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            until(served, lambda: streams_under_way(served) == 2 and private_pages(served) == 1)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        until(
            served,
            lambda: not len(served.daemon.attachments.table) and not streams_under_way(served),
        )
        until(served, lambda: private_pages(served) == 0)
        with Remote(served.address, LARGE) as one:
            assert one.found(1) == BLOCKS
            assert one.found(3) == 0
            nothing_is_held(served)
            with Admin(served.address) as admin:
                counters = admin.stats().counters
            assert counters["faults_total{kind=internal_error}"] == 0


def test_mutated_streams_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with remote(tmp_path) as (served, one), Hand(served, one) as hand:
        mutator, statuses = Mutator(5), Counter()
        stub = hand.channel.stream_unary("/kvc2.v1.Cache/Write", None, None)
        for number in range(300):
            messages = written(hand.head, hand.commit.namespace_id, number % 7)
            at = mutator.random.randrange(len(messages))
            data = [each.SerializeToString() for each in messages]
            data[at] = mutator.message([messages[at]])
            if mutator.random.random() < 0.2:
                mutator.random.shuffle(data)
            call = stub.future(iter(data), timeout=20)
            statuses[call.code().name] += 1
        print(dict(statuses))
        assert set(statuses) <= {
            *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"),
        }
        assert min(statuses["OK"], statuses["INVALID_ARGUMENT"]) > 10
        nothing_is_held(served)
        with Admin(served.address) as admin:
            assert admin.stats().counters["faults_total{kind=internal_error}"] == 0
