"""Opaque keys as a client sees them: arrays of them are looked up, stored and read in the arena,
each for itself; from memory, from disk and after a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvc2.answers import NOWHERE, Asked
from kvc2.client import Admin, ArenaTerms, NamespaceHandle
from kvc2.config import LimitsConfig
from kvc2.errors import InvalidRequest
from kvc2.layout import Layout, Segment
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import identity
from tests.kvc2.cache.test_arena_leases import (
    LAYOUT_BYTES,
    Reader,
    leases,
    payloads,
    prompt,
    reading,
)

KEYS = [b"k", b"x" * 64, b"\0", b"\0\0", *(b"key %d" % each for each in range(4))]


def handle(reader: Reader, salt: bytes = b"") -> NamespaceHandle:
    wanted = NamespaceHandle(identity().encode(), salt=salt, opaque=True)
    return reader.client.open_handle(wanted)


def put(reader: Reader, at: NamespaceHandle, keys: list[bytes], seed: int = 1) -> list[int]:
    pages = reader.client.grant(len(keys))
    assert pages.size == len(keys)
    rows = np.frombuffer(reader.staging.map, np.uint8).reshape(-1, LAYOUT_BYTES)
    rows[pages] = payloads(seed, len(keys))
    del rows
    answer = reader.client.commit_keys(at, keys, pages)
    reader.client.release([], returned=pages)
    return list(answer.results[0].tolist())


def test_what_was_put_is_found_and_read_key_by_key(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader):
        at = handle(reader)
        assert reader.client.match_keys(at, KEYS).tolist() == [0] * len(KEYS)
        assert put(reader, at, KEYS) == [0] * len(KEYS)
        assert put(reader, at, KEYS[:3], seed=2) == [1] * 3  # what is there stays as it is
        mixed = [KEYS[5], b"absent", KEYS[0]]
        assert reader.client.match_keys(at, mixed).tolist() == [2, 0, 2]
        found = reader.client.acquire_keys(at, b"a", mixed)
        assert found.found.tolist() == [2, 0, 2]
        assert found.offsets[1] == NOWHERE
        there = reader.read(found.offsets[[0, 2]])
        np.testing.assert_array_equal(there, payloads(1, len(KEYS))[[5, 0]])
        reader.client.release([b"a"])
        assert leases(served) == 0
        assert reader.client.match_keys(handle(reader, b"salt"), KEYS).tolist() == [0] * len(KEYS)


def test_of_keys_none_is_skipped(tmp_path: Path) -> None:
    refused = pytest.raises(InvalidRequest, match=r"skip_blocks = 1: 0, for opaque keys")
    with reading(tmp_path) as (_, reader), refused:
        reader.client.acquire_keys(handle(reader), b"a", KEYS, ArenaTerms(skip_blocks=1))


def test_pages_are_granted_with_a_lease_on_keys(tmp_path: Path) -> None:
    """To compute what is not there into."""
    with reading(tmp_path) as (_, reader):
        terms = ArenaTerms(grant_pages=2)
        found = reader.client.acquire_keys(handle(reader), b"a", KEYS, terms)
        assert (found.found.any(), found.granted_pages.size) == (False, 2)
        reader.client.release([b"a"], returned=found.granted_pages)


def test_keys_come_from_disk_and_survive_a_restart(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        at = handle(reader)
        put(reader, at, KEYS)
        admin.flush(10)
        admin.evict("cpu")
        assert reader.client.match_keys(at, KEYS).tolist() == [3] * len(KEYS)
        found = reader.client.acquire_keys(at, b"a", [*KEYS, b"absent"])
        assert found.found.tolist() == [3] * len(KEYS) + [0]
        np.testing.assert_array_equal(reader.read(found.offsets[:-1]), payloads(1, len(KEYS)))
    with reading(tmp_path) as (_, reader):
        at = handle(reader)
        assert reader.client.match_keys(at, KEYS).tolist() == [3] * len(KEYS)
        found = reader.client.acquire_keys(at, b"a", KEYS)
        np.testing.assert_array_equal(reader.read(found.offsets), payloads(1, len(KEYS)))


def test_keys_and_tokens_are_other_namespaces_and_neither_is_taken_for_the_other(
    tmp_path: Path,
) -> None:
    with reading(tmp_path) as (_, reader):
        at, tokens = handle(reader), reader.handle
        put(reader, at, KEYS)
        reader.store(1)
        assert reader.client.match(tokens, prompt(1)).matched_tokens > 0
        with pytest.raises(InvalidRequest, match="tokens"):
            reader.client.match(at, prompt(1))
        with pytest.raises(InvalidRequest, match="keys"):
            reader.client.match_keys(tokens, KEYS)


@pytest.mark.parametrize("keys", [[], [b""], [b"ok", b"x" * 65]])
def test_a_key_has_1_to_64_bytes(tmp_path: Path, keys: list[bytes]) -> None:
    with reading(tmp_path) as (_, reader), pytest.raises(InvalidRequest, match="keys"):
        reader.client.match_keys(handle(reader), keys)


def test_a_call_has_as_many_keys_as_the_daemon_says(tmp_path: Path) -> None:
    limits = LimitsConfig(max_keys=2)
    with reading(tmp_path, limits=limits) as (_, reader):
        at = handle(reader)
        assert reader.client.match_keys(at, KEYS[:2]).tolist() == [0, 0]
        with pytest.raises(InvalidRequest, match="keys"):
            reader.client.match_keys(at, KEYS[:3])


def test_a_key_twice_in_one_commit_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    with reading(tmp_path) as (_, reader):
        at = handle(reader)
        with pytest.raises(InvalidRequest, match="each key once"):
            put(reader, at, [b"a", b"b", b"a"])
        assert reader.client.match_keys(at, [b"a", b"b"]).tolist() == [0, 0]


def test_one_session_has_namespaces_of_several_layouts(tmp_path: Path) -> None:
    """Their leases are in the arena; a page of one is never taken for one of the other."""
    small = Layout((Segment(0, 0, 512, 0, 512), Segment(1, 0, 512, 512, 512)), 1)
    with ServedDaemon(serve_config(tmp_path), cache=None) as served, Reader(served.address) as one:
        foreign = b'{"engine":"other","fields":{"page_size":1},"schema":"foreign/1","weights":"w"}'
        other = NamespaceHandle(foreign, layout=small, opaque=True)
        at = one.client.open_handle(other)
        assert one.client.match_keys(at, [b"k"]).tolist() == [0]
        put(one, handle(one), KEYS[:2])
        assert one.client.match_keys(at, KEYS[:2]).tolist() == [0, 0]
        with pytest.raises(InvalidRequest, match="layout"):
            put(one, at, KEYS[:1])


# ---- kept, brought and explained ----


def in_tiers(reader: Reader, at: NamespaceHandle, keys: list[bytes]) -> list[int]:
    return list(reader.client.match_keys(at, keys).tolist())


def test_each_pinned_key_is_kept_when_all_else_is_evicted(tmp_path: Path) -> None:
    """Whether it is there or comes later; each pin ends for itself."""
    with reading(tmp_path, disk=False) as (served, reader), Admin(served.address) as admin:
        at = handle(reader)
        put(reader, at, KEYS[:4])
        kept = [KEYS[1], KEYS[2], KEYS[5], KEYS[1]]
        found = reader.client.pin(at, Asked(keys=kept), hard=True)
        assert found.pinned.tolist() == [1] * 4
        assert (found.blocks, found.resident_blocks, found.pinned_blocks) == (3, 2, 3)
        put(reader, at, KEYS[4:])
        admin.evict("cpu")
        assert in_tiers(reader, at, KEYS) == [0, 2, 2, 0, 0, 2, 0, 0]
        assert reader.client.unpin(at, Asked(keys=[KEYS[1], b"absent", KEYS[1]])) == 1
        admin.evict("cpu")
        assert in_tiers(reader, at, KEYS) == [0, 0, 2, 0, 0, 2, 0, 0]


def test_keys_that_there_is_no_room_for_are_told_and_the_others_are_pinned(tmp_path: Path) -> None:
    with reading(tmp_path, disk=False) as (_, reader):
        at = handle(reader)
        room, most = 0, reader.client.limits.max_keys
        for begin in range(0, 1 << 20, most):
            keys = [b"%d" % each for each in range(begin, begin + most)]
            found = reader.client.pin(at, Asked(keys=keys), hard=True)
            room += found.blocks
            assert found.pinned_blocks == room
            assert found.pinned.tolist() == [1] * found.blocks + [0] * (most - found.blocks)
            if found.blocks < most:
                break
        else:
            raise AssertionError("it pinned all")
        assert room > 0
        assert reader.client.pin(at, Asked(keys=[b"0", b"more"]), hard=True).pinned.tolist() == [
            1,
            0,
        ]


def test_keys_are_prefetched_each_for_itself(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        at = handle(reader)
        put(reader, at, KEYS)
        admin.flush(10)
        admin.evict("cpu")
        wanted = [KEYS[6], b"absent", KEYS[0]]
        found = reader.client.prefetch(at, Asked(keys=wanted), deadline_s=30.0)
        size = found.tiers.cpu // 2
        assert (size > 0, found.tiers.disk, found.coming_tokens) == (True, 0, 0)
        assert in_tiers(reader, at, KEYS) == [2, 3, 3, 3, 3, 3, 2, 3]
        assert leases(served) == 0
        name = bytes.fromhex(reader.client.explain(at, Asked(keys=[KEYS[0]])).namespace)
        admin.prefetch(Asked(keys=KEYS), namespace=name, deadline_s=30.0)
        assert in_tiers(reader, at, KEYS) == [2] * len(KEYS)


def test_a_key_is_explained(tmp_path: Path) -> None:
    with reading(tmp_path) as (served, reader), Admin(served.address) as admin:
        at, other = handle(reader), handle(reader, b"salt")
        put(reader, at, KEYS[:2])
        found = reader.client.explain(at, Asked(keys=[KEYS[0]]))
        assert (found.hit_blocks, found.runs[0].tier, found.why) == (1, "cpu", "nothing")
        missed = reader.client.explain(at, Asked(keys=[b"absent"]))
        assert (missed.hit_blocks, missed.why, missed.sibling.size) == (0, "never_seen", 0)
        assert reader.client.explain(other, Asked(keys=[KEYS[0]])).why == "never_seen"  # a salt
        name = bytes.fromhex(found.namespace)
        assert admin.explain(key=KEYS[0], namespace=name).hit_blocks == 1
        reader.client.invalidate(at)
        assert admin.explain(key=KEYS[0], namespace=name).why == "invalidated"


def test_what_is_never_seen_is_not_looked_for_among_names_of_the_other_kind(
    tmp_path: Path,
) -> None:
    """One tenant has tokens and keys, of pages of the same size."""
    with reading(tmp_path) as (_, reader):
        at, tokens = handle(reader), reader.handle
        put(reader, at, KEYS[:1])
        reader.store(1)
        assert reader.client.explain(tokens, prompt(2)).why == "diverged"
        assert reader.client.explain(at, Asked(keys=[b"absent"])).why == "never_seen"


@pytest.mark.parametrize("call", ["pin", "unpin", "prefetch", "explain"])
def test_every_call_refuses_the_other_kind_of_name(tmp_path: Path, call: str) -> None:
    hard = {"hard": True} if call == "pin" else {}
    with reading(tmp_path) as (_, reader):
        at, tokens = handle(reader), reader.handle
        with pytest.raises(InvalidRequest, match=r"tokens.*opaque keys"):
            getattr(reader.client, call)(at, prompt(1), **hard)
        with pytest.raises(InvalidRequest, match=r"key.*tokens"):
            getattr(reader.client, call)(tokens, Asked(keys=[b"k"]), **hard)
        with pytest.raises(InvalidRequest, match=r"key.*1 to 64 bytes"):
            getattr(reader.client, call)(at, Asked(keys=[b"x" * 65]), **hard)


def test_keys_are_kept_and_brought_where_they_are_read(tmp_path: Path) -> None:
    with reading(tmp_path) as (_, reader):
        at = handle(reader)
        with pytest.raises(InvalidRequest, match=r"tier.*keys"):
            reader.client.pin(at, Asked(keys=KEYS), tier="gpu", hard=True)
        with pytest.raises(InvalidRequest, match=r"tier.*keys"):
            reader.client.prefetch(at, Asked(keys=KEYS), tier="gpu")


def test_tokens_in_a_namespace_of_another_layout_are_asked_for_in_the_arena(tmp_path: Path) -> None:
    """Every call that takes a prompt answers there, or refuses a place that it can't have."""
    small = Layout((Segment(0, 0, 512, 0, 512), Segment(1, 0, 512, 512, 512)), 8)
    foreign = b'{"engine":"other","fields":{"page_size":8},"schema":"foreign/1","weights":"w"}'
    with ServedDaemon(serve_config(tmp_path), cache=None) as served, Reader(served.address) as one:
        at, client = one.client.open_handle(NamespaceHandle(foreign, layout=small)), one.client
        assert client.match(at, prompt(1)).matched_tokens == 0
        assert client.acquire_in_arena(at, b"a", prompt(1)).matched_tokens == 0
        granted = client.acquire_in_arena(at, b"b", prompt(1), ArenaTerms(grant_pages=2))
        assert granted.granted_pages.size == 2  # of the pool, whose layout is another
        assert client.explain(at, prompt(1)).why == "never_seen"
        assert client.explain_request(b"a").why == "never_seen"
        assert client.pin(at, prompt(1), hard=True).blocks == len(prompt(1)) // 8
        for call, terms in ((client.pin, {"hard": True}), (client.prefetch, {})):
            with pytest.raises(InvalidRequest, match=r"tier.*layout"):
                call(at, prompt(1), tier="gpu", **terms)  # type: ignore[operator]
