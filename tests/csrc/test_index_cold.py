"""Prompts that nobody repeats: whatever the policy, what is kept of them is what lru keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc2.commands import replay
from tests.csrc.test_index_returns import Pages

Prompts = list[list[int]]


def prompts(lengths: Sequence[int], head: int = 0) -> Prompts:
    """One of each length after `head` blocks that all begin with; all else is once there."""
    blocks = itertools.count(head)
    return [[*range(head), *itertools.islice(blocks, length)] for length in lengths]


def kept(policy: str, pages: int, asked: Prompts, seed: int = 0) -> list[int]:
    """How many leading blocks of each prompt are there after all were asked for in turn."""
    cache = Pages(policy, pages, seed)
    for each in asked:
        cache.ask(*each)
    paths = (np.array(each, np.uint32) for each in asked)
    return [cache.index.match(cache.space, cache.pool, path).blocks for path in paths]


@pytest.mark.parametrize("policy", replay.POLICIES)
@pytest.mark.parametrize(("blocks", "head"), [(40, 0), (200, 0), (40, 10), (200, 40)])
def test_of_40_prompts_that_nobody_repeats_the_last_five_are_kept(
    policy: str, blocks: int, head: int
) -> None:
    found = kept(policy, 5 * blocks + head, prompts([blocks] * 40, head))
    assert found == [head] * 35 + [head + blocks] * 5


@pytest.mark.parametrize("policy", [each for each in replay.POLICIES if each != "lru"])
@given(
    pages=st.integers(1, 300),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_without_reuse_every_policy_keeps_what_lru_keeps(
    policy: str, pages: int, lengths: list[int], seed: int
) -> None:
    asked = prompts(lengths)
    assert kept(policy, pages, asked, seed) == kept("lru", pages, asked)


@pytest.mark.parametrize("policy", [each for each in replay.POLICIES if each != "lru"])
def test_many_prompts_without_reuse_are_not_taken_for_some_that_came_back(policy: str) -> None:
    """The memory of what was there is by tags, of which some are alike by chance."""
    asked = prompts([50] * 1000)
    assert kept(policy, 2000, asked) == kept("lru", 2000, asked)
