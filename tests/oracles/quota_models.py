"""The oracle's part about quotas: whose block is whose, and who pays for a page."""

from abc import abstractmethod

from tests.oracles.life_models import LivesModel
from tests.oracles.model_parts import Path, PoolModel


class QuotasModel(LivesModel):
    def __init__(self) -> None:
        super().__init__()
        self.pools: dict[int, PoolModel] = {}
        self.tenants: dict[object, int] = {}  # by namespace
        self.quotas: dict[tuple[int, int], int] = {}  # (tenant, tier) -> blocks

    @abstractmethod
    def victim(
        self,
        pool: int,
        spared: Path | None = None,
        wanted: int | None = None,
        *,
        of: int | None = None,
    ) -> Path | None: ...

    @abstractmethod
    def evict_one(self, path: Path, pool: int) -> int: ...

    def limited(self, tier: int) -> list[int]:
        """Tenants with a quota there."""
        return sorted(tenant for tenant, at in self.quotas if at == tier)

    def tenant(self, path: Path) -> int:
        return self.tenants.get(path[0], 0)

    def quota_use(self, tenant: int, tier: int) -> int:
        """Blocks, in all pools of the tier, of a tenant that has a quota there."""
        at = [pool for pool in self.pools.values() if pool.tier == tier]
        return sum(self.tenant(path) == tenant for pool in at for path in pool.blocks)

    def over(self, pool: int) -> list[int]:
        tier = self.pools[pool].tier
        use = {tenant: self.quota_use(tenant, tier) for tenant in self.limited(tier)}
        return [tenant for tenant in use if use[tenant] > self.quotas[tenant, tier]]

    def payers(self, pool: int, tenant: int, taken: int) -> list[int | None]:
        """Whose blocks a page is taken from first, second, ...; None: anybody's."""
        tier = self.pools[pool].tier
        full = (tenant, tier) in self.quotas and (
            self.quota_use(tenant, tier) + taken + 1 > self.quotas[tenant, tier]
        )
        return [*self.over(pool), *([tenant] if full else []), None]

    def trim(self, pool: int) -> list[Path]:
        evicted: list[Path] = []
        while path := next(filter(None, (self.victim(pool, of=t) for t in self.over(pool))), None):
            self.evict_one(path, pool)
            evicted.append(path)
        return evicted
