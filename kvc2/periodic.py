"""Work that a daemon repeats as long as it lives. A turn that fails is counted and logged, and the
next one comes all the same: else one bad session would, say, keep every frozen engine's leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvc2.metrics import Metrics

LOG = logging.getLogger(__name__)


async def periodically(
    seconds: float, work: Callable[[], Awaitable[object] | object], metrics: Metrics
) -> None:
    """Until cancelled: wait, then work."""
    while True:
        await asyncio.sleep(seconds)
        try:
            result = work()
            if isinstance(result, Awaitable):
                await result
        except Exception:
            metrics.fault("internal_error")
            LOG.exception("what is done every %g s failed", seconds)
