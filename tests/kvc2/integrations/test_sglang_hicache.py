"""SGLang's HiCache by its contract, with stand-ins of its base class and of a host pool in which
the pieces of a page lie apart."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvc2.errors import InvalidConfig, InvalidRequest
from tests.doubles.daemons import ServedDaemon, serve_config

PAGE_SIZE, TOKEN_BYTES, PAGES = 4, 1000, 24
KEYS = [f"{each:064x}" for each in range(8)]
WAIT_S = 20.0


class Storage(ABC):
    """What HiCache calls of a backend must be there."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    @abstractmethod
    def get(self) -> None: ...

    @abstractmethod
    def batch_get(self) -> None: ...

    @abstractmethod
    def set(self) -> None: ...

    @abstractmethod
    def batch_set(self) -> None: ...

    @abstractmethod
    def exists(self) -> None: ...


class HostPool:
    """[2, tokens, bytes]: all keys, then all values. `indices` are of tokens, a page's together."""

    page_size, layout, dtype = PAGE_SIZE, "page_first", "bfloat16"

    def __init__(self, seed: int, odd: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.kv = random.integers(0, 256, (2, PAGES * PAGE_SIZE, TOKEN_BYTES), np.uint8)
        self.odd = odd

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        firsts = np.asarray(indices)[::PAGE_SIZE].tolist()
        addresses = [self.kv[part, each].ctypes.data for each in firsts for part in (0, 1)]
        size = PAGE_SIZE * TOKEN_BYTES
        return addresses, [size, size - self.odd] * len(firsts)


def tokens(*pages: int) -> list[int]:
    return [PAGE_SIZE * page + each for page in pages for each in range(PAGE_SIZE)]


@pytest.fixture
def backend_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("sglang.srt.mem_cache.hicache_storage")
    module.HiCacheStorage = Storage
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = importlib.import_module("kvc2.integrations.sglang_hicache")
    yield importlib.reload(ours).Kvc2HiCache
    monkeypatch.undo()
    importlib.reload(ours)


def opened(backend_class: Any, address: str, pool: HostPool, **changes: Any) -> Any:
    values = {"model_name": "model", "tp_rank": 0, "tp_size": 1, **changes}
    made = backend_class(SimpleNamespace(extra_config={"address": address}, **values), {})
    made.register_mem_pool_host(pool)
    return made


def test_pages_are_stored_and_read_where_they_lie(backend_class: Any, tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        pool, other = HostPool(1), HostPool(2)
        first = opened(backend_class, served.address, pool)
        assert first._objects.client.wait_attached(WAIT_S)
        assert first.batch_exists(KEYS) == 0
        from_pages, into_pages = [5, 0, 7, 3], [2, 9, 11, 1]
        assert first.batch_set_v1(KEYS[:4], tokens(*from_pages)) == [True] * 4
        second = opened(backend_class, served.address, other)
        assert second._objects.client.wait_attached(WAIT_S)
        assert second.batch_exists([*KEYS[:3], "absent", KEYS[3]]) == 3
        assert second.exists(KEYS[3])
        before = other.kv.copy()
        found = second.batch_get_v1([*KEYS[:4], "absent"], tokens(*into_pages, 20))
        assert found == [True] * 4 + [False]
        expected = before
        expected[:, tokens(*into_pages)] = pool.kv[:, tokens(*from_pages)]
        expected[:, tokens(20)] = other.kv[:, tokens(20)]  # what was not found is undefined
        np.testing.assert_array_equal(other.kv, expected)
        rank = opened(backend_class, served.address, HostPool(3), tp_rank=1)
        assert rank._objects.client.wait_attached(WAIT_S)
        assert rank.batch_exists(KEYS) == 0
        for each in (first, second, rank):
            each.close()


def test_without_a_daemon_nothing_is_there_and_nothing_raises(
    backend_class: Any, tmp_path: Path
) -> None:
    backend = opened(backend_class, f"unix:{tmp_path}/none", HostPool(1))
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_get_v1(KEYS[:2], tokens(1, 2)) == [False, False]
    assert backend.batch_set_v1(KEYS[:2], tokens(1, 2)) == [False, False]
    with pytest.raises(InvalidConfig, match="interface_v1"):
        backend.batch_get(KEYS[:1])
    backend.close()


def test_pieces_of_several_sizes_are_refused_at_the_start(
    backend_class: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match="one size"):
        opened(backend_class, f"unix:{tmp_path}/none", HostPool(1, odd=1))


def test_it_can_be_imported_without_sglang() -> None:
    assert importlib.import_module("kvc2.integrations.sglang_hicache").Kvc2HiCache


@pytest.mark.parametrize("extra", [None, {}, {"address": 5}, {"address": "here"}])
def test_an_address_that_is_none_is_refused_by_name(backend_class: Any, extra: Any) -> None:
    config = SimpleNamespace(extra_config=extra, model_name="model", tp_rank=0, tp_size=1)
    with pytest.raises(InvalidRequest, match=r"extra_config\.address = .*unix:PATH"):
        backend_class(config, {})
