"""What a durable pool admits: the oracle's part, and what every step of a walk agrees on."""

from hypothesis.stateful import invariant

from tests.machines import SEEN, Prompt
from tests.model_parts import NO_HINTS, Hints, Path
from tests.prefetch_machine import PrefetchMachine, PrefetchModel


class AdmissionModel(PrefetchModel):
    """`again`: the blocks in the tree that an acquire has matched."""

    def __init__(self, policy: str = "lru") -> None:
        super().__init__(policy)
        self.again: set[Path] = set()
        self.picky = False

    def acquire(
        self,
        lease: int,
        namespace: int,
        pool: int,
        blocks: Prompt,
        limit: int,
        hints: Hints = NO_HINTS,
    ) -> None:
        super().acquire(lease, namespace, pool, blocks, limit, hints)
        found = len(self.leases[lease].found)
        self.again |= {(namespace, *blocks[: i + 1]) for i in range(found)}

    def forget(self) -> None:
        super().forget()
        self.again &= set(self.stamps)

    def admitted(self, path: Path, below: int) -> bool:
        return not (self.picky and self.pools[below].durable) or path in self.again

    def missing_below(self, pool: int, below: int, page: int) -> list[Path]:
        missing = super().missing_below(pool, below, page)
        return missing if missing and self.admitted(missing[-1], below) else []

    def not_admitted(self, pool: int) -> int:
        at = self.pools[pool]
        if at.below is None:
            return 0
        there = [path for path in at.blocks if at.resident(path) and not self.dead(path)]
        lacking = [path for path in there if not self.pools[at.below].present(path)]
        return sum(not self.admitted(path, at.below) for path in lacking)


class AdmissionMachine(PrefetchMachine):
    """The durable pool of some walks is picky."""

    model: AdmissionModel

    def __init__(self) -> None:
        super().__init__()
        self.model = AdmissionModel(self.policy)

    @invariant()
    def admission_agrees(self) -> None:
        self.model.picky = self.picky
        for pool in self.model.pools:
            refused = self.model.not_admitted(pool)
            assert self.index.not_admitted(pool) == refused
            SEEN["plan_demote: not admitted"] += bool(refused)
