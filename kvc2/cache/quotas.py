"""What each declared tenant may take of each tier: set from the configuration or by SetQuota.

Tenants are numbered for the index in the order of the configuration, from 1; the default tenant has
a number and a quota only when it is declared. Not here: who pays for a page (csrc/index/quotas.h).
"""

from __future__ import annotations

from kvc2 import _core, errors
from kvc2.answers import TenantUse
from kvc2.config import DEFAULT_TENANT, ServeConfig
from kvc2.tiers.base import TIER_NUMBERS

NO_LIMIT = (1 << 64) - 1


class TenantQuotas:
    """One thread (the event loop's) uses this."""

    def __init__(self, index: _core.Index, config: ServeConfig) -> None:
        self._index = index
        self._numbers = {each.name: i + 1 for i, each in enumerate(config.tenants)}
        self._limits: dict[tuple[str, str], tuple[int, int]] = {}
        for each in config.tenants:
            for tier in TIER_NUMBERS:
                self.set(each.name, tier, each.bytes_of(tier), each.max_blocks)

    def number(self, tenant: str) -> int:
        """The tenant's in the index; 0: a tenant that nothing is counted for."""
        return self._numbers.get(tenant or DEFAULT_TENANT, 0)

    def set(self, tenant: str, tier: str, max_bytes: int, max_blocks: int) -> TenantUse:
        """0: no limit. What is too much now goes with the tenant's next use of the tier. Raises
        NotFound."""
        tenant = tenant or DEFAULT_TENANT
        if tenant not in self._numbers:
            raise errors.NotFound("tenant", tenant, "one that the configuration declares")
        self._index.set_quota(
            self._numbers[tenant],
            TIER_NUMBERS[tier],
            max_bytes=max_bytes or NO_LIMIT,
            max_blocks=max_blocks or NO_LIMIT,
        )
        self._limits[tenant, tier] = (max_bytes, max_blocks)
        return self._use(tenant, tier)

    def uses(self) -> list[TenantUse]:
        """By tenant and tier."""
        return [self._use(tenant, tier) for tenant in self._numbers for tier in TIER_NUMBERS]

    def _use(self, tenant: str, tier: str) -> TenantUse:
        used = self._index.quota_use(self._numbers[tenant], TIER_NUMBERS[tier])
        return TenantUse(tenant, tier, *used, *self._limits[tenant, tier])
