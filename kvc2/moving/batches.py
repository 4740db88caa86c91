"""Batches from cpu to disk: how large they are, and how many are under way.

Not here: what is in them (disk_writer.py), what makes them durable and in which order
(tiers/disk/tier.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine

from kvc2 import _core
from kvc2.tiers.pools import LayoutOnDisk

BATCH_BYTES = 32 << 20  # one fdatasync and one commit (about 2 ms) for 16 ms of writing ...
BATCH_BYTES_MAX = 128 << 20  # ... or for more, where that is little of both tiers
POOL_SHARE = 8  # a batch is at most this part of its pools: two are pinned in one, two kept free
LARGE_SHARE = 32  # and if it is larger than BATCH_BYTES, at most this part of the disk's
UNDER_WAY_MAX = 2  # one is synced and committed while the next is written


def batch_pages(cpu_pages: int, disk_pages: int, page_bytes: int) -> int:
    """Pages of one batch to a disk pool, from a cpu pool whose pages it pins meanwhile."""
    most = min(cpu_pages // POOL_SHARE, disk_pages // POOL_SHARE)
    large = min(BATCH_BYTES_MAX // page_bytes, disk_pages // LARGE_SHARE)
    return max(1, min(most, max(BATCH_BYTES // page_bytes, large)))


def pages_per_batch(index: _core.Index, pools: LayoutOnDisk) -> int:
    """Of one batch to a layout's disk pool as large as it is now."""
    cpu, disk = index.pool_counts(pools.cpu.id), index.pool_counts(pools.disk.id)
    return batch_pages(cpu.pages, disk.pages, pools.shape.page_bytes)


def free_beside_batches(index: _core.Index, pools: LayoutOnDisk) -> int:
    """Free disk pages beside the two batches that are kept free; negative: they are not."""
    return index.pool_counts(pools.disk.id).free - UNDER_WAY_MAX * pages_per_batch(index, pools)


class Batches:
    """Those under way, in the order in which they were begun and end. One task at a time calls.

    | state | to   | when [function]                                                  |
    |-------|------|------------------------------------------------------------------|
    | none  | one  | a batch is begun [begin]                                         |
    | one   | full | the next is begun while this one is synced and committed [begin] |
    | full  | one  | the first has ended, before the other [first_ended]              |
    | one   | none | it has ended [first_ended, all_ended]                            |
    """

    def __init__(self) -> None:
        self._tasks: deque[asyncio.Task[bool]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def full(self) -> bool:
        """Whether one must end before another may be planned."""
        return len(self._tasks) >= UNDER_WAY_MAX

    def begin(self, work: Coroutine[None, None, bool]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def first_ended(self) -> bool:
        """What the one that was begun first answers."""
        task = self._tasks[0]
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._tasks.popleft()

    async def all_ended(self) -> None:
        """Waits for those under way, whatever becomes of them."""
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks.clear()
