"""How long requests wait for the remote store: as long as it says something, and within what they
may wait themselves.

Not here: what is asked of it (fetches.py, key_fetches.py), whether anybody asks at all
(tiers/remote/breaker.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from kvc2.cache.arrivals import Arrivals
from kvc2.cache.landing import Fetch, Means

T = TypeVar("T")


class Patience:
    """All on the event loop."""

    def __init__(self, means: Means, arrivals: Arrivals) -> None:
        self._means, self._link, self._arrivals = means, means.link, arrivals

    async def answer(
        self,
        asking: asyncio.Task[T],
        otherwise: T,
        *,
        released: asyncio.Future[None],
        deadline_s: float,
    ) -> T:
        """Of what asks the store since just now. `otherwise` where it doesn't answer in time, or
        nobody waits any more; then it goes on asking."""
        begun = time.monotonic()
        waits: list[asyncio.Future[Any]] = [asking, released]
        wait_s = min(self._link.patience_s, deadline_s)
        await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        silent = self._link.heard_at < begun and wait_s >= self._link.patience_s
        if silent and not released.done():  # a short deadline says nothing of the store
            self._link.late()
        return otherwise

    async def arrivals(
        self,
        fetches: Sequence[Fetch],
        *,
        begun: float,
        released: asyncio.Future[None],
        deadline_s: float,
        patience_s: float | None = None,
    ) -> None:
        """Holds them until the caller lets go of each, and waits for one after the other, as long
        as that is worth it for a request that has waited since `begun`."""
        for fetch in fetches:
            fetch.holders += 1
        try:
            for fetch in fetches:
                waited_s = time.monotonic() - begun
                await self._arrival(
                    fetch,
                    released=released,
                    deadline_s=max(0.0, deadline_s - waited_s),
                    silent_s=max(0.0, self._link.patience_s - waited_s),
                    patience_s=patience_s,
                )
        except BaseException:  # the caller went away
            for fetch in fetches:
                self._arrivals.let_go(fetch)
            raise

    async def _arrival(
        self,
        fetch: Fetch,
        *,
        released: asyncio.Future[None],
        deadline_s: float,
        silent_s: float,
        patience_s: float | None,
    ) -> None:
        """Until the fetch is over, or as long as it is worth it: patience_s longer than it should
        take (None: no longer than deadline_s). silent_s: for a store that says nothing to anybody;
        one that answers others is busy, and alive."""
        begun, left_s = time.monotonic(), deadline_s
        if patience_s is not None:
            left_s = min(left_s, self._seconds(fetch.num_bytes) + patience_s)
        pools = fetch.prompt.pools
        while not fetch.over and not released.done():
            expected_s = self._seconds(self._arrivals.part(pools) * pools.shape.page_bytes)
            before, changed = time.monotonic(), fetch.changed.until_changed()
            wait_s = max(0.0, min(begun + left_s - before, expected_s + silent_s))
            waits: list[asyncio.Future[Any]] = [changed, released]
            await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if changed.done() or released.done():
                continue
            took_s = time.monotonic() - before
            silent = self._link.heard_at < before
            if silent or time.monotonic() >= begun + left_s:
                self._give_up(fetch, silent=silent and took_s >= expected_s + silent_s)
                return

    def _seconds(self, num_bytes: int) -> float:
        """In which so much should come; 0: not known."""
        estimate = self._arrivals.meter.estimate
        found = 0.0 if estimate is None else estimate.seconds(num_bytes)
        return found if math.isfinite(found) else 0.0

    def _give_up(self, fetch: Fetch, *, silent: bool) -> None:
        """The engine computes what has not come; it goes on coming."""
        if silent:
            self._link.late()
        if fetch.of_keys:
            return  # what they stand for nobody here can say
        left = fetch.end - fetch.first - fetch.came
        tokens = left * fetch.prompt.namespace.page_size
        self._means.metrics.all.recomputed_tokens.labels("overdue").inc(tokens)
