"""SGLang's HiCache over kvc2: a storage backend of the kind `dynamic`, with interface_v1. Can be
imported without SGLang, and is of no use then."""

import ctypes
import hashlib
import importlib
from typing import Any

import numpy as np

from kvc2.client import open_objects
from kvc2.errors import InvalidConfig
from kvc2.foreign_identity import Foreign
from kvc2.host.address import Address
from kvc2.integrations.versions import check

try:
    from sglang.srt.mem_cache.hicache_storage import (  # type: ignore[import-not-found]
        HiCacheStorage,
    )
except ImportError:
    HiCacheStorage = object

TRIED = "0.5"  # the version that the tests drive


class Kvc2HiCache(HiCacheStorage):  # type: ignore[misc]
    """Each piece of a page (its keys, its values) is a block, since they lie apart in the pool."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        check("SGLang", TRIED, "sglang")
        self._config = storage_config
        self._address: str = (storage_config.extra_config or {}).get("address", "")
        Address.of_daemon(self._address, field="extra_config.address")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        config, torch = self._config, importlib.import_module("torch")
        first = torch.zeros(mem_pool_host.page_size, dtype=torch.int64)
        sizes = mem_pool_host.get_page_buffer_meta(first)[1]
        if len(set(sizes)) != 1:
            raise InvalidConfig("pieces of a page", sizes, "pieces of one size")
        self._pieces = len(sizes)
        pool = mem_pool_host
        lies = {"layout": str(pool.layout), "dtype": str(pool.dtype), "bytes": sizes[0]}
        part = {"tp_rank": config.tp_rank, "tp_size": config.tp_size, "page_size": 1}
        identity = Foreign("sglang", config.model_name, {**lies, **part})
        encoded = identity.encode()
        self._objects = open_objects(self._address, encoded, sizes[0], engine_name="sglang")
        self._objects.wait_attached()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return [*self._pages(self._objects.exists(self._names(keys))), False].index(False)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        names, pieces = self._names(keys), self._buffers(host_indices)
        return self._pages(self._objects.get_into(names, pieces))

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        names, pieces = self._names(keys), self._buffers(host_indices)
        return self._pages(self._objects.put_from(names, pieces))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, *_: Any, **__: Any) -> Any:
        raise InvalidConfig("interface_v1", 0, "1: pages come and go in place")

    set = batch_get = batch_set = get

    def close(self) -> None:
        self._objects.close()

    def _names(self, keys: list[str]) -> list[bytes]:
        names = [f"{key} {piece}" for key in keys for piece in range(self._pieces)]
        return [hashlib.sha256(each.encode()).digest() for each in names]

    def _buffers(self, indices: Any) -> list[Any]:
        where = zip(*self.mem_pool_host.get_page_buffer_meta(indices), strict=True)
        return [(ctypes.c_ubyte * size).from_address(address) for address, size in where]

    def _pages(self, pieces: np.ndarray[Any, Any]) -> list[bool]:
        return [bool(each.all()) for each in pieces.reshape(-1, self._pieces)]
