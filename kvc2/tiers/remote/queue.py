"""What waits to be put into the remote store: bounded, and what comes when it is full is not put.

Not here: what is worth being put (cache/puts.py).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

KNOWN_MAX = 1 << 16  # blocks; 200 bytes each
KNOWN_S = 600.0  # after that the store may have dropped a block, and is asked again

Item = TypeVar("Item")


class PutQueue(Generic[Item]):
    """Items with the bytes that they stand for, at most `bytes_max` together. One task takes."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max, self._bytes = bytes_max, 0
        self._items: deque[tuple[Item, int]] = deque()
        self._some = asyncio.Event()

    def offer(self, item: Item, num_bytes: int) -> bool:
        """False: there is no room for it."""
        if self._bytes + num_bytes > self._bytes_max:
            return False
        self._items.append((item, num_bytes))
        self._bytes += num_bytes
        self._some.set()
        return True

    async def take(self) -> Item:
        """The oldest one, when there is one."""
        while not self._items:
            self._some.clear()
            await self._some.wait()
        item, num_bytes = self._items.popleft()
        self._bytes -= num_bytes
        return item

    def __len__(self) -> int:
        return len(self._items)


class Known:
    """Names of blocks that the store had lately, the last KNOWN_MAX of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def add(self, name: bytes) -> None:
        self._seen[name] = self._clock()
        self._seen.move_to_end(name)
        if len(self._seen) > KNOWN_MAX:
            self._seen.popitem(last=False)

    def __contains__(self, name: bytes) -> bool:
        seen = self._seen.get(name)
        return seen is not None and self._clock() - seen < KNOWN_S
