"""Blocks under keys of an engine's own, in batches, by a real daemon: what was put is what is got,
into whatever memory the engine chooses, and a fault is a no."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2.answers import Limits
from kvc2.client import Admin, Completions, Objects, open_objects
from kvc2.client import objects as objects_module
from kvc2.client.staging import Staging
from kvc2.errors import Detached, InvalidRequest
from kvc2.foreign_identity import Foreign
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.waiting import wait_until

BYTES = 10_000  # no multiple of anything
IDENTITY = Foreign("test", "w", {"page_size": 1}).encode()
KEYS = [b"key %d" % each for each in range(40)]
WAIT_S = 20.0


def rows(seed: int, count: int = len(KEYS)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), np.uint8)


def opened(address: str, **changes: int) -> Objects:
    return open_objects(address, IDENTITY, BYTES, **{"staging_bytes": 8 * BYTES, **changes})


@contextlib.contextmanager
def serving(folder: Path, **changes: object) -> Iterator[tuple[ServedDaemon, Objects]]:
    config = serve_config(folder, **{"disk": True, **changes})
    with ServedDaemon(config, cache=None) as served:
        objects = opened(served.address)
        assert objects.client.wait_attached(WAIT_S), objects.client.last_refusal
        yield served, objects
        wait_until(lambda: served.on_loop(served.daemon.cache.stats).leases == 0)
        assert sorted(objects._storing._staging._free) == list(
            range(objects._storing._staging.num_pages)
        )
        objects.close()
        served.on_loop(served.daemon.cache.index.check)


def read(objects: Objects, keys: list[bytes]) -> tuple[list[bool], NDArray[np.uint8]]:
    into = np.zeros((len(keys), BYTES), np.uint8)
    return objects.get_into(keys, into).tolist(), into


def test_what_was_put_is_got_from_memory_and_from_disk(tmp_path: Path) -> None:
    """More keys than there are staging pages."""
    with serving(tmp_path) as (served, objects), Admin(served.address) as admin:
        assert not objects.exists(KEYS).any()
        assert read(objects, KEYS)[0] == [False] * len(KEYS)
        assert objects.put_from(KEYS, rows(1)).all()
        assert objects.put_from(KEYS, rows(2)).all()  # what is there stays as it is
        asked = [KEYS[7], b"absent", *KEYS[20:30], KEYS[7]]
        there = [True, False, *[True] * 11]
        want = rows(1)[[7, 0, *range(20, 30), 7]]
        for _ in ("memory", "disk"):
            assert objects.exists(asked).tolist() == there
            found, into = read(objects, asked)
            assert found == there
            np.testing.assert_array_equal(into[there], want[there])
            admin.flush(10)
            admin.evict("cpu")


def test_one_client_has_blocks_of_several_sizes(tmp_path: Path) -> None:
    """Under the same keys; larger ones than the staging pages too."""
    with serving(tmp_path) as (served, objects), Admin(served.address) as admin:
        for size in (100, 3 * BYTES):
            identity = Foreign("test", "w", {"page_size": 1, "bytes": size}).encode()
            other = objects.of(identity, size)
            values = np.random.default_rng(size).integers(0, 256, (12, size), np.uint8)
            first = (ctypes.c_ubyte * size).from_address(values.ctypes.data)
            assert not other.exists(KEYS).any()
            assert other.put_from(KEYS[:1], [first]).all()
            assert other.put_from(KEYS[:12], values.data).all()
            admin.flush(10)
            admin.evict("cpu")
            into = np.zeros_like(values)
            assert other.get_into(KEYS[:13], [*into, bytearray(size)]).tolist() == [True] * 12 + [
                False
            ]
            np.testing.assert_array_equal(into, values)
            assert not objects.exists(KEYS).any()
            other.close()
        assert objects.put_from(KEYS, rows(1)).all()


def test_one_identity_has_one_size_in_a_session(tmp_path: Path) -> None:
    """What is told of one layout would be read as the other's."""
    with serving(tmp_path) as (_, objects):
        assert objects.put_from(KEYS, rows(1)).all()
        with pytest.raises(InvalidRequest, match="layout"):
            objects.of(IDENTITY, 100)
        np.testing.assert_array_equal(read(objects, KEYS)[1], rows(1))


def test_an_engine_chooses_the_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, objects):
        sources = [bytes(rows(1)[0]), bytearray(rows(1)[1]), memoryview(rows(1)[2])]
        assert objects.put_from(KEYS[:3], list(sources)).all()
        memory = np.zeros(BYTES, np.uint8)
        at = (ctypes.c_ubyte * BYTES).from_address(memory.ctypes.data)
        mine = bytearray(BYTES)
        assert objects.get_into(KEYS[:2], [mine, at]).all()
        assert bytes(mine) == sources[0]
        assert memory.tobytes() == bytes(sources[1])


@pytest.mark.parametrize(
    "buffers",
    [
        bytearray(BYTES),
        bytearray(2 * BYTES + 1),
        [bytearray(BYTES)],
        [bytearray(BYTES), bytearray(BYTES - 1)],
        bytes(2 * BYTES),
        [bytearray(BYTES), bytes(BYTES)],
    ],
)
def test_buffers_that_do_not_fit_are_refused(tmp_path: Path, buffers: object) -> None:
    objects = opened(f"unix:{tmp_path}/none")
    with pytest.raises(InvalidRequest, match="buffers"):
        objects.get_into(KEYS[:2], buffers)
    objects.close()


def test_a_key_twice_is_stored_once(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, objects):
        assert objects.put_from([b"a", b"b", b"a"], rows(1, 3)).tolist() == [True] * 3
        found, into = read(objects, [b"a", b"b"])
        assert found == [True, True]
        np.testing.assert_array_equal(into, rows(1, 3)[:2])


def test_nothing_is_asked_of_no_keys(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, objects):
        assert objects.exists([]).size == 0
        assert objects.get_into([], bytearray()).size == 0
        assert objects.put_from([], []).size == 0


def test_a_key_that_can_not_be_is_refused_with_the_fields_name(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, objects):
        for keys in ([b""], [b"x" * 65]):
            with pytest.raises(InvalidRequest, match="keys"):
                objects.put_from(keys, rows(1, 1))


def test_batches_are_cut_by_what_a_daemon_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as (_, objects):
        told: list[int] = []

        def counted(name: str) -> None:
            """Of how many keys each call was."""
            call = getattr(objects.client, name)
            at = {"match_keys": 1, "acquire_keys": 2}[name]
            monkeypatch.setattr(
                objects.client,
                name,
                lambda *given, **named: told.append(len(given[at])) or call(*given, **named),
            )

        counted("match_keys")
        counted("acquire_keys")
        limits = objects.client.limits
        few = Limits(**{**vars(limits), "max_keys": 16})
        monkeypatch.setattr(type(objects.client), "limits", property(lambda _: few))
        objects.exists(KEYS)
        assert told == [16, 16, 8]
        monkeypatch.setattr(objects_module, "BYTES_A_CALL", 15 * BYTES)
        objects.exists(KEYS)  # moves no bytes
        assert told[3:] == [16, 16, 8]
        read(objects, KEYS)
        assert told[6:] == [15, 15, 10]


def test_a_full_arena_takes_what_it_can_and_says_so(tmp_path: Path) -> None:
    """8 MB; what is locked stays, and is what was put."""
    with serving(tmp_path, disk=False) as (_, objects):
        tokens, held = [], []
        for number in range(0, 2000, 8):
            keys = [b"%d" % each for each in range(number, number + 8)]
            stored = objects.put_from(keys, rows(number, 8))
            token, locked = objects.lock(keys)
            tokens.append(token)
            held += [(key, number) for key, kept in zip(keys, locked, strict=True) if kept]
            if not stored.all():
                break
        else:
            raise AssertionError("it took all")
        assert len(held) > 100
        for key, number in held[::50]:
            found, into = read(objects, [key])
            assert found == [True]
            np.testing.assert_array_equal(into[0], rows(number, 8)[int(key) - number])
        for token in tokens:
            objects.unlock(token)


def test_what_is_locked_is_not_evicted(tmp_path: Path) -> None:
    with serving(tmp_path, disk=False) as (served, objects), Admin(served.address) as admin:
        objects.put_from(KEYS, rows(1))
        token, found = objects.lock([*KEYS[:4], b"absent"])
        assert found.tolist() == [True] * 4 + [False]
        admin.evict("cpu")
        assert objects.exists(KEYS[:6]).tolist() == [True] * 4 + [False] * 2
        objects.unlock(token)
        objects.unlock(token)
        wait_until(lambda: admin.stats().leases == 0)
        admin.evict("cpu")
        assert not objects.exists(KEYS[:4]).any()


def test_many_threads_get_what_was_put(tmp_path: Path) -> None:
    """Fewer staging pages than threads want, so that they take turns."""
    with serving(tmp_path) as (_, objects), ThreadPoolExecutor(6) as threads:

        def both(number: int) -> bool:
            keys = [b"%d of %d" % (each, number) for each in range(12)]
            stored = objects.put_from(keys, rows(number, 12))
            found, into = read(objects, keys)
            return bool(stored.all()) and all(found) and bool((into == rows(number, 12)).all())

        assert all(threads.map(both, range(18)))


def test_an_eventfd_says_what_has_completed(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, objects):
        calls = Completions()
        poll = select.poll()
        poll.register(calls.fd, select.POLLIN)
        assert not poll.poll(0)
        assert calls.completed() == []
        waits = threading.Event()
        first = calls.submit(objects.put_from, KEYS, rows(1))
        held = calls.submit(waits.wait, WAIT_S)
        failed = calls.submit(objects.put_from, KEYS, bytearray(3))
        assert first.result(WAIT_S).all()
        assert poll.poll(WAIT_S * 1000)
        assert calls.completed() == [first]
        assert not poll.poll(0)
        assert calls.take(held) is None
        waits.set()
        with pytest.raises(InvalidRequest):
            failed.result(WAIT_S)
        assert poll.poll(WAIT_S * 1000)
        assert calls.take(held) is True
        assert calls.completed() == [failed]
        calls.close()


def test_what_is_read_of_a_session_that_is_over_is_not_there(tmp_path: Path) -> None:
    """The daemon ends it between the lease and the copy, and may have put others in its place."""
    with serving(tmp_path) as (served, objects):
        objects.put_from(KEYS, rows(1))
        acquire_keys, sessions = objects.client.acquire_keys, served.daemon.attachments.table

        arena, nothing = objects.client.arena, np.zeros(0, np.uint64)

        def over(*given: object, **named: object) -> object:
            found = acquire_keys(*given, **named)
            served.on_loop(next(iter(sessions)).give_up)
            wait_until(lambda: not arena.read(nothing, BYTES, bytearray()))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objects.client, "acquire_keys", over)
            assert read(objects, KEYS)[0] == [False] * len(KEYS)
        wait_until(lambda: bool(objects.exists(KEYS[:1]).any()))
        assert read(objects, KEYS)[0] == [True] * len(KEYS)


def test_a_lease_of_another_session_is_never_read_by_this_ones_view(tmp_path: Path) -> None:
    """The client attaches again between the look at the arena and the acquire."""
    with serving(tmp_path) as (served, objects):
        objects.put_from(KEYS, rows(1))
        arena, sessions = objects.client.arena, served.daemon.attachments.table
        epoch = next(iter(sessions)).epoch
        served.on_loop(next(iter(sessions)).give_up)
        wait_until(lambda: any(each.epoch > epoch for each in sessions))
        wait_until(lambda: bool(objects.exists(KEYS[:1]).any()))
        with pytest.raises(Detached):
            objects.client.acquire_keys(objects._namespace, b"a", KEYS, arena=arena)
        with pytest.raises(Detached):
            objects.client.commit_keys(
                objects._namespace, KEYS[:1], np.zeros(1, np.uint32), arena=arena
            )


def test_without_a_daemon_nothing_is_there_and_nothing_is_stored(tmp_path: Path) -> None:
    objects = opened(f"unix:{tmp_path}/none")
    assert not objects.exists(KEYS).any()
    assert not any(read(objects, KEYS)[0])
    assert not objects.put_from(KEYS, rows(1)).any()
    token, found = objects.lock(KEYS)
    assert not found.any()
    objects.unlock(token)
    objects.close()


def test_what_was_opened_is_given_back_when_it_is_closed(tmp_path: Path) -> None:
    """The staging pages, tens of megabytes."""

    def pools() -> int:
        found = 0
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found += "kvc2-pool" in os.readlink(each)
        return found

    before = pools()
    objects = opened(f"unix:{tmp_path}/none")
    assert pools() > before
    objects.close()
    assert pools() == before


@pytest.mark.parametrize("num_bytes", [0, -4, 1 << 40])
def test_blocks_of_a_size_that_can_not_be_are_refused_by_name(
    tmp_path: Path, num_bytes: int
) -> None:
    with pytest.raises(InvalidRequest, match=rf"bytes = {num_bytes}: 1 to"):
        open_objects(f"unix:{tmp_path}/none", IDENTITY, num_bytes)


def test_a_lock_that_fails_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part of its keys is refused; `serving` waits until no lease is open."""
    monkeypatch.setattr(objects_module, "KEYS_A_CALL", 4)
    with serving(tmp_path) as (_, objects):
        assert objects.put_from(KEYS, rows(1)).all()
        with pytest.raises(InvalidRequest, match="keys"):
            objects.lock([*KEYS[:4], b""])


def test_a_page_of_an_unanswered_copy_is_not_filled_before_its_session_is_over() -> None:
    staging = Staging(4)
    nothing = np.zeros(0, np.uint32)
    assert staging.kept_pages().tolist() == [0, 1, 2, 3]
    staging.on_attached(nothing)
    taken, era = staging.take(3), staging.era
    staging.hold(taken, era)
    assert staging.take(4).tolist() == [3]
    staging.on_detached(Detached("silent"))  # it may thaw and copy them
    staging.give_back(np.array([3], np.uint32))
    assert staging.take(4).tolist() == [3]
    staging.on_attached(nothing)
    assert staging.take(4).tolist() == [0, 1, 2]
    staging.hold(taken, era)  # told late: of a session that was over by then
    assert staging.take(4).tolist() == [0, 1, 2]
    staging.hold(taken, staging.era)
    staging.on_detached(Detached("dead"))
    assert staging.take(4).tolist() == [0, 1, 2]
