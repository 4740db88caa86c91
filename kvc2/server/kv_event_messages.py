"""KV events as vLLM's schema has them: structs that msgspec writes as msgpack, and how the index's
changes become such.

A block's hash is a number: the last 8 bytes of its key, big-endian, as vLLM makes one of its own
hash; of a block that an opaque key names, of that key. Consecutive blocks of one path are one
event. Only here and in kv_events.py are the libraries of the extra `events` imported.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.tiers.base import TIER_NUMBERS

MEDIA = {TIER_NUMBERS["gpu"]: "GPU", TIER_NUMBERS["cpu"]: "CPU", TIER_NUMBERS["disk"]: "STORAGE"}
HASH_BYTES = 8
ExtraKeys = tuple[str | tuple[str, int], ...]


class BlockStored(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Consecutive blocks of one path are in `medium`. token_ids: of all of them; none where opaque
    keys name them, which then follow from nothing."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[ExtraKeys | None] | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Blocks are not in `medium` any more."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Whatever was told: nothing is anywhere, till it is told anew."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """ts: seconds since 1970."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


def hash_of(key: bytes) -> int:
    return int.from_bytes(key[-HASH_BYTES:], "big")


def _hashes(keys: NDArray[np.uint8]) -> list[int]:
    """The same of rows."""
    found: list[int] = np.ascontiguousarray(keys[:, -HASH_BYTES:]).view(">u8").ravel().tolist()
    return found


def salt_of(namespace: bytes) -> str:
    """What stands for a namespace where vLLM has a request's cache_salt."""
    return f"kvc2-{namespace.hex()}"


def events_of(taken: _core.KvEvents, *, salted: bool) -> list[Event]:
    """In their order. salted: a path's first block names the namespace among its extra keys."""
    changes = _Changes(taken, salted)
    return [changes.event(first, end) for first, end in changes.runs()]


def _rows_of_zeros(names: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray((names == 0).all(axis=1))


class _Changes:
    """What was taken, by arrays that are read once."""

    def __init__(self, taken: _core.KvEvents, salted: bool) -> None:
        self._salted = salted
        self._kinds, self._tiers, self._opaque = taken.kinds, taken.tiers, taken.opaque
        self._sizes, self._words = taken.page_sizes, taken.words
        self._ends = np.cumsum(taken.words_of, dtype=np.int64)
        self._keys, self._parents = taken.keys, taken.parents
        self._namespaces, self._extras = taken.namespaces, taken.extras
        self._first = _rows_of_zeros(taken.parents)
        self._has_extras = ~_rows_of_zeros(taken.extras)

    def runs(self) -> list[tuple[int, int]]:
        """[first, end) of changes that are one event."""
        if not len(self._kinds):
            return []
        joins = np.ones(len(self._kinds) - 1, np.bool_)
        for each in (self._kinds, self._tiers, self._opaque, self._sizes):
            joins &= each[1:] == each[:-1]
        joins &= (self._namespaces[1:] == self._namespaces[:-1]).all(axis=1)
        follows = (self._parents[1:] == self._keys[:-1]).all(axis=1)
        joins &= follows | (self._opaque[1:] == 1) | (self._kinds[1:] == _core.KV_REMOVED)
        joins &= self._kinds[1:] != _core.KV_CLEARED
        starts = [0, *(np.flatnonzero(~joins) + 1).tolist(), len(self._kinds)]
        return list(pairwise(starts))

    def event(self, first: int, end: int) -> Event:
        kind, medium = self._kinds[first], MEDIA[int(self._tiers[first])]
        if kind == _core.KV_CLEARED:
            return AllBlocksCleared()
        opaque = bool(self._opaque[first])
        hashes = self._opaque_keys(first, end) if opaque else _hashes(self._keys[first:end])
        if kind == _core.KV_REMOVED:
            return BlockRemoved(hashes, medium)
        rooted = opaque or bool(self._first[first])
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=None if rooted else _hashes(self._parents[first : first + 1])[0],
            token_ids=[] if opaque else self._words_of(first, end).tolist(),
            block_size=int(self._sizes[first]),
            lora_id=None,
            medium=medium,
            lora_name=None,
            extra_keys=self._extra_keys(first, end),
        )

    def _words_of(self, first: int, end: int) -> NDArray[np.uint32]:
        begin = int(self._ends[first - 1]) if first else 0
        return self._words[begin : self._ends[end - 1]]

    def _opaque_keys(self, first: int, end: int) -> list[int]:
        words = self._words_of(first, end).reshape(end - first, -1)
        return [hash_of(key[1:].tobytes()[: int(key[0])]) for key in words]

    def _extra_keys(self, first: int, end: int) -> list[ExtraKeys | None] | None:
        salted = self._salted and bool(self._first[first])
        if not salted and not self._has_extras[first:end].any():
            return None
        found: list[ExtraKeys | None] = []
        for at in range(first, end):
            keys: ExtraKeys = ()
            if self._has_extras[at]:
                keys = ((self._extras[at].tobytes().hex(), 0),)
            if self._salted and self._first[at]:
                keys = (*keys, salt_of(self._namespaces[at].tobytes()))
            found.append(keys or None)
        return found
