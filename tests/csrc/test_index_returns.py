"""What a request announced of its return: awaited blocks go after others, until it has lapsed."""

import numpy as np
import pytest

from kvc2 import _core
from kvc2.commands import replay

SLACK = 4  # times the announced wait, as cache.proto says
NOBODY = _core.Hints()


class Pages:
    """An index of one pool, of blocks of one token."""

    def __init__(self, policy: str, pages: int, seed: int = 0) -> None:
        self.index = _core.Index(policy=policy, seed=seed)
        self.pool = self.index.add_pool(
            page_size=1, pages_per_slab=pages, below=None, durable=False
        )
        self.index.add_slab(self.pool)
        self.space = self.index.open_namespace(bytes(32), 1)

    def ask(self, *blocks: int, hints: _core.Hints = NOBODY) -> int:
        path = np.array(blocks, np.uint32)
        lease = self.index.acquire(self.space, self.pool, path, len(path))
        pages = self.index.grant(self.pool, len(path) - lease.matched)
        room = lease.matched + len(pages)  # of a prompt that is longer than the pool
        self.index.commit(lease.id, lease.matched, path[lease.matched : room], pages)
        self.index.release(lease.id, hints)
        self.index.check()
        return int(lease.matched)

    def holds(self, block: int) -> bool:
        path = np.array([block], np.uint32)
        return bool(self.index.match(self.space, self.pool, path).blocks)


@pytest.mark.parametrize("policy", replay.POLICIES)
@pytest.mark.parametrize("within", [1, 10, 1000])
def test_who_is_awaited_is_kept_until_four_times_that_have_passed(policy: str, within: int) -> None:
    for seconds in (0, within, SLACK * within - 1):
        pages = Pages(policy, 4)
        pages.index.advance(100)
        pages.ask(1, hints=_core.Hints(expect_return_within_s=within))
        pages.index.advance(100 + seconds)
        for other in range(10, 20):
            pages.ask(other)
        assert pages.holds(1)


def test_what_has_lapsed_is_as_if_nobody_had_announced_it() -> None:
    pages = Pages("lru", 4)
    pages.index.advance(100)
    pages.ask(1, hints=_core.Hints(expect_return_within_s=10))
    for other in (10, 11, 12, 13):
        pages.ask(other)
    assert pages.holds(1)
    pages.index.advance(100 + SLACK * 10)
    pages.ask(14)
    assert not pages.holds(1)


def test_the_latest_request_counts_and_an_end_goes_before_an_announcement() -> None:
    pages = Pages("lru", 4)
    pages.ask(1, hints=_core.Hints(expect_return_within_s=10))
    pages.ask(1)  # announces nothing
    pages.ask(2, hints=_core.Hints(expect_return_within_s=10, session_end=True))
    for other in (10, 11, 12):
        pages.ask(other)
    assert not pages.holds(2)
    pages.ask(13)
    assert not pages.holds(1)


def test_an_end_says_nothing_of_what_another_request_has_used_since() -> None:
    pages = Pages("lru", 4)
    pages.ask(9)
    path = np.array([1], np.uint32)
    pages.ask(1)
    ending = pages.index.acquire(pages.space, pages.pool, path, 1)
    pages.ask(1)
    pages.index.release(ending.id, _core.Hints(session_end=True))
    pages.index.evict(pages.pool, 1)
    assert pages.holds(1)
    assert not pages.holds(9)


def test_an_end_says_nothing_of_what_another_request_goes_on_from() -> None:
    pages = Pages("lru", 8)
    pages.ask(1, 3)
    pages.ask(9)
    pages.ask(1, 2, hints=_core.Hints(session_end=True))
    assert pages.index.evict(pages.pool, 1).pages.size == 1  # 2: it has ended
    assert pages.index.evict(pages.pool, 2).pages.size == 2
    assert pages.holds(1)
    assert not pages.holds(9)


def test_a_priority_goes_before_an_announcement() -> None:
    pages = Pages("lru", 2)
    pages.ask(1, hints=_core.Hints(priority=1))
    pages.ask(2, hints=_core.Hints(expect_return_within_s=10))
    pages.ask(3)
    assert pages.holds(1)
    assert not pages.holds(2)
