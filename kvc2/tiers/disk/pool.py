"""The pages of one layout on disk: moved to and from memory, and those whose records must change.

A page that the index has freed, or moved a block from, still has its record: the next transaction
takes that along, and until it is durable nothing is planned into the pool (`settled`). Not here:
the transaction (disk.py), which blocks go to disk (disk_writer.py).
"""

from __future__ import annotations

import threading

import numpy as np

from kvc2 import _core
from kvc2.tiers.base import U8, U32, U64, PageShape, part_of
from kvc2.tiers.disk.catalogue import Change
from kvc2.tiers.disk.slab_file import SlabFiles, aligned

MOVE_BYTES = 8 << 20  # of memory beside the arena, while a slab is emptied
READ_FAILED = 255  # beside _core.BLOCK_*: the bytes did not come at all


class DiskPool:
    """`closed`: slabs that a failed sync has retired, in which the index plans nothing.

    Any thread may call `drop`, `moved` and `settled`, and read; the writer alone calls the rest.
    """

    def __init__(self, number: int, shape: PageShape, slabs: SlabFiles) -> None:
        self.number = number
        self.shape = shape
        self.slabs = slabs
        self.closed: set[int] = set()
        self._deletes: list[U32] = []  # pages that the index has freed
        self._moves: list[tuple[U32, U32]] = []  # pages from and to which blocks have moved
        self._taken = Change()  # the same, of the transaction that is going on
        self._lock = threading.Lock()

    # ---- what the catalogue does not say yet ----

    def drop(self, pages: U32) -> None:
        """The index has freed these: their records go with the next transaction."""
        if pages.size:
            with self._lock:
                self._deletes.append(pages)

    def moved(self, sources: U32, targets: U32) -> None:
        """The index has these blocks in other pages: so will the next transaction."""
        with self._lock:
            self._moves.append((sources, targets))

    @property
    def settled(self) -> bool:
        """The catalogue says what the index does: only then a page may be planned into."""
        with self._lock:
            taken = self._taken.deletes or self._taken.moves
            return not (self._deletes or self._moves or taken)

    def take(self) -> Change:
        """What a transaction that begins now moves and deletes; `ended` says what came of it."""
        with self._lock:
            deletes, self._deletes = self._deletes, []
            moves, self._moves = self._moves, []
            self._taken = Change(
                moves={self.number: moves} if moves else {},
                deletes={self.number: deletes} if deletes else {},
            )
            return Change(moves=dict(self._taken.moves), deletes=dict(self._taken.deletes))

    def ended(self, *, committed: bool) -> None:
        """The transaction is durable, or what it took goes with the next one."""
        with self._lock:
            taken, self._taken = self._taken, Change()
            if not committed:
                self._deletes[:0] = taken.deletes.get(self.number, [])
                self._moves[:0] = taken.moves.get(self.number, [])

    # ---- pages ----

    def load(self, arena: U8, pages: U32, offsets: U64, records: _core.Records) -> U8:
        """Read pages into the arena and verify them whole. [n] of BLOCK_* or READ_FAILED."""
        return self._load(self.slabs, arena, pages, offsets, records)

    def move(self, sources: U32, targets: U32, records: _core.Records) -> U8:
        """Copy pages to others of the pool, each verified whole, durable when this returns. [n] of
        BLOCK_* or READ_FAILED. OSError: none of them counts."""
        size = self.shape.page_bytes
        step = max(1, min(MOVE_BYTES // size, sources.size))
        memory = aligned(step * size)
        slabs = self.slabs.over(memory)
        status = np.full(sources.size, READ_FAILED, np.uint8)
        for start in range(0, sources.size, step):
            part = slice(start, min(start + step, sources.size))
            status[part] = self.verify(memory, sources[part], part_of(records, part))
            slabs.write(targets[part], self.places(part.stop - start))
        slabs.sync(targets)
        return status

    def verify(self, memory: U8, pages: U32, records: _core.Records) -> U8:
        """Read pages into `memory`, whole pages from its start on, and verify them whole. Changes
        nothing. [n] of BLOCK_* or READ_FAILED."""
        return self._load(self.slabs.over(memory), memory, pages, self.places(pages.size), records)

    def places(self, count: int) -> U64:
        """[count] where `verify` puts pages."""
        return np.arange(count, dtype=np.uint64) * np.uint64(self.shape.page_bytes)

    def _load(
        self, slabs: SlabFiles, arena: U8, pages: U32, offsets: U64, records: _core.Records
    ) -> U8:
        came = slabs.read(pages, offsets)
        shape = self.shape
        status = _core.verify_blocks(
            arena.data, offsets, records, shape.layout_digest, shape.payload_bytes
        )
        status[came == 0] = READ_FAILED
        return status
