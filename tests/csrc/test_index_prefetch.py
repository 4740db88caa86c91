"""Index.prefetch on a prefix that lies in two pools, which random walks seldom come by."""

import numpy as np

from kvc2 import _core
from tests.oracles.machines import u32

TOKENS = u32(range(4))  # a block of one token each


def in_two_pools() -> tuple[_core.Index, list[int]]:
    """Four blocks on disk, of which the first two are in the cpu pool too; none is in gpu."""
    index = _core.Index()
    pools: list[int] = []
    for durable in (True, False, False):
        below = pools[-1] if pools else None
        pools.append(index.add_pool(page_size=1, pages_per_slab=8, below=below, durable=durable))
        index.add_slab(pools[-1])
    disk, cpu, gpu = pools
    space = index.open_namespace(bytes(32), 1)
    lease = index.acquire(space, gpu, TOKENS, 4)
    index.commit(lease.id, 0, TOKENS, index.grant(gpu, 4))
    index.release(lease.id)
    for source in (gpu, cpu):
        copied = index.plan_demote(source, 8)
        assert copied is not None
        index.complete(copied.id, 4)
    index.evict(gpu, 4)
    index.evict(cpu, 2)  # the tail
    return index, [gpu, cpu, disk]


def test_one_transfer_is_between_two_pools() -> None:
    index, (gpu, cpu, disk) = in_two_pools()
    ways = []
    while (step := index.prefetch(0, gpu, TOKENS, 8, touches=False)) is not None:
        assert isinstance(step, _core.Transfer)
        ways.append((step.source, step.target, step.target_pages.size))
        index.complete(step.id, step.target_pages.size)
        index.check()
    assert ways == [(cpu, gpu, 2), (disk, cpu, 2), (cpu, gpu, 2)]
    assert index.match(0, gpu, TOKENS).tiers == (4, 0, 0)


def test_nothing_is_held_or_computed_for_it() -> None:
    index, (gpu, cpu, _) = in_two_pools()
    unknown = np.concatenate([TOKENS, u32([9])])
    assert index.prefetch(0, cpu, unknown, 8, touches=True) is not None
    assert index.counts().leases == 0
    assert index.acquire(0, gpu, unknown, 5).computing == 0


def test_a_closed_pool_gets_nothing() -> None:
    index, (gpu, cpu, _) = in_two_pools()
    index.close_pool(cpu)
    while (step := index.prefetch(0, gpu, TOKENS, 8, touches=False)) is not None:
        assert isinstance(step, _core.Transfer)
        assert (step.source, step.target) == (cpu, gpu)
        index.complete(step.id, step.target_pages.size)
    assert index.match(0, gpu, TOKENS).tiers == (2, 0, 2)
