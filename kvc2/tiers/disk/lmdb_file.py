"""Is this file what a sound LMDB left behind? Asked before LMDB opens it: LMDB 0.9 has no
checksums, and of a damaged file it dies, by an assertion or by SIGBUS beyond the file's end.

What is checked is all that LMDB follows without a look of its own: both meta pages; from the
newest, each tree's pages, that they are of their level and there once, that their nodes tile the
page; keys in order where all are of 8 bytes; overflow pages; lists of free pages, that none of them
is in use.
Not here: what keys and values say (catalogue.py), and the bytes of pages that nothing refers to.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
HEADER_BYTES = 16  # of a page
NODE_BYTES = 8  # of a node's header
META_OFFSET = HEADER_BYTES
META = struct.Struct("<IIQQ IHHQQQQQ IHHQQQQQ QQ")  # mdb.c: struct MDB_meta
META_MAGIC, META_VERSION = 0xBEEFC0DE, 1
TREE = np.dtype(
    [("pad", "<u4"), ("flags", "<u2"), ("depth", "<u2"), ("counts", "<u8", (4,)), ("root", "<u8")]
)  # struct MDB_db
BRANCH, LEAF, OVERFLOW, META_PAGE = 1, 2, 4, 8  # flags of a page
BIG_DATA, SUB_TREE = 1, 2  # flags of a node
INTEGER_KEYS, DUPLICATES = 0x08, 0x04  # flags of a tree
DEPTH_MAX = 32  # of LMDB's cursors
NO_ROOT = 0xFFFFFFFFFFFFFFFF
KEY_BYTES_MAX = 511

I64 = NDArray[np.int64]


class Damaged(Exception):
    """The catalogue's file can't be what a sound LMDB left behind."""


def check_file(path: Path) -> None:
    """Raises Damaged. Reads headers of pages and nodes, not values: 0.1 s for 100,000 blocks. A
    file that is not there, or empty, is sound."""
    if not path.exists() or path.stat().st_size == 0:
        return
    trees, last_page, transaction = _newest_meta(path)
    size = path.stat().st_size
    if size < (last_page + 1) * PAGE_BYTES:
        raise Damaged(f"{path}: shorter than its {last_page + 1} pages")
    with path.open("rb") as file:
        data = np.fromfile(file, np.uint8, (last_page + 1) * PAGE_BYTES)
    walk = _Walk(path, data)
    free, main = trees
    for root in (free, main):
        if root["flags"] & DUPLICATES:
            raise Damaged(f"{path}: a tree with flags {root['flags']:#x}")
    nodes = walk.tree(main)
    for found in nodes.values_of(SUB_TREE, TREE):
        if found["flags"]:
            raise Damaged(f"{path}: a tree with flags {found['flags']:#x}")
        walk.in_order(walk.tree(found), ">u8")
    freed = walk.tree(free)
    walk.in_order(freed, "<u8")
    walk.free_lists(freed, transaction)


def _newest_meta(path: Path) -> tuple[NDArray[np.void], int, int]:
    """The roots of the free and the main tree [2], the last page, the transaction."""
    with path.open("rb") as file:
        head = file.read(2 * PAGE_BYTES)
    newest: tuple[int, ...] = ()
    for page, start in enumerate((0, PAGE_BYTES)):
        if len(head) < start + META_OFFSET + META.size:
            raise Damaged(f"{path}: {len(head)} bytes are no catalogue")
        values = META.unpack_from(head, start + META_OFFSET)
        flags = struct.unpack_from("<H", head, start + 10)[0]
        if values[:2] != (META_MAGIC, META_VERSION) or values[4] != PAGE_BYTES:
            raise Damaged(f"{path}: meta page {page} is none of LMDB 0.9")
        if not flags & META_PAGE or values[-1] >= 1 << 62 or not 1 <= values[-2] < 1 << 40:
            raise Damaged(f"{path}: meta page {page} can't be")
        if not newest or values[-1] > newest[-1]:  # as LMDB chooses
            newest, at = values, start + META_OFFSET + 24
    return np.frombuffer(head, TREE, 2, at), newest[-2], newest[-1]


class _Nodes:
    """The leaf nodes of one tree, in order: where each begins, and what its header says [n]."""

    def __init__(self, data: NDArray[np.uint8], starts: I64) -> None:
        self.data = data
        self.starts = starts
        low, high, self.flags, self.key_bytes = _words(data, starts, 4)
        self.value_bytes = low | high << 16

    @property
    def places(self) -> I64:
        """Where values begin."""
        return self.starts + NODE_BYTES + self.key_bytes

    @property
    def sizes(self) -> I64:
        """Bytes that each takes of its page: of a big value only the page's number is there."""
        inside = np.where(self.flags & BIG_DATA, 8, self.value_bytes)
        used = NODE_BYTES + self.key_bytes + inside
        return used + (used & 1)

    def values_of(self, flag: int, kind: np.dtype[np.void]) -> NDArray[np.void]:
        """The values of nodes with this flag; Damaged where one isn't of this kind's length."""
        wanted = (self.flags & flag) != 0
        if (self.value_bytes[wanted] != kind.itemsize).any() or (self.flags & ~flag).any():
            raise Damaged("nodes of the main tree are no trees")
        rows = [self.data[p : p + kind.itemsize].tobytes() for p in self.places[wanted].tolist()]
        return np.frombuffer(b"".join(rows), kind)


class _Walk:
    """`used` [pages]: what has been come by, once each."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.used = np.zeros(data.size // PAGE_BYTES, np.bool_)
        self.used[:2] = True

    def bad(self, what: str) -> Damaged:
        return Damaged(f"{self.path}: {what}")

    def take(self, pages: I64) -> None:
        """These pages are in use, or free, once."""
        if pages.size and (int(pages.min()) < 2 or int(pages.max()) >= self.used.size):
            raise self.bad("a page that is not there")
        if self.used[pages].any() or np.unique(pages).size != pages.size:
            raise self.bad("a page that is used twice")
        self.used[pages] = True

    def tree(self, root: np.void) -> _Nodes:
        """Walks a tree level by level."""
        if int(root["root"]) == NO_ROOT:
            return _Nodes(self.data, np.zeros(0, np.int64))
        depth = int(root["depth"])
        if not 1 <= depth <= DEPTH_MAX or int(root["root"]) >= self.used.size:
            raise self.bad(f"a tree of depth {depth}")
        pages = np.array([root["root"]], np.int64)
        for _ in range(depth - 1):
            starts = self.nodes_in(pages, BRANCH)
            low, high, highest, _key = _words(self.data, starts, 4)
            pages = low | high << 16 | highest << 32
        nodes = _Nodes(self.data, self.nodes_in(pages, LEAF))
        self.overflows(nodes)
        return nodes

    def nodes_in(self, pages: I64, kind: int) -> I64:
        """Where the nodes of pages of one level begin, in order."""
        self.take(pages)
        heads = pages * PAGE_BYTES
        numbers = _words(self.data, heads, 8)
        if (numbers[0] | numbers[1] << 16 | numbers[2] << 32 | numbers[3] << 48 != pages).any():
            raise self.bad("a page of another number")
        flags, lower, upper = numbers[5], numbers[6], numbers[7]
        counts = (lower - HEADER_BYTES) >> 1
        bounds = (lower & 1 == 0) & (lower <= upper) & (upper <= PAGE_BYTES)
        if not ((flags == kind) & bounds & (counts >= (2 if kind == BRANCH else 1))).all():
            raise self.bad("a page that is not of its level")
        of = np.repeat(np.arange(pages.size), counts)
        within = np.arange(of.size) - np.repeat(np.cumsum(counts) - counts, counts)
        (offsets,) = _words(self.data, heads[of] + HEADER_BYTES + 2 * within, 1)
        if (offsets < upper[of]).any() or (offsets > PAGE_BYTES - NODE_BYTES).any():
            raise self.bad("a node outside of its page")
        starts = heads[of] + offsets
        self.tiled(starts, kind, heads + upper, heads + PAGE_BYTES)
        return starts

    def tiled(self, starts: I64, kind: int, begins: I64, ends: I64) -> None:
        """The nodes fill each page from its bound to its end, none over another."""
        nodes = _Nodes(self.data, starts)
        if kind == BRANCH:
            used = NODE_BYTES + nodes.key_bytes
            sizes = used + (used & 1)
        else:
            sizes = nodes.sizes
        if (nodes.key_bytes > KEY_BYTES_MAX).any():
            raise self.bad("a key that is too long")
        order = np.argsort(starts)
        tops, bottoms = starts[order], (starts + sizes)[order]
        # what lies between two nodes is nothing, or the way from one page's end to another's bound
        joined = tops[1:] == bottoms[:-1]
        turns = np.isin(bottoms[:-1], ends) & np.isin(tops[1:], begins)
        edges = tops[0] in begins and bottoms[-1] in ends
        if not (joined | turns).all() or not edges:
            raise self.bad("nodes that do not fill their page")

    def overflows(self, nodes: _Nodes) -> None:
        """Values with pages of their own."""
        big = np.flatnonzero(nodes.flags & BIG_DATA)
        if not big.size:
            return
        numbers = _words(self.data, nodes.places[big], 4)
        first = numbers[0] | numbers[1] << 16 | numbers[2] << 32
        needed = (HEADER_BYTES - 1 + nodes.value_bytes[big]) // PAGE_BYTES + 1
        if numbers[3].any() or (first < 2).any() or (first + needed > self.used.size).any():
            raise self.bad("a value outside of the file")
        heads = _words(self.data, first * PAGE_BYTES, 8)
        held = heads[6] | heads[7] << 16
        whole = (heads[5] == OVERFLOW) & (held >= needed) & (first + held <= self.used.size)
        if not (whole & (heads[0] | heads[1] << 16 | heads[2] << 32 == first)).all():
            raise self.bad("a value's pages that are none")
        within = np.arange(int(held.sum())) - np.repeat(np.cumsum(held) - held, held)
        self.take(np.repeat(first, held) + within)

    def in_order(self, nodes: _Nodes, kind: str) -> None:
        """Keys of 8 bytes rise. Others are few; LMDB only searches by them."""
        if nodes.starts.size == 0 or (nodes.key_bytes != 8).any():
            return
        keys = self.data[(nodes.starts + NODE_BYTES)[:, None] + np.arange(8)]
        numbers = np.ascontiguousarray(keys).view(kind).ravel()
        if not (numbers[1:] > numbers[:-1]).all():
            raise self.bad("keys out of order")

    def free_lists(self, nodes: _Nodes, transaction: int) -> None:
        """Each value is a count and so many free pages, falling; its key the transaction."""
        if (nodes.key_bytes != 8).any() or (nodes.flags & ~BIG_DATA).any():
            raise self.bad("a list of free pages that is none")
        rows = zip(
            nodes.starts.tolist(),
            nodes.places.tolist(),
            nodes.value_bytes.tolist(),
            nodes.flags.tolist(),
            strict=True,
        )
        for start, place, size, flags in rows:
            key = int.from_bytes(self.data[start + NODE_BYTES :][:8].tobytes(), "little")
            if flags & BIG_DATA:
                first = int.from_bytes(self.data[place : place + 8].tobytes(), "little")
                place = first * PAGE_BYTES + HEADER_BYTES
            numbers = np.frombuffer(self.data[place : place + size // 8 * 8].tobytes(), "<u8")
            if not 0 < key <= transaction or not numbers.size or numbers[0] >= numbers.size:
                raise self.bad("a list of free pages of another length")
            pages = numbers[1 : 1 + int(numbers[0])]
            if (pages >= self.used.size).any() or (pages[1:] >= pages[:-1]).any():
                raise self.bad("free pages that are not there, or out of order")
            self.take(pages.astype(np.int64))


def _words(data: NDArray[np.uint8], starts: I64, count: int) -> list[I64]:
    """`count` little-endian u16 from each start [n]."""
    found = []
    for word in range(count):
        place = starts + 2 * word
        found.append(data[place].astype(np.int64) | data[place + 1].astype(np.int64) << 8)
    return found
