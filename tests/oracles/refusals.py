"""What pools refuse: the oracle's part, and the machine under a policy whose worths all can tell.

Under `by_key` a page is worth the lowest three bits of its block's key, and what is worth least
goes first, of that what was not used for longest. So the oracle says itself what is refused, and
why.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kvc2 import _core
from kvc2._core import Cause
from tests.oracles.blocks import PAGE_SIZE, Prompt, block_bytes, extras_of, tokens_of
from tests.oracles.key_models import KeysModel, words
from tests.oracles.keys_machine import KEYS, KeysMachine
from tests.oracles.machines import BLOCKS, DEAD_BLOCKS, SEEN, STEM, choice, prompts, small, u32
from tests.oracles.model_parts import IN_FLIGHT, NO_HINTS, PRIVATE, Death, Path, TransferModel

Worths = tuple[float, float]
DURABLE_MARGIN = 1.5


class RefusalModel(KeysModel):
    """`key_of`: the index's key of a block. `ahead`: of the call under way."""

    key_of: Callable[[Path], bytes]
    ahead = 0

    def worth(self, path: Path) -> float:
        return float(self.key_of(path)[0] & 7)

    def first_of(self, legal: list[Path]) -> list[Path]:
        least = min(map(self.worth, legal), default=0)
        return self.longest_unused([path for path in legal if self.worth(path) == least])

    # who is refused
    def standing(self, path: Path, pool: int, life: int) -> tuple[bool, bool, int]:
        """Of a newcomer, where nothing forbids its eviction."""
        if self.pinned(path, pool, hard=True):
            return True, True, 100
        if self.pinned(path, pool, hard=False):
            return True, True, 99
        return True, not self.held_below(path, pool), life

    def judge(
        self, path: Path, pool: int, life: int, spared: Path | None = None, taken: int = 0
    ) -> Worths | None:
        """Why the pool would not have it; None: it would."""
        at, tenant = self.pools[pool], self.tenant(path)
        if len(at.free_pages()) > (self.ahead if at.durable else 0):
            return None
        payers = self.payers(pool, tenant, taken)
        found = (self.victim(pool, spared, of=payer) for payer in payers)
        victim = next(filter(None, found), None)
        if victim is None:
            return None
        if self.tenant(victim) in self.over(pool) and self.tenant(victim) != tenant:
            return None
        ours, theirs = self.standing(path, pool, life), self.precedence(victim, pool)
        worths = self.worth(path), self.worth(victim)
        margin = DURABLE_MARGIN if at.durable else 1
        return worths if (ours, worths[0]) < (theirs, margin * worths[1]) else None

    def judge_copy(self, path: Path, pool: int) -> Worths | None:
        life = self.life(path).standing(self.now)
        return self.judge(path, pool, life, spared=path[:-1])

    def note(self, path: Path, pool: int, worths: Worths) -> None:
        self.pools[pool].refusals += 1
        self.deaths.append(Death(path, Cause.NOT_ADMITTED, pool, self.now, worths))

    def refuse(self, pool: int, below: int, paths: list[Path], worths: Worths) -> None:
        at = self.pools[pool]
        for path in paths:
            if at.blocks[path] not in at.refused:
                at.refused.add(at.blocks[path])
                self.note(path, below, worths)

    def worths_of(self, path: Path) -> Worths:
        known = [death for death in self.deaths[-DEAD_BLOCKS:] if death.path == path]
        return known[-1].worths if known else (0, 0)

    # what that means elsewhere
    def settled(self, path: Path, pool: int) -> bool:
        at = self.pools[pool]
        return at.blocks.get(path) in at.refused or self.held_below(path, pool)

    def noted(self, path: Path, pool: int, page: int, cause: Cause) -> bool:
        goes = cause in (Cause.EVICTED, Cause.SESSION_ENDED)
        return goes and page in self.pools[pool].refused and not self.dead(path)

    def place(self, path: Path, pool: int, page: int) -> None:
        super().place(path, pool, page)
        for above in self.pools.values():
            if above.below == pool:
                above.refused.discard(above.blocks.get(path, -1))

    def enqueue(self, pool: int, page: int) -> None:
        super().enqueue(pool, page)
        if self.pools[pool].below is not None:
            self.pools[pool].refused.discard(page)

    # changes
    def refuses(self, plan: TransferModel, page: int, paths: list[Path], *, back: bool) -> bool:
        at = self.pools[plan.source]
        if page in at.insisted:
            return False
        known = at.blocks[paths[0]] in at.refused
        ends = self.judged_by_its_parent(plan, page, paths[0])
        if back and not known and not ends and not self.may_return(paths[0], plan.target):
            return False
        if ends:
            SEEN["refused: below the only one that could go"] += 1
            worths: Worths | None = self.worth(paths[0]), self.worth(paths[0][:-1])
        else:
            worths = self.worths_of(paths[0]) if known else self.judge_copy(paths[0], plan.target)
        if worths is None:
            return False
        SEEN["refused: below what was refused"] += known or len(paths) > 1
        SEEN[f"refused: a copy to tier {self.pools[plan.target].tier}"] += 1
        self.refuse(plan.source, plan.target, paths, worths)
        return True

    def judged_by_its_parent(self, plan: TransferModel, page: int, path: Path) -> bool:
        """Whether a full target could evict the block that this one hangs on, and nothing else."""
        source, at = self.pools[plan.source], self.pools[plan.target]
        full = len(at.free_pages()) <= (self.ahead if at.durable else 0)
        if page in source.insisted or source.blocks[path] in source.refused or not full:
            return False
        payers = self.payers(plan.target, self.tenant(path), 0)

        def victim(spared: Path | None) -> Path | None:
            found = (self.victim(plan.target, spared, of=each) for each in payers)
            return next(filter(None, found), None)

        return victim(None) == path[:-1] and victim(path[:-1]) is None

    def waits(self, plan: TransferModel, page: int, path: Path) -> bool:
        at = self.pools[plan.target]
        busy = any(state in (PRIVATE, IN_FLIGHT) for state in at.state.values()) or any(
            self.pins(plan.target, each) for each in at.state
        )
        return busy and self.judged_by_its_parent(plan, page, path)

    def offer(self, plan: TransferModel, path: Path, picks: deque[int]) -> bool:
        if self.judge_copy(path, plan.target) is not None:
            self.pools[plan.target].refusals += 1
            SEEN["refused: a prefetch"] += 1
            return False
        return super().offer(plan, path, picks)

    def complete(self, transfer_id: int, done: int) -> None:
        plan = self.transfers[transfer_id]
        done = 0 if plan.failed else done
        super().complete(transfer_id, done)
        source, target = self.pools.get(plan.source), self.pools.get(plan.target)
        if source is None or target is None or source.below != plan.target:
            return
        for i in range(done):
            if plan.source_pages[i] in source.insisted and target.below is not None:
                target.insisted.add(plan.target_pages[i])
                SEEN["insisted: on its way"] += 1
            source.insisted.discard(plan.source_pages[i])

    def complete_move(self, transfer: int, done: int) -> list[int]:
        move = self.transfers[transfer]
        at = self.pools.get(move.source)
        marked = [] if at is None else [at.refused.copy(), at.insisted.copy()]
        left = super().complete_move(transfer, done)
        for source, target in zip(move.source_pages, move.target_pages, strict=True):
            for marks, before in zip((at.refused, at.insisted) if at else (), marked, strict=True):
                if source in left and source in before:
                    marks.add(target)
        return left

    def insist(self, path: Path, chain: list[int]) -> None:
        if self.pools[chain[-1]].present(path):
            return
        for pool, below in itertools.pairwise(chain):
            at = self.pools[pool]
            if at.present(path) and not self.pools[below].resident(path):
                SEEN["insisted: on what was refused"] += at.blocks[path] in at.refused
                at.insisted.add(at.blocks[path])
                if at.resident(path) and at.blocks[path] not in at.sent_back:
                    self.enqueue(pool, at.blocks[path])

    def insist_lease(self, lease_id: int) -> None:
        if lease_id in self.leases:
            lease = self.leases[lease_id]
            pool, paths = lease.pool, [held.path for held in lease.held]
        else:
            keys = self.key_leases[lease_id]
            pool, paths = keys.pool, keys.held()
        for path in paths:
            self.insist(path, self.chain(pool))

    def insist_all(self, pool: int) -> None:
        for above in sorted(self.pools):
            if pool in self.chain(above)[1:]:
                at = self.pools[above]
                for path in sorted(at.blocks, key=at.blocks.__getitem__):
                    page = at.blocks[path]
                    waits = page in at.queue or page in at.sent_back or page in at.refused
                    if waits or not at.resident(path):
                        self.insist(path, self.chain(above))

    def grant_for(self, lease_id: int, first: int, count: int, picks: list[int]) -> None:
        lease = self.leases[lease_id]
        known = range(len(lease.found), len(lease.path) - 1)
        source, tenant = deque(picks), self.tenants.get(lease.namespace, 0)
        for taken in range(0 if self.pools[lease.pool].closed else count):
            path = lease.path[: first + taken + 2]
            worths = None
            if first + taken in known:
                life = self.life_of(lease.hints).standing(self.now)
                worths = self.judge(path, lease.pool, life, taken=taken)
            if worths is not None:
                SEEN["refused: a grant"] += 1
                for block in range(first + taken, first + count):
                    if block in known:
                        self.note(lease.path[: block + 2], lease.pool, worths)
                break
            if self.take(lease.pool, source, PRIVATE, asks=(tenant, taken)) is None:
                break
        assert not source, "more pages than there are"

    def grant_for_keys(
        self, lease_id: int, blocks: list[tuple[int, ...]], picks: list[int]
    ) -> list[bool]:
        """Which of them got the next of `picks`."""
        lease = self.key_leases[lease_id]
        asked = {path for path, found in zip(lease.paths, lease.found, strict=True) if not found}
        source, tenant = deque(picks), self.tenants.get(lease.namespace, 0)
        granted = [False] * len(blocks)
        taken = 0
        for i, block in enumerate([] if self.pools[lease.pool].closed else blocks):
            path = (lease.namespace, block)
            life = self.life_of(lease.hints).standing(self.now)
            worths = self.judge(path, lease.pool, life, taken=taken) if path in asked else None
            if worths is not None:
                SEEN["refused: a key"] += 1
                self.note(path, lease.pool, worths)
            elif self.take(lease.pool, source, PRIVATE, asks=(tenant, taken)) is not None:
                granted[i] = True
                taken += 1
        assert not source, "more pages than there are"
        return granted


class RefusalMachine(KeysMachine):
    """Every pool that may refuse does."""

    model: RefusalModel
    policy = "by_key"

    def __init__(self) -> None:
        super().__init__()
        self.index = _core.Index(
            first_generation=10, policy=self.policy, dead_blocks=DEAD_BLOCKS, admission=True
        )
        self.model = RefusalModel(self.policy)
        self.model.key_of = self.key_of
        self.keys_known: dict[Path, bytes] = {}

    @initialize(limited=st.booleans(), picky=st.sampled_from([False, False, True]))
    def build(self, limited: bool, picky: bool) -> None:
        super().build(limited, picky)

    def key_of(self, path: Path) -> bytes:
        if path not in self.keys_known:
            name = self.names[path[0]]  # type: ignore[call-overload]
            blocks: list[tuple[int, ...]] = list(path[1:])  # type: ignore[arg-type]
            if path[0] in self.key_spaces:
                key = _core.xxh3_128(_core.xxh3_128(name) + block_bytes(blocks[0]))
            else:
                extras = extras_of(blocks)
                keys = _core.chain_keys(name, tokens_of(blocks), PAGE_SIZE, extras)
                key = keys[-1].tobytes()
            self.keys_known[path] = key
        return self.keys_known[path]

    def plan_demote_of(self, source: int, count: int) -> "_core.Transfer | None":
        self.model.ahead = count % 3
        return self.index.plan_demote(source, count, ahead=count % 3)

    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, count=small, shift=st.sampled_from([0, 0, 0, 0, 1, 7]))
    def store(self, lease: int, count: int, shift: int) -> None:
        """Pages for what a lease lacks, and commits into them."""
        number = self.a_lease(lease)
        at = self.model.leases[number]
        first = at.end + shift
        pages = self.index.grant_for(number, first, count).tolist()
        self.tell([])
        self.model.grant_for(number, first, count, pages)
        if not shift:
            blocks = list(at.path[first + 1 :])[: len(pages)]
            self.check_commit(number, first, blocks, pages[: len(blocks)])  # type: ignore[arg-type]

    @precondition(lambda self: self.model.key_leases)
    @rule(lease=choice, keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
    def store_keys(self, lease: int, keys: list[bytes]) -> None:
        number = self.a_key_lease(lease)
        pages = self.index.grant_for_keys(number, keys).tolist()
        self.tell([])
        granted = [page for page in pages if page != _core.NO_PAGE]
        got = self.model.grant_for_keys(number, list(map(words, keys)), granted)
        assert got == [page != _core.NO_PAGE for page in pages]

    @rule(pick=choice)
    def insist(self, pick: int) -> None:
        leases = self.model.lease_ids()
        if pick % 4 == 0 or not leases:
            self.index.insist_all(self.disk)
            self.model.insist_all(self.disk)
        else:
            self.index.insist(leases[pick % len(leases)])
            self.model.insist_lease(leases[pick % len(leases)])

    def fill(self, pool: int) -> list[int]:
        """Its free pages are somebody's, till they are given back."""
        pages = self.model.pools[pool].free_pages()
        if self.model.pools[pool].closed or not self.index.keep(pool, u32(pages)):
            return []
        self.model.pools[pool].state.update(dict.fromkeys(pages, PRIVATE))
        return pages

    @rule(pool=choice, before=prompts, prompt=prompts, count=small)
    def copy_to_a_full_pool(self, pool: int, before: Prompt, prompt: Prompt, count: int) -> None:
        with self.full([self.cpu, self.cpu, self.disk][pool % 3], pool, before):
            self.serve(0, pool, prompt, 1, NO_HINTS, 0, 0)
            self.demote_all(count, to_disk=True)
            self.demote_all(count, to_disk=True)

    @rule(pool=choice, before=prompts, count=small)
    def insist_on_a_full_pool(self, pool: int, before: Prompt, count: int) -> None:
        with self.full([self.cpu, self.disk][pool % 2], pool, before):
            self.demote_all(count, to_disk=True)
            self.insist(pool)
            self.demote_all(count, to_disk=True)

    @rule(pool=choice, before=prompts, prompt=prompts, count=small)
    def prefetch_to_a_full_pool(
        self, pool: int, before: Prompt, prompt: Prompt, count: int
    ) -> None:
        """What only the disk has meets what it has not."""
        self.serve(0, pool, before, 0, NO_HINTS, 0, 0)
        self.demote_all(4, to_disk=True)
        self.evict(self.cpu, 4)
        with self.full(self.cpu, pool, prompt):
            self.bring(self.current[0], self.cpu, before, count, touches=False)
            self.arrive()

    @rule(pool=choice, before=prompts, prompt=prompts, count=small)
    def store_in_a_full_pool(self, pool: int, before: Prompt, prompt: Prompt, count: int) -> None:
        with self.full(self.cpu, pool, before):
            self.store(self.open(0, self.cpu, prompt, 9), count, 0)
            self.store_keys(self.open_lease(self.cpu, KEYS[:count]), KEYS[:count])

    @rule(pool=choice, prompt=prompts, count=st.integers(1, 9))
    def a_path_fills_a_pool(self, pool: int, prompt: Prompt, count: int) -> None:
        """What else is there is pinned, and nothing is on its way."""
        self.calm()
        self.evict(self.cpu, 9)
        kept = [BLOCKS[2], BLOCKS[2], BLOCKS[0]]
        self.serve(0, pool, kept, 0, NO_HINTS, 0, 0)
        self.demote_all(9, to_disk=True)
        self.pin(0, self.cpu, kept, True, 9)
        self.serve(0, pool, [*STEM[:3], *prompt], 0, NO_HINTS, 0, 0)
        self.calm()
        for _ in range(2):
            self.demote_all(count, to_disk=False)
        self.unpin(0, self.cpu, kept)

    @contextmanager
    def full(self, at: int, pool: int, before: Prompt) -> Iterator[None]:
        """A pool that has what came of a request, and no free page."""
        self.serve(0, pool, before, 0, NO_HINTS, 0, 0)
        self.demote_all(4, to_disk=at == self.disk)
        kept = self.fill(at)
        yield
        pages = [page for page in kept if self.model.pools[at].state.get(page) == PRIVATE]
        if self.index.give_back(at, u32(pages)):
            for page in pages:
                self.model.pools[at].free(page)

    @invariant()
    def refusals_agree(self) -> None:
        for pool, at in self.model.pools.items():
            assert self.index.pool_counts(pool).refused == at.refusals
            assert np.all([at.resident(at.owner(page)) for page in at.refused])
            SEEN["refused: what is there above"] += len(at.refused)
