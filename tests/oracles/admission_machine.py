"""What a durable pool admits: the oracle's part, and what every step of a walk agrees on."""

from hypothesis.stateful import invariant

from tests.oracles.machines import SEEN
from tests.oracles.model_parts import LeaseModel, Path
from tests.oracles.prefetch_machine import PrefetchMachine, PrefetchModel


class AdmissionModel(PrefetchModel):
    """`again`: the blocks in the tree that an acquire has matched."""

    def __init__(self, policy: str = "lru") -> None:
        super().__init__(policy)
        self.again: set[Path] = set()
        self.picky = False

    def use(self, lease: LeaseModel) -> None:
        super().use(lease)
        self.again |= {lease.path[: i + 2] for i in range(len(lease.found))}

    def forget(self) -> None:
        super().forget()
        self.again &= set(self.stamps)

    def admitted(self, path: Path, below: int) -> bool:
        return not (self.picky and self.pools[below].durable) or path in self.again

    def missing_below(self, pool: int, below: int, page: int) -> list[Path]:
        missing = super().missing_below(pool, below, page)
        return missing if missing and self.admitted(missing[-1], below) else []

    def not_admitted(self, pool: int) -> int:
        if not (self.picky and self.pools[pool].durable):
            return 0
        above = [each for at, each in self.pools.items() if pool in self.chain(at)[1:]]
        there = {path for each in above for path in each.blocks if each.resident(path)}
        lacking = [path for path in there if not self.pools[pool].present(path)]
        return sum(not self.dead(path) and path not in self.again for path in lacking)


class AdmissionMachine(PrefetchMachine):
    """The durable pool of some walks is picky."""

    model: AdmissionModel

    def __init__(self) -> None:
        super().__init__()
        self.model = AdmissionModel(self.policy)
        self.sent_back: set[tuple[int, Path]] = set()

    @invariant()
    def admission_agrees(self) -> None:
        self.model.picky = self.picky
        for pool in self.model.pools:
            refused = self.model.not_admitted(pool)
            assert self.index.not_admitted(pool) == refused
            SEEN["plan_demote: not admitted"] += bool(refused)

    @invariant()
    def what_is_sent_back_is_seen(self) -> None:
        before, self.sent_back = self.sent_back, set()
        for pool, at in self.model.pools.items():
            owners = {page: path for path, page in at.blocks.items()}
            self.sent_back |= {(pool, owners[page]) for page in at.sent_back if page in owners}
        SEEN["evict: sent back"] += len(self.sent_back - before)
        for pool, path in before - self.sent_back:
            known = self.model.pools.get(pool)
            below = None if known is None else known.below
            arriving = below is not None and self.model.arriving(below, path)
            SEEN["plan_demote: what was sent back"] += arriving
