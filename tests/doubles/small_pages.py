"""Whose each page of an engine's pool is, as its daemon counts: the laws asserted, no bytes but the
cpu tier's. Not here: leases and calls (small_daemon.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

Key: TypeAlias = tuple[Any, ...]  # namespace, and all tokens up to the block's end
Moves: TypeAlias = list[tuple[int, np.ndarray]]  # page, and what it will hold


class SmallPages:
    """A page is free, the engine's (private) or a block's (resident). `pinned` tells which pages
    leases hold."""

    def __init__(self, pool: np.ndarray, pinned: Callable[[], set[int]]) -> None:
        self.pool = pool
        self.free: set[int] = set()
        self.private: set[int] = set()
        self.resident: dict[Key, int] = {}  # least recently used first
        self.transfers: list[Moves] = []
        self._lower: dict[Key, np.ndarray] = {}  # the cpu tier
        self._pinned = pinned

    def begin(self, kept: Sequence[int]) -> None:
        """A session, whose engine goes on using the pages that it kept."""
        self.resident.clear()
        self.transfers.clear()
        self.private = set(kept)
        self.free = set(range(len(self.pool))) - self.private

    def bring(self, key: Key, moves: Moves) -> Literal["gpu", "cpu"] | None:
        """The tier that has the block, which has a page from now on, by a move if need be."""
        if key in self.resident:
            self._touch(key)
            return "gpu"
        if key in self._lower and (page := self._one()) is not None:
            self.resident[key] = page
            moves.append((page, self._lower[key]))
            return "cpu"
        return None

    def adopt(self, key: Key, page: int) -> bool:
        """Whether this page of the engine is the block's now. If not, it has one already."""
        if key in self.resident:
            self._touch(key)
            return False
        self.private.remove(page)
        self.resident[key] = page
        return True

    def grant(self, count: int) -> np.ndarray:
        """So many, or fewer."""
        pages = []
        while len(pages) < count and (page := self._one()) is not None:
            pages.append(page)
            self.private.add(page)
        return np.array(pages, np.uint32)

    def give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.private.remove(page)
            self.free.add(page)

    def arrive(self, transfer: int) -> None:
        """All up to this one."""
        for moves in self.transfers[:transfer]:
            for page, values in moves:
                self.pool[page] = values
            moves.clear()

    def evict(self, *, enough: int) -> None:
        """Blocks that nobody pins, to the cpu tier, until so many pages are free."""
        for key, page in list(self.resident.items()):
            if len(self.free) >= enough:
                return
            coming = {page for moves in self.transfers for page, _ in moves}
            if page not in self._pinned() | coming:
                self._lower[key] = self.pool[page].copy()
                del self.resident[key]
                self.free.add(page)

    def check(self) -> None:
        owned = [*self.free, *self.private, *self.resident.values()]
        assert len(owned) == len(set(owned)) == len(self.pool), "a page has no owner, or two"

    def _one(self) -> int | None:
        self.evict(enough=1)
        return self.free.pop() if self.free else None

    def _touch(self, key: Key) -> None:
        self.resident[key] = self.resident.pop(key)
