"""Moves host memory between the pages of KV and the experts that memory holds, while serving.

    KV -> experts   free pages are held back, their memory is given up, then the store may hold more
    experts -> KV   the store gives experts up, then pages that were held back are free again

So what both have never exceeds the budget. A little at a time, between two steps, and only of
what is free: no request waits for it, and where pages run out, those held back are free at once.
No bit changes: nobody reads a page that is held back, and experts are read again. Not responsible
for how much should lie where (host_budget).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from engine.attention.base import KvShape
from engine.budget import Counts, Measured
from engine.experts.store import ExpertStore
from engine.host_budget import HostDivision, Redivision
from engine.prefix import Bridge, Lease, PoolMemory

MOVE_S = 0.25  # between two moves
MOVED_BYTES = 16e6  # by one of them, at most, but one page or expert at least
HOLDER = b"held back"


class Pages(Protocol):
    """Of a pool: some of them are held back."""

    @property
    def held(self) -> int: ...

    def hold(self, count: int) -> None:
        """Begins to hold up to so many more, of those that are free and not needed soon, unless
        some are on their way already."""

    def settle(self) -> None:
        """Waits for those that are."""

    def let_go(self, count: int) -> None: ...

    def close(self) -> None: ...


class HeldPages:
    """Pages of an engine's pool that no request gets. Their memory is the host's: a thread gives it
    up, which takes longer than a step may wait, and they are held from then on."""

    def __init__(self, bridge: Bridge, memory: PoolMemory, shape: KvShape, num_pages: int) -> None:
        self.bridge = bridge
        self._memory = memory
        self._shape = shape
        self._num_pages = num_pages
        self._lease, self._coming = Lease(HOLDER), Lease(HOLDER)
        self._beside = ThreadPoolExecutor(1, "kvc2-pages")
        self._giving_up: Future[None] | None = None

    @property
    def held(self) -> int:
        return len(self._lease.pages) + len(self._coming.pages if self._given_up else ())

    def hold(self, count: int) -> None:
        """More than the pages that steps need soon must be free; the daemon is asked for more."""
        soon = self.bridge.config.low_water
        self.bridge.commit([], soon=count)
        if self._given_up:
            self.settle()
        count = min(count, self.bridge.book.free - soon)
        size = self._shape.page_size
        if not self._coming.pages and count > 0 and self.bridge.grow(self._coming, count * size):
            self._giving_up = self._beside.submit(self._give_up, list(self._coming.pages))

    def hold_first(self, count: int) -> None:
        """Before the first step, and before there is a session: nobody has written to them."""
        self.bridge.grow(self._lease, count * self._shape.page_size)

    def settle(self) -> None:
        if self._giving_up is not None:
            self._giving_up.result()
            self._lease.pages += self._coming.pages
            self._coming.pages, self._giving_up = [], None

    def close(self) -> None:
        self._beside.shutdown()

    def let_go(self, count: int) -> None:
        if self._given_up:
            self.settle()
        at = max(0, self.held - count)
        freed = Lease(HOLDER, pages=self._lease.pages[at:])
        del self._lease.pages[at:]
        self.bridge.release([freed])

    @property
    def _given_up(self) -> bool:
        """Those on their way have come, and may be counted."""
        return self._giving_up is not None and self._giving_up.done()

    def _give_up(self, pages: list[int]) -> None:
        size = self._shape.segment_bytes
        for first, count in _runs(sorted(pages)):
            for segment in range(2 * self._shape.layers):
                begin = (segment * self._num_pages + first) * size
                self._memory.give_up(begin, count * size)


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """(first, how many) of neighbours in a sorted list."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and page == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found


class HostMemory:
    """Carries a division out. The thread that computes calls `turn` and `spare`, any one `told`.

    `num_pages`: of the whole pool; `shown`: the counts of cold experts, and what was measured.
    """

    def __init__(
        self,
        policy: Redivision,
        store: ExpertStore,
        pages: Pages,
        num_pages: int,
        shown: Callable[[], tuple[Counts, Measured]],
    ) -> None:
        self._policy = policy
        self._store = store
        self._pages = pages
        self._num_pages = num_pages
        self._shown = shown
        self._moved_at = time.monotonic()
        self._beside = ThreadPoolExecutor(1, "kvc2-division")  # deciding takes longer than a token
        self._deciding: Future[None] | None = None

    @property
    def now(self) -> HostDivision:
        """What both have."""
        left = self._num_pages - self._pages.held
        return HostDivision(self._store.places, left, self._policy.goal.by)

    def turn(self, now: float) -> None:
        """Between two steps. Waits for nothing."""
        if self._policy.fixed:
            return
        if self._policy.due(now) and (self._deciding is None or self._deciding.done()):
            self._deciding = self._beside.submit(self._decide, now)
        if now - self._moved_at >= MOVE_S:
            self._moved_at = now
            self._move()

    def spare(self, count: int) -> bool:
        """Pages ran out: so many of those held back are free now, if there are, and the store gives
        up what it must. Whether any are."""
        if self._policy.fixed:
            return False
        self._pages.settle()
        if not self._pages.held:
            return False
        sizes, before = self._policy.sizes, self._pages.held
        count = min(count, before)
        lacking = count * sizes.page_bytes - self._left_bytes
        fewer = self._store.places - max(0, -(-lacking // sizes.expert_bytes))
        self._store.resize(max(sizes.least_experts, fewer))
        self._let_go(count)
        return self._pages.held < before

    def told(self) -> dict[str, Any]:
        """For GET /experts."""
        return self._policy.told(self.now, *self._shown())

    def close(self) -> None:
        self._beside.shutdown()
        self._pages.close()

    def _decide(self, now: float) -> None:
        self._policy.decide(now, *self._shown())

    @property
    def _left_bytes(self) -> int:
        return self._policy.total_bytes - self.now.used_bytes(self._policy.sizes)

    def _move(self) -> None:
        sizes, goal = self._policy.sizes, self._policy.goal
        experts = max(1, int(MOVED_BYTES) // sizes.expert_bytes)
        pages = max(1, int(MOVED_BYTES) // sizes.page_bytes)
        if self._store.places > goal.experts:
            self._store.resize(max(goal.experts, self._store.places - experts))
        elif self._store.places < goal.experts:
            more = min(experts, goal.experts - self._store.places)
            lacking = more * sizes.expert_bytes - self._left_bytes
            can = self._num_pages - self._pages.held - sizes.least_pages
            if lacking > 0 and can > 0:
                self._pages.hold(min(pages, can, -(-lacking // sizes.page_bytes)))
            fit = self._left_bytes // sizes.expert_bytes
            self._store.resize(self._store.places + max(0, min(more, fit)))
        if self._store.places >= goal.experts:
            self._let_go(min(pages, goal.pages - self.now.pages))

    def _let_go(self, count: int) -> None:
        fit = self._left_bytes // self._policy.sizes.page_bytes
        if min(count, fit) > 0:
            self._pages.let_go(min(count, fit))
