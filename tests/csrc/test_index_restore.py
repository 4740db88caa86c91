"""What a restart makes of a catalogue, and clocks that end: generations and stamps."""

import numpy as np
import pytest

from kvc2 import _core
from tests.csrc.test_index import NAME, SIZE, House, tokens
from tests.oracles.model_parts import digests

RESTORED, ORPHAN, FORGED, CONFLICT = (
    _core.RESTORED, _core.ORPHAN, _core.FORGED, _core.CONFLICT,
)  # fmt: skip


def restore(
    house: House,
    *paths: tuple[int, ...],
    pages: list[int] | None = None,
    generation: int = 1,
    stamp: int = 1,
    damaged: int | None = None,
) -> list[int]:
    """One record for the last block of each path; `damaged` names one with a wrong digest."""
    chains = [[NAME, *digests(NAME, [tokens(block).tobytes() for block in p])] for p in paths]
    names = np.frombuffer(b"".join(c[-1] for c in chains), np.uint8).reshape(-1, 32).copy()
    parents = np.frombuffer(b"".join(c[-2] for c in chains), np.uint8).reshape(-1, 32)
    if damaged is not None:
        names[damaged, 0] ^= 1
    count = len(paths)
    answers = house.index.restore(
        house.disk,
        names,
        parents,
        tokens(*(p[-1] for p in paths)).reshape(-1, SIZE),
        np.array(range(count) if pages is None else pages, dtype=np.uint32),
        np.full(count, generation, dtype=np.uint64),
        np.full(count, stamp, dtype=np.uint32),
    )
    house.index.check()
    return answers.tolist()


@pytest.fixture
def house() -> House:
    return House()


def test_records_are_restored_in_any_order(house: House) -> None:
    assert restore(house, (1, 2, 3), (1,), (4,), (1, 2)) == [RESTORED] * 4
    assert house.matched(1, 2, 3) == (0, 0, 3)
    assert house.index.pool_counts(house.disk).resident == 4


def test_a_record_whose_digest_does_not_follow_is_forged_and_what_hangs_on_it_an_orphan(
    house: House,
) -> None:
    assert restore(house, (1,), (1, 2), (1, 2, 3), damaged=1) == [RESTORED, FORGED, ORPHAN]
    assert house.matched(1, 2, 3) == (0, 0, 1)


def test_an_orphan_is_restored_once_its_parent_is_there(house: House) -> None:
    assert restore(house, (1, 2)) == [ORPHAN]
    assert house.index.counts().blocks == 0
    assert restore(house, (1,), pages=[5]) == [RESTORED]
    assert restore(house, (1, 2)) == [RESTORED]
    assert house.matched(1, 2) == (0, 0, 2)


def test_a_page_or_a_block_that_comes_twice_is_a_conflict(house: House) -> None:
    assert restore(house, (1,), (2,), pages=[3, 3]) == [RESTORED, CONFLICT]
    assert restore(house, (1,), pages=[4]) == [CONFLICT]
    assert restore(house, (5,), pages=[8]) == [CONFLICT]  # the pool has pages 0 to 7
    assert house.index.pool_counts(house.disk).resident == 1


def test_residents_are_told_as_their_records_were(house: House) -> None:
    restore(house, (1,), (1, 2), (1, 2, 3), pages=[5, 0, 3], generation=9)
    pages, records = house.index.residents(house.disk, 0, 4)
    assert pages.tolist() == [0, 3]
    names = [NAME, *digests(NAME, [tokens(block).tobytes() for block in (1, 2, 3)])]
    assert [row.tobytes() for row in records.digests] == names[2:]
    assert [row.tobytes() for row in records.parents] == names[1:3]
    assert [row.tobytes() for row in records.namespaces] == [NAME, NAME]
    assert (records.tokens == tokens(2, 3).reshape(-1, SIZE)).all()
    assert records.generations.tolist() == [9, 9]
    assert house.index.residents(house.disk, 4, 100)[0].tolist() == [5]
    assert house.index.residents(house.disk, 8, 4)[0].size == 0
    with pytest.raises(ValueError, match="not a durable one"):
        house.index.residents(house.cpu, 0, 1)


def test_only_a_durable_pool_is_restored(house: House) -> None:
    house.disk = house.cpu
    with pytest.raises(ValueError, match="not a durable one"):
        restore(house, (1,))


def test_generations_go_on_after_a_restart(house: House) -> None:
    restore(house, (1,), generation=41)
    house.index.release(house.compute(2))
    house.demote(house.gpu)
    transfer = house.index.plan_demote(house.cpu, 8)
    assert transfer is not None
    assert transfer.records is not None
    assert transfer.records.generations.tolist() == [42]


def test_each_reuse_of_a_page_raises_its_generation(house: House) -> None:
    seen: list[int] = []
    for block in range(3):
        house.index.release(house.compute(block))
        house.demote(house.gpu)
        transfer = house.index.plan_demote(house.cpu, 8)
        assert transfer is not None
        assert transfer.records is not None
        assert transfer.target_pages.tolist() == [0]
        seen += transfer.records.generations.tolist()
        house.index.complete(transfer.id, 1)
        house.index.evict(house.disk, 1)
    assert seen == [1, 2, 3]


def test_what_is_used_after_a_restart_is_younger_than_what_was_restored(house: House) -> None:
    restore(house, (1,), stamp=70)
    house.index.release(house.compute(2))
    assert house.index.stamps(house.gpu)[0] == 71


@pytest.mark.parametrize("last", [0xFFFFFFFE, 0xFFFFFFFF])
def test_the_order_outlives_the_end_of_the_clock(house: House, last: int) -> None:
    restore(house, (1,), (2,), pages=[0, 1], stamp=last - 1)
    restore(house, (3,), pages=[2], stamp=last)
    house.index.release(house.compute(4))
    house.index.release(house.compute(5))
    old, young = (house.index.stamps(pool).tolist() for pool in (house.disk, house.gpu))
    assert 0 < old[0] <= old[2] < young[0] < young[1]
    house.index.check()


def test_a_lease_from_before_the_end_of_the_clock_is_old_after_it(house: House) -> None:
    restore(house, (1,), stamp=0xFFFFFFFC)
    early = house.index.acquire(house.space, house.gpu, tokens(2), 1)  # at FFFFFFFD
    for _ in range(3):
        house.index.release(house.index.acquire(house.space, house.gpu, tokens(9), 1).id)
    page = house.index.grant(house.gpu, 1)
    house.index.commit(early.id, 0, tokens(2), page)
    assert house.index.stamps(house.gpu)[page].tolist() == [0x7FFFFFFE]


def test_eviction_knows_the_order_after_the_end_of_the_clock(house: House) -> None:
    restore(house, (9,), stamp=0xFFFFFFF8)
    for block in (1, 2, 3, 4):  # up to FFFFFFFC
        house.index.release(house.compute(block))
    for _ in range(4):
        house.index.release(house.index.acquire(house.space, house.gpu, tokens(1), 1).id)
    house.index.check()
    house.index.evict(house.gpu, 2)
    left = [block for block in (1, 2, 3, 4) if house.matched(block)[0]]
    assert left == [1, 4]
