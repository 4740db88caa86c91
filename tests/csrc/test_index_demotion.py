"""What a pool evicts before the one below has it goes down again, and puts nothing out for it."""

import pytest

from kvc2 import _core
from tests.csrc.test_index import NAME, SIZE, House, tokens


@pytest.fixture
def house() -> House:
    return House()


def test_what_is_evicted_before_the_next_pool_has_it_comes_again(house: House) -> None:
    for block in (1, 2):
        house.index.release(house.compute(block))
        house.demote(house.gpu)
    house.index.evict(house.cpu, 1)
    assert house.index.undemoted(house.gpu) == 1
    house.demote(house.gpu)
    house.demote(house.cpu)
    house.index.evict(house.cpu, 2)  # the disk has them
    assert house.index.undemoted(house.gpu) == 0
    assert house.matched(1, 9) == (1, 0, 0)
    assert house.index.pool_counts(house.disk).resident == 2


def test_what_comes_again_puts_nothing_out_that_waits_for_the_disk(house: House) -> None:
    blocks = [*range(1, 9)]
    second = house.pool(8, house.cpu)
    for block in blocks:
        lease = house.index.acquire(house.space, second, tokens(block), 1)
        house.index.commit(lease.id, 0, tokens(block), house.index.grant(second, 1))
        house.index.release(lease.id)
    house.demote(second)  # the new ones came, and put out the first two
    assert house.index.pool_counts(house.cpu).evicted == 2
    assert house.index.undemoted(second) == 2
    assert house.index.plan_demote(second, 8) is None
    house.index.complete(house.index.plan_demote(house.cpu, 1).id, 1)  # type: ignore[union-attr]
    transfer = house.index.plan_demote(second, 8)  # in the place of what the disk has now
    assert transfer is not None
    assert transfer.source_pages.size == 1
    house.index.complete(transfer.id, 1)
    house.demote(house.cpu)
    house.demote(second)
    house.demote(house.cpu)
    house.index.check()
    assert house.index.pool_counts(house.disk).resident == 8
    assert house.index.undemoted(second) == 0


def test_what_comes_again_waits_for_what_a_full_tenant_has_pinned() -> None:
    """Else it comes, is the first to be trimmed, and comes again."""
    index = _core.Index()
    shape = {"page_size": SIZE, "pages_per_slab": 8, "page_bytes": 1}
    disk = index.add_pool(**shape, below=None, durable=True, tier=2)
    cpu = index.add_pool(**shape, below=disk, durable=False, tier=1)
    gpu = index.add_pool(**shape, below=cpu, durable=False, tier=0)
    for pool in (disk, cpu, gpu):
        index.add_slab(pool)
    index.set_quota(1, 1, max_blocks=2)
    space = index.open_namespace(NAME, SIZE)
    index.set_tenant(space, 1)

    def commit_and_copy(block: int, pools: list[int]) -> None:
        lease = index.acquire(space, gpu, tokens(block), 1)
        index.commit(lease.id, 0, tokens(block), index.grant(gpu, 1))
        index.release(lease.id)
        for pool in pools:
            transfer = index.plan_demote(pool, 8)
            assert transfer is not None
            index.complete(transfer.id, 1)

    for block in (1, 2):
        commit_and_copy(block, [gpu, cpu])
        assert index.pin(space, cpu, tokens(block), hard=False, max_blocks=8)
    commit_and_copy(3, [gpu])
    assert index.trim(cpu).pages.size == 1
    assert index.undemoted(gpu) == 1
    assert index.plan_demote(gpu, 8) is None
    index.unpin(space, cpu, tokens(1))
    assert index.plan_demote(gpu, 8) is not None
    index.check()


def test_a_lease_knows_how_many_of_its_blocks_another_pool_has(house: House) -> None:
    lease = house.compute(1, 2, 3)
    assert house.index.held_in(lease, house.disk) == 0
    transfer = house.index.plan_demote(house.gpu, 2)
    assert transfer is not None
    assert house.index.held_in(lease, house.cpu) == 0  # on their way
    house.index.complete(transfer.id, 2)
    assert house.index.held_in(lease, house.cpu) == 2
    house.demote(house.cpu)
    assert house.index.held_in(lease, house.disk) == 2
    assert house.index.held_in(lease, house.gpu) == 3
    with pytest.raises(KeyError):
        house.index.held_in(lease + 1, house.disk)
