"""Blocks on their way from the remote store into the cpu tier, part by part, in prefix order.

Each value is judged whole (tiers/remote/codec.py) before a byte of it is copied, and is then a
block of the cpu tier as any other. Not here: which blocks are fetched, and who waits (fetches.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from kvc2 import _core
from kvc2.answers import NO_HINTS, NO_PAGES, U32, Asked, Hints
from kvc2.cache.extras import prompt_extras
from kvc2.cache.namespaces import Namespace
from kvc2.metrics import RemoteMetrics
from kvc2.moving.changes import Waiters
from kvc2.moving.loading import ARENA_SHARE
from kvc2.tiers.meter import Meter
from kvc2.tiers.pools import LayoutPools, Pools
from kvc2.tiers.remote.codec import Chain, Sealer, Verdict, value_bytes
from kvc2.tiers.remote.link import Link
from kvc2.tiers.remote.store import StoreError

LOG = logging.getLogger(__name__)

Made = TypeVar("Made")

PART_S = 0.02  # of one get: so often shows that the store is alive ...
PART_BYTES = 1 << 20  # ... before its speed is known
PART_BYTES_MAX = 8 << 20
GETS_MAX = 8  # of all fetches: the other connections are for who asks what there is
DEPTH = 3  # gets under way: one is judged while others come


@dataclass(frozen=True)
class Means:
    """What blocks are fetched and put with. Names and values are made and judged on `threads`."""

    index: _core.Index
    pools: Pools
    link: Link
    metrics: RemoteMetrics
    threads: ThreadPoolExecutor

    async def on_threads(self, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


@dataclass(frozen=True)
class Prompt:
    """Whose blocks come, where to, and what the request says of them."""

    namespace: Namespace
    asked: Asked
    pools: LayoutPools
    hints: Hints = NO_HINTS

    def tokens(self, blocks: int) -> U32:
        """Of the first so many."""
        end = blocks * self.namespace.page_size
        return np.ascontiguousarray(self.asked.tokens[:end], np.uint32)

    @property
    def extras(self) -> _core.PromptExtras | None:
        return prompt_extras(self.asked.extras, self.namespace.page_size)


@dataclass(eq=False)
class Fetch:
    """Blocks [first, end) of a prompt on their way into the cpu tier.

    | state  | to   | when [function]                                                            |
    |--------|------|----------------------------------------------------------------------------|
    | coming | over | all of them came, or one did not: lost, bad, no room, no answer [Arrivals]  |

    The `came` leading ones are there. `leases` of the index pin them until it is over and the last
    of its holders, requests that wait or are about to lease them, has let go."""

    prompt: Prompt
    chain: Chain
    first: int
    end: int
    number: int  # the namespace's, in the index, when it began
    came: int = 0
    over: bool = False
    holders: int = 0
    leases: list[int] = field(default_factory=list)
    changed: Waiters = field(default_factory=Waiters)

    @property
    def num_bytes(self) -> int:
        return (self.end - self.first) * self.prompt.pools.shape.page_bytes

    def brings(self, block: int, digest: bytes) -> bool:
        """Whether it is the block of this digest, at this place of its prompt."""
        return self.first <= block < self.end and self.chain.digests[block].tobytes() == digest

    @property
    def valid(self) -> bool:
        """Whether the namespace is what it was."""
        namespace = self.prompt.namespace
        return not namespace.gone and namespace.number == self.number


class Arrivals:
    """All on the event loop. `wake`: there is something to copy to the disk."""

    def __init__(self, means: Means, *, wake: Callable[[], None]) -> None:
        self._means = means
        self._wake = wake
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
        gets: deque[asyncio.Task[list[bytes | None]]] = deque()
        try:
            await self._take_all(fetch, sealer, gets)
        except StoreError:
            return  # the link has counted it
        finally:
            for get in gets:
                get.cancel()
                get.add_done_callback(_seen)
            self._coming.remove(fetch)
            self._bytes -= fetch.num_bytes
            fetch.over = True
            fetch.changed.changed()
            self._release(fetch)

    async def _take_all(
        self, fetch: Fetch, sealer: Sealer, gets: deque[asyncio.Task[list[bytes | None]]]
    ) -> None:
        shape, at, mark = fetch.prompt.pools.shape, fetch.first, time.monotonic()
        while gets or at < fetch.end:
            while at < fetch.end and len(gets) < DEPTH:
                end = min(at + self.part(fetch.prompt.pools), fetch.end)
                names = fetch.chain.names(shape, at, end)
                gets.append(asyncio.create_task(self._get(names, value_bytes(shape))))
                at = end
            values = await gets[0]
            gets.popleft()
            came = await self._take(fetch, sealer, values)
            if came < len(values):
                return
            now = time.monotonic()
            self._saw(came * shape.page_bytes, now - mark)
            mark = now

    async def _get(self, names: list[bytes], num_bytes: int) -> list[bytes | None]:
        async with self._gets:
            return await self._means.link.get(names, num_bytes)

    async def _take(self, fetch: Fetch, sealer: Sealer, values: Sequence[bytes | None]) -> int:
        """How many leading values are blocks of the cpu tier now."""
        sound = [each for each in values[: leading(values)] if each is not None]
        if len(sound) < len(values):  # it has gone since, or is nothing that could be read
            lost = fetch.first + fetch.came + len(sound)
            self._delete(fetch.chain.names(fetch.prompt.pools.shape, lost, lost + 1))
        pages, first, pools = (
            self._grant(fetch, len(sound)),
            fetch.first + fetch.came,
            fetch.prompt.pools,
        )
        if not pages.size:
            return 0
        records = fetch.chain.records(np.arange(first, first + pages.size))
        arena, payloads = self._means.pools.arena.memory, pools.payloads(pages)
        judge = partial(sealer.open, sound[: pages.size], records, arena, payloads)
        try:
            verdicts = await self._means.on_threads(judge)
        except Exception:
            self._give_back(fetch, pages)
            raise
        good = sum(each is Verdict.GOOD for each in verdicts)
        if good < len(verdicts):
            self._means.metrics.all.fault("remote_bad_block")
            self._delete(fetch.chain.names(pools.shape, first + good, first + good + 1))
        self._give_back(fetch, pages[good:])
        came = self._commit(fetch, pages[:good]) if good else 0
        fetch.came += came
        self._means.metrics.moved(("remote", "cpu"), came, pools.shape.payload_bytes)
        fetch.changed.changed()
        return came

    def _grant(self, fetch: Fetch, count: int) -> U32:
        if not count or not fetch.valid:
            return NO_PAGES
        self._means.pools.make_room(fetch.prompt.pools, count)
        return self._means.index.grant(fetch.prompt.pools.cpu.id, count, fetch.number)

    def _commit(self, fetch: Fetch, pages: U32) -> int:
        """The pages hold the blocks that follow those that came. How many are blocks of the cpu
        tier now; fewer where what they hang on has gone, or the namespace was invalidated."""
        if not fetch.valid:
            self._give_back(fetch, pages)
            return 0
        prompt, first = fetch.prompt, fetch.first + fetch.came
        size, end = prompt.namespace.page_size, first + pages.size
        tokens, extras = prompt.tokens(end), prompt.extras
        lease = self._means.index.acquire(
            fetch.number,
            prompt.pools.cpu.id,
            tokens,
            end,
            prompt.namespace.hints(prompt.hints),
            skip_blocks=first,
            touches=False,
            extras=extras,
        )
        fetch.leases.append(lease.id)
        if lease.first_block < first:
            self._give_back(fetch, pages)
            return 0
        held = lease.pages.size  # that others have brought meanwhile
        self._give_back(fetch, pages[:held])
        rest, at = pages[held:], first + held
        if not rest.size:
            return held
        results = self._means.index.commit(lease.id, at, tokens[at * size :], rest, extras)
        kept = np.isin(results, (_core.ADOPTED, _core.DUPLICATE))
        self._give_back(fetch, rest[~kept])
        self._wake()
        return held + int(kept.sum())

    def _give_back(self, fetch: Fetch, pages: U32) -> None:
        if pages.size:
            self._means.index.give_back(fetch.prompt.pools.cpu.id, np.ascontiguousarray(pages))

    def _delete(self, names: list[bytes]) -> None:
        """Values that are no blocks of ours: the next put mends them."""

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


def _seen(get: asyncio.Task[list[bytes | None]]) -> None:
    """What failed with the one before it is no news."""
    if not get.cancelled():
        get.exception()


def leading(values: Sequence[object]) -> int:
    """How many come before the first that is false or None."""
    return next((i for i, each in enumerate(values) if not each), len(values))
