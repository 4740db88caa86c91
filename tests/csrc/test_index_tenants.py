"""Whose blocks go for a tenant's page, and what ends with a namespace: one law each. Random walks:
test_index_machine.py."""

import numpy as np
import pytest

from kvc2 import _core
from tests.oracles.machines import u32

ROOM = 6  # pages of the pool


class Pool:
    """Six pages of one token each; namespace 0 is nobody's, namespace 1 of a tenant with a quota
    of two blocks."""

    def __init__(self) -> None:
        self.index = _core.Index()
        self.pool = self.index.add_pool(page_size=1, pages_per_slab=ROOM, below=None, durable=False)
        self.index.add_slab(self.pool)
        self.index.set_quota(1, 0, max_blocks=2)
        for name in range(2):
            assert self.index.open_namespace(bytes([name]) * 32, 1) == name
        self.index.set_tenant(1, 1)

    def commit(self, space: int, *blocks: int) -> None:
        for block in blocks:
            lease = self.index.acquire(space, self.pool, u32([block]), 1)
            self.index.commit(lease.id, 0, u32([block]), self.index.grant(self.pool, 1))
            self.index.release(lease.id)

    def held(self, space: int, blocks: range) -> int:
        path = [self.index.match(space, self.pool, u32([block])).blocks for block in blocks]
        return int(np.sum(path))


def test_who_is_over_its_quota_pays_before_older_blocks() -> None:
    at = Pool()
    at.commit(0, 1, 2, 3)
    at.commit(1, 1, 2, 3)
    assert at.index.grant(at.pool, 1, 0).size == 1
    assert (at.held(0, range(1, 4)), at.held(1, range(1, 4))) == (3, 2)


def test_who_has_no_room_left_pays_for_what_it_asks() -> None:
    at = Pool()
    at.commit(0, 1, 2, 3, 4)
    at.commit(1, 1, 2)
    assert at.index.grant(at.pool, 1, 1).size == 1
    assert (at.held(0, range(1, 5)), at.held(1, range(1, 3))) == (4, 1)


def test_pages_that_a_grant_has_taken_count_in_its_room() -> None:
    at = Pool()
    at.commit(0, 1, 2, 3, 4, 5)
    at.commit(1, 1)
    assert at.index.grant(at.pool, 2, 1).size == 2
    assert (at.held(0, range(1, 6)), at.held(1, range(1, 2))) == (4, 0)


def test_pins_end_with_their_namespace() -> None:
    at = Pool()
    at.commit(0, 1)
    for hard in (True, False):
        assert at.index.pin(0, at.pool, u32([int(hard)]), hard=hard, max_blocks=ROOM)
    at.index.retire(0)
    assert [at.index.pinned_blocks(at.pool, hard=hard) for hard in (True, False)] == [0, 0]
    at.index.check()


def test_the_pinned_blocks_of_a_tenant_are_those_of_its_namespaces() -> None:
    """Counted once each; also where a namespace joins a tenant later, or ends."""
    at = Pool()
    index, pool = at.index, at.pool

    def pinned(hard: bool = False) -> list[int]:
        index.check()
        return [index.pinned_blocks(pool, hard=hard, tenant=tenant) for tenant in (0, 1, 2)]

    def pin(space: int, *blocks: int, hard: bool = False) -> None:
        assert index.pin(space, pool, u32(blocks), hard=hard, max_blocks=ROOM)

    index.set_tenant(1, 1)
    pin(0, 1, 2)
    pin(0, 1, 3)  # shares a block
    pin(1, 1)
    pin(1, 1, 2, 3, hard=True)
    assert (pinned(), pinned(hard=True)) == ([3, 1, 0], [0, 3, 0])
    pin(1, 1, hard=True)  # in the place of the soft one
    assert (pinned(), pinned(hard=True)) == ([3, 0, 0], [0, 3, 0])
    index.set_tenant(0, 2)
    assert pinned() == [0, 0, 3]
    index.unpin(0, pool, u32([1, 2]))
    assert pinned() == [0, 0, 2]
    index.retire(0)
    assert pinned() == [0, 0, 0]


def test_a_pin_with_an_end_is_over_at_that_second() -> None:
    """Its blocks may go at once; what another pin keeps stays."""
    at = Pool()
    at.index.advance(10)
    at.commit(0, 1, 2, 3)
    for block, ttl_s in ((1, 5), (2, 7), (3, 0)):
        assert at.index.pin(0, at.pool, u32([block]), hard=True, max_blocks=ROOM, ttl_s=ttl_s)
    left = []
    for second in (14, 15, 17):
        assert (at.index.advance(second) > 0) == (second != 14)  # who waits for room is told
        at.index.check()
        at.index.evict(at.pool, ROOM)
        left.append([at.held(0, range(block, block + 1)) for block in (1, 2, 3)])
    assert left == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_the_end_of_a_pin_is_that_of_its_last_pinning() -> None:
    """Sooner, later or none; what was unpinned, retired or removed meanwhile leaves no end."""
    at = Pool()
    index, pool = at.index, at.pool

    def pin(block: int, ttl_s: int, space: int = 0, most: int = ROOM) -> bool:
        return index.pin(space, pool, u32([block]), hard=True, max_blocks=most, ttl_s=ttl_s)

    def pinned(second: int) -> int:
        index.advance(second)
        index.check()
        return index.pinned_blocks(pool, hard=True)

    index.advance(10)
    for block, ttls in enumerate([(5, 9), (9, 5), (5, 0), (0, 5)]):
        assert all(pin(block, ttl_s) for ttl_s in ttls)
    assert not pin(1, 1, most=3)  # refused: its end stays too
    assert [pinned(second) for second in (14, 15, 18, 19, 99)] == [4, 2, 2, 1, 1]
    assert pin(5, 5)
    assert index.unpin(0, pool, u32([5])) == 1
    assert pin(5, 0)
    assert pin(6, 5, space=1)
    index.retire(1)
    assert pinned(200) == 2
    assert pin(7, (1 << 32) - 1)  # longer than there are seconds
    assert pinned(300) == 3
    assert pin(8, 5)
    index.close_pool(pool)
    index.remove_pool(pool)
    index.advance(400)
    index.check()


@pytest.mark.parametrize(
    ("first", "then", "stays"),
    [
        ((True, 0), (False, 0), True),
        ((True, 5), (False, 0), True),
        ((True, 5), (False, 9), True),
        ((False, 0), (False, 9), True),
        ((False, 9), (False, 5), True),
        ((False, 5), (False, 9), False),
        ((False, 5), (False, 0), False),
        ((False, 0), (True, 5), False),
        ((True, 9), (True, 5), True),
        ((True, 5), (True, 0), False),
    ],
)
def test_a_pin_may_keep_a_stronger_one(
    first: tuple[bool, int], then: tuple[bool, int], *, stays: bool
) -> None:
    at = Pool()
    index, pool = at.index, at.pool

    def pin(hard: bool, ttl_s: int, keep_stronger: bool) -> bool:
        return index.pin(
            0,
            pool,
            u32([1]),
            hard=hard,
            max_blocks=1,
            ttl_s=ttl_s,
            keep_stronger=keep_stronger,
        )

    def ends() -> list[tuple[int, int]]:
        """Soft and hard pins, second by second."""
        found = []
        for second in range(10, 21):
            index.advance(second)
            index.check()
            found.append(
                (index.pinned_blocks(pool, hard=False), index.pinned_blocks(pool, hard=True))
            )
        return found

    def alone(hard: bool, ttl_s: int) -> list[tuple[int, int]]:
        return [
            (int(not hard), int(hard)) if not ttl_s or second < 10 + ttl_s else (0, 0)
            for second in range(10, 21)
        ]

    index.advance(10)
    assert pin(*first, keep_stronger=True)
    assert pin(*then, keep_stronger=True)
    assert ends() == alone(*(first if stays else then))


def test_second_uses_are_known_after_a_branch_has_gone() -> None:
    """Two runs that become one again: what the lower one's blocks were used twice counts on."""
    index = _core.Index()
    disk = index.add_pool(
        page_size=1, pages_per_slab=8, below=None, durable=True, second_access=True
    )
    gpu = index.add_pool(page_size=1, pages_per_slab=8, below=disk, durable=False)
    index.add_slab(gpu)
    space = index.open_namespace(bytes(32), 1)

    def use(path: list[int], hints: _core.Hints | None = None) -> None:
        lease = index.acquire(space, gpu, u32(path), len(path))
        rest = path[lease.matched :]
        index.commit(lease.id, lease.matched, u32(rest), index.grant(gpu, len(rest)))
        index.release(lease.id, hints or _core.Hints())

    use([1, 2, 3, 4])
    use([1, 2, 3, 4])
    assert index.not_admitted(disk) == 0
    use([1, 2, 9], _core.Hints(session_end=True))
    assert index.not_admitted(disk) == 1
    index.evict(gpu, 1)
    nodes = index.counts().nodes
    use([1, 2, 3])
    assert index.counts().nodes < nodes
    assert index.not_admitted(disk) == 0
