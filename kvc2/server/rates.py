"""How many calls and bytes a second each tenant may have, and what it has had.

A bucket fills at the tenant's rate, up to a second's worth. A call is taken while its buckets have
something, and may take more bytes than there are: the next one waits until they are back, so that
in the long run the rate holds, whatever the size of a call. What is refused takes nothing. Each
tenant has buckets of its own. Not here: whose a call is (callers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvc2.config import DEFAULT_TENANT, LimitsConfig, ServeConfig, TenantConfig
from kvc2.errors import RateLimited
from kvc2.metrics import Metrics, RateMetrics

MB = 1_000_000
ROUNDING = 1e-6  # of a call, or of a byte: what is told to come back then is not sent away again
Limit = Literal["max_calls_per_s", "max_mb_per_s"]


class Bucket:
    """`per_s` in a second; 0: no limit."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s = per_s
        self._most = max(per_s, 1.0)
        self._left = self._most
        self._at = now

    def wait_s(self, now: float) -> float:
        """Until one may be taken; 0: it may now."""
        if not self._per_s:
            return 0.0
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        lacking = 1.0 - self._left
        return lacking / self._per_s if lacking > ROUNDING else 0.0

    def take(self, count: float) -> None:
        if self._per_s:
            self._left -= count


class Buckets:
    """Of one tenant. A limit of its own goes before that of all."""

    def __init__(self, limits: LimitsConfig, tenant: TenantConfig, now: float) -> None:
        self._tenant = tenant
        self._limits = limits
        self.calls = Bucket(self._value("max_calls_per_s"), now)
        self.bytes = Bucket(self._value("max_mb_per_s") * MB, now)

    def _value(self, limit: Limit) -> float:
        own = getattr(self._tenant, limit)
        found: float = getattr(self._limits, limit) if own is None else own
        return found

    def take(self, now: float, num_bytes: int) -> None:
        """Both, or nothing. Raises RateLimited of what has to be waited for longer."""
        waits: dict[Limit, float] = {"max_calls_per_s": self.calls.wait_s(now)}
        if num_bytes:
            waits["max_mb_per_s"] = self.bytes.wait_s(now)
        limit = max(waits, key=lambda each: waits[each])
        if waits[limit]:
            raise self._refusal(limit, waits[limit])
        self.calls.take(1)
        self.bytes.take(num_bytes)

    def _refusal(self, limit: Limit, wait_s: float) -> RateLimited:
        section = "limits" if getattr(self._tenant, limit) is None else "tenants"
        allowed = f"tenant {self._tenant.name!r} has had them: again in {wait_s:.3g} s"
        error = RateLimited(f"{section}.{limit}", self._value(limit), allowed)
        error.limit, error.retry_s = limit, wait_s
        return error


class Rates:
    """Of all tenants that the configuration knows. Runs on the event loop; `clock` is monotonic
    seconds."""

    def __init__(self, config: ServeConfig, metrics: Metrics, clock: Callable[[], float]) -> None:
        tenants = {DEFAULT_TENANT: TenantConfig(DEFAULT_TENANT)}
        tenants.update({each.name: each for each in config.tenants})
        now = clock()
        self._buckets = {
            name: Buckets(config.limits, tenant, now) for name, tenant in tenants.items()
        }
        self._metrics = RateMetrics(metrics.registry, tenants)
        self._clock = clock

    def take(self, tenant: str, num_bytes: int = 0) -> None:
        """A call of this tenant that brings these bytes of payloads. Raises RateLimited, and then
        it has taken nothing."""
        try:
            self._buckets[tenant].take(self._clock(), num_bytes)
        except RateLimited as error:
            self._metrics.refused(tenant, error.limit)
            raise
        self._metrics.taken(tenant, num_bytes)
