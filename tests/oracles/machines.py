"""Hypothesis state machines: random calls on the real thing and on its naive oracle.

The blocks are few and small, so that prefixes are shared and nodes split all the time, and a pool
holds about as many pages as a path has blocks, so that everything is evicted all the time. Single
calls are here; lives of requests and sessions that need several in a row are in lives.py. `SEEN`
counts what the walks came by, and test_index_machine.py demands enough of each.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvc2 import _core
from tests.oracles.blocks import (
    PAGE_SIZE,
    Prompt,
    block_bytes,
    extras_digest,
    extras_of,
    tokens_of,
)
from tests.oracles.model_parts import (
    IN_FLIGHT,
    NO_HINTS,
    PRIVATE,
    REFUSED,
    RESIDENT,
    Hints,
    Path,
    PoolModel,
    TransferModel,
    digests,
)
from tests.oracles.records import check_record
from tests.oracles.slab_models import SlabModel

DEAD_BLOCKS = 12  # so few that walks forget some
PER_SLAB = 3
PAGE_BYTES = 10
NAMESPACES = [b"a" * 32, b"b" * 32]
# Two begin alike: tokens are compared whole. What follows the tokens of a block are its extras.
BLOCKS = [(0, 0), (0, 1), (7, 7)]
PICTURES = [(0, 1, 1), (0, 1, 2)]
some_blocks = st.sampled_from([*BLOCKS, *PICTURES])

STEM = [BLOCKS[0], BLOCKS[1], PICTURES[0], BLOCKS[2]]  # of most prompts, for some length
prompts = st.builds(
    lambda shared, own: STEM[:shared] + own,
    st.integers(0, len(STEM)),
    st.lists(some_blocks, max_size=3),
)
namespaces = st.sampled_from([0, 0, 0, 1])
some_hints = st.builds(
    Hints,
    ttl=st.integers(0, 3),
    returns=st.sampled_from([0, 0, 1]),
    priority=st.sampled_from([0, 0, 1, 7]),
    end=st.booleans(),
)
SEEN: Counter[str] = Counter()  # of all walks of this process; see test_index_machine.py
skips = st.sampled_from([0, 0, 0, 1, 2, 5])
small = st.integers(1, 5)
choice = st.integers(0, 1000)  # of one of several, modulo their number


def u32(values: object) -> np.ndarray:
    return np.array(values, dtype=np.uint32).reshape(-1)


def of_hints(hints: Hints) -> _core.Hints:
    return _core.Hints(
        ttl_s=hints.ttl,
        expect_return_within_s=hints.returns,
        priority=hints.priority,
        session_end=hints.end,
    )


class IndexMachine(RuleBasedStateMachine):
    """Two engines' pools over one cpu and one durable pool."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.index = _core.Index(first_generation=10, policy=self.policy, dead_blocks=DEAD_BLOCKS)
        self.model = SlabModel(self.policy)
        self.generations: dict[int, int] = {}  # by page of the durable pool
        self.last_generation = 9
        self.last_transfer = 0
        self.names = list(NAMESPACES)  # by id
        self.current = {0: 0, 1: 1}  # the id that came in the place of a retired one
        self.key_spaces: set[object] = set()  # ids of namespaces of opaque keys

    @initialize(limited=st.booleans(), picky=st.sampled_from([False, True]))
    def build(self, limited: bool, picky: bool) -> None:
        self.picky = picky
        self.disk = self.add_pool(below=None, durable=True, slabs=4, tier=2)
        self.cpu = self.add_pool(below=self.disk, durable=False, slabs=2, tier=1)
        self.gpus = [self.add_pool(below=self.cpu, durable=False, slabs=2) for _ in range(2)]
        for i, name in enumerate(NAMESPACES):
            assert self.index.open_namespace(name, PAGE_SIZE) == i
            assert self.index.open_namespace(name, PAGE_SIZE) == i
        for tier in range(3 if limited else 0):
            self.index.set_quota(1, tier, max_blocks=3 + tier)
            self.model.quotas[1, tier] = 3 + tier
        if limited:
            self.index.set_tenant(0, 1)
            self.model.tenants[0] = 1

    def add_pool(self, *, below: int | None, durable: bool, slabs: int, tier: int = 0) -> int:
        pool = self.index.add_pool(
            page_size=PAGE_SIZE,
            pages_per_slab=PER_SLAB,
            below=below,
            durable=durable,
            tier=tier,
            page_bytes=PAGE_BYTES,
            second_access=durable and self.picky,
        )
        self.model.pools[pool] = PoolModel(PER_SLAB, below, durable, tier)
        for _ in range(slabs):
            self.grow(pool)
        return pool

    def grow(self, pool: int) -> None:
        slab = self.index.add_slab(pool)
        state, taken = self.model.pools[pool].state, self.model.pools[pool].numbers()
        assert slab == next(s for s in itertools.count() if s not in taken)
        state.update(dict.fromkeys(range(slab * PER_SLAB, (slab + 1) * PER_SLAB), "free"))

    def of_tokens(self, paths: Iterable[Path]) -> list[Path]:
        return [path for path in paths if path[0] not in self.key_spaces]

    def a_pool(self, pick: int) -> int:
        return pick if pick in self.model.pools else [*self.gpus, self.cpu, self.disk][pick % 4]

    def a_gpu(self, pick: int) -> int:
        return pick if pick in self.gpus else self.gpus[pick % 2]

    def a_head(self, pick: int) -> int:
        """A pool that leases are on."""
        heads = [*self.gpus, self.cpu]
        return pick if pick in heads else [*self.gpus, *self.gpus, *heads][pick % 7]

    def a_lease(self, pick: int) -> int:
        leases = sorted(self.model.leases)
        return pick if pick in leases else leases[pick % len(leases)]

    def tell(self, pages: list[int]) -> None:
        """The oracle learns what went, `pages` in this order."""
        for at, known in self.model.pools.items():
            there = set(self.index.stamps(at).nonzero()[0].tolist())
            gone = {page for page, state in known.state.items() if state == RESIDENT} - there
            self.model.gone[at] = [page for page in pages if page in gone] + sorted(gone)

    def some(self, pool: int, state: str, count: int, pick: int) -> list[int]:
        pages = [p for p, s in self.model.pools[pool].state.items() if s == state]
        start = pick % len(pages) if pages else 0
        return (pages[start:] + pages[:start])[:count]

    # requests
    @rule(namespace=namespaces, gpu=choice, prompt=prompts, limit=st.sampled_from([9, 9, 3, 0]),
          hints=some_hints, skip=skips)  # fmt: skip
    def acquire(
        self, namespace: int, gpu: int, prompt: Prompt, limit: int, hints: Hints, skip: int
    ) -> None:
        pool = self.a_head(gpu)
        if not self.model.pools[pool].closed:
            self.open(namespace, pool, prompt, limit, hints, skip=skip)

    def open(
        self,
        namespace: int,
        pool: int,
        prompt: Prompt,
        limit: int,
        hints: Hints = NO_HINTS,
        *,
        skip: int = 0,
        touches: bool = True,
    ) -> int:
        """A new lease's id. With 5 open the oldest ends, else every page is pinned soon."""
        if len(self.model.leases) == 5:
            self.release(min(self.model.leases))
        namespace = self.current.get(namespace, namespace)
        tokens = np.concatenate([tokens_of(prompt), u32([7] * (limit % PAGE_SIZE))])
        nodes = self.index.counts().nodes
        real = self.opened = self.index.acquire(
            namespace,
            pool,
            tokens,
            limit,
            of_hints(hints),
            skip_blocks=skip,
            touches=touches,
            extras=extras_of(prompt),
        )
        SEEN["acquire: nodes are joined"] += self.index.counts().nodes < nodes
        self.model.acquire(real.id, namespace, pool, prompt, limit, hints, skip, touches=touches)
        lease, state = self.model.leases[real.id], self.model.pools[pool].state
        SEEN["acquire: no use of what it finds"] += not touches and len(lease.found) > 0
        assert (real.matched, real.computing) == (len(lease.found), lease.computing)
        SEEN["acquire: some blocks are skipped"] += 0 < lease.first < len(lease.found)
        SEEN["acquire: past a block with extras"] += any(
            map(extras_digest, prompt[: len(lease.found) - 1])
        )
        SEEN["acquire: an arriving page"] += any(state[h.page] == IN_FLIGHT for h in lease.held)
        SEEN["acquire: another computes it"] += lease.computing > 0
        for tier in set(lease.found) if pool != self.cpu else ():
            SEEN[f"acquire: found in tier {tier}"] += 1
        beside = any(each.pool != pool for each in self.model.leases.values() if each.held)
        SEEN["acquire: on the cpu's pool, beside an engine's"] += pool == self.cpu and beside
        return real.id

    @precondition(lambda self: self.model.leases)
    @rule(
        lease=choice, shift=st.sampled_from([0] * 9 + [-2, -1, 1]), tail=prompts,
        follow=st.booleans(), page=choice, foreign=st.integers(0, 9),
    )  # fmt: skip
    def commit(
        self, lease: int, shift: int, tail: Prompt, follow: bool, page: int, foreign: int
    ) -> None:
        at = self.a_lease(lease)
        first = max(self.model.leases[at].end + shift, 0)
        blocks = list(self.model.leases[at].path[first + 1 :]) if follow else tail
        pages = self.some(self.model.leases[at].pool, PRIVATE, len(blocks), page)
        if foreign == 0 and pages:
            pages[-1] = page % (3 * PER_SLAB)
        if foreign == 1 and pages:
            pages[-1] = pages[0]
        self.check_commit(at, first, blocks[: len(pages)], pages)  # type: ignore[arg-type]

    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, first=st.integers(0, 5))
    def commit_again(self, lease: int, first: int) -> None:
        at = self.a_lease(lease)
        held = self.model.leases[at].held[first:]
        first += self.model.leases[at].first
        self.check_commit(at, first, [h.path[-1] for h in held], [h.page for h in held])  # type: ignore[misc]

    def check_commit(self, lease: int, first: int, blocks: Prompt, pages: list[int]) -> None:
        holes = self.model.holes()
        state = self.model.pools[self.model.leases[lease].pool].state
        before = dict(state)
        extras = extras_of(blocks, first)
        answers = list(self.index.commit(lease, first, tokens_of(blocks), u32(pages), extras))
        assert answers == self.model.commit(lease, first, blocks, pages)
        SEEN["commit: refused"] += REFUSED in answers
        SEEN["commit: a hole closed"] += self.model.holes() < holes
        SEEN["private -> resident: commit"] += before != state
        SEEN["commit: to the cpu's pool"] += (
            before != state and self.model.leases[lease].pool == self.cpu
        )
        at = self.model.leases[lease]
        fresh = at.held[max(0, first - at.first) :]
        SEEN["commit: after skipped blocks"] += bool(at.first and fresh)
        SEEN["commit: what it skipped is gone"] += (
            first == at.first > 0 and REFUSED in answers and at.before() not in self.model.stamps
        )
        SEEN["commit: a duplicate"] += any(h.duplicate for h in fresh)
        SEEN["commit: a duplicate of an arriving page"] += any(
            h.duplicate and self.model.arriving(self.model.leases[lease].pool, h.path)
            for h in fresh
        )

    def release(self, lease: int, hints: Hints = NO_HINTS) -> None:
        at = self.a_lease(lease)
        self.index.release(at, of_hints(hints))
        self.saw_release(at)
        self.model.release(at, hints)

    def saw_release(self, lease: int) -> None:
        at = self.model.leases[lease]
        SEEN["private -> free: a duplicate's end"] += any(h.duplicate for h in at.held + at.stray)
        SEEN["release: with strays"] += bool(at.stray)

    @rule(leases=st.lists(choice, min_size=1, max_size=3), rarely=st.integers(0, 4))
    def release_all(self, leases: list[int], rarely: int) -> None:
        """What a session does that ends and leaves its pool to others; some are closed already."""
        if rarely != 0:
            return
        known = self.model.lease_ids()
        chosen = [known[each % len(known)] if known else each for each in leases] + [10**6]
        open_ones = set(chosen) & set(known)
        assert self.index.release_all(np.array(chosen, np.uint64)) == len(open_ones)
        SEEN["release_all: several"] += len(open_ones) > 1
        for each in open_ones:
            if each in self.model.leases:
                self.saw_release(each)
            self.model.close(each)

    # private pages
    @rule(gpu=choice, count=small, namespace=st.sampled_from([None, 0, 1]))
    def grant(self, gpu: int, count: int, namespace: int | None = None) -> None:
        pool = self.a_head(gpu)
        space = None if namespace is None else self.current[namespace]
        pages = self.index.grant(pool, count, space).tolist()
        self.tell(pages)
        free = len(self.model.pools[pool].free_pages())
        SEEN["free -> private: grant"] += bool(pages)
        SEEN["grant: by evicting"] += len(pages) > free
        self.model.grant(pool, count, pages, self.model.tenants.get(space, 0))

    @rule(gpu=choice, count=small, page=choice, foreign=st.integers(0, 5))
    def give_back(self, gpu: int, count: int, page: int, foreign: int) -> None:
        pool = self.a_head(gpu)
        pages = self.some(pool, PRIVATE, count, page)
        pages += [page % (3 * PER_SLAB)] if foreign == 0 else []
        state = self.model.pools[pool].state
        fine = len(set(pages)) == len(pages) and all(
            state.get(p) == PRIVATE and not self.model.is_held(pool, p) for p in pages
        )
        assert self.index.give_back(pool, u32(pages)) == fine
        SEEN["private -> free: give_back"] += fine and bool(pages)
        SEEN["give_back: refused"] += not fine
        for each in pages if fine else []:
            self.model.pools[pool].free(each)

    @rule(gpu=choice, pages=st.lists(st.integers(0, 3 * PER_SLAB), max_size=3))
    def keep(self, gpu: int, pages: list[int]) -> None:
        pool = self.a_head(gpu)
        at = self.model.pools[pool]
        fine = not at.closed and len(set(pages)) == len(pages)
        fine = fine and all(at.state.get(p) == "free" for p in pages)
        assert self.index.keep(pool, u32(pages)) == fine
        SEEN["free -> private: keep"] += fine and bool(pages)
        at.state.update(dict.fromkeys(pages if fine else [], PRIVATE))

    # transfers
    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, count=st.sampled_from([9, 9, 1, 2]))
    def promote(self, lease: int, count: int = 9) -> None:
        at = self.a_lease(lease)
        real = self.index.promote(at, count)
        pages = [] if real is None else real.target_pages.tolist()
        self.tell(pages)
        expected = self.model.promote(at, count, None if real is None else real.id, pages)
        self.check_transfer(real, expected)

    @rule(pick=choice, count=st.sampled_from([9, 1]))
    def read_from_disk(self, pick: int, count: int) -> None:
        """Into the cpu's pool, under a lease there."""
        below, above = (self.model.pools[pool].blocks for pool in (self.disk, self.cpu))
        named = {number: which for which, number in self.current.items()}
        paths = [path for path in below if path not in above and path[0] in named]
        if paths:
            namespace, *blocks = sorted(paths, key=repr)[pick % len(paths)]
            lease = self.open(named[namespace], self.cpu, blocks, len(blocks))  # type: ignore[index, arg-type]
            self.promote(lease, count)

    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, count=st.integers(1, 4))
    def next_load(self, lease: int, count: int) -> None:
        at = self.a_lease(lease)
        real = self.index.next_load(at, count)
        if isinstance(real, _core.Wait):
            self.tell([])
            assert self.model.next_load(at, count, None, []) == real.transfer
            SEEN["next_load: wait"] += 1
            return
        pages = [] if real is None else real.target_pages.tolist()
        self.tell(pages)
        expected = self.model.next_load(at, count, None if real is None else real.id, pages)
        assert not isinstance(expected, int), f"did not wait for {expected}"
        self.check_transfer(real, expected)

    @rule(pool=choice, count=small)
    def plan_demote(self, pool: int, count: int) -> None:
        source = self.a_pool(pool)
        if source == self.disk:
            assert self.index.plan_demote(source, count) is None
            return
        real = self.plan_demote_of(source, count)
        pages = [] if real is None else real.target_pages.tolist()
        self.tell(pages)
        transfer = None if real is None else real.id
        self.check_transfer(real, self.model.plan_demote(source, count, transfer, pages))

    def plan_demote_of(self, source: int, count: int) -> "_core.Transfer | None":
        return self.index.plan_demote(source, count)

    def check_transfer(self, real: "_core.Transfer | None", expected: TransferModel | None) -> None:
        if real is None:
            assert expected is None
            return
        assert expected is not None
        self.last_transfer += 1
        assert real.id == self.last_transfer
        assert (real.source, real.target) == (expected.source, expected.target)
        assert real.source_pages.tolist() == expected.source_pages
        runs = [(s + i, t + i) for s, t, n in real.extents.tolist() for i in range(n)]
        assert runs == list(zip(expected.source_pages, expected.target_pages, strict=True))
        down = real.target == self.model.pools[real.source].below
        kind = "plan_demote" if down else "next_load" if real.source == self.disk else "promote"
        SEEN[f"free -> in_flight: {kind}"] += 1
        SEEN["promote: from disk into a lease on the cpu's pool"] += any(
            each.pool == real.target == self.cpu
            and self.disk == real.source
            and any(held.path in expected.paths for held in each.held)
            for each in self.model.leases.values()
        )
        SEEN["promote: after skipped blocks"] += kind == "promote" and any(
            each.first and each.held and each.held[0].path == expected.paths[0]
            for each in self.model.leases.values()
        )
        SEEN["plan_demote: from a closed pool"] += self.model.pools[real.source].closed
        if self.disk not in (real.source, real.target):
            assert real.records is None
            return
        if real.target == self.disk:
            for page in expected.target_pages:
                self.last_generation += 1
                self.generations[page] = self.last_generation
        self.check_records(real, expected)

    def check_records(self, real: "_core.Transfer", expected: TransferModel) -> None:
        records = real.records
        durable = expected.target_pages if real.target == self.disk else expected.source_pages
        assert records is not None
        assert records.generations.tolist() == [self.generations[page] for page in durable]
        for i, path in enumerate(expected.paths):
            check_record(records, i, path, self.names_of(path), opaque=path[0] in self.key_spaces)

    def names_of(self, path: Path) -> list[bytes]:
        """Its namespace's, and the digest of each of its blocks."""
        namespace, *blocks = path
        name = self.names[namespace]  # type: ignore[call-overload]
        return [name, *digests(name, [block_bytes(block) for block in blocks])]  # type: ignore[arg-type]

    @precondition(lambda self: self.model.transfers)
    @rule(transfer=choice, short=st.sampled_from([0, 0, 0, 1, 2, 9]))
    def complete(self, transfer: int, short: int) -> None:
        at = sorted(self.model.transfers)[transfer % len(self.model.transfers)]
        self.land(at, short)

    def land(self, transfer: int, short: int = 0) -> None:
        """The transfer ends; its last `short` blocks have failed."""
        plan = self.model.transfers[transfer]
        done = max(len(plan.paths) - short, 0)
        lost = plan.paths[0 if plan.failed else done :]
        leases = [le for le in self.model.leases.values() if le.pool == plan.target]
        broken = [[h for h in le.held if h.path in lost] for le in leases]
        SEEN["in_flight -> resident: complete"] += done > 0 and not plan.failed
        SEEN["complete: of a removed source"] += plan.source not in self.model.pools
        SEEN["complete: of a removed target"] += plan.target not in self.model.pools
        if plan.target in self.model.pools:
            SEEN["in_flight -> free: failed"] += bool(lost)
            source = self.model.pools.get(plan.source)
            SEEN["complete: a failed demotion is queued again"] += bool(lost) and (
                source is not None and source.below == plan.target
            )
            SEEN["complete: only in part"] += 0 < len(lost) < len(plan.paths)
            SEEN["complete: a failure breaks a lease"] += any(broken)
            SEEN["complete: and two"] += sum(map(bool, broken)) > 1
            SEEN["complete: and a duplicate"] += any(h.duplicate for b in broken for h in b)
        assert self.index.complete(transfer, done).size == 0
        self.model.complete(transfer, done)

    # eviction and faults
    @rule(pool=choice, count=small)
    def evict(self, pool: int, count: int) -> None:
        at = self.a_pool(pool)
        pages = dict(self.model.pools[at].blocks)
        real = self.index.evict(at, count)
        self.tell(real.pages.tolist())
        paths = self.model.evict(at, count)
        spared = {self.model.above_the_next(at)}
        assert len(paths) == count or set(self.model.candidates(at)) <= spared
        assert real.pages.tolist() == [pages[path] for path in paths]
        gone = sum(self.model.last_copy(path, at) for path in paths)
        assert real.last_copies == gone
        SEEN["resident -> free: evict"] += bool(paths)
        SEEN["evict: a last copy"] += gone > 0
        SEEN["evict: a copy"] += gone < len(paths)
        if at == self.disk:
            names = [self.names_of(path)[-1] for path in paths]
            assert [digest.tobytes() for digest in real.digests] == names
        else:
            assert real.digests.shape == (0, 32)

    @rule(pool=choice, more=small)
    def keep_free(self, pool: int, more: int) -> None:
        at = self.a_pool(pool)
        count = len(self.model.pools[at].free_pages()) + more
        pages = dict(self.model.pools[at].blocks)
        real = self.index.keep_free(at, count)
        self.tell(real.pages.tolist())
        paths = self.model.keep_free(at, count)
        assert real.pages.tolist() == [pages[path] for path in paths]
        assert real.last_copies == 0
        SEEN["resident -> free: keep_free"] += bool(paths)
        free = len(self.model.pools[at].free_pages())
        SEEN["keep_free: the rest are last copies"] += free < count

    @rule(gpu=choice, rarely=st.integers(0, 9))
    def session_ends(self, gpu: int, rarely: int) -> None:
        if rarely == 7:
            self.close(self.a_gpu(gpu))

    def close(self, pool: int) -> None:
        at = self.model.pools[pool]
        SEEN["close_pool: with leases"] += any(le.pool == pool for le in self.model.leases.values())
        SEEN["private -> free: session end"] += PRIVATE in at.state.values()
        self.index.close_pool(pool)
        self.model.close_pool(pool)

    @precondition(lambda self: any(self.model.pools[gpu].closed for gpu in self.gpus))
    @rule()
    def session_is_forgotten(self) -> None:
        pool = next(gpu for gpu in self.gpus if self.model.pools[gpu].closed)
        holes = self.model.holes()
        SEEN["resident -> free: remove_pool"] += bool(self.model.pools[pool].blocks)
        for transfer in self.model.transfers.values():
            SEEN["remove_pool: of a source"] += transfer.source == pool
            SEEN["remove_pool: of a target"] += transfer.target == pool
        self.index.remove_pool(pool)
        self.model.remove_pool(pool)
        SEEN["remove_pool: a hole"] += self.model.holes() > holes
        self.gpus.remove(pool)
        self.gpus.append(self.add_pool(below=self.cpu, durable=False, slabs=2))

    # slabs
    @rule(pool=choice)
    def add_slab(self, pool: int) -> None:
        at = self.a_pool(pool)
        if not self.model.pools[at].closed and len(self.model.pools[at].numbers()) < 5:
            self.grow(at)

    # after every step
    @invariant()
    def laws_hold(self) -> None:
        self.index.check()

    @invariant()
    def counts_agree(self) -> None:
        for pool, at in self.model.pools.items():
            real = self.index.pool_counts(pool)
            states = list(at.state.values())
            got = [real.free, real.private, real.in_flight, real.resident, real.pages]
            assert got == [
                *(states.count(s) for s in ("free", PRIVATE, IN_FLIGHT, RESIDENT)), len(states)
            ]  # fmt: skip
            assert (real.evicted, real.last_copies) == (at.evicted, at.last_copies)
            if self.policy == "lru":
                assert self.index.victim_age(pool) == self.model.victim_age(pool)
            assert real.pinned == sum(self.model.pins(pool, page) > 0 for page in at.state)
            assert self.index.undemoted(pool) == len({*at.queue, *at.sent_back})
            stamps = self.index.stamps(pool)
            assert {int(p): int(stamps[p]) for p in stamps.nonzero()[0]} == {
                page: self.model.stamps[path]
                for path, page in at.blocks.items()
                if at.resident(path)
            }
            if at.durable:
                there = self.index.residents(pool, 0, 1000)[0].tolist()
                assert there == [page for page in sorted(at.state) if at.state[page] == RESIDENT]
        real = self.index.counts()
        blocks = {path for at in self.model.pools.values() for path in at.blocks}
        assert (real.blocks, real.holes) == (len(blocks), self.model.holes())
        SEEN["steps"] += 1
        SEEN["steps with holes"] += real.holes > 0
        opened = len(self.model.lease_ids()), len(self.model.transfers)
        assert (real.leases, real.transfers) == opened

    @invariant()
    def matches_agree(self) -> None:
        paths = {path for at in self.model.pools.values() for path in at.blocks}
        for namespace, *blocks in self.of_tokens(paths):
            for pool in [*self.gpus, self.cpu]:
                chain = self.model.chain(pool)
                found = self.model.tiers(namespace, chain, blocks)  # type: ignore[arg-type]
                match = self.index.match(namespace, pool, tokens_of(blocks), extras_of(blocks))  # type: ignore[arg-type]
                assert match.blocks == len(found)
                assert match.tiers == tuple(found.count(t) for t in range(len(chain)))

    @invariant()
    def leases_agree(self) -> None:
        for lease, at in self.model.leases.items():
            real = self.index.lease(lease)
            assert real.pages.tolist() == [held.page for held in at.held]
            tiers = [held.tier for held in at.held]
            chain = self.model.chain(at.pool)
            assert real.tiers == tuple(tiers.count(t) for t in range(len(chain)))
            assert real.transfer == self.model.depends(at)
            pool = self.model.pools[at.pool]
            # a duplicate's own page is not being filled, whatever its block's is
            there = [
                pool.blocks[held.path] != held.page or pool.resident(held.path) for held in at.held
            ]
            assert real.arrived == [*there, False].index(False)
            assert (real.matched, real.computing) == (len(at.found), at.computing)
            ahead = [tier for tier, blocks in real.ahead.tolist() for _ in range(blocks)]
            assert ahead == at.found[at.end :]
            assert real.first_block == at.first
