"""The naive oracle of opaque keys: each is a path of one block, and a lease on some is a list of
those that are there."""

import itertools
from collections import deque
from dataclasses import dataclass, field

from tests.oracles.admission_machine import AdmissionModel
from tests.oracles.model_parts import (
    ADOPTED,
    DUPLICATE,
    NO_HINTS,
    PRIVATE,
    REFUSED,
    RESIDENT,
    Hints,
    Path,
    TransferModel,
)


def words(key: bytes) -> tuple[int, ...]:
    """What stands for it in the place of tokens."""
    padded = len(key).to_bytes(4, "little") + key.ljust(64, b"\0")
    return tuple(int.from_bytes(padded[i : i + 4], "little") for i in range(0, 68, 4))


@dataclass
class KeyLeaseModel:
    namespace: int
    pool: int
    stamp: int
    hints: Hints
    paths: list[Path]
    found: list[int]  # 0, or 1 + tier
    there: list[bool] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)  # committed by it

    def held(self) -> list[Path]:
        return list(itertools.compress(self.paths, self.there)) + self.made


class KeysModel(AdmissionModel):
    def __init__(self, policy: str = "lru") -> None:
        super().__init__(policy)
        self.key_leases: dict[int, KeyLeaseModel] = {}

    def lease_ids(self) -> list[int]:
        return sorted([*self.leases, *self.key_leases])

    def pins(self, pool: int, page: int) -> int:
        blocks = self.pools[pool].blocks
        leases = [lease for lease in self.key_leases.values() if lease.pool == pool]
        held = [path for lease in leases for path in lease.held()]
        return super().pins(pool, page) + sum(blocks[path] == page for path in held)

    def find_key(self, path: Path, pools: list[int]) -> int:
        return sum(1 + tier for tier in self.tiers(path[0], pools, [path[1]]))  # type: ignore[arg-type, list-item]

    def acquire_keys(
        self,
        lease: int,
        namespace: int,
        pool: int,
        blocks: list[tuple[int, ...]],
        hints: Hints,
        *,
        touches: bool = True,
    ) -> None:
        self.clock += 1
        paths: list[Path] = [(namespace, block) for block in blocks]
        chain = self.chain(pool)
        found = [self.find_key(path, chain) for path in paths]
        known = [path for path, tier in zip(paths, found, strict=True) if tier]
        if touches:
            self.use_keys(known, chain, hints)
        there = [path in known and self.pools[pool].present(path) for path in paths]
        self.key_leases[lease] = KeyLeaseModel(
            namespace, pool, self.clock, hints, paths, found, there
        )

    def use_keys(self, known: list[Path], chain: list[int], hints: Hints) -> None:
        for path in known:
            self.stamps[path] = self.clock
            for upper, lower in itertools.pairwise(chain):
                if self.pools[upper].resident(path) and not self.pools[lower].present(path):
                    self.enqueue(upper, self.pools[upper].blocks[path])
        self.again |= set(known)
        self.say(hints, known, fresh=[])

    def promote(
        self, lease_id: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | None:
        if lease_id in self.leases:
            return super().promote(lease_id, count, transfer, picks)
        lease = self.key_leases[lease_id]
        at, below = self.pools[lease.pool], self.pools[lease.pool].below
        assert below is not None
        plan = TransferModel(below, lease.pool, [], [], [])
        source = deque(picks)
        for i, path in enumerate(lease.paths):
            gone = path not in self.stamps or self.dead(path)
            if lease.there[i] or not lease.found[i] or gone:
                continue
            if not at.present(path):
                if not self.pools[below].resident(path):
                    continue
                if len(plan.paths) >= count or not self.add(plan, path, source):
                    break
            lease.there[i] = True
        return self.start(plan, transfer)

    def next_load(
        self, lease_id: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | int | None:
        if lease_id in self.leases:
            return super().next_load(lease_id, count, transfer, picks)
        lease = self.key_leases[lease_id]
        chain = self.chain(lease.pool)
        wanted = [
            path
            for path, found, there in zip(lease.paths, lease.found, lease.there, strict=True)
            if found and not there and not self.pools[lease.pool].present(path)
        ]
        wanted = wanted if len(chain) > 2 else []
        return self.bring_keys(chain[-2:], wanted, count, (transfer, picks))

    def prefetch_keys(
        self, chain: list[int], paths: list[Path], count: int, came: tuple[int | None, list[int]]
    ) -> TransferModel | int | None:
        return self.bring_keys(chain, paths, count, came, judged=True)

    def bring_keys(
        self,
        chain: list[int],
        paths: list[Path],
        count: int,
        came: tuple[int | None, list[int]],
        *,
        judged: bool = False,
    ) -> TransferModel | int | None:
        plan = TransferModel(-1, -1, [], [], [])
        source, coming = deque(came[1]), []
        for path in paths:
            if path not in self.stamps or self.dead(path):
                continue
            tier = self.find_key(path, chain)
            above = [chain[0]] if self.pools[chain[0]].present(path) else chain[max(tier - 2, 0) :]
            if self.arriving(above[0], path):
                coming.append(self.filling(above[0], path))
            if tier < 2 or self.pools[above[0]].present(path) or self.pools[above[0]].closed:
                continue
            if not plan.paths:
                plan = TransferModel(chain[tier - 1], above[0], [], [], [])
            if plan.source != chain[tier - 1]:
                continue
            bring = self.offer if judged else self.add
            if len(plan.paths) >= count or not bring(plan, path, source):
                break
        if not plan.paths and coming:
            self.start(plan, None)
            return coming[0]
        return self.start(plan, came[0])

    def filling(self, pool: int, path: Path) -> int:
        """The transfer that does."""
        page = self.pools[pool].blocks[path]
        to = {i: t for i, t in self.transfers.items() if t.target == pool and not t.is_move}
        return next(i for i, transfer in to.items() if page in transfer.target_pages)

    def complete(self, transfer_id: int, done: int) -> None:
        transfer = self.transfers[transfer_id]
        failed = transfer.paths[0 if transfer.failed else done :]
        for lease in self.key_leases.values():
            if lease.pool == transfer.target:
                kept = zip(lease.paths, lease.there, strict=True)
                lease.there = [there and path not in failed for path, there in kept]
        super().complete(transfer_id, done)

    def commit_keys(
        self,
        at: tuple[int, int],
        blocks: list[tuple[int, ...]],
        pages: list[int],
        lease_id: int | None,
        hints: Hints,
    ) -> list[int]:
        """`at`: namespace and pool."""
        lease = None if lease_id is None else self.key_leases[lease_id]
        self.clock += lease is None
        if at[0] in self.retired:
            return [REFUSED] * len(pages)
        stamp, hints = (self.clock, hints) if lease is None else (lease.stamp, lease.hints)
        answers = []
        for block, page in zip(blocks, pages, strict=True):
            path = (at[0], block)
            answers.append(self.commit_key(at[1], path, page, stamp, hints))
            if lease is not None and answers[-1] == ADOPTED and path not in lease.held():
                lease.made.append(path)
        return answers

    def commit_key(self, pool: int, path: Path, page: int, stamp: int, hints: Hints) -> int:
        at = self.pools[pool]
        if at.blocks.get(path) == page:
            return ADOPTED
        if at.state.get(page) != PRIVATE or self.is_held(pool, page):
            return REFUSED
        fresh = [] if path in self.stamps else [path]
        self.stamps[path] = max(self.stamps.get(path, 0), stamp)
        self.say(hints, [path], fresh)
        if at.present(path):
            return DUPLICATE
        at.state[page] = RESIDENT
        self.place(path, pool, page)
        self.enqueue(pool, page)
        return ADOPTED

    def release(self, lease_id: int, hints: Hints = NO_HINTS) -> None:
        if lease_id in self.leases:
            super().release(lease_id, hints)
            return
        lease = self.key_leases.pop(lease_id)
        lease.hints = lease.hints if hints == NO_HINTS else hints
        for path in lease.held():
            self.say(lease.hints, [path], fresh=[])
            if lease.hints.end and self.stamps[path] == lease.stamp:
                self.end(path)

    def close(self, lease_id: int) -> None:
        if self.key_leases.pop(lease_id, None) is None:
            super().close(lease_id)

    def close_pool(self, pool: int) -> None:
        for lease in [i for i, each in self.key_leases.items() if each.pool == pool]:
            self.close(lease)
        super().close_pool(pool)
