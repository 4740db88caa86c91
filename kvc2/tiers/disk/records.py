"""A block's record as it lies in the catalogue: what a restart must know of it, and of a namespace.

    bytes             field
       32             digest
       32             parent
        8             generation
       16             checksum, of the payload
       4 * page_size  tokens, or as much of the external key as fits
    and if there is more to say, a tail:
        1             flags: what follows, in the order of their bits
        1             bit 0: length of the external key, 1 to 64; its bytes beyond 4 * page_size
       32             bit 1: extras
                      bit 2, reserved: component, part, parts, 4 bytes each; else 0, 0 of 1

All integers are little-endian. A plain block (tokens, no images, component 0, the only part) has no
tail, and is what format 1 of the catalogue had of every block. A flag that isn't known here comes
from a writer that knows more: its block is a miss, as a header's reserved field makes one.
Not here: keys and transactions (catalogue.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvc2.tiers.base import U8, U32, PageShape
from kvc2.tiers.disk.lmdb_file import PAGE_BYTES, Damaged

KEY = np.dtype([("layout", ">u4"), ("page", ">u4")])
EXTERNAL_KEY_MAX = 64
HAS_KEY, HAS_EXTRAS = 1, 2  # flags
KNOWN_FLAGS = (HAS_KEY, HAS_EXTRAS, HAS_KEY | HAS_EXTRAS)
LEAF_FILL = 0.5  # of an LMDB leaf page, the least that splits leave
PAGE_ROOM = 24  # bytes a page for recency, lifetimes and the copies that replace them


def record_type(page_size: int) -> np.dtype[np.void]:
    """A plain block's record."""
    return np.dtype(
        [
            ("digest", np.uint8, (32,)),
            ("parent", np.uint8, (32,)),
            ("generation", "<u8"),
            ("checksum", np.uint8, (16,)),
            ("tokens", "<u4", (page_size,)),
        ]
    )


def tail_type(flags: int, page_size: int) -> np.dtype[np.void]:
    """What follows it with these flags."""
    fields: list[tuple[str, type[np.uint8], tuple[int, ...]]] = [("flags", np.uint8, ())]
    if flags & HAS_KEY:
        fields.append(("external_bytes", np.uint8, ()))
        fields.append(("rest", np.uint8, (max(0, EXTERNAL_KEY_MAX - 4 * page_size),)))
    if flags & HAS_EXTRAS:
        fields.append(("extras", np.uint8, (32,)))
    return np.dtype(fields)


def room_bytes(shape: PageShape) -> int:
    """Catalogue bytes that one slab's pages may need: records in half-full leaves, recency. Every
    block may have a key; that every one has extras fits leaves that are filled by 0.6, and where
    they are not, blocks stay in memory as from a full disk."""
    plain, tail = record_type(shape.page_size), tail_type(HAS_KEY, shape.page_size)
    record = plain.itemsize + tail.itemsize + 16  # node header and key
    leaf = PAGE_BYTES - 16
    if record > leaf // 2:  # LMDB gives it overflow pages of its own
        one = -(-(record + 16) // PAGE_BYTES) * PAGE_BYTES + 64
    else:
        one = int(PAGE_BYTES / ((leaf // record) * LEAF_FILL))
    return shape.pages_per_slab * (one + PAGE_ROOM)


class NamespaceEntry(NamedTuple):
    """What is stored of a namespace. opaque: keys name its blocks, not tokens."""

    page_size: int
    identity: bytes
    opaque: bool = False

    @property
    def word(self) -> int:
        """Page size and key mode in 4 bytes; of tokens what format 1 had there."""
        return self.page_size | self.opaque << 16

    @staticmethod
    def of(word: int, identity: bytes) -> NamespaceEntry:
        """Raises Damaged."""
        if word >> 17:
            raise Damaged(f"a namespace of key mode {word >> 16}")
        return NamespaceEntry(word & 0xFFFF, identity, bool(word >> 16))


class Blocks(Protocol):
    """What `_core.Records` and `_core.Headers` have of the blocks of a batch."""

    digests: U8
    parents: U8
    tokens: U32
    external_bytes: U8
    external_keys: U8
    extras: U8


@dataclass(frozen=True)
class Stored:
    """Records of one layout, as arrays in page order. `records` [n] of record_type: tokens are
    zeros where a key names the block. external_bytes [n], external_keys [n, 64], extras [n, 32] as
    in `_core.Records`. `unread`: pages whose records say what isn't known here; no row has them."""

    pages: U32
    records: NDArray[np.void]
    external_bytes: U8
    external_keys: U8
    extras: U8
    unread: U32

    def chosen(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Stored:
        """These rows."""
        return Stored(
            self.pages[rows],
            self.records[rows],
            self.external_bytes[rows],
            _rows(self.external_keys, rows),
            _rows(self.extras, rows),
            self.unread,
        )


def encode(
    number: int, pages: U32, blocks: Blocks, generations: NDArray[np.uint64], checksums: U8
) -> list[tuple[bytes, bytes]]:
    """Keys and values for blocks [n] in these pages of a layout."""
    rows = np.empty(pages.size, record_type(blocks.tokens.shape[1]))
    rows["digest"], rows["parent"] = blocks.digests, blocks.parents
    rows["generation"], rows["checksum"] = generations, checksums
    rows["tokens"] = blocks.tokens
    values = values_of(rows)
    flags = HAS_KEY * (blocks.external_bytes != 0) + HAS_EXTRAS * blocks.extras.any(axis=1)
    for each in np.unique(flags[flags != 0]).tolist():
        chosen = np.flatnonzero(flags == each)
        for row, value in zip(
            chosen.tolist(), _with_tails(each, rows, blocks, chosen), strict=True
        ):
            values[row] = value
    return list(zip(keys_of(number, pages), values, strict=True))


def decode(keys: Sequence[bytes], values: Sequence[bytes], page_size: int) -> Stored:
    """What records of one layout say. Raises Damaged for one that no version writes."""
    kind = record_type(page_size)
    lengths = np.array([len(value) for value in values], np.int64)
    if any(len(key) != KEY.itemsize for key in keys) or (lengths < kind.itemsize).any():
        raise Damaged("a record of another length")
    pages = np.frombuffer(b"".join(keys), KEY)["page"].astype(np.uint32)
    longer = np.flatnonzero(lengths > kind.itemsize)
    if not longer.size:
        return _plain(pages, np.frombuffer(b"".join(values), kind))
    rows = np.frombuffer(b"".join(value[: kind.itemsize] for value in values), kind).copy()
    stored = _plain(pages, rows, writable=True)
    flags = np.zeros(pages.size, np.uint8)
    flags[longer] = [values[row][kind.itemsize] for row in longer.tolist()]
    read = np.ones(pages.size, np.bool_)
    for each in np.unique(flags[longer]).tolist():
        chosen = longer[flags[longer] == each]
        if each not in KNOWN_FLAGS:
            read[chosen] = False
            continue
        tail = tail_type(each, page_size)
        if (lengths[chosen] != kind.itemsize + tail.itemsize).any():
            raise Damaged("a record of another length")
        told = b"".join(values[row][kind.itemsize :] for row in chosen.tolist())
        _take_tails(stored, chosen, np.frombuffer(told, tail))
    found = stored.chosen(read)
    return Stored(
        found.pages,
        found.records,
        found.external_bytes,
        found.external_keys,
        found.extras,
        pages[~read],
    )


def keys_of(number: int, pages: U32) -> list[bytes]:
    """Keys of records in these pages of a layout."""
    keys = np.empty(pages.size, KEY)
    keys["layout"], keys["page"] = number, pages
    return values_of(keys)


def values_of(rows: NDArray[np.void]) -> list[bytes]:
    """Each row's bytes."""
    found: list[bytes] = rows.view(f"V{rows.dtype.itemsize}").tolist()
    return found


def _with_tails(
    flags: int, rows: NDArray[np.void], blocks: Blocks, chosen: NDArray[np.intp]
) -> list[bytes]:
    page_size = blocks.tokens.shape[1]
    heads, tails = rows[chosen], np.zeros(chosen.size, tail_type(flags, page_size))
    tails["flags"] = flags
    if flags & HAS_KEY:
        place = 4 * page_size
        keys = blocks.external_keys[chosen]
        heads["tokens"] = _padded(keys[:, :place], place).view("<u4")
        tails["external_bytes"], tails["rest"] = blocks.external_bytes[chosen], keys[:, place:]
    if flags & HAS_EXTRAS:
        tails["extras"] = blocks.extras[chosen]
    return [a + b for a, b in zip(values_of(heads), values_of(tails), strict=True)]


def _take_tails(stored: Stored, chosen: NDArray[np.intp], tails: NDArray[np.void]) -> None:
    """Put what tails say of these rows into the arrays. Raises Damaged."""
    names = tails.dtype.names or ()
    if "extras" in names:
        stored.extras[chosen] = tails["extras"]
        if not tails["extras"].any(axis=1).all():
            raise Damaged("a record with a tail that says nothing")
    if "external_bytes" not in names:
        return
    lengths = tails["external_bytes"]
    place = np.ascontiguousarray(stored.records["tokens"][chosen]).view(np.uint8)
    keys = np.concatenate([place, tails["rest"]], axis=1)
    beyond = np.arange(keys.shape[1]) >= lengths[:, None]
    if not ((lengths > 0) & (lengths <= EXTERNAL_KEY_MAX)).all() or keys[beyond].any():
        raise Damaged("a record with a key that can't be")
    stored.external_bytes[chosen] = lengths
    stored.external_keys[chosen] = keys[:, :EXTERNAL_KEY_MAX]
    stored.records["tokens"][chosen] = 0


def _plain(pages: U32, rows: NDArray[np.void], *, writable: bool = False) -> Stored:
    """Without a tail. Zeros that nobody writes to take no memory."""
    make = np.zeros if writable else _zeros
    count = pages.size
    return Stored(
        pages,
        rows,
        make((count,), np.uint8),
        make((count, EXTERNAL_KEY_MAX), np.uint8),
        make((count, 32), np.uint8),
        np.empty(0, np.uint32),
    )


def _zeros(shape: tuple[int, ...], kind: type[np.uint8]) -> U8:
    return np.broadcast_to(kind(0), shape)


def _rows(array: U8, rows: NDArray[np.bool_] | NDArray[np.intp]) -> U8:
    """Some rows, which take no memory where all are alike."""
    if array.strides[0] == 0 and array.shape[0]:
        count = int(rows.sum()) if rows.dtype == np.bool_ else rows.size
        return np.broadcast_to(array[0], (count, array.shape[1]))
    return array[rows]


def _padded(rows: U8, width: int) -> U8:
    """[n, width] with zeros after each row."""
    found = np.zeros((rows.shape[0], width), np.uint8)
    found[:, : rows.shape[1]] = rows
    return found
