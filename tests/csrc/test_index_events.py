"""What the index tells routers, by random walks (oracles/events_machine.py) and by hand."""

import numpy as np
import pytest

from kvc2 import _core
from tests.csrc.test_index_machine import WALK, walk_and_see
from tests.oracles.events_machine import EventsMachine, Router, events_of
from tests.oracles.machines import SEEN

# about a third of what was counted; see test_index_machine.py
AT_LEAST = {
    "event: STORED": 1200,
    "event: REMOVED": 700,
    "event: CLEARED": 200,
    "event: told again": 40,
    "events: all taken": 700,
    "events: all taken, after an overflow": 100,
    "events: some are left": 500,
    "resident -> free: a move": 3,
}


class EventsUnderHazard(EventsMachine):
    policy = "hazard"


@pytest.mark.parametrize("lives", [EventsMachine, EventsUnderHazard])
def test_who_applies_all_events_has_what_is_resident(lives: type[EventsMachine]) -> None:
    walk_and_see(lives, WALK.examples // 20, AT_LEAST)


class Store:
    """One gpu pool of an index that tells, and a namespace."""

    def __init__(self, kv_event_bytes: int, pages: int, page_size: int = 2) -> None:
        self.index = _core.Index(kv_event_bytes=kv_event_bytes)
        self.page_size, self.per_slab = page_size, pages
        self.pool = self.add_pool()
        self.space = self.index.open_namespace(b"n" * 32, page_size)

    def add_pool(self) -> int:
        pool = self.index.add_pool(
            page_size=self.page_size, pages_per_slab=self.per_slab, below=None, durable=False
        )
        self.index.add_slab(pool)
        return pool

    def put(self, tokens: np.ndarray, pool: int | None = None) -> None:
        blocks, pool = len(tokens) // self.page_size, self.pool if pool is None else pool
        lease = self.index.acquire(self.space, pool, tokens, blocks)
        pages = self.index.grant(pool, blocks)
        self.index.commit(lease.id, 0, tokens, pages)
        self.index.release(lease.id)

    def begin_scan(self, pages: int) -> Router:
        """A scan that has looked at so many pages, and told nothing yet."""
        self.index.tell_kv_events_anew()
        router = Router()
        for event in events_of(self.index.take_kv_events()[0]):  # all is cleared
            router.apply(event)
        assert len(self.index.take_kv_events(scan_pages=pages)[0].kinds) == 0
        return router

    def take_all(self, router: Router) -> int:
        """How many chunks there were."""
        for chunks in range(100_000):
            taken, more = self.index.take_kv_events()
            for event in events_of(taken):
                router.apply(event)
            if not more:
                return chunks + 1
        raise AssertionError("it never ends")


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


def test_an_index_without_events_tells_nothing() -> None:
    store = Store(0, 8)
    store.put(tokens(8))
    store.index.tell_kv_events_anew()
    taken, more = store.index.take_kv_events()
    assert len(taken.kinds) == 0
    assert not more


def test_a_scan_tells_a_path_of_many_chunks_from_its_root_on() -> None:
    store = Store(1 << 24, 4096)
    store.put(tokens(2 * 4000))
    router = Router()
    store.index.tell_kv_events_anew()
    SEEN.clear()
    assert store.take_all(router) > 4000 // 512
    assert len(router.there) == 4000
    assert SEEN["event: before its parent"] == 0
    assert SEEN["event: told again"] == 0


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_scan_waits_where_no_more_may_wait(blocks: int) -> None:
    """It would begin anew with each change that it tells too many."""
    store = Store(1000, 36)
    for start in range(12):
        store.put(tokens(2 * blocks) + np.uint32(1000 * start))
    overflows = store.index.kv_event_overflows()
    router = Router()
    SEEN.clear()
    store.index.tell_kv_events_anew()
    store.take_all(router)
    assert len(router.there) == 12 * blocks
    assert store.index.kv_event_overflows() == overflows
    assert SEEN["event: before its parent"] == 0


def test_what_moves_to_where_a_scan_has_been_is_told() -> None:
    store = Store(1 << 20, 4)
    held = store.index.grant(store.pool, 4)
    store.index.add_slab(store.pool)
    store.put(tokens(2))  # its block is in the second slab
    assert store.index.give_back(store.pool, held)
    router = store.begin_scan(4)
    assert store.index.close_slab(store.pool, 1)
    move = store.index.plan_move(store.pool, 1, 1)
    assert move is not None
    assert move.target_pages[0] < 4
    store.index.complete(move.id, 1)
    store.take_all(router)
    assert len(router.there) == 1


def test_what_comes_to_a_pool_where_a_scan_has_been_is_told_though_another_has_it() -> None:
    """That other pool of the tier may lose it before the scan comes there."""
    store = Store(1 << 20, 4)
    other = store.add_pool()
    store.put(tokens(2), other)
    router = store.begin_scan(4)
    store.put(tokens(2))
    assert store.index.evict(other, 1).pages.size == 1
    store.take_all(router)
    assert len(router.there) == 1


def test_what_waits_is_bounded_and_the_router_has_all_in_the_end() -> None:
    store = Store(1 << 20, 1 << 15)
    router = Router()
    store.take_all(router)
    for start in range(30):  # 1,000 blocks each, of 150 bytes
        store.put(tokens(2000) + np.uint32(2000 * start))
    assert store.index.kv_event_overflows() > 0
    store.take_all(router)
    assert len(router.there) == 30_000


def test_a_router_that_never_reads_costs_what_was_said() -> None:
    """The bound holds whatever comes and goes."""
    store = Store(1 << 16, 64)
    for start in range(2000):
        store.put(tokens(128) + np.uint32(128 * start))
    router, waiting = Router(), 0
    more = True
    while more:
        taken, more = store.index.take_kv_events()
        waiting += sum(getattr(taken, each).nbytes for each in ("keys", "parents", "words"))
        for event in events_of(taken):
            router.apply(event)
    assert waiting <= 1 << 17
    assert len(router.there) == 64
