"""Leases that are no use of what they pin: nothing is learnt of them."""

import numpy as np

from kvc2 import _core
from tests.csrc.test_index import House, tokens

HOUR_S = 3600


def test_a_lease_that_does_not_touch_pins() -> None:
    house = House()
    house.index.release(house.compute(1, 2))
    house.demote(house.gpu)
    lease = house.index.acquire(house.space, house.cpu, tokens(1, 2), 2, touches=False)
    assert lease.pages.size == 2
    assert house.index.evict(house.cpu, 9).pages.size == 0
    house.index.release_all(np.array([lease.id], np.uint64))
    assert house.index.evict(house.cpu, 9).pages.size == 2


def test_it_makes_nothing_warmer() -> None:
    house = House()
    house.index.release(house.compute(1))
    house.index.release(house.compute(2))
    lease = house.index.acquire(house.space, house.gpu, tokens(1), 1, touches=False)
    house.index.release_all(np.array([lease.id], np.uint64))
    house.index.evict(house.gpu, 1)
    assert house.matched(1) == (0, 0, 0)  # colder than 2, though a lease was on it since
    assert house.matched(2) == (1, 0, 0)


def test_it_computes_nothing_that_others_could_wait_for() -> None:
    house = House()
    house.index.acquire(house.space, house.gpu, tokens(1, 2), 2, touches=False)
    assert house.index.acquire(house.space, house.gpu, tokens(1, 2), 2).computing == 0
    house.index.check()


def test_it_prolongs_no_life() -> None:
    house = House()
    house.index.advance(1)
    first = house.index.acquire(house.space, house.gpu, tokens(1), 1, _core.Hints(ttl_s=10))
    house.index.commit(first.id, 0, tokens(1), house.index.grant(house.gpu, 1))
    house.index.release(first.id)
    lease = house.index.acquire(house.space, house.gpu, tokens(1), 1, touches=False)
    house.index.release_all(np.array([lease.id], np.uint64))
    house.index.advance(HOUR_S)
    assert house.matched(1) == (0, 0, 0)


def test_it_teaches_the_curve_nothing() -> None:
    house, unlimited = House(), np.array([_core.NO_LIMIT], np.uint64)
    house.index.release(house.compute(1, 2))
    before = house.index.hit_rates(unlimited)
    for _ in range(5):
        lease = house.index.acquire(house.space, house.gpu, tokens(1, 2), 2, touches=False)
        house.index.release_all(np.array([lease.id], np.uint64))
    assert (house.index.hit_rates(unlimited) == before).all()


def test_it_takes_commits_after_what_it_skips() -> None:
    house = House()
    house.index.release(house.compute(1, 2))
    house.demote(house.gpu)
    house.demote(house.cpu)
    house.index.evict(house.gpu, 9)
    house.index.evict(house.cpu, 9)
    assert house.matched(1, 2, 3) == (0, 0, 2)
    lease = house.index.acquire(
        house.space, house.cpu, tokens(1, 2, 3), 3, skip_blocks=2, touches=False
    )
    page = house.index.grant(house.cpu, 1)
    answer = house.index.commit(lease.id, 2, tokens(3), page)
    assert answer.tolist() == [_core.ADOPTED]
    assert house.matched(1, 2, 3) == (0, 1, 2)
    house.index.release_all(np.array([lease.id], np.uint64))
    house.index.check()
