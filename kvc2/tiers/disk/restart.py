"""What a restart makes of a catalogue: namespaces, slabs and residency in an index.

A daemon's start and an offline check go the same way: what this takes is there, what it refuses is
not. Not here: deleting what was refused (pools.py, check.py), the bytes of pages.
"""

from __future__ import annotations

import numpy as np

from kvc2 import _core
from kvc2.namespace import of_era
from kvc2.tiers.base import TIER_NUMBERS, U8, U32, PageShape
from kvc2.tiers.disk.catalogue import Catalogue
from kvc2.tiers.disk.records import Stored

NO_LIFETIMES = np.empty((0, 2), np.uint32)


def open_namespaces(index: _core.Index, catalogue: Catalogue) -> dict[bytes, int]:
    """Make the catalogue's namespaces known; their numbers by the name of their era."""
    numbers = {}
    for name, entry in catalogue.namespaces.items():
        known = of_era(name, catalogue.eras.get(name, 0))
        numbers[known] = index.open_namespace(known, entry.page_size, opaque=entry.opaque)
    return numbers


def add_slabs(index: _core.Index, pool: int, numbers: list[int]) -> None:
    """Give a pool that has none the slabs of these numbers."""
    for _ in range(max(numbers, default=-1) + 1):
        index.add_slab(pool)
    for gap in set(range(max(numbers, default=-1) + 1)) - set(numbers):
        index.take_slab(pool, gap)


def restore(
    index: _core.Index, pool: int, stored: Stored, stamps: U32, lifetimes: U32 = NO_LIFETIMES
) -> U8:
    """[n] of RESTORED, ORPHAN, FORGED, CONFLICT. stamps [pages] and lifetimes [pages, 2]: as they
    were written aside."""
    rows = stored.records
    keyed = bool(stored.external_bytes.any())  # else no array of keys is made
    beside = bool(stored.extras.any())
    return index.restore(
        pool,
        np.ascontiguousarray(rows["digest"]),
        np.ascontiguousarray(rows["parent"]),
        np.ascontiguousarray(rows["tokens"].astype(np.uint32)),
        stored.pages,
        np.ascontiguousarray(rows["generation"].astype(np.uint64)),
        _stamps_of(stamps, stored.pages),
        _expiries_of(lifetimes, stored),
        external_bytes=stored.external_bytes if keyed else None,
        external_keys=stored.external_keys if keyed else None,
        extras=stored.extras if beside else None,
    )


def disk_pool(index: _core.Index, shape: PageShape, *, second_access: bool = False) -> int:
    """A durable pool for pages of this shape; second_access: as disk.admission says."""
    return index.add_pool(
        page_size=shape.page_size,
        pages_per_slab=shape.pages_per_slab,
        below=None,
        durable=True,
        tier=TIER_NUMBERS["disk"],
        page_bytes=shape.page_bytes,
        second_access=second_access,
    )


def _expiries_of(lifetimes: U32, stored: Stored) -> U32:
    """[n] when each block expires, 0: never. What was written aside of a page is of its block only
    while the page has that generation."""
    expires = np.zeros(stored.pages.size, np.uint32)
    known = np.flatnonzero(stored.pages < len(lifetimes))
    rows = lifetimes[stored.pages[known]]
    same = rows[:, 1] == stored.records["generation"][known].astype(np.uint32)
    expires[known[same]] = rows[same, 0]
    return expires


def _stamps_of(aside: U32, pages: U32) -> U32:
    """[n] the stamp of each page; 1, the oldest there is, where none was written aside."""
    stamps = np.ones(pages.size, np.uint32)
    known = pages < aside.size
    stamps[known] = np.maximum(aside[pages[known]], 1)
    return stamps
