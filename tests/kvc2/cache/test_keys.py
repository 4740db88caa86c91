"""Opaque keys as a client sees them: arrays of them are looked up, stored and read in the arena,
each for itself; from memory, from disk and after a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvc2.answers import NOWHERE
from kvc2.client import Admin, NamespaceHandle
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
