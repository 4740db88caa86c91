"""What every tier meets: the shape of its pages, where its slabs lie, how its pages move.

A tier is executed here and decided in csrc/index: nothing in this folder chooses a page. All page
moves go between a tier and the arena; `offsets` are always those of whole arena pages (header
sector first, then the payload).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.layout import HEADER_BYTES, Layout, slab_shape

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
TIER_NUMBERS = {"gpu": 0, "cpu": 1, "disk": 2}  # as the index counts quotas by
NO_SLAB = np.iinfo(np.int64).min


@dataclass(frozen=True)
class PageShape:
    """What pages of one layout are in arena and slab: all that a restart must know of a layout."""

    layout_digest: bytes  # 32
    page_size: int  # tokens
    payload_bytes: int
    page_bytes: int
    slab_bytes: int
    pages_per_slab: int

    @staticmethod
    def of(layout: Layout, slab_bytes: int) -> PageShape:
        slab = slab_shape(layout.page_bytes, slab_bytes)
        return PageShape(
            layout_digest=layout.digest,
            page_size=layout.page_size,
            payload_bytes=layout.payload_bytes,
            page_bytes=layout.page_bytes,
            slab_bytes=slab.slab_bytes,
            pages_per_slab=slab.pages_per_slab,
        )

    def with_slabs(self, slab_bytes: int) -> PageShape:
        """The same pages in slabs of another unit (a restart with another `slab_bytes`)."""
        slab = slab_shape(self.page_bytes, slab_bytes)
        return replace(self, slab_bytes=slab.slab_bytes, pages_per_slab=slab.pages_per_slab)


@dataclass(frozen=True)
class RecordsPart:
    """Some rows of a transfer's records; _core takes any object with these arrays for records."""

    namespaces: U8
    digests: U8
    parents: U8
    keys: U8
    tokens: U32
    generations: U64
    external_bytes: U8
    external_keys: U8
    extras: U8


def records_of(transfer: _core.Transfer) -> _core.Records:
    """Of a transfer from or to a durable pool. ValueError for another."""
    if transfer.records is None:
        raise ValueError(f"transfer {transfer.id}: neither of its pools is durable")
    return transfer.records


def part_of(records: _core.Records, part: slice) -> _core.Records:
    rows = {each.name: getattr(records, each.name)[part] for each in fields(RecordsPart)}
    return cast(_core.Records, RecordsPart(**rows))


def joined(parts: Sequence[_core.Records]) -> _core.Records:
    """The rows of one or more, one after the other."""
    names = [each.name for each in fields(RecordsPart)]
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return cast(_core.Records, RecordsPart(**rows))


class PageStore(Protocol):
    """The pages of one pool, and the two ways between them and the arena.

    Both block, release the GIL for the bytes, and may be called from any thread, by several at
    once for different pages. pages [n], offsets [n] of arena pages; no page twice.
    """

    def read(self, pages: U32, offsets: U64) -> U8:
        """Bring pages into the arena. [n] of 1 (came) or 0 (a fault took it): no exception."""

    def write(self, pages: U32, offsets: U64) -> None:
        """Copy arena pages here. OSError: any of them may be torn now."""


class SlabTable:
    """Base of each slab by its number; pages [s * pages_per_slab, ...) lie in slab s."""

    def __init__(self, shape: PageShape) -> None:
        self.shape = shape
        self._bases = np.empty(0, np.int64)

    def __contains__(self, number: int) -> bool:
        return number < self._bases.size and int(self._bases[number]) != NO_SLAB

    def numbers(self) -> list[int]:
        return [int(number) for number in np.flatnonzero(self._bases != NO_SLAB)]

    def put(self, number: int, base: int) -> None:
        if number >= self._bases.size:
            grown = np.full(max(number + 1, 2 * self._bases.size), NO_SLAB, np.int64)
            grown[: self._bases.size] = self._bases
            self._bases = grown
        self._bases[number] = base

    def drop(self, number: int) -> int:
        """Its base. KeyError when there is no such slab."""
        base = self.base(number)
        self._bases[number] = NO_SLAB
        return base

    def base(self, number: int) -> int:
        if number not in self:
            raise KeyError(number)
        return int(self._bases[number])

    def bases(self, pages: U32) -> NDArray[np.int64]:
        """[n] the base of each page's slab. KeyError for a page without a slab."""
        numbers = pages // self.shape.pages_per_slab
        if numbers.size and int(numbers.max()) >= self._bases.size:
            raise KeyError(int(numbers.max()))
        found = self._bases[numbers]
        if (found == NO_SLAB).any():
            raise KeyError(int(numbers[found == NO_SLAB][0]))
        return found

    def within(self, pages: U32) -> U64:
        """[n] the offset of each page in its slab."""
        inside = (pages % self.shape.pages_per_slab).astype(np.uint64)
        return inside * np.uint64(self.shape.page_bytes)


def payload_offsets(offsets: U64) -> U64:
    """Where the payloads of arena pages begin."""
    return offsets + np.uint64(HEADER_BYTES)
