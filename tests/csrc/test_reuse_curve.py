"""The estimate of other capacities against a naive LRU cache, and the bound on what it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvc2 import _core
from tests.oracles.model_parts import LruModel

KIB = 1 << 10
PAGE_SIZE = 4
U8 = NDArray[np.uint8]


def keys_of(path: list[int]) -> U8:
    """A block's name: all of its path decides it, as in the index."""
    names = [_core.xxh3_128(np.array(path[: i + 1], np.uint32).tobytes()) for i in range(len(path))]
    return np.frombuffer(b"".join(names), np.uint8).reshape(len(path), 16)


def learn(curve: _core.ReuseCurve) -> None:
    while curve.catch_up():
        pass


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40)


@given(paths, st.integers(1, 60), st.integers(0, 3))
def test_with_all_blocks_sampled_it_equals_the_naive_cache(
    asked: list[list[int]], capacity: int, more: int
) -> None:
    """At powers of two, where a bucket ends; `more`: tokens of no full block."""
    for blocks in (2 ** (capacity % 6), None):
        cache, curve = LruModel(blocks), _core.ReuseCurve()
        hits = tokens = 0
        for path in asked:
            names = [tuple(path[: i + 1]) for i in range(len(path))]
            hits += cache.access(names) * PAGE_SIZE
            tokens += len(path) * PAGE_SIZE + more
            curve.access(keys_of(path), PAGE_SIZE, len(path) * PAGE_SIZE + more)
            curve.check()
        learn(curve)
        size = _core.NO_LIMIT if blocks is None else blocks * PAGE_SIZE
        assert curve.hit_rate(size) == pytest.approx(hits / tokens)


def test_larger_caches_never_hit_less() -> None:
    curve, random = _core.ReuseCurve(sample_max=64), np.random.default_rng(1)
    for _ in range(500):
        stem = random.integers(0, 30, random.integers(1, 12)).tolist()
        curve.access(keys_of(stem), PAGE_SIZE, len(stem) * PAGE_SIZE)
    learn(curve)
    rates = [curve.hit_rate(size) for size in (*(2**power for power in range(20)), _core.NO_LIMIT)]
    assert rates == sorted(rates)
    assert 0 <= rates[0] < rates[-1] <= 1


def test_it_keeps_no_more_than_its_bound_and_forgets_at_random() -> None:
    """A million blocks that are seen once, between which 1,000 come back."""
    curve, random = _core.ReuseCurve(), np.random.default_rng(1)
    again = random.integers(0, 256, (1000, 16), dtype=np.uint8)
    for _ in range(100):
        curve.access(again, PAGE_SIZE, 1000 * PAGE_SIZE)
        fresh = random.integers(0, 256, (10_000, 16), dtype=np.uint8)
        curve.access(fresh, PAGE_SIZE, 10_000 * PAGE_SIZE)
    learn(curve)
    curve.check()
    assert curve.sampled == 8192
    assert 0.005 < curve.rate < 0.012
    assert curve.metadata_bytes < 640 * KIB
    distance = 11_000 * PAGE_SIZE
    assert curve.hit_rate(distance * 2) == pytest.approx(99 / 1100, abs=0.02)
    assert curve.hit_rate(distance // 2) == pytest.approx(0, abs=0.02)


def test_before_the_first_access_it_says_nothing() -> None:
    curve = _core.ReuseCurve()
    assert curve.hit_rate(1 << 20) == curve.hit_rate(_core.NO_LIMIT) == 0
    curve.access(np.empty((0, 16), np.uint8), PAGE_SIZE, 3)
    learn(curve)
    assert curve.hit_rate(_core.NO_LIMIT) == 0


def test_what_is_noted_is_bounded_and_learnt_in_its_order() -> None:
    """However late it is learnt, the curve is the same."""
    at_once, late, random = _core.ReuseCurve(), _core.ReuseCurve(), np.random.default_rng(2)
    for _ in range(60):
        path = random.integers(0, 256, (1000, 16), dtype=np.uint8)
        again = path[: random.integers(1, 1000)]
        for asked in (path, again):
            for curve in (at_once, late):
                curve.access(asked, PAGE_SIZE, len(asked) * PAGE_SIZE)
            learn(at_once)
            late.check()
    assert late.metadata_bytes < 1024 * KIB
    learn(late)
    sizes = [2**power for power in range(24)]
    assert [late.hit_rate(size) for size in sizes] == [at_once.hit_rate(size) for size in sizes]


def test_the_index_learns_from_acquires_and_from_what_was_computed() -> None:
    index = _core.Index()
    pool = index.add_pool(page_size=2, pages_per_slab=16, below=None, durable=False)
    index.add_slab(pool)
    number = index.open_namespace(b"n" * 32, 2)
    tokens = np.arange(9, dtype=np.uint32)
    first = index.acquire(number, pool, tokens[:5], 2)  # 2 blocks are computed
    answer = np.arange(4, 8, dtype=np.uint32)  # and two more of the answer
    index.commit(first.id, 0, np.concatenate([tokens[:4], answer]), index.grant(pool, 4))
    index.release(first.id)
    second = index.acquire(number, pool, tokens, 4)
    assert second.matched == 4
    found = index.hit_rates(np.array([_core.NO_LIMIT, 8, 4, 2], np.uint64))
    assert found == pytest.approx([8 / 14, 8 / 14, 4 / 14, 2 / 14])
    index.check()
