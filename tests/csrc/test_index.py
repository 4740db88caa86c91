"""The laws of csrc/index/index.h one by one. Random walks: test_index_machine.py."""

import numpy as np
import pytest

from kvc2 import _core

SIZE = 2
NAME = b"n" * 32


def tokens(*blocks: int) -> np.ndarray:
    return np.repeat(np.array(blocks, dtype=np.uint32), SIZE)


class House:
    """One engine's pool of 4 pages over a cpu pool of 6 and a durable one of 8."""

    def __init__(self) -> None:
        self.index = _core.Index()
        self.disk = self.pool(8, None, durable=True)
        self.cpu = self.pool(6, self.disk)
        self.gpu = self.pool(4, self.cpu)
        self.space = self.index.open_namespace(NAME, SIZE)

    def pool(self, pages: int, below: int | None, *, durable: bool = False) -> int:
        pool = self.index.add_pool(
            page_size=SIZE, pages_per_slab=pages, below=below, durable=durable
        )
        self.index.add_slab(pool)
        return pool

    def compute(self, *blocks: int) -> int:
        """An open lease that has committed the blocks."""
        lease = self.index.acquire(self.space, self.gpu, tokens(*blocks), len(blocks))
        first = len(lease.pages)
        pages = self.index.grant(self.gpu, len(blocks) - first)
        answers = self.index.commit(lease.id, first, tokens(*blocks[first:]), pages)
        assert set(answers.tolist()) <= {_core.ADOPTED}
        return lease.id

    def demote(self, pool: int) -> None:
        for _ in range(99):
            transfer = self.index.plan_demote(pool, 8)
            if transfer is None:
                return
            self.index.complete(transfer.id, len(transfer.source_pages))
        raise AssertionError("blocks go round and round")

    def matched(self, *blocks: int) -> tuple[int, ...]:
        self.index.check()
        return self.index.match(self.space, self.gpu, tokens(*blocks)).tiers


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


@pytest.fixture
def house() -> House:
    return House()


def test_nothing_is_visible_before_commit(house: House) -> None:
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2), 2)
    pages = house.index.grant(house.gpu, 2)
    assert house.matched(1, 2) == (0, 0, 0)
    house.index.commit(lease.id, 0, tokens(1, 2), pages)
    assert house.matched(1, 2, 3) == (2, 0, 0)


def test_evicting_never_touches_a_pinned_prefix(house: House) -> None:
    lease = house.compute(1, 2, 3)
    assert house.index.evict(house.gpu, 9).pages.size == 0
    house.index.release(lease)
    assert house.index.evict(house.gpu, 9).last_copies == 3


def test_a_stem_that_lost_its_branch_is_one_run_again_whatever_is_on_its_way(house: House) -> None:
    for last in (3, 9, 3):
        house.index.release(house.compute(1, 2, last))
    house.index.evict(house.gpu, 1)
    assert house.matched(1, 2, 9) == (2, 0, 0)
    nodes = house.index.counts().nodes
    transfer = house.index.plan_demote(house.gpu, 2)
    assert transfer is not None
    assert len(transfer.source_pages) == 2
    lease = house.compute(1, 2, 3)
    assert house.index.counts().nodes == nodes - 1
    assert house.matched(1, 2, 3) == (3, 0, 0)
    house.index.complete(transfer.id, 2)
    house.index.release(lease)
    house.index.evict(house.gpu, 3)
    assert house.matched(1, 2, 3) == (0, 2, 0)


def test_evicting_takes_the_tail_first_and_the_coldest_path(house: House) -> None:
    house.index.release(house.compute(1, 2))
    house.index.release(house.compute(1, 3))
    house.index.evict(house.gpu, 1)
    assert house.matched(1, 2) == (1, 0, 0)
    assert house.matched(1, 3) == (2, 0, 0)


def test_a_copy_that_a_slower_pool_holds_goes_before_a_colder_last_copy(house: House) -> None:
    house.index.release(house.compute(1))
    cold = house.index.match(house.space, house.gpu, tokens(1))
    assert cold.blocks == 1
    house.index.release(house.compute(2))
    transfer = house.index.plan_demote(house.gpu, 8)
    assert transfer is not None
    house.index.complete(transfer.id, 1)  # block 1; block 2 has failed
    house.index.release(house.index.acquire(house.space, house.gpu, tokens(1), 1).id)
    house.index.evict(house.gpu, 1)
    assert house.matched(1) == (0, 1, 0)
    assert house.matched(2) == (1, 0, 0)


def test_the_later_of_two_equal_commits_stays_private_and_is_freed_at_release(house: House) -> None:
    first, second = (house.index.acquire(house.space, house.gpu, tokens(1, 2), 2) for _ in range(2))
    assert (first.computing, second.computing) == (0, 2)
    pages = house.index.grant(house.gpu, 4)
    assert house.index.commit(first.id, 0, tokens(1, 2), pages[:2]).tolist() == [_core.ADOPTED] * 2
    assert (
        house.index.commit(second.id, 0, tokens(1, 2), pages[2:]).tolist() == [_core.DUPLICATE] * 2
    )
    assert not house.index.give_back(house.gpu, pages[2:])
    house.index.check()
    house.index.release(second.id)
    assert house.index.pool_counts(house.gpu).free == 2


def test_a_commit_with_a_gap_or_a_foreign_page_is_refused(house: House) -> None:
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2), 2)
    pages = house.index.grant(house.gpu, 2)
    assert house.index.commit(lease.id, 1, tokens(2), pages[:1]).tolist() == [_core.REFUSED]
    foreign = np.array([3, pages[0]], dtype=np.uint32)
    assert house.index.commit(lease.id, 0, tokens(1, 2), foreign).tolist() == [_core.REFUSED] * 2
    assert house.matched(1) == (0, 0, 0)


def test_every_tier_in_turn_gives_the_prefix_back(house: House) -> None:
    house.index.release(house.compute(1, 2, 3))
    house.demote(house.gpu)
    house.demote(house.cpu)
    house.index.evict(house.gpu, 9)
    assert house.matched(1, 2, 3) == (0, 3, 0)
    house.index.evict(house.cpu, 9)
    assert house.matched(1, 2, 3) == (0, 0, 3)
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3).id
    load = house.index.next_load(lease, 2)
    assert isinstance(load, _core.Transfer)
    wait = house.index.next_load(lease, 2)
    assert isinstance(wait, _core.Wait)
    assert wait.transfer == load.id
    house.index.complete(load.id, 2)
    promote = house.index.promote(lease)
    assert promote is not None
    view = house.index.lease(lease)
    assert (view.transfer, view.tiers) == (promote.id, (0, 0, 2))
    house.index.complete(promote.id, 2)
    assert house.index.lease(lease).transfer == 0
    assert house.matched(1, 2, 3) == (2, 0, 1)


def test_a_lease_on_the_cpu_s_pool_is_read_in_place(house: House) -> None:
    """Its blocks come from disk by promote, and what it commits goes to disk from there."""
    index = house.index
    index.release(house.compute(1, 2, 3))
    house.demote(house.gpu)
    house.demote(house.cpu)
    for pool in (house.gpu, house.cpu):
        index.evict(pool, 9)
    lease = index.acquire(house.space, house.cpu, tokens(1, 2, 3, 4), 4)
    assert (lease.matched, lease.ahead.tolist()) == (3, [[1, 3]])
    assert index.next_load(lease.id, 9) is None
    first = index.promote(lease.id, 2)
    assert first is not None
    assert (first.source, first.target, first.target_pages.size) == (house.disk, house.cpu, 2)
    index.complete(first.id, 2)
    rest = index.promote(lease.id)  # asked again, later
    assert rest is not None
    index.complete(rest.id, 1)
    page = index.grant(house.cpu, 1)
    assert index.commit(lease.id, 3, tokens(4), page).tolist() == [_core.ADOPTED]
    view = index.lease(lease.id)
    assert (view.tiers, view.transfer, view.pages[3]) == ((0, 3), 0, page[0])
    assert index.evict(house.cpu, 9).pages.size == 0
    engine = index.acquire(house.space, house.gpu, tokens(1, 2, 3, 4), 4)
    assert engine.matched == 4
    assert index.promote(engine.id) is not None
    house.demote(house.cpu)
    assert index.release_all(np.array([lease.id, 99, engine.id, lease.id], np.uint64)) == 2
    with pytest.raises(KeyError):
        index.lease(lease.id)
    assert index.evict(house.cpu, 9).pages.size == 0  # a transfer reads them
    index.check()
    with pytest.raises(ValueError, match="is durable"):
        index.acquire(house.space, house.disk, tokens(1), 1)


def test_a_lease_neither_pins_nor_brings_what_its_caller_has(house: House) -> None:
    index = house.index
    index.release(house.compute(1, 2, 3))
    house.demote(house.gpu)
    index.evict(house.gpu, 9)
    lease = index.acquire(house.space, house.gpu, tokens(1, 2, 3, 4), 4, skip_blocks=2)
    assert (lease.matched, lease.first_block, lease.ahead.tolist()) == (3, 2, [[1, 1]])
    transfer = index.promote(lease.id)
    assert transfer is not None
    assert transfer.target_pages.size == 1
    index.complete(transfer.id, 1)
    page = index.grant(house.gpu, 1)
    assert index.commit(lease.id, 1, tokens(2), page).tolist() == [_core.REFUSED]
    assert index.commit(lease.id, 3, tokens(4), page).tolist() == [_core.ADOPTED]
    assert index.lease(lease.id).pages.size == 2
    assert index.evict(house.cpu, 9).pages.size == 1  # block 3: the engine's pool has it too
    assert house.matched(1, 2, 3, 4) == (2, 2, 0)
    index.release(lease.id)
    index.check()


def test_what_is_not_there_is_not_skipped_and_what_has_gone_ends_the_lease(house: House) -> None:
    index = house.index
    index.release(house.compute(1))
    lease = index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3, skip_blocks=3)
    assert (lease.matched, lease.first_block, lease.pages.size) == (1, 1, 0)
    two = index.grant(house.gpu, 2)
    assert index.evict(house.gpu, 9).pages.size == 1  # nothing holds the block that it skips
    assert index.commit(lease.id, 1, tokens(2, 3), two).tolist() == [_core.REFUSED] * 2
    assert index.promote(lease.id) is None
    index.release(house.compute(1))
    assert index.commit(lease.id, 1, tokens(2, 3), two).tolist() == [_core.ADOPTED] * 2
    assert house.matched(1, 2, 3) == (3, 0, 0)


def test_a_lease_goes_on_from_all_that_it_skipped_or_not_at_all(house: House) -> None:
    index = house.index
    index.release(house.compute(1, 2))
    lease = index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3, skip_blocks=2)
    assert lease.first_block == 2
    page = index.grant(house.gpu, 1)
    index.evict(house.gpu, 1)  # block 2
    assert house.matched(1, 2) == (1, 0, 0)
    assert index.commit(lease.id, 2, tokens(3), page).tolist() == [_core.REFUSED]
    index.release(lease.id)
    assert house.matched(1, 3) == (1, 0, 0)


def test_a_failed_promotion_ends_the_lease_s_pages_before_it(house: House) -> None:
    house.index.release(house.compute(1, 2, 3))
    house.demote(house.gpu)
    house.index.evict(house.gpu, 9)
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3).id
    transfer = house.index.promote(lease)
    assert transfer is not None
    sharer = house.index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3)
    assert (len(sharer.pages), sharer.transfer) == (3, transfer.id)
    house.index.complete(transfer.id, 1)
    house.index.check()
    for each in (lease, sharer.id):
        assert len(house.index.lease(each).pages) == 1
        house.index.release(each)
    assert house.matched(1, 2, 3) == (1, 2, 0)


def test_a_lease_waits_for_nothing_behind_what_failed(house: House) -> None:
    """Neither now nor by what it is told later."""
    house.index.release(house.compute(1, 2, 3))
    house.demote(house.gpu)
    house.index.evict(house.gpu, 9)
    stem = house.index.acquire(house.space, house.gpu, tokens(1), 1).id
    first = house.index.promote(stem)
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2, 3), 3).id
    second = house.index.promote(lease)
    assert first is not None
    assert second is not None
    assert house.index.lease(lease).transfer == second.id
    house.index.complete(first.id, 0)
    view = house.index.lease(lease)
    assert (view.pages.size, view.transfer) == (0, 0)
    house.index.check()
    house.index.complete(second.id, 2)
    house.index.check()


def test_a_run_takes_no_page_that_another_lease_holds_as_its_duplicate(house: House) -> None:
    house.compute(1)
    lease = house.index.acquire(house.space, house.gpu, tokens(1), 0)
    duplicate, free = house.index.grant(house.gpu, 2).tolist()
    answers = house.index.commit(lease.id, 0, tokens(1), pages(duplicate))
    assert answers.tolist() == [_core.DUPLICATE]
    # 2 is in no tree, so that what follows it is committed as a run
    answers = house.index.commit(lease.id, 1, tokens(2, 3), pages(free, duplicate))
    assert answers.tolist() == [_core.ADOPTED, _core.REFUSED]
    house.index.check()


def test_a_commit_again_with_other_tokens_is_refused(house: House) -> None:
    lease = house.compute(1, 2)
    held = house.index.lease(lease).pages
    assert house.index.commit(lease, 0, tokens(1, 2), held).tolist() == [_core.ADOPTED] * 2
    answers = house.index.commit(lease, 0, tokens(1, 3), held)
    assert answers.tolist() == [_core.ADOPTED, _core.REFUSED]


def test_what_has_expired_since_acquire_is_not_loaded(house: House) -> None:
    ttl = _core.Hints(ttl_s=5)
    house.index.advance(1)
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2), 2, ttl)
    house.index.commit(lease.id, 0, tokens(1, 2), house.index.grant(house.gpu, 2))
    house.index.release(lease.id, ttl)
    for pool in (house.gpu, house.cpu):
        house.demote(pool)
        house.index.evict(pool, 9)
    lease = house.index.acquire(house.space, house.gpu, tokens(1, 2), 2, ttl)
    assert (lease.matched, lease.ahead.tolist()) == (2, [[2, 2]])
    house.index.advance(6)
    assert house.index.next_load(lease.id, 9) is None


def test_a_lost_page_makes_a_hole_and_a_commit_closes_it(house: House) -> None:
    lease = house.compute(1, 2, 3)
    pages = house.index.lease(lease).pages
    house.index.release(lease)
    assert house.index.lost(house.gpu, pages[1:2]).last_copies == 1
    assert house.index.counts().holes == 1
    assert house.matched(1, 2, 3) == (1, 0, 0)
    house.compute(1, 2)
    assert house.matched(1, 2, 3) == (3, 0, 0)


def test_a_removed_pool_fails_its_transfers_but_the_other_end_waits_for_complete(
    house: House,
) -> None:
    house.compute(1, 2)
    transfer = house.index.plan_demote(house.gpu, 8)
    assert transfer is not None
    house.index.close_pool(house.gpu)
    house.index.remove_pool(house.gpu)
    house.index.check()
    assert house.index.pool_counts(house.cpu).in_flight == 2  # a late copy may still write there
    house.index.complete(transfer.id, 2)
    house.index.check()
    assert house.index.pool_counts(house.cpu).free == 6


def test_what_a_demotion_did_not_bring_is_undemoted_again(house: House) -> None:
    house.index.release(house.compute(1, 2, 3))
    transfer = house.index.plan_demote(house.gpu, 8)
    assert transfer is not None
    house.index.complete(transfer.id, 1)
    house.index.check()
    assert house.index.undemoted(house.gpu) == 2
    again = house.index.plan_demote(house.gpu, 8)
    assert again is not None
    assert again.source_pages.tolist() == transfer.source_pages[1:].tolist()
    house.index.complete(again.id, 2)
    assert house.index.undemoted(house.gpu) == 0
    assert house.index.undemoted(house.cpu) == 3


def test_a_durable_pool_never_evicts_by_itself_and_generations_rise(house: House) -> None:
    seen: list[int] = []
    for block in range(12):
        house.index.release(house.compute(block))
        house.demote(house.gpu)
        while transfer := house.index.plan_demote(house.cpu, 8):
            assert transfer.records is not None
            seen += transfer.records.generations.tolist()
            house.index.complete(transfer.id, len(transfer.source_pages))
    assert seen == list(range(1, 9))
    assert house.index.undemoted(house.cpu) > 0


def test_a_slab_is_taken_when_it_is_empty(house: House) -> None:
    house.index.release(house.compute(1, 2))
    assert not house.index.take_slab(house.gpu, 0)
    assert house.index.evict(house.gpu, 9).last_copies == 2
    assert house.index.take_slab(house.gpu, 0)
    assert house.index.pool_counts(house.gpu).pages == 0
    house.index.check()


def test_arguments_are_refused_by_name(house: House) -> None:
    index = house.index
    with pytest.raises(TypeError, match="tokens: dtype int64"):
        index.match(house.space, house.gpu, np.zeros(4, dtype=np.int64))
    with pytest.raises(TypeError, match="extras is neither None nor PromptExtras"):
        house.index.match(house.space, house.gpu, tokens(1), "images")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens: shape"):
        index.match(house.space, house.gpu, np.zeros((2, 2), dtype=np.uint32))
    with pytest.raises(ValueError, match="page_size"):
        index.open_namespace(NAME, 2 * SIZE)
    with pytest.raises(ValueError, match="namespace: 3 bytes"):
        index.open_namespace(b"abc", SIZE)
    for call in (lambda: index.lease(9), lambda: index.complete(9, 0), lambda: index.grant(9, 1)):
        with pytest.raises(KeyError):
            call()


def test_a_slab_with_private_pages_or_none_there_is_not_taken(house: House) -> None:
    page = house.index.grant(house.gpu, 1)
    assert not house.index.take_slab(house.gpu, 0)
    assert not house.index.take_slab(house.gpu, 1)
    house.index.give_back(house.gpu, page)
    assert house.index.take_slab(house.gpu, 0)
    assert house.index.slab_pages(house.gpu).tolist() == [0xFFFFFFFF]
    assert house.index.add_slab(house.gpu) == 0
    assert house.index.slab_pages(house.gpu).tolist() == [0]


def test_a_slab_is_closed_moved_and_taken_while_its_blocks_stay(house: House) -> None:
    index, gpu = house.index, house.gpu
    index.add_slab(gpu)
    index.release(house.compute(1, 2, 3))
    assert index.close_slab(gpu, 0)
    assert index.pool_counts(gpu).pages == 4 + 3
    move = index.plan_move(gpu, 0, 2)
    assert move is not None
    assert (move.source, move.target, move.source_pages.tolist()) == (gpu, gpu, [0, 1])
    assert house.matched(1, 2, 3) == (3, 0, 0)
    reader = index.acquire(house.space, gpu, tokens(1), 1)  # pins what is being moved
    assert index.complete(move.id, 2).tolist() == [1]
    assert index.plan_move(gpu, 0, 9) is not None  # block 3; block 1 is pinned
    assert not index.take_slab(gpu, 0)
    index.release(reader.id)
    index.complete(move.id + 1, 1)
    last = index.plan_move(gpu, 0, 9)
    assert last is not None
    assert index.complete(last.id, 1).tolist() == [0]
    assert index.take_slab(gpu, 0)
    assert house.matched(1, 2, 3) == (3, 0, 0)
    assert index.lease(house.compute(1, 2, 3)).pages.min() >= 4
    index.check()


def test_a_closed_slab_gives_no_page_and_may_be_reopened(house: House) -> None:
    index, gpu = house.index, house.gpu
    index.release(house.compute(1))
    assert index.close_slab(gpu, 0)
    assert not index.close_slab(gpu, 0)
    assert index.slab_pages(gpu).tolist() == [0xFFFFFFFF]
    assert index.pool_counts(gpu).free == 0
    assert index.plan_move(gpu, 0, 1) is None  # nowhere to go
    assert index.reopen_slab(gpu, 0)
    assert not index.reopen_slab(gpu, 0)
    assert index.pool_counts(gpu).free == 3
    assert index.grant(gpu, 9).size == 4  # the block goes, as it would have
    index.check()


def test_the_age_of_the_next_victim_counts_acquires_of_all_pools(house: House) -> None:
    index = house.index
    assert index.victim_age(house.gpu) is None
    index.release(house.compute(1))
    other = index.add_pool(page_size=SIZE, pages_per_slab=1, below=None, durable=False)
    for _ in range(3):
        index.release(index.acquire(house.space, other, tokens(9), 1).id)
    assert index.victim_age(house.gpu) == 3
    index.acquire(house.space, house.gpu, tokens(1), 1)
    assert index.victim_age(house.gpu) is None  # pinned


def test_a_page_that_waits_for_demotion_survives_its_slab(house: House) -> None:
    house.index.release(house.compute(1))
    house.index.evict(house.gpu, 1)
    assert house.index.take_slab(house.gpu, 0)
    house.index.add_slab(house.gpu)
    house.index.release(house.compute(2))
    house.index.check()
    assert house.index.undemoted(house.gpu) == 1
    house.demote(house.gpu)
    assert house.index.pool_counts(house.cpu).resident == 1


def test_nothing_is_planned_into_a_closed_pool_but_out_of_it(house: House) -> None:
    lease = house.compute(1)
    house.index.grant(house.gpu, 1)
    house.index.close_pool(house.gpu)
    with pytest.raises(KeyError):
        house.index.release(lease)
    with pytest.raises(ValueError, match="closed"):
        house.index.acquire(house.space, house.gpu, tokens(1), 1)
    with pytest.raises(ValueError, match="closed"):
        house.index.add_slab(house.gpu)
    assert house.index.grant(house.gpu, 1).size == 0
    assert not house.index.keep(house.gpu, np.array([3], dtype=np.uint32))
    counts = house.index.pool_counts(house.gpu)
    assert (counts.private, counts.pinned, counts.resident) == (0, 0, 1)
    house.demote(house.gpu)
    house.index.remove_pool(house.gpu)
    house.index.check()
    assert house.index.pool_counts(house.cpu).resident == 1
    house.index.close_pool(house.cpu)
    house.index.evict(house.cpu, 1)
    house.index.close_pool(house.disk)
    with pytest.raises(ValueError, match="below another one"):
        house.index.remove_pool(house.disk)


def test_a_pool_is_closed_before_it_is_removed(house: House) -> None:
    with pytest.raises(ValueError, match="close it first"):
        house.index.remove_pool(house.gpu)


def test_a_copy_on_its_way_does_not_make_another_one_spare(house: House) -> None:
    other, house.gpu = house.gpu, house.pool(4, house.cpu)
    house.index.release(house.compute(1, 2))
    transfer = house.index.plan_demote(house.gpu, 8)
    assert transfer is not None
    house.gpu, dying = other, house.gpu
    house.index.release(house.compute(1))
    house.index.close_pool(dying)
    house.index.remove_pool(dying)  # what is on its way from there will not arrive
    assert house.index.evict(house.gpu, 9).pages.size == 0
    house.index.complete(transfer.id, 2)
    assert house.index.evict(house.gpu, 9).last_copies == 1
    house.index.check()


def test_a_namespace_is_closed_once_nothing_is_of_it(house: House) -> None:
    index, other = house.index, house.index.open_namespace(b"o" * 32, SIZE)
    lease = house.compute(1, 2)
    assert not index.close_namespace(house.space)  # blocks, and a lease
    index.release(lease)
    index.pin(house.space, house.gpu, tokens(1), hard=False, max_blocks=9)
    assert index.has_pins(house.space)
    index.evict(house.gpu, 9)
    assert index.counts().blocks == 0
    assert not index.close_namespace(house.space)  # a pin, of what may come
    index.unpin(house.space, house.gpu, tokens(1))
    empty = index.acquire(house.space, house.gpu, tokens(1), 1)
    assert not index.close_namespace(house.space)  # a lease without a block
    index.release(empty.id)
    assert index.close_namespace(house.space)
    for ask in (index.close_namespace, index.retire, index.has_pins):
        with pytest.raises(KeyError):
            ask(house.space)
    with pytest.raises(KeyError):
        index.match(house.space, house.gpu, tokens(1))
    assert (index.counts().namespaces, index.close_namespace(other)) == (1, True)
    assert sorted(index.open_namespace(bytes([n]) * 32, SIZE) for n in range(3)) == [0, 1, 2]
    house.space = index.open_namespace(NAME, SIZE)  # the same name is a new namespace
    house.compute(1, 2)
    index.check()
