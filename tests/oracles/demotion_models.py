"""The oracle's part about demotion: what a slower pool should have, and what comes to it again."""

from collections import deque

from kvc2._core import Cause
from tests.oracles.model_parts import RESIDENT, Path, TransferModel
from tests.oracles.models import IndexModel


class DemotionModel(IndexModel):
    """IndexModel, and what is copied down."""

    def plan_demote(
        self, pool: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | None:
        at = self.pools[pool]
        assert at.below is not None
        plan = TransferModel(pool, at.below, [], [], [])
        source = deque(picks)
        full = False
        for queue in (at.queue, at.sent_back):
            while queue and len(plan.paths) < count and not full:
                full = not self.demote(plan, queue[0], count, source, back=queue is at.sent_back)
                if not full:
                    queue.pop(0)
        return self.start(plan, transfer)

    def demote(
        self, plan: TransferModel, page: int, count: int, source: deque[int], *, back: bool
    ) -> bool:
        """Adds what is missing of the path of a page's block; False: there is no room for it."""
        missing = self.missing_below(plan.source, plan.target, page)
        for i, path in enumerate(missing):
            if len(plan.paths) == count:
                return False
            if self.waits(plan, page, path):
                return False
            if self.refuses(plan, page, missing[i:], back=back):
                return True
            if back and not self.may_return(path, plan.target):
                return False
            if not self.add(plan, path, source):
                return False
        return True

    def waits(self, plan: TransferModel, page: int, path: Path) -> bool:
        """Whether nothing but the block that it hangs on could go, as long as others are busy."""
        return False

    def refuses(self, plan: TransferModel, page: int, paths: list[Path], *, back: bool) -> bool:
        """Whether the target would not have the first of them, and so none."""
        return False

    def missing_below(self, pool: int, below: int, page: int) -> list[Path]:
        if self.pools[pool].state.get(page) != RESIDENT:
            return []
        path = self.pools[pool].owner(page)
        missing: list[Path] = []
        if self.dead(path):
            return missing
        while len(path) > 1 and not self.pools[below].present(path):
            if not self.pools[pool].resident(path):
                return []
            missing.insert(0, path)
            path = path[:-1]
        return missing

    def admitted(self, path: Path, below: int) -> bool:
        return True

    def evict_one(self, path: Path, pool: int, cause: Cause = Cause.EVICTED) -> int:
        self.send_back(path, pool)
        return super().evict_one(path, pool, cause)

    def send_back(self, path: Path, pool: int) -> None:
        """The pools above will demote again what the one below should have had first."""
        below = self.pools[pool].below
        if below is None or self.settled(path, pool) or not self.admitted(path, below):
            return
        for above in self.pools.values():
            if above.below == pool and above.resident(path):
                page = above.blocks[path]
                if page not in above.queue + above.sent_back:
                    above.sent_back.append(page)

    def may_return(self, path: Path, pool: int) -> bool:
        """Whether nothing that waits to go further down would be evicted for it."""
        at, tenant = self.pools[pool], self.tenant(path)
        full = (tenant, at.tier) in self.quotas and (
            self.quota_use(tenant, at.tier) + 1 > self.quotas[tenant, at.tier]
        )
        if not full and (at.free_pages() or not at.queue + at.sent_back):
            return True
        candidates = [each for each in self.candidates(pool) if each != path[:-1]]
        for payer in [tenant] if full else self.payers(pool, tenant, 0):
            legal = [each for each in candidates if payer is None or self.tenant(each) == payer]
            if legal:
                first = min(self.precedence(each, pool) for each in legal)
                return first[:2] != (True, True)
        return False
