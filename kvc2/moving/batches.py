"""Batches from cpu to disk: how large they are, and how many are under way.

Not here: what is in them (behind.py), what makes them durable and in which order (tiers/disk.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine

STORE_BYTES = 32 << 20  # one fdatasync and one commit (about 2 ms) for 16 ms of writing ...
STORE_BYTES_MAX = 128 << 20  # ... or for more, where that is little of both tiers
POOL_SHARE = 8  # a batch is at most this part of its pools: two are pinned in one, two kept free
LARGE_SHARE = 32  # and if it is larger than STORE_BYTES, at most this part of the disk's
UNDER_WAY_MAX = 2  # one is synced and committed while the next is written


def store_pages(cpu_pages: int, disk_pages: int, page_bytes: int) -> int:
    """Pages of one batch to a disk pool, from a cpu pool whose pages it pins meanwhile."""
    most = min(cpu_pages // POOL_SHARE, disk_pages // POOL_SHARE)
    large = min(STORE_BYTES_MAX // page_bytes, disk_pages // LARGE_SHARE)
    return max(1, min(most, max(STORE_BYTES // page_bytes, large)))


class Batches:
    """Those under way, in the order in which they were begun and end. One task at a time calls."""

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
