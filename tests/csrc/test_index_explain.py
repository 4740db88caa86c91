"""Why a prefix is not there: each cause on the real index, by hand. That it equals its oracle on
random lives is test_index_machine.py's."""

from __future__ import annotations

import numpy as np
import pytest

from kvc2._core import Cause, Explanation, Index, Why
from tests.oracles.machines import u32

SIZE, PER_SLAB = 4, 8
PROMPT = list(range(16))


class Built:
    """A gpu pool over cpu over disk, and a second gpu pool."""

    def __init__(self, dead_blocks: int = 64) -> None:
        self.index = Index(dead_blocks=dead_blocks)
        self.disk = self.pool(None, durable=True)
        self.cpu = self.pool(self.disk)
        self.gpu, self.other = self.pool(self.cpu), self.pool(self.cpu)
        self.chain = [self.gpu, self.cpu, self.disk]
        self.space = self.index.open_namespace(b"n" * 32, SIZE)

    def pool(self, below: int | None, *, durable: bool = False) -> int:
        pool = self.index.add_pool(
            page_size=SIZE, pages_per_slab=PER_SLAB, below=below, durable=durable
        )
        self.index.add_slab(pool)
        return pool

    def store(self, tokens: list[int], pool: int | None = None) -> None:
        """Computed and committed in the pool."""
        pool = self.gpu if pool is None else pool
        lease = self.index.acquire(self.space, pool, u32(tokens), len(tokens) // SIZE)
        first = len(lease.pages)
        pages = self.index.grant(pool, len(tokens) // SIZE - first)
        answers = self.index.commit(lease.id, first, u32(tokens[first * SIZE :]), pages)
        assert not answers.any()
        self.index.release(lease.id)

    def demote(self, pool: int) -> None:
        transfer = self.index.plan_demote(pool, 99)
        assert transfer is not None
        self.index.complete(transfer.id, len(transfer.source_pages))

    def explain(self, tokens: list[int], pools: list[int] | None = None) -> Explanation:
        return self.index.explain(self.space, pools or self.chain, u32(tokens))


def test_hits_are_told_by_run_of_the_fastest_tier() -> None:
    built = Built()
    built.store(PROMPT)
    built.demote(built.gpu)
    built.index.evict(built.gpu, 1)
    built.demote(built.cpu)
    built.index.evict(built.gpu, 1)
    found = built.explain([*PROMPT, 1, 2])
    assert (found.blocks, found.why) == (4, Why.NOTHING)
    assert found.runs.tolist() == [[0, 2], [1, 2]]
    assert found.death is None
    assert found.sibling is None


def test_a_prompt_that_nobody_sent_was_never_seen() -> None:
    found = Built().explain(PROMPT)
    assert (found.blocks, found.why, found.runs.shape) == (0, Why.NEVER_SEEN, (0, 2))


def test_what_was_evicted_tells_from_which_pool_and_when() -> None:
    built = Built()
    built.store(PROMPT)
    built.demote(built.gpu)
    built.index.advance(100)
    built.index.evict(built.cpu, 2)
    built.index.advance(200)
    built.index.evict(built.gpu, 1)
    found = built.explain(PROMPT)
    assert (found.blocks, found.why) == (3, Why.DIED)
    assert found.death is not None
    assert (found.death.cause, found.death.pool, found.death.when) == (
        Cause.EVICTED,
        built.gpu,
        200,
    )


def test_time_does_not_go_back() -> None:
    built = Built()
    built.store(PROMPT)
    built.index.advance(100)
    built.index.advance(50)
    built.index.evict(built.gpu, 1)
    found = built.explain(PROMPT)
    assert found.death is not None
    assert found.death.when == 100


def test_a_diverged_prompt_tells_the_sibling_that_is_most_like_it() -> None:
    built = Built()
    for third in ([8, 8, 8, 8], [8, 9, 10, 0], [8, 9, 0, 0]):
        built.store([*PROMPT[:8], *third])
    found = built.explain(PROMPT)
    assert (found.blocks, found.why) == (2, Why.DIVERGED)
    assert found.sibling is not None
    assert found.sibling.common == 3
    assert found.sibling.tokens.tolist() == [8, 9, 10, 0]


def test_within_a_run_the_sibling_is_its_next_block() -> None:
    built = Built()
    built.store(PROMPT)
    found = built.explain([0, 1, 2, 3, 4, 5, 0, 0])
    assert (found.blocks, found.why) == (1, Why.DIVERGED)
    assert found.sibling is not None
    assert (found.sibling.common, found.sibling.tokens.tolist()) == (2, [4, 5, 6, 7])


def test_a_dead_block_beside_living_ones_tells_both() -> None:
    built = Built()
    built.store([*PROMPT[:4], 9, 9, 9, 9])
    built.store(PROMPT[:8])
    found = built.explain(PROMPT[:8])
    assert found.why == Why.NOTHING
    built.index.evict(built.gpu, 1)
    found = built.explain([*PROMPT[:4], 9, 9, 9, 9])
    assert (found.blocks, found.why) == (1, Why.DIED)
    assert found.sibling is not None
    assert found.sibling.common == 0


def test_a_hole_tells_the_fault_that_made_it() -> None:
    built = Built()
    built.store(PROMPT)
    page = built.index.acquire(built.space, built.gpu, u32(PROMPT), 2)
    built.index.release(page.id)
    built.index.lost(built.gpu, page.pages[1:])
    found = built.explain(PROMPT)
    assert (found.blocks, found.why) == (1, Why.HOLE)
    assert found.death is not None
    assert found.death.cause == Cause.LOST


def test_what_only_another_engine_has_is_elsewhere() -> None:
    built = Built()
    built.store(PROMPT, built.other)
    assert built.explain(PROMPT).why == Why.ELSEWHERE
    found = built.explain(PROMPT, [*built.chain, built.other])
    assert (found.blocks, found.runs.tolist()) == (4, [[3, 4]])


def test_a_session_that_ended_took_what_only_it_had() -> None:
    built = Built()
    built.store(PROMPT)
    built.index.close_pool(built.gpu)
    built.index.remove_pool(built.gpu)
    found = built.explain(PROMPT, [built.cpu])
    assert found.why == Why.DIED
    assert found.death is not None
    assert (found.death.cause, found.death.pool) == (Cause.SESSION_ENDED, built.gpu)


def test_a_copy_that_only_arrives_is_no_hit_and_fails_by_name() -> None:
    built = Built()
    built.store(PROMPT)
    transfer = built.index.plan_demote(built.gpu, 99)
    assert transfer is not None
    built.index.close_pool(built.gpu)
    built.index.remove_pool(built.gpu)
    assert built.explain(PROMPT, [built.cpu, built.disk]).why == Why.ARRIVING
    built.index.complete(transfer.id, 0)
    found = built.explain(PROMPT, [built.cpu, built.disk])
    assert found.why == Why.DIED
    assert found.death is not None
    assert (found.death.cause, found.death.pool) == (Cause.TRANSFER_FAILED, built.cpu)


def test_the_dead_are_bounded_and_the_oldest_is_forgotten() -> None:
    built = Built(dead_blocks=2)
    built.store(PROMPT)
    built.index.evict(built.gpu, 4)
    assert built.explain(PROMPT).why == Why.DIED  # block 0 died last
    counts = built.index.counts()
    assert (counts.deaths, counts.dead_known) == (4, 2)
    built.store(PROMPT[:8])  # 2 and 3, which died first, are forgotten
    assert built.explain(PROMPT).why == Why.NEVER_SEEN
    built.index.check()


def test_none_are_remembered_where_none_may_be() -> None:
    built = Built(dead_blocks=0)
    built.store(PROMPT)
    built.index.evict(built.gpu, 4)
    assert built.explain(PROMPT).why == Why.NEVER_SEEN
    assert built.index.counts().deaths == 4


def test_the_dead_take_40_bytes_each() -> None:
    count = 1 << 10
    built = Built(dead_blocks=count)
    for prompt in range(count // 4 + 1):
        built.store([prompt + 10] * 16)
        built.index.evict(built.gpu, 4)
    assert built.index.counts().dead_known == count
    assert built.index.counts().dead_bytes == 40 * count


def test_acquire_explains_what_it_found_before_it_changed_anything() -> None:
    built = Built()
    built.store(PROMPT[:8])
    before = built.explain(PROMPT)
    lease = built.index.acquire(built.space, built.gpu, u32(PROMPT), 4)
    found = lease.explanation
    assert (found.blocks, found.why) == (before.blocks, before.why) == (2, Why.NEVER_SEEN)
    assert built.index.lease(lease.id).explanation.blocks == 0
    cut = built.index.acquire(built.space, built.gpu, u32(PROMPT), 2).explanation
    assert (cut.blocks, cut.why) == (2, Why.NOTHING)


@pytest.mark.parametrize(
    ("pools", "tokens", "error", "words"),
    [
        ([], u32([1]), ValueError, "pools"),
        ([0] * 256, u32([1]), ValueError, "pools"),
        ([99], u32([1]), KeyError, "pool 99"),
        ([0], np.zeros(3, np.int64), TypeError, "tokens"),
    ],
)
def test_explain_names_what_it_refuses(
    pools: list[int], tokens: np.ndarray, error: type[Exception], words: str
) -> None:
    built = Built()
    with pytest.raises(error, match=words):
        built.index.explain(built.space, pools, tokens)
    with pytest.raises(KeyError, match="namespace"):
        built.index.explain(7, [0], u32([1]))
