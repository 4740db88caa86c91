"""Naive oracles: obviously right, no cleverness, for small states only.

`IndexModel` is what csrc/index must equal. A block is its whole path (namespace, block, ...), so
there is no tree, no split and no count to keep: every question scans everything. It decides
evictions itself; only the choice among free pages is the index's, so a call that takes pages is
told which ones (`picks`) and checks that they were free to take. Under a policy other than `lru`,
and where lru finds several blocks equally old, it is told the victims too, and checks that they
were legal ones.
"""

import itertools
from collections import deque

from kvc2._core import Cause
from tests.oracles.model_parts import (
    ADOPTED,
    DUPLICATE,
    FREE,
    IN_FLIGHT,
    NO_HINTS,
    PRIVATE,
    REFUSED,
    RESIDENT,
    Death,
    Held,
    Hints,
    LeaseModel,
    Path,
    TransferModel,
)
from tests.oracles.quota_models import QuotasModel


class IndexModel(QuotasModel):
    def __init__(self, policy: str = "lru") -> None:
        super().__init__()
        self.policy = policy
        self.gone: dict[int, list[int]] = {}  # by pool: what the index evicted in this call
        self.leases: dict[int, LeaseModel] = {}
        self.transfers: dict[int, TransferModel] = {}
        self.clock = 1
        self.deaths: list[Death] = []  # all of them, oldest first

    # questions
    def lease_ids(self) -> list[int]:
        return sorted(self.leases)

    def chain(self, pool: int) -> list[int]:
        below = self.pools[pool].below
        return [pool] if below is None else [pool, *self.chain(below)]

    def anywhere(self, path: Path) -> bool:
        return any(pool.present(path) for pool in self.pools.values())

    def under(self, path: Path, pool: int | None = None) -> list[Path]:
        """Blocks below `path` with a page in `pool` (None: in any)."""
        pools = self.pools.values() if pool is None else [self.pools[pool]]
        deeper = [p for each in pools for p in each.blocks if len(p) > len(path)]
        return [p for p in deeper if p[: len(path)] == path]

    def pins(self, pool: int, page: int) -> int:
        count = 0
        for lease in self.leases.values():
            for held in lease.held + lease.stray:
                anchored = lease.pool == pool and held.anchored
                count += anchored and self.pools[pool].blocks[held.path] == page
        for transfer in self.transfers.values():
            count += transfer.source == pool and page in transfer.source_pages
            arrives = transfer.target == pool and not transfer.is_move
            count += arrives and page in transfer.target_pages
        return count

    def arriving(self, pool: int, path: Path) -> bool:
        return self.pools[pool].present(path) and not self.pools[pool].resident(path)

    def is_held(self, pool: int, page: int) -> bool:
        leases = [lease for lease in self.leases.values() if lease.pool == pool]
        moves = [t for t in self.transfers.values() if t.is_move and t.target == pool]
        return any(page in move.target_pages for move in moves) or any(
            h.duplicate and h.page == page for le in leases for h in le.held + le.stray
        )

    def held_below(self, path: Path, pool: int) -> bool:
        return any(self.pools[p].resident(path) for p in self.chain(pool)[1:])

    def last_copy(self, path: Path, pool: int) -> bool:
        return not any(p.resident(path) for i, p in self.pools.items() if i != pool)

    def evictable(self, path: Path, pool: int) -> bool:
        at = self.pools[pool]
        if not at.resident(path) or self.pins(pool, at.blocks[path]) or self.under(path, pool):
            return False
        if self.pinned(path, pool, hard=True) and not self.dead(path):
            return False
        return not self.last_copy(path, pool) or not self.under(path)

    def tiers(self, namespace: int, pools: list[int], blocks: list[tuple[int, ...]]) -> list[int]:
        """The first of `pools` that has it, by matched block."""
        tiers = []
        for i in range(len(blocks)):
            path = (namespace, *blocks[: i + 1])
            holders = [t for t, p in enumerate(pools) if self.pools[p].resident(path)]
            if not holders or self.dead(path):
                break
            tiers.append(holders[0])
        return tiers

    def holes(self) -> int:
        prefixes = {
            p[:n] for pool in self.pools.values() for p in pool.blocks for n in range(2, len(p))
        }
        return sum(not self.anywhere(path) for path in prefixes)

    def depends(self, lease: LeaseModel) -> int:
        pages = [self.pools[lease.pool].blocks[held.path] for held in lease.held]
        return max(
            (i for i, t in self.transfers.items() if t.target == lease.pool
             and not t.is_move and set(t.target_pages) & set(pages)),
            default=0,
        )  # fmt: skip

    # changes
    def drop(self, path: Path, pool: int, cause: Cause) -> int:
        at = self.pools[pool]
        page = at.blocks.pop(path)
        noted = self.noted(path, pool, page, cause)
        at.free(page)
        if not self.anywhere(path) and not noted:
            ended = cause == Cause.EVICTED and self.dead(path)
            cause = self.cause_of_end(path) if ended else cause
            self.deaths.append(Death(path, cause, pool, self.now))
        self.forget()
        return page

    def noted(self, path: Path, pool: int, page: int, cause: Cause) -> bool:
        """Whether why it goes was said before."""
        return False

    def place(self, path: Path, pool: int, page: int) -> None:
        self.pools[pool].blocks[path] = page

    def settled(self, path: Path, pool: int) -> bool:
        """Nothing more is copied down from this page."""
        return self.held_below(path, pool)

    def first_of(self, legal: list[Path]) -> list[Path]:
        """Of what may go first under any policy, what may under this one."""
        return self.longest_unused(legal) if self.policy == "lru" else legal

    def forget(self) -> None:
        """Neither a block nor a hole: its stamp is gone too."""
        gone = [p for p in self.stamps if not self.anywhere(p) and not self.under(p)]
        for path in gone:
            del self.stamps[path]
            self.lives.pop(path, None)

    def victim(
        self,
        pool: int,
        spared: Path | None = None,
        wanted: int | None = None,
        *,
        of: int | None = None,
    ) -> Path | None:
        """Of the longest unused, and under other policies of all, one of `gone`: in its order, or,
        where that is not known, before the page that was `wanted` only those of closed slabs."""
        candidates = [p for p in self.candidates(pool) if p != spared]
        candidates = [p for p in candidates if of is None or self.tenant(p) == of]
        first = min((self.precedence(p, pool) for p in candidates), default=None)
        legal = [p for p in candidates if self.precedence(p, pool) == first]
        legal = self.first_of(legal)
        at = self.pools[pool]
        blocks = {at.blocks[path]: path for path in legal}
        gone = [page for page in self.gone.get(pool, ()) if page in blocks]
        if wanted is not None:
            gone.sort(key=lambda page: (page // at.per_slab not in at.shut, page != wanted))
        unsaid = legal[:1] if self.policy in ("lru", "by_key") else []
        return next(iter([blocks[page] for page in gone] or unsaid), None)

    def candidates(self, pool: int) -> list[Path]:
        return [path for path in self.pools[pool].blocks if self.evictable(path, pool)]

    def precedence(self, path: Path, pool: int) -> tuple[bool, bool, int]:
        """What goes before what under any policy."""
        if not self.dead(path) and self.pinned(path, pool, hard=False):
            return True, True, 99
        standing = 0 if self.dead(path) else self.life(path).standing(self.now)
        return not self.dead(path), not self.settled(path, pool), standing

    def take(
        self,
        pool: int,
        picks: deque[int],
        state: str,
        spared: Path | None = None,
        *,
        asks: tuple[int, int] = (0, 0),
    ) -> int | None:
        """`asks`: the tenant that it is for, and the private pages that this has taken."""
        at = self.pools[pool]
        while not at.free_pages():
            wanted = picks[0] if picks else None
            payers = [] if at.durable else self.payers(pool, *asks)
            found = (self.victim(pool, spared, wanted, of=payer) for payer in payers)
            path = next(filter(None, found), None)
            if path is None:
                return None
            self.evict_one(path, pool)
        assert picks, f"pool {pool} had room for one more page"
        page = picks.popleft()
        assert at.state.get(page) == FREE, f"page {page} of pool {pool} was {at.state.get(page)}"
        at.state[page] = state
        return page

    def grant(self, pool: int, count: int, picks: list[int], tenant: int = 0) -> None:
        source = deque(picks)
        for taken in range(0 if self.pools[pool].closed else count):
            if self.take(pool, source, PRIVATE, asks=(tenant, taken)) is None:
                break
        assert not source, "more pages than there are"

    def enqueue(self, pool: int, page: int) -> None:
        at = self.pools[pool]
        if at.below is not None and page not in at.queue:
            at.queue.append(page)

    def acquire(
        self,
        lease: int,
        namespace: int,
        pool: int,
        blocks: list[tuple[int, ...]],
        limit: int,
        hints: Hints = NO_HINTS,
        skip: int = 0,
        *,
        touches: bool = True,
    ) -> None:
        self.clock += 1
        found = self.tiers(namespace, self.chain(pool), blocks[:limit])
        opened = LeaseModel(namespace, pool, self.clock, (namespace, *blocks), found, 0, hints)
        opened.first = min(skip, len(found))
        opened.touches = touches
        if touches:
            self.use(opened)
        self.hold_more(opened)
        opened.known_from = opened.end
        self.leases[lease] = opened

    def use(self, lease: LeaseModel) -> None:
        """What it found is used now, and others may wait for what it computes."""
        lease.computing = self.computed_by_others(lease)
        matched = [lease.path[: i + 2] for i in range(len(lease.found))]
        for path in matched:
            self.stamps[path] = self.clock
        self.say(lease.hints, matched, fresh=[])
        for upper, lower in itertools.pairwise(self.chain(lease.pool)):
            for path in matched:
                if self.pools[upper].resident(path) and not self.pools[lower].present(path):
                    self.enqueue(upper, self.pools[upper].blocks[path])

    def computed_by_others(self, lease: LeaseModel) -> int:
        """Blocks right after what the lease has found."""
        others = [other for other in self.leases.values() if other is not lease]
        computed = {path for other in others for path in other.computes()}
        wanted = [lease.path[: i + 2] for i in range(len(lease.found), len(lease.path) - 1)]
        return len(list(itertools.takewhile(computed.__contains__, wanted)))

    def shorten(self, lease_id: int, blocks: int) -> None:
        lease = self.leases[lease_id]
        end = max(lease.end, blocks)
        committed = any(held.tier is None for held in lease.held + lease.stray)
        if end >= len(lease.found) or lease.end < lease.known_from or committed:
            return
        del lease.found[end:]
        lease.committed = 0
        lease.computing = self.computed_by_others(lease)

    def hold_more(self, lease: LeaseModel) -> None:
        """Pages in the lease's pool that follow what it holds."""
        while (path := self.next_path(lease)) and self.pools[lease.pool].present(path):
            page = self.pools[lease.pool].blocks[path]
            lease.held.append(Held(path, page, lease.found[lease.end]))

    def next_path(self, lease: LeaseModel, block: int | None = None) -> Path | None:
        """The matched block, hanging on what the lease holds, if it is (still) there."""
        block = lease.end if block is None else block
        if not lease.known_from <= block < len(lease.found):
            return None
        path = (*lease.before(), *lease.path[lease.end + 1 : block + 2])
        return path if path in self.stamps and not self.dead(path) else None

    def commit(
        self, lease_id: int, first: int, blocks: list[tuple[int, ...]], pages: list[int]
    ) -> list[int]:
        lease = self.leases[lease_id]
        if lease.namespace in self.retired:
            return [REFUSED] * len(pages)
        answers: list[int] = []
        known = set(self.stamps)
        for i, (block, page) in enumerate(zip(blocks, pages, strict=True)):
            refused = REFUSED in answers
            answers.append(REFUSED if refused else self.commit_one(lease, first + i, block, page))
        lease.committed = max(lease.committed, lease.end)
        used = self.uses(lease)
        self.say(lease.hints, used, fresh=[path for path in used if path not in known])
        return answers

    def uses(self, lease: LeaseModel) -> list[Path]:
        """The path to the last block that it holds, or skips; empty if that has left the tree."""
        last = lease.before()
        there = len(last) == 1 or last in self.stamps
        return [last[: n + 1] for n in range(1, len(last))] if there else []

    def commit_one(self, lease: LeaseModel, block: int, tokens: tuple[int, ...], page: int) -> int:
        at = self.pools[lease.pool]
        if lease.first <= block < lease.end:
            held = lease.held[block - lease.first]
            if held.page != page or held.path[-1] != tokens:
                return REFUSED
            return DUPLICATE if held.duplicate else ADOPTED
        free_to_use = at.state.get(page) == PRIVATE and not self.is_held(lease.pool, page)
        before = lease.before()
        gone = len(before) > 1 and before not in self.stamps
        if block != lease.end or not free_to_use or gone:
            return REFUSED
        path = (*before, tokens)
        self.stamps[path] = max(self.stamps.get(path, 0), lease.stamp)
        duplicate = at.present(path)
        if not duplicate:
            at.state[page] = RESIDENT
            self.place(path, lease.pool, page)
            self.enqueue(lease.pool, page)
        lease.held.append(Held(path, page, None, duplicate))
        return DUPLICATE if duplicate else ADOPTED

    def release(self, lease_id: int, hints: Hints = NO_HINTS) -> None:
        lease = self.leases[lease_id]
        lease.hints = lease.hints if hints == NO_HINTS else hints
        used = self.uses(lease)
        self.say(lease.hints, used, fresh=[])
        for path in reversed(used if lease.hints.end else []):
            below = [p for p in self.stamps if len(p) > len(path) and p[: len(path)] == path]
            if self.stamps[path] != lease.stamp or not set(below) <= set(used):
                break
            self.end(path)
        self.close(lease_id)

    def close(self, lease_id: int) -> None:
        lease = self.leases.pop(lease_id)
        for held in lease.held + lease.stray:
            if held.duplicate:
                self.pools[lease.pool].free(held.page)

    def add(self, plan: TransferModel, path: Path, picks: deque[int]) -> bool:
        asks = (self.tenant(path), 0)
        page = self.take(plan.target, picks, IN_FLIGHT, spared=path[:-1], asks=asks)
        if page is None:
            return False
        self.place(path, plan.target, page)
        plan.paths.append(path)
        plan.source_pages.append(self.pools[plan.source].blocks[path])
        plan.target_pages.append(page)
        self.transfers[-1] = plan  # pins while the plan is made
        return True

    def offer(self, plan: TransferModel, path: Path, picks: deque[int]) -> bool:
        """As `add`, where the target may refuse it."""
        return self.add(plan, path, picks)

    def start(self, plan: TransferModel, transfer: int | None) -> TransferModel | None:
        self.transfers.pop(-1, None)
        assert (transfer is not None) == bool(plan.paths)
        if transfer is not None:
            self.transfers[transfer] = plan
        return plan if plan.paths else None

    def promote(
        self, lease_id: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | None:
        lease = self.leases[lease_id]
        self.hold_more(lease)
        below = self.pools[lease.pool].below
        plan = TransferModel(-1 if below is None else below, lease.pool, [], [], [])
        source = deque(picks)
        while below is not None and (path := self.next_path(lease)) and len(plan.paths) < count:
            if self.pools[lease.pool].present(path) or not self.pools[below].resident(path):
                break
            if not self.add(plan, path, source):
                break
            lease.held.append(Held(path, plan.target_pages[-1], lease.found[lease.end]))
        return self.start(plan, transfer)

    def next_load(
        self, lease_id: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | int | None:
        """A transfer, or the id of the one to wait for."""
        lease = self.leases[lease_id]
        chain = self.chain(lease.pool)
        if len(chain) < 3:
            return self.start(TransferModel(-1, -1, [], [], []), transfer)
        plan = TransferModel(chain[-1], chain[-2], [], [], [])
        source = deque(picks)
        memory = [self.pools[p] for p in chain[:-1]]
        for block in range(lease.end, len(lease.found)):
            path = self.next_path(lease, block)
            if path is None or len(plan.paths) == count:
                break
            if memory[0].present(path) or any(p.resident(path) for p in memory):
                if plan.paths:
                    break
                continue
            coming = [p for p in chain[:-1] if self.pools[p].present(path)]
            if coming and not plan.paths:
                page = self.pools[coming[0]].blocks[path]
                return next(
                    i for i, t in self.transfers.items()
                    if t.target == coming[0] and page in t.target_pages
                )  # fmt: skip
            if (
                coming
                or not self.pools[chain[-1]].resident(path)
                or not self.add(plan, path, source)
            ):
                break
        return self.start(plan, transfer)

    def complete(self, transfer_id: int, done: int) -> None:
        transfer = self.transfers.pop(transfer_id)
        done = 0 if transfer.failed else done
        at = self.pools.get(transfer.target)
        if at is None:
            return
        for path, page in list(zip(transfer.paths, transfer.target_pages, strict=True))[:done]:
            at.state[page] = RESIDENT
            if at.below is not None and not self.pools[at.below].present(path):
                self.enqueue(transfer.target, page)
        failed = transfer.paths[done:]
        for lease in self.leases.values():
            hit = [i for i, h in enumerate(lease.held) if h.path in failed]
            if lease.pool == transfer.target and hit:
                lease.stray += lease.held[hit[0] :]
                del lease.held[hit[0] :]
            for held in lease.stray if lease.pool == transfer.target else []:
                held.anchored = held.anchored and held.path not in failed
        for path in reversed(failed):
            self.drop(path, transfer.target, Cause.TRANSFER_FAILED)
        source = self.pools.get(transfer.source)
        if source is not None and source.below == transfer.target:
            for page in transfer.source_pages[done:]:
                self.enqueue(transfer.source, page)

    def evict_one(self, path: Path, pool: int, cause: Cause = Cause.EVICTED) -> int:
        self.pools[pool].evicted += 1
        self.pools[pool].last_copies += self.last_copy(path, pool)
        return self.drop(path, pool, cause)

    def evict(self, pool: int, count: int) -> list[Path]:
        evicted: list[Path] = []
        while len(evicted) < count and (path := self.victim(pool, self.above_the_next(pool))):
            self.evict_one(path, pool)
            evicted.append(path)
        return evicted

    def above_the_next(self, pool: int) -> Path | None:
        """The last block in a durable pool on the path of the one that comes to it next."""
        if not self.pools[pool].durable:
            return None
        for _, above in sorted(self.pools.items()):
            queue = above.queue or above.sent_back
            if above.below != pool or not queue or above.state.get(queue[0]) != RESIDENT:
                continue
            path = above.owner(queue[0])[:-1]
            while len(path) > 1 and not self.pools[pool].present(path):
                path = path[:-1]
            if len(path) > 1:
                return path
        return None

    def keep_free(self, pool: int, count: int) -> list[Path]:
        evicted: list[Path] = []
        at = self.pools[pool]
        while len(at.free_pages()) < count and (path := self.victim(pool)):
            if not self.held_below(path, pool):
                break
            self.evict_one(path, pool)
            evicted.append(path)
        return evicted

    def reap(self, pool: int, count: int) -> list[Path]:
        evicted: list[Path] = []
        while len(evicted) < count and (path := self.victim(pool)) and self.dead(path):
            self.evict_one(path, pool)
            evicted.append(path)
        return evicted

    def lost(self, pool: int, pages: list[int]) -> list[int]:
        at = self.pools[pool]
        gone = []
        for page in pages:
            if at.state.get(page) == RESIDENT and not self.pins(pool, page):
                self.drop(at.owner(page), pool, Cause.LOST)
                gone.append(page)
        return gone

    def close_pool(self, pool: int) -> None:
        self.pools[pool].closed = True
        for lease in [i for i, le in self.leases.items() if le.pool == pool]:
            self.close(lease)
        for page, state in list(self.pools[pool].state.items()):
            if state == PRIVATE and not self.is_held(pool, page):
                self.pools[pool].free(page)

    def remove_pool(self, pool: int) -> None:
        by_page = sorted(self.pools[pool].blocks, key=self.pools[pool].blocks.__getitem__)
        self.prefix_pins = {at: hard for at, hard in self.prefix_pins.items() if at[0] != pool}
        for path in by_page:
            self.drop(path, pool, Cause.SESSION_ENDED)
        del self.pools[pool]
        for transfer in self.transfers.values():
            transfer.failed |= pool in (transfer.source, transfer.target)
        self.forget()
