"""LMCache's second level over kvc2: an adapter that it loads as a plugin, with adapter_params
{"address": "unix:PATH"}. It can be imported without LMCache, and is of no use then."""

import hashlib
import itertools
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvc2.client import Completions, Objects, open_objects
from kvc2.client.objects import Bools
from kvc2.foreign_identity import Foreign
from kvc2.host.address import Address
from kvc2.integrations.versions import check

try:
    from lmcache.lmcache_native import Bitmap  # type: ignore[import-not-found]
    from lmcache.v1.distributed.internal_api import L2StoreResult  # type: ignore[import-not-found]
    from lmcache.v1.distributed.l2_adapters.base import (  # type: ignore[import-not-found]
        L2AdapterInterface,
    )
except ImportError:
    Bitmap = L2StoreResult = L2AdapterInterface = object


log = logging.getLogger(__name__)

TRIED = "0.5"  # the version that the tests drive
SizeKey = tuple[str, int]  # model, group: what objects of one size have in common


class Kvc2L2(L2AdapterInterface):  # type: ignore[misc]
    """Blocks of several sizes, each with a client of its own. A fault is a bit that isn't set."""

    def __init__(self, params: dict[str, Any], l1_memory_desc: object = None) -> None:
        super().__init__()
        check("LMCache", TRIED, "lmcache")
        self._address: str = params.get("address", "")
        Address.of_daemon(self._address, field="adapter_params.address")
        self._of_size: dict[int, Objects] = {}
        self._sizes: dict[SizeKey, int] = {}  # of the objects that were given
        self._stores, self._lookups, self._loads = Completions(), Completions(), Completions()
        self._tasks: dict[int, Future[Any]] = {}
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._held: dict[bytes, list[Held]] = {}  # by key, the oldest first

    def get_store_event_fd(self) -> int:
        return self._stores.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fd

    def get_load_event_fd(self) -> int:
        return self._loads.fd

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        views = [each.byte_array for each in objects]
        return self._begin(self._stores, self._store, L2StoreResult(False, 0), keys, views)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        with self._lock:
            ended = set(self._stores.completed())
            tasks = [task for task, future in self._tasks.items() if future in ended]
            return {task: self._tasks.pop(task).result() for task in tasks}

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any) -> int:
        """An object's size is that of the last one of its model and group, or else, as after a
        restart, what the layout says. Of neither, nothing is found."""
        said = {group: bytes_of(desc) for group, desc in group_layout_descs.items()}
        with self._lock:
            sizes = [
                self._sizes.get(kind_of(key)) or said.get(key.object_group_id, 0) for key in keys
            ]
        return self._begin(self._lookups, self._look_up, Bitmap(len(keys)), keys, sizes)

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._take(self._lookups, task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        with self._lock:
            for name in map(name_of, keys):
                if self._held.get(name):
                    self._held[name].pop(0).let_go()

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        views = [each.byte_array for each in objects]
        return self._begin(self._loads, self._load, Bitmap(len(keys)), keys, views)

    def query_load_result(self, task_id: int) -> Any:
        return self._take(self._loads, task_id)

    def report_status(self) -> dict[str, Any]:
        """Healthy: every size that was asked for has its session."""
        with self._lock:
            states = {size: objects.client.state for size, objects in self._of_size.items()}
        healthy = all(state == "attached" for state in states.values())
        return {"is_healthy": healthy, "address": self._address, "state_by_bytes": states}

    def close(self) -> None:
        for calls in (self._stores, self._lookups, self._loads):
            calls.close()
        for objects in self._of_size.values():
            objects.close()

    def _store(self, keys: list[Any], views: list[memoryview]) -> Any:
        sizes = self._learn(keys, views)
        stored = self._by_size(Objects.put_from, keys, sizes, views).all()
        if stored:
            self._notify_keys_stored(keys, sizes)
        return L2StoreResult(bool(stored), sum(sizes))

    def _load(self, keys: list[Any], views: list[memoryview]) -> Any:
        sizes = self._learn(keys, views)
        return bits(self._by_size(Objects.get_into, keys, sizes, views))

    def _learn(self, keys: list[Any], views: list[memoryview]) -> list[int]:
        sizes = [each.nbytes for each in views]
        with self._lock:
            self._sizes.update(zip(map(kind_of, keys), sizes, strict=True))
        return sizes

    def _look_up(self, keys: list[Any], sizes: list[int]) -> Any:
        return bits(self._by_size(self._hold, keys, sizes, list(keys)))

    def _hold(self, objects: Objects, names: list[bytes], _: object) -> Bools:
        token, found = objects.lock(names)
        if not found.any():
            objects.unlock(token)  # nobody else will
        held = Held(objects, token, int(found.sum()))
        with self._lock:
            for index in np.flatnonzero(found).tolist():
                self._held.setdefault(names[index], []).append(held)
        return found

    def _by_size(
        self, call: Callable[..., Bools], keys: list[Any], sizes: list[int], more: list[Any]
    ) -> Bools:
        """`call` with the blocks of each size: their names, and what each has `more`."""
        done = np.zeros(len(keys), np.bool_)
        for size in set(sizes) - {0}:
            at = [index for index, each in enumerate(sizes) if each == size]
            names = [name_of(keys[index]) for index in at]
            done[at] = call(self._objects(size), names, [more[index] for index in at])
        return done

    def _objects(self, size: int) -> Objects:
        with self._lock:
            if size in self._of_size:
                return self._of_size[size]
            identity = Foreign("lmcache", "keys say", {"page_size": 1, "bytes": size})
            objects = open_objects(self._address, identity.encode(), size)
            self._of_size[size] = objects
        objects.wait_attached()
        return objects

    def _begin(
        self, completions: Completions, call: Callable[..., Any], in_vain: Any, *given: Any
    ) -> int:
        """The number of a task, whose result is `in_vain` where its call fails."""

        def run() -> Any:
            try:
                return call(*given)
            except Exception:  # LMCache's thread, which asks for the result, would end
                log.exception("a call of LMCache's failed")
                return in_vain

        with self._lock:
            task = next(self._numbers)
            self._tasks[task] = completions.submit(run)
            return task

    def _take(self, completions: Completions, task: int) -> Any:
        with self._lock:
            future = self._tasks.get(task)
            result = None if future is None else completions.take(future)
            if result is not None:
                del self._tasks[task]
            return result


@dataclass
class Held:
    """A lock of several keys, of which so many are not unlocked yet."""

    objects: Objects
    token: int
    left: int

    def let_go(self) -> None:
        self.left -= 1
        if not self.left:
            self.objects.unlock(self.token)


def name_of(key: Any) -> bytes:
    """32 bytes for whatever LMCache tells its objects apart by."""
    fields = (key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash, key.cache_salt)
    return hashlib.sha256(repr(fields).encode()).digest()


def kind_of(key: Any) -> SizeKey:
    return key.model_name, key.object_group_id


def bytes_of(desc: Any) -> int:
    shapes = zip(desc.shapes, desc.dtypes, strict=True)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def bits(flags: Bools) -> Any:
    made = Bitmap(flags.size)
    for index in np.flatnonzero(flags).tolist():
        made.set(index)
    return made
