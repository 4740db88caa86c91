"""LMCache's second level, by its contract: three eventfds, tasks by number, results told once,
locks by key. Stand-ins of LMCache's classes have what the adapter uses of them."""

from __future__ import annotations

import importlib
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2.client import Admin
from kvc2.errors import InvalidRequest
from tests.doubles.daemons import ServedDaemon, serve_config

WAIT_S = 20.0
SIZES = {0: 4096, 1: 10_000}  # bytes of a block, by group


CALLED = (
    *("get_store_event_fd", "get_lookup_and_lock_event_fd", "get_load_event_fd"),
    *("submit_store_task", "pop_completed_store_tasks", "submit_lookup_and_lock_task"),
    *("query_lookup_and_lock_result", "submit_unlock", "submit_load_task", "query_load_result"),
    "close",
)


class Adapter:
    """What LMCache calls of an adapter must be there."""

    def __init__(self) -> None:
        self.notified: list[tuple[list[Any], list[int]]] = []
        assert all(callable(getattr(self, name)) for name in CALLED)

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.notified.append((keys, sizes))


class Bits:
    def __init__(self, size: int) -> None:
        self.told = [False] * size

    def set(self, index: int) -> None:
        self.told[index] = True


class Result(int):
    def __new__(cls, success: bool, bytes_transferred: int) -> Result:
        return super().__new__(cls, bytes_transferred if success else -1)


@dataclass(frozen=True)
class Key:
    chunk_hash: bytes
    object_group_id: int = 0
    model_name: str = "model"
    kv_rank: int = 0
    cache_salt: str = ""


@dataclass
class Block:
    """Memory of LMCache's first level."""

    byte_array: memoryview


@dataclass
class Desc:
    shapes: list[tuple[int, ...]]
    dtypes: list[np.dtype[Any]]


DESCS = {
    0: Desc([(2, 512), (1024,)], [np.dtype(np.float16), np.dtype(np.float16)]),
    1: Desc([(2, 5, 500)], [np.dtype(np.float16)]),
}


def keys(count: int, group: int = 0, **more: Any) -> list[Key]:
    return [Key(b"%32d" % each, group, **more) for each in range(count)]


def content(seed: int, count: int, group: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZES[group]), np.uint8)


def blocks(rows: NDArray[np.uint8]) -> list[Block]:
    return [Block(memoryview(row)) for row in rows]


@pytest.fixture
def adapter_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stand_ins = {
        "lmcache": {},
        "lmcache.lmcache_native": {"Bitmap": Bits},
        "lmcache.v1": {},
        "lmcache.v1.distributed": {},
        "lmcache.v1.distributed.internal_api": {"L2StoreResult": Result},
        "lmcache.v1.distributed.l2_adapters": {},
        "lmcache.v1.distributed.l2_adapters.base": {"L2AdapterInterface": Adapter},
    }
    for name, has in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(has)
        monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module("kvc2.integrations.lmcache_l2")
    yield importlib.reload(module).Kvc2L2
    monkeypatch.undo()
    importlib.reload(module)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path, disk=True), cache=None) as served:
        yield served


@pytest.fixture
def adapter(adapter_class: Any, served: ServedDaemon) -> Iterator[Any]:
    made = adapter_class({"address": served.address})
    yield made
    made.close()


def wait(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(WAIT_S * 1000)


def store(adapter: Any, given: list[Key], objects: list[Block]) -> int:
    task = adapter.submit_store_task(given, objects)
    wait(adapter.get_store_event_fd())
    told: dict[int, int] = {}
    while task not in told:
        told |= adapter.pop_completed_store_tasks()
    return told[task]


def query(adapter: Any, kind: str, task: int) -> list[bool]:
    wait(getattr(adapter, f"get_{kind}_event_fd")())
    ask = getattr(adapter, f"query_{kind}_result")
    while (found := ask(task)) is None:
        pass
    assert ask(task) is None  # it is told once
    return list(found.told)


def look_up(adapter: Any, given: list[Key], descs: dict[int, Desc] = DESCS) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(given, descs)
    return query(adapter, "lookup_and_lock", task)


def load(adapter: Any, given: list[Key], objects: list[Block]) -> list[bool]:
    return query(adapter, "load", adapter.submit_load_task(given, objects))


def test_what_is_stored_is_found_and_loaded_in_several_sizes(adapter: Any) -> None:
    both = [*keys(8), *keys(8, 1)]
    rows = [content(1, 8), content(2, 8, 1)]
    size = 8 * (SIZES[0] + SIZES[1])
    assert store(adapter, both, [*blocks(rows[0]), *blocks(rows[1])]) == size
    ((told, sizes),) = adapter.notified
    assert (told, sum(sizes)) == (both, size)
    absent = Key(b"absent")
    assert look_up(adapter, [*both, absent]) == [True] * 16 + [False]
    into = [np.zeros_like(each) for each in rows]
    wanted = [*both, absent]
    memory = [*blocks(into[0]), *blocks(into[1]), Block(memoryview(bytearray(SIZES[0])))]
    assert load(adapter, wanted, memory) == [True] * 16 + [False]
    for got, put in zip(into, rows, strict=True):
        np.testing.assert_array_equal(got, put)


@pytest.mark.parametrize("other", [{"model_name": "other"}, {"kv_rank": 1}, {"cache_salt": "salt"}])
def test_a_key_that_differs_in_anything_is_another(adapter: Any, other: dict[str, Any]) -> None:
    store(adapter, keys(2), blocks(content(1, 2)))
    assert look_up(adapter, [*keys(1), *keys(1, **other)]) == [True, False]


def test_the_event_descriptors_are_three(adapter: Any) -> None:
    names = ("store", "lookup_and_lock", "load")
    assert len({getattr(adapter, f"get_{name}_event_fd")() for name in names}) == 3


def test_what_is_locked_stays_until_each_of_its_keys_is_unlocked(
    adapter: Any, served: ServedDaemon
) -> None:
    store(adapter, keys(4), blocks(content(1, 4)))
    assert look_up(adapter, keys(4)) == [True] * 4
    assert look_up(adapter, keys(2)) == [True] * 2
    with Admin(served.address) as admin:
        assert admin.stats().leases == 2
        for unlocked, left in ((keys(4)[:3], 2), (keys(4)[3:], 1), (keys(2), 0), (keys(4), 0)):
            adapter.submit_unlock(unlocked)
            while admin.stats().leases > left:
                pass
            assert admin.stats().leases == left


def test_a_lookup_that_finds_nothing_holds_nothing(adapter: Any, served: ServedDaemon) -> None:
    """Nobody unlocks its keys, and a session may have only so many leases."""
    store(adapter, keys(1), blocks(content(1, 1)))
    for first in range(1, 4):
        assert look_up(adapter, [Key(b"%32d" % first)]) == [False]
    assert look_up(adapter, keys(1)) == [True]
    with Admin(served.address) as admin:
        while admin.stats().leases > 1:
            pass
        adapter.submit_unlock(keys(1))
        while admin.stats().leases:
            pass


def test_without_a_daemon_nothing_is_there_and_nothing_raises(
    adapter_class: Any, tmp_path: Path
) -> None:
    adapter = adapter_class({"address": f"unix:{tmp_path}/none"})
    assert adapter.report_status()["is_healthy"]
    assert store(adapter, keys(2), blocks(content(1, 2))) == -1
    status = adapter.report_status()
    assert (status["is_healthy"], status["state_by_bytes"]) == (False, {SIZES[0]: "detached"})
    assert look_up(adapter, keys(2)) == [False, False]
    assert load(adapter, keys(2), blocks(content(1, 2))) == [False, False]
    adapter.submit_unlock(keys(2))
    adapter.close()


def test_after_a_restart_of_the_engine_a_lookup_tells_the_sizes(
    adapter_class: Any, adapter: Any, served: ServedDaemon
) -> None:
    store(adapter, keys(3, 1), blocks(content(1, 3, 1)))
    again = adapter_class({"address": served.address})
    assert look_up(again, keys(3, 1)) == [True] * 3
    again.close()


@pytest.mark.parametrize("hint", [{}, {0: Desc([], [])}])
def test_a_lookup_without_a_layout_goes_by_what_was_stored(
    adapter: Any, hint: dict[int, Desc]
) -> None:
    """A layout is a hint; LMCache's own bench has none."""
    assert look_up(adapter, keys(2), hint) == [False] * 2
    store(adapter, keys(2), blocks(content(1, 2)))
    store(adapter, keys(2, model_name="other"), blocks(content(1, 2, 1)))
    both = [*keys(2), *keys(2, model_name="other"), *keys(1, model_name="third")]
    assert look_up(adapter, both, hint) == [True] * 4 + [False]


def test_a_call_that_fails_is_in_vain_and_the_next_one_works(
    adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("as it comes")

    store(adapter, keys(2), blocks(content(1, 2)))
    adapter._objects, by_size = fail, adapter._objects
    assert store(adapter, keys(2), blocks(content(1, 2))) == -1
    assert look_up(adapter, keys(2)) == [False] * 2
    assert load(adapter, keys(2), blocks(content(1, 2))) == [False] * 2
    assert [each.getMessage() for each in caplog.records] == ["a call of LMCache's failed"] * 3
    adapter._objects = by_size
    assert look_up(adapter, keys(2)) == [True] * 2


@pytest.mark.parametrize("params", [{}, {"address": 5}, {"address": "here"}])
def test_an_address_that_is_none_is_refused_by_name(
    adapter_class: Any, params: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter_params\.address = .*unix:PATH"):
        adapter_class(params)


def test_it_can_be_imported_without_lmcache() -> None:
    assert importlib.import_module("kvc2.integrations.lmcache_l2").Kvc2L2
