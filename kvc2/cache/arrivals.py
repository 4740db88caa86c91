"""Blocks on their way from the remote store into the cpu tier, part by part, in prefix order.

Each value is judged whole (tiers/remote/codec.py) before a byte of it is copied, and is then a
block of the cpu tier as any other (landing.py). Of a prompt the first that doesn't come ends it; of
opaque keys each is for itself. Not here: which blocks are fetched, and who waits (fetches.py,
key_fetches.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc2.cache.landing import Fetch, Landing, Means, Prompt, Rows
from kvc2.moving.loading import ARENA_SHARE
from kvc2.tiers.meter import Meter
from kvc2.tiers.pools import LayoutPools
from kvc2.tiers.remote.codec import Chain, Sealer, Verdict, value_bytes
from kvc2.tiers.remote.store import StoreError

LOG = logging.getLogger(__name__)

PART_S = 0.02  # of one get: so often shows that the store is alive ...
PART_BYTES = 1 << 20  # ... before its speed is known
PART_BYTES_MAX = 8 << 20
GETS_MAX = 8  # of all fetches: the other connections are for who asks what there is
DEPTH = 3  # gets under way: one is judged while others come
Values = list[bytes | None]


class Get(NamedTuple):
    """Values of the blocks from `first` on."""

    first: int
    values: asyncio.Task[Values]


class Arrivals:
    """All on the event loop. `wake`: there is something to copy to the disk."""

    def __init__(self, means: Means, *, wake: Callable[[], None]) -> None:
        self._means = means
        self._wake = wake
        self._landing = Landing(means, wake=wake)
        self._coming: list[Fetch] = []
        self._gets = asyncio.Semaphore(GETS_MAX)
        self._bytes = 0  # on their way
        self._behind: set[asyncio.Task[Any]] = set()
        self.meter = Meter(time.monotonic)

    async def stop(self) -> None:
        """When nothing is under way any more; the link is closed."""
        while self._behind:
            await asyncio.wait(self._behind)

    def keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that goes on, whoever waits for it."""
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._behind.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._means.metrics.all.fault("internal_error")
            LOG.error("fetching from the remote store: %r", error)

    def room(self, pools: LayoutPools) -> int:
        """Blocks that may be on their way beside those that are."""
        room = self._means.pools.arena.capacity_bytes // ARENA_SHARE - self._bytes
        return max(0, room // pools.shape.page_bytes)

    def coming(self, chain: Chain, block: int) -> Fetch | None:
        """What brings this block."""
        digest = chain.digests[block].tobytes()
        return next((each for each in self._coming if each.brings(block, digest)), None)

    def coming_keys(self, chain: Chain) -> list[Fetch | None]:
        """What brings each of these blocks of opaque keys."""
        digests = [each.tobytes() for each in chain.digests]
        found: list[Fetch | None] = [None] * len(digests)
        for fetch in self._coming:
            for row in [i for i, digest in enumerate(digests) if fetch.brings_key(digest)]:
                found[row] = fetch
        return found

    @property
    def idle(self) -> bool:
        return not self._coming

    def begin(
        self, prompt: Prompt, chain: Chain, sealer: Sealer, first: int, blocks: int
    ) -> Fetch | None:
        """None: there is no room for it now."""
        blocks = min(blocks, self.room(prompt.pools))
        if blocks <= 0:
            return None
        fetch = Fetch(prompt, chain, first, first + blocks, prompt.namespace.number)
        self._coming.append(fetch)
        self._bytes += fetch.num_bytes
        self.keep(self._run(fetch, sealer))
        return fetch

    def let_go(self, fetch: Fetch) -> None:
        """By one of its holders."""
        fetch.holders -= 1
        self._release(fetch)

    def _release(self, fetch: Fetch) -> None:
        if fetch.over and not fetch.holders and fetch.leases:
            self._means.index.release_all(np.array(fetch.leases, np.uint64))
            fetch.leases.clear()
            self._wake()

    def part(self, pools: LayoutPools) -> int:
        """Blocks of one get."""
        estimate, most = self.meter.estimate, PART_BYTES
        if estimate is not None:
            most = round(min(PART_BYTES_MAX, estimate.bandwidth_bytes_per_s * PART_S))
        return max(1, most // pools.shape.page_bytes)

    async def _run(self, fetch: Fetch, sealer: Sealer) -> None:
        gets: deque[Get] = deque()
        try:
            await self._take_all(fetch, sealer, gets)
        except StoreError:
            return  # the link has counted it
        finally:
            for get in gets:
                get.values.cancel()
                get.values.add_done_callback(_seen)
            self._coming.remove(fetch)
            self._bytes -= fetch.num_bytes
            fetch.over = True
            fetch.changed.changed()
            self._release(fetch)

    async def _take_all(self, fetch: Fetch, sealer: Sealer, gets: deque[Get]) -> None:
        shape, at, mark = fetch.prompt.pools.shape, fetch.first, time.monotonic()
        while gets or at < fetch.end:
            while at < fetch.end and len(gets) < DEPTH:
                end = min(at + self.part(fetch.prompt.pools), fetch.end)
                names = fetch.chain.names(shape, at, end)
                getting = asyncio.create_task(self._get(names, value_bytes(shape)))
                gets.append(Get(at, getting))
                at = end
            values = await gets[0].values
            first = gets.popleft().first
            came = await self._take(fetch, sealer, first, values)
            if came < len(values) and not (fetch.of_keys and fetch.valid):
                return
            now = time.monotonic()
            if came:
                self._saw(came * shape.page_bytes, now - mark)
            mark = now

    async def _get(self, names: list[bytes], num_bytes: int) -> Values:
        async with self._gets:
            return await self._means.link.get(names, num_bytes)

    async def _take(self, fetch: Fetch, sealer: Sealer, first: int, values: Values) -> int:
        """How many of these values are blocks of the cpu tier now; of a prompt, leading ones."""
        rows = self._there(fetch, first, values)
        pages = self._landing.grant(fetch, rows.size)
        rows = rows[: pages.size]
        if not rows.size:
            return 0
        sound = [values[row - first] or b"" for row in rows.tolist()]
        arena, payloads = self._means.pools.arena.memory, fetch.prompt.pools.payloads(pages)
        judge = partial(sealer.open, sound, fetch.chain.records(rows), arena, payloads)
        try:
            verdicts = await self._means.on_threads(judge)
        except Exception:
            self._landing.give_back(fetch, pages)
            raise
        good = np.array([each is Verdict.GOOD for each in verdicts])
        if not fetch.of_keys:
            good[leading(good) :] = False
        self._bad(fetch, rows, good)
        self._landing.give_back(fetch, pages[~good])
        came = self._landing.commit(fetch, rows[good], pages[good])
        fetch.came += came
        shape = fetch.prompt.pools.shape
        self._means.metrics.moved(("remote", "cpu"), came, shape.payload_bytes)
        fetch.changed.changed()
        return came

    def _there(self, fetch: Fetch, first: int, values: Values) -> Rows:
        """The blocks of those values that there are; of a prompt, of the leading ones. What has
        gone since it was asked for, or is nothing that could be read, is deleted."""
        there = np.array([bool(each) for each in values])
        lost = np.flatnonzero(~there)
        if not fetch.of_keys:
            there[leading(there) :] = False
            lost = lost[:1]
        if lost.size:
            self._delete(fetch, first + lost)
        return first + np.flatnonzero(there)

    def _bad(self, fetch: Fetch, rows: Rows, good: NDArray[np.bool_]) -> None:
        """Counts and deletes those that are; after a prompt's first one nothing is known of any."""
        bad = rows[~good] if fetch.of_keys else rows[~good][:1]
        for _ in bad:
            self._means.metrics.all.fault("remote_bad_block")
        if bad.size:
            self._delete(fetch, bad)

    def _delete(self, fetch: Fetch, rows: Rows) -> None:
        """Values that are no blocks of ours: the next put mends them."""
        names = [fetch.chain.name_of(fetch.prompt.pools.shape, each) for each in rows.tolist()]

        async def delete() -> None:
            try:
                await self._means.link.delete(names)
            except StoreError:
                return  # it will be found bad again

        self.keep(delete())

    def _saw(self, num_bytes: int, seconds: float) -> None:
        self.meter.saw(num_bytes, seconds, 0.0)
        self._means.metrics.all.transfer_seconds.labels("remote", "cpu").observe(seconds)
        if (estimate := self.meter.estimate) is not None:
            self._means.metrics.all.bandwidth.labels("remote").set(estimate.bandwidth_bytes_per_s)


def _seen(get: asyncio.Task[Values]) -> None:
    """What failed with the one before it is no news."""
    if not get.cancelled():
        get.exception()


def leading(values: Iterable[object]) -> int:
    """How many come before the first that is false or None."""
    return sum(1 for _ in takewhile(bool, values))
