"""What pools refuse, by the model that evicts: small cases with names. The laws on random walks:
test_index_machine.py."""

from __future__ import annotations

import numpy as np
import pytest

from kvc2 import _core
from kvc2._core import Cause, Why

PAGES = 32
ONCE = 24  # blocks of a prompt that nobody sends again
TURNS = [1000 + at for at in range(8)]  # of a prompt that comes back every time


def u32(values: object) -> np.ndarray:
    return np.array(values, dtype=np.uint32).reshape(-1)


class Store:
    """A pool that clients store copies in, as long as it takes them."""

    def __init__(self, *, admission: bool = True, pages: int = PAGES) -> None:
        self.index = _core.Index(policy="hazard", admission=admission)
        self.pool = self.index.add_pool(
            page_size=1, pages_per_slab=pages, below=None, durable=False, tier=1
        )
        self.index.add_slab(self.pool)
        self.space = self.index.open_namespace(bytes(32), 1)
        self.strangers = 10_000

    def ask(self, path: list[int]) -> tuple[int, int]:
        """Blocks that hit, and blocks that were stored."""
        lease = self.index.acquire(self.space, self.pool, u32(path), len(path))
        pages = self.index.grant_for(lease.id, lease.matched, len(path) - lease.matched)
        end = lease.matched + pages.size
        self.index.commit(lease.id, lease.matched, u32(path[lease.matched : end]), pages)
        self.index.release(lease.id)
        return lease.matched, pages.size

    def stranger(self, blocks: int = ONCE) -> list[int]:
        self.strangers += blocks
        return list(range(self.strangers, self.strangers + blocks))

    def learn(self) -> None:
        """That some prompts come back at once, and others never."""
        for _ in range(200):
            self.ask(TURNS)
            self.ask(self.stranger())

    def counts(self) -> _core.PoolCounts:
        return self.index.pool_counts(self.pool)


def test_what_nobody_sends_again_does_not_put_out_what_comes_back() -> None:
    store = Store()
    store.learn()
    assert store.ask(store.stranger(PAGES)) == (0, PAGES - len(TURNS))
    assert store.counts().refused == len(TURNS)
    assert store.ask(TURNS) == (len(TURNS), 0)
    store.index.check()
    without = Store(admission=False)
    without.learn()
    assert without.counts().refused == 0
    assert without.ask(without.stranger(PAGES)) == (0, PAGES)
    assert without.ask(TURNS)[0] == 0


def test_below_a_refused_block_nothing_is_stored_and_both_are_explained() -> None:
    store = Store()
    store.learn()
    path = store.stranger(PAGES)
    _, stored = store.ask(path)
    for blocks in (stored + 1, stored + 5):
        found = store.index.explain(store.space, [store.pool], u32(path[:blocks]))
        assert (found.blocks, found.why) == (stored, Why.DIED)
        death = found.death
        assert death is not None
        assert (death.cause, death.pool) == (Cause.NOT_ADMITTED, store.pool)
        assert 0 < death.worth < death.victim_worth
    assert store.index.counts().holes == 0


def test_a_refused_block_that_comes_back_soon_is_seen_and_then_stored() -> None:
    store = Store()
    store.learn()
    watched, regretted = store.index.regret(1)
    path = store.stranger(PAGES)
    _, stored = store.ask(path)
    assert stored < PAGES
    seen = store.index.regret(1)
    assert seen[0] > watched
    assert seen[1] == regretted
    more = [store.ask(path)[0] + store.ask(path)[1] for _ in range(8)][-1]
    assert more > stored
    assert store.index.regret(1)[1] > regretted
    assert store.index.regret(0) == store.index.regret(2) == (0, 0)


def test_a_request_that_stores_nothing_is_seen_too() -> None:
    """What was asked for before and is stored at last stays, where what is new goes."""
    seen, unseen = Store(), Store()
    path = seen.stranger(8)
    last = {seen: path, unseen: unseen.stranger(8)}
    for store in (seen, unseen):
        store.learn()
        for _ in range(8):
            store.ask(TURNS)
            asked = path if store is seen else store.stranger(8)
            lease = store.index.acquire(store.space, store.pool, u32(asked), len(asked))
            assert lease.matched == 0
            store.index.release(lease.id)
        assert store.ask(last[store]) == (0, 8)
        store.ask(TURNS)
        store.ask(store.stranger())
    assert [store.ask(last[store])[0] for store in (seen, unseen)] == [8, 0]


def test_a_pinned_prefix_is_stored_whatever_it_is_worth() -> None:
    for hard in (True, False):
        store = Store()
        store.learn()
        path = store.stranger(PAGES)
        assert store.index.pin(store.space, store.pool, u32(path), hard=hard, max_blocks=PAGES)
        assert store.ask(path) == (0, PAGES)


def test_a_request_of_a_higher_priority_is_stored_and_one_of_a_lower_is_not() -> None:
    store = Store()
    store.learn()
    path = store.stranger(PAGES)
    high = _core.Hints(priority=7)
    lease = store.index.acquire(store.space, store.pool, u32(path), len(path), high)
    pages = store.index.grant_for(lease.id, 0, PAGES)
    assert pages.size == PAGES
    store.index.commit(lease.id, 0, u32(path), pages)
    store.index.release(lease.id)
    for _ in range(3):
        assert store.ask(TURNS) == (0, 0)


def test_a_pool_with_room_takes_what_is_worth_less_than_all_that_it_has() -> None:
    store = Store()
    store.learn()
    refused = store.counts().refused
    store.index.evict(store.pool, PAGES - len(TURNS))
    assert store.index.match(store.space, store.pool, u32(TURNS)).blocks == len(TURNS)
    assert store.ask(store.stranger(10)) == (0, 10)
    assert store.counts().refused == refused


def test_no_pool_refuses_anything_before_a_block_has_come_back() -> None:
    store = Store()
    for _ in range(50):
        assert store.ask(store.stranger()) == (0, ONCE)
    assert store.counts().refused == 0


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_other_policies_know_no_worths_and_refuse_nothing(policy: str) -> None:
    store = Store()
    store.index = _core.Index(policy=policy, admission=True)
    store.pool = store.index.add_pool(
        page_size=1, pages_per_slab=PAGES, below=None, durable=False, tier=1
    )
    store.index.add_slab(store.pool)
    store.space = store.index.open_namespace(bytes(32), 1)
    store.learn()
    assert store.counts().refused == 0


class Tiers:
    """An engine's pool over a cpu and a durable one, of so many pages; of none there is none."""

    def __init__(self, gpu: int, cpu: int, disk: int, policy: str = "hazard") -> None:
        self.index = _core.Index(policy=policy, admission=True)
        pools: list[int] = []
        for tier, pages in ((2, disk), (1, cpu), (0, gpu))[disk == 0 :]:
            below = pools[-1] if pools else None
            pools.append(
                self.index.add_pool(
                    page_size=1, pages_per_slab=pages, below=below, durable=tier == 2, tier=tier
                )
            )
            self.index.add_slab(pools[-1])
        self.disk, self.cpu, self.gpu = pools[0], *pools[-2:]
        self.lease = 0
        self.space = self.index.open_namespace(bytes(32), 1)
        self.number = 10_000

    def stranger(self, blocks: int) -> list[int]:
        self.number += blocks
        return list(range(self.number, self.number + blocks))

    def ask(self, path: list[int]) -> int:
        """Blocks that hit; it computes the others, whatever that evicts of the engine's own."""
        lease = self.index.acquire(self.space, self.gpu, u32(path), len(path))
        while (load := self.index.next_load(lease.id, 99)) is not None:
            assert isinstance(load, _core.Transfer)
            self.index.complete(load.id, load.target_pages.size)
        while (up := self.index.promote(lease.id)) is not None:
            self.index.complete(up.id, up.target_pages.size)
        held = self.index.lease(lease.id).pages.size
        self.index.shorten(lease.id, held)
        pages = self.index.grant(self.gpu, len(path) - held)
        assert pages.size == len(path) - held
        self.index.commit(lease.id, held, u32(path[held:]), pages)
        self.lease = lease.id
        return held

    def behind(self, ahead: int = 2) -> None:
        """What is copied when nobody waits, and what is evicted ahead on the disk."""
        for pool in (self.gpu, self.cpu):
            while (down := self.index.plan_demote(pool, max(1, ahead), ahead=ahead)) is not None:
                if self.disk != self.cpu:
                    free = self.index.pool_counts(self.disk).free
                    self.index.evict(self.disk, max(0, ahead - free))
                self.index.complete(down.id, down.target_pages.size)

    def learn(self) -> None:
        for _ in range(200):
            self.ask(TURNS)
            self.index.release(self.lease)
            self.behind()
            self.ask(self.stranger(ONCE))
            self.index.release(self.lease)
            self.behind()


def test_a_full_disk_refuses_and_what_is_insisted_on_goes_down_all_the_same() -> None:
    tiers = Tiers(gpu=40, cpu=36, disk=34)
    tiers.learn()
    tiers.index.evict(tiers.disk, 10)
    before = tiers.index.pool_counts(tiers.disk).refused
    tiers.ask(tiers.stranger(30))
    tiers.behind()
    stored = tiers.index.held_in(tiers.lease, tiers.disk)
    assert 0 < stored < 30
    assert tiers.index.pool_counts(tiers.disk).refused >= before + 30 - stored
    assert tiers.index.undemoted(tiers.cpu) == 0
    tiers.index.insist(tiers.lease)
    tiers.behind()
    assert tiers.index.held_in(tiers.lease, tiers.disk) == 30
    tiers.index.check()


def test_all_that_was_refused_goes_to_the_disk_where_somebody_insists() -> None:
    tiers = Tiers(gpu=40, cpu=36, disk=44)
    tiers.learn()
    tiers.index.insist_all(tiers.disk)
    tiers.behind()
    assert tiers.index.insist_all(tiers.disk) == 0  # what the disk has evicted is not sought
    tiers.index.evict(tiers.disk, 12)
    tiers.ask(tiers.stranger(30))
    tiers.behind()
    refused = 30 - tiers.index.held_in(tiers.lease, tiers.disk)
    assert 0 < refused <= tiers.index.insist_all(tiers.disk)
    tiers.behind()
    assert tiers.index.held_in(tiers.lease, tiers.disk) == 30
    tiers.index.check()


def test_a_refused_block_is_spare_where_it_is() -> None:
    """The engine's pool evicts what the cpu's would not have before what it has no copy of yet."""
    tiers = Tiers(gpu=80, cpu=32, disk=0)
    tiers.learn()
    refused = tiers.stranger(32)
    tiers.ask(refused)
    tiers.index.release(tiers.lease)
    tiers.behind()
    assert tiers.index.pool_counts(tiers.cpu).refused > 0
    fresh = tiers.stranger(20)
    tiers.ask(fresh)
    tiers.index.release(tiers.lease)
    tiers.index.evict(tiers.gpu, 60)
    assert tiers.index.match(tiers.space, tiers.gpu, u32(fresh)).tiers == (20, 0)
    found = tiers.index.explain(tiers.space, [tiers.gpu, tiers.cpu], u32(refused))
    assert found.death is not None
    assert (found.death.cause, found.death.pool) == (Cause.NOT_ADMITTED, tiers.cpu)


def test_a_refused_block_that_is_used_again_is_judged_again() -> None:
    tiers = Tiers(gpu=40, cpu=36, disk=34)
    tiers.learn()
    path = tiers.stranger(30)
    stored = []
    for _ in range(20):
        tiers.ask(path)
        tiers.behind()
        stored.append(tiers.index.held_in(tiers.lease, tiers.disk))
        tiers.index.release(tiers.lease)
    assert (stored[0] < 30, stored[-1]) == (True, 30)
    tiers.index.check()


def test_what_hangs_on_a_refused_block_is_refused_though_there_is_room_by_then() -> None:
    tiers = Tiers(gpu=40, cpu=36, disk=34)
    tiers.learn()
    path = tiers.stranger(20)
    tiers.ask(path)
    tiers.behind()
    stored = tiers.index.held_in(tiers.lease, tiers.disk)
    assert stored < 20
    tiers.index.evict(tiers.disk, 34 - len(TURNS))
    stored = tiers.index.held_in(tiers.lease, tiers.disk)
    refused = tiers.index.pool_counts(tiers.disk).refused
    pages = tiers.index.grant(tiers.gpu, 1)
    tiers.index.commit(tiers.lease, 20, u32(tiers.stranger(1)), pages)
    tiers.behind()
    assert tiers.index.held_in(tiers.lease, tiers.disk) == stored
    assert tiers.index.pool_counts(tiers.disk).refused == refused + 1
    tiers.index.check()


def test_what_one_engine_was_refused_is_no_spare_copy_when_the_pool_had_it_of_another() -> None:
    tiers = Tiers(gpu=80, cpu=32, disk=0)
    tiers.learn()
    tiers.index.evict(tiers.gpu, 60)
    path = tiers.stranger(30)
    tiers.ask(path)
    tiers.index.release(tiers.lease)
    tiers.behind()
    assert tiers.index.match(tiers.space, tiers.cpu, u32(path)).blocks < 30
    tiers.ask(tiers.stranger(20))
    tiers.index.release(tiers.lease)
    other = tiers.index.add_pool(
        page_size=1, pages_per_slab=40, below=tiers.cpu, durable=False, tier=0
    )
    tiers.index.add_slab(other)
    lease = tiers.index.acquire(tiers.space, other, u32(path), 30)
    tiers.index.shorten(lease.id, 0)
    tiers.index.commit(lease.id, 0, u32(path), tiers.index.grant(other, 30))
    tiers.index.insist(lease.id)
    while (down := tiers.index.plan_demote(other, 99)) is not None:
        tiers.index.complete(down.id, down.target_pages.size)
    assert tiers.index.match(tiers.space, tiers.cpu, u32(path)).blocks == 30
    tiers.index.release(lease.id)
    for _ in range(6):  # the other engine's uses make it worth more than what was computed last
        tiers.index.release(tiers.index.acquire(tiers.space, other, u32(path), 30).id)
    tiers.index.close_pool(other)
    tiers.index.remove_pool(other)
    tiers.index.evict(tiers.cpu, 32)
    tiers.index.evict(tiers.gpu, 40)
    assert tiers.index.match(tiers.space, tiers.gpu, u32(path)).blocks == 30
    tiers.index.check()


def of_worth(worth: int, first: int = 0) -> list[int]:
    """A path of one block, which is worth that under `by_key`."""
    paths = ([number] for number in range(first, first + 1000))
    return next(p for p in paths if _core.chain_keys(bytes(32), u32(p), 1)[0][0] & 7 == worth)


@pytest.mark.parametrize(
    ("disk", "worth", "taken"), [(0, 1, False), (0, 2, True), (2, 2, False), (2, 3, True)]
)
def test_a_disk_asks_for_half_as_much_again_as_its_victim_is_worth(
    disk: int, worth: int, taken: bool
) -> None:
    """And a pool in memory for as much."""
    tiers = Tiers(gpu=4, cpu=3 if disk else 1, disk=disk, policy="by_key")
    for path in (of_worth(2), of_worth(worth, first=1000)):
        tiers.ask(path)
        tiers.index.release(tiers.lease)
        tiers.behind(1)
    last = tiers.disk if disk else tiers.cpu
    assert tiers.index.explain(tiers.space, [last], u32(path)).blocks == taken
    assert tiers.index.pool_counts(last).refused == (not taken)


def test_a_path_that_fills_the_disk_is_refused_where_it_ends_and_nothing_waits_for_it() -> None:
    tiers = Tiers(gpu=100, cpu=90, disk=34)
    tiers.learn()
    path = tiers.stranger(80)
    for _ in range(10):
        tiers.ask(path)
        tiers.index.release(tiers.lease)
        tiers.behind(1)
    counts = tiers.index.pool_counts(tiers.disk)
    assert tiers.index.explain(tiers.space, [tiers.disk], u32(path)).blocks == 33
    assert tiers.index.undemoted(tiers.cpu) == 0
    tiers.ask(path)
    tiers.index.release(tiers.lease)
    tiers.behind(1)
    after = tiers.index.pool_counts(tiers.disk)
    assert (after.resident, after.evicted) == (33, counts.evicted)
    assert after.refused == counts.refused + 80 - 33
    short = tiers.stranger(2)
    tiers.ask(short)
    tiers.index.insist(tiers.lease)
    tiers.index.release(tiers.lease)
    tiers.behind(1)
    assert tiers.index.explain(tiers.space, [tiers.disk], u32(short)).blocks == 2
    tiers.index.check()


def test_a_path_that_fills_the_disk_waits_while_another_block_is_on_its_way_there() -> None:
    tiers = Tiers(gpu=100, cpu=90, disk=34)
    tiers.learn()
    tiers.index.evict(tiers.disk, 34)
    tiers.ask(tiers.stranger(1))
    tiers.index.insist(tiers.lease)
    tiers.index.release(tiers.lease)
    for pool in (tiers.gpu, tiers.cpu):
        plan = tiers.index.plan_demote(pool, 1)
        assert plan is not None
        if pool == tiers.gpu:
            tiers.index.complete(plan.id, 1)
    path = tiers.stranger(80)
    tiers.ask(path)
    tiers.index.release(tiers.lease)
    before = tiers.index.pool_counts(tiers.disk).refused
    tiers.behind(1)
    assert tiers.index.explain(tiers.space, [tiers.disk], u32(path)).blocks == 32
    assert tiers.index.pool_counts(tiers.disk).refused == before
    assert tiers.index.undemoted(tiers.cpu) == 80 - 32
    tiers.index.complete(plan.id, 1)
    tiers.behind(1)
    assert tiers.index.undemoted(tiers.cpu) == 0
    tiers.index.check()


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_path_longer_than_the_disk_is_written_once_as_far_as_it_fits(ahead: int) -> None:
    tiers = Tiers(gpu=100, cpu=90, disk=34)
    path = tiers.stranger(80)
    tiers.ask(
        path
    )  # nobody can tell yet what it is worth: its tail waits, none of it goes for that
    tiers.index.release(tiers.lease)
    for _ in range(40 // ahead):
        tiers.behind(ahead)
        tiers.index.evict(tiers.disk, ahead)  # as a writer that keeps pages free does
    counts = tiers.index.pool_counts(tiers.disk)
    assert (counts.resident, counts.evicted) == (34, 0)
    assert tiers.index.undemoted(tiers.cpu) == 80 - 34
    for _ in range(3):  # then its tail is refused, and what is kept free stays free
        tiers.ask(path)
        tiers.index.release(tiers.lease)
        for _ in range(40 // ahead):
            tiers.behind(ahead)
            free = tiers.index.pool_counts(tiers.disk).free
            tiers.index.evict(tiers.disk, max(0, ahead - free))
        counts = tiers.index.pool_counts(tiers.disk)
        assert (counts.resident, counts.evicted) == (34 - ahead, ahead)
        assert tiers.index.undemoted(tiers.cpu) == 0
        assert tiers.index.explain(tiers.space, [tiers.disk], u32(path)).blocks == 34 - ahead
