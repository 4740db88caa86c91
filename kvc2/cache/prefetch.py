"""Brings prefixes to a faster tier, or from a remote store, before a request asks for them.

One transfer at a time, in prefix order, and only while none is under way that somebody waits for:
what a request can meet is one part of PART_S in its queue. Nothing is leased: what came is evicted
by the usual rules. Not here: which blocks (csrc/index, prefetch), how bytes move (mover.py).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvc2 import _core, errors
from kvc2.answers import Asked, Prefetched, TierTokens
from kvc2.cache.beyond import Beyond
from kvc2.cache.extras import prompt_extras
from kvc2.cache.landing import Prompt
from kvc2.cache.namespaces import Namespace
from kvc2.cache.pins import Pins
from kvc2.cache.sessions import Session
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.loading import ARENA_SHARE, Loader, Step
from kvc2.moving.mover import Mover
from kvc2.tiers.meter import PROBE_BYTES
from kvc2.tiers.pools import LayoutOnDisk, LayoutPools, Pools

LOG = logging.getLogger(__name__)

AT_ONCE_MAX = 16  # prefetches that are not over
PART_S = 0.02  # of one transfer: what a request behind it may have to wait ...
PART_BYTES_MAX = 16 << 20  # ... on a fast tier, too


@dataclass(eq=False)
class Wish:
    """A prefix, or some keys, that shall come to `pool`: that of a session (`gpu`), or of the cpu
    tier."""

    namespace: Namespace
    asked: Asked
    pool: int
    pools: LayoutPools
    gpu: GpuPool | None = None

    @property
    def blocks(self) -> int:
        tokens = len(self.asked.tokens) // self.pools.shape.page_size
        return len(self.asked.keys) if self.namespace.opaque else tokens

    @cached_property
    def extras(self) -> _core.PromptExtras | None:
        """As the index knows them."""
        return prompt_extras(self.asked.extras, self.namespace.page_size)


class Prefetcher:
    """All on the event loop."""

    def __init__(
        self,
        index: _core.Index,
        pins: Pins,
        pools: Pools,
        *,
        loader: Loader,
        mover: Mover,
        beyond: Beyond | None,
    ) -> None:
        self._beyond = beyond
        self._index = index
        self._pins = pins
        self._loader = loader
        self._mover = mover
        self._under_way: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self.pools = pools

    async def prefetch(
        self,
        session: Session | None,
        namespace: Namespace,
        asked: Asked,
        *,
        tier: str,
        deadline_s: float,
    ) -> Prefetched:
        """Bring the longest cached prefix of the full blocks of a prompt to cpu or to the session's
        gpu pool, or those of some keys that are cached to cpu, and answer when it is there or the
        time is over; then it goes on by itself. Raises InvalidRequest, and LimitReached when too
        many are under way."""
        wish = self._wish(session, namespace, asked, tier)
        if len(self._under_way) >= AT_ONCE_MAX:
            raise errors.LimitReached("prefetches", AT_ONCE_MAX, "are under way")
        task = asyncio.create_task(self._bring_all(wish))
        self._under_way.add(task)
        task.add_done_callback(self._over)
        await asyncio.wait([task], timeout=deadline_s)
        return self._result(wish, tier, over=task.done())

    async def stop(self) -> None:
        """What is not begun is given up."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("prefetch failed: %r", error)

    def _wish(self, session: Session | None, namespace: Namespace, asked: Asked, tier: str) -> Wish:
        if tier == "disk":
            raise errors.InvalidRequest("tier", tier, "cpu, or gpu in a session")
        pool = self._pins.pool(session, namespace, tier)
        pools = namespace.pools
        if not self.pools.tiers.names:
            raise errors.InvalidRequest("tier", tier, "a tier with a slower one below it")
        gpu = session.pool if tier == "gpu" and session is not None else None
        return Wish(namespace, asked, pool, pools, gpu)

    def _result(self, wish: Wish, tier: str, *, over: bool) -> Prefetched:
        size = wish.pools.shape.page_size
        tiers = TierTokens()
        if self._alive(wish):
            found = self._match(wish)
            blocks = (*found, 0, 0, 0) if tier == "gpu" else (0, *found, 0, 0)
            tiers = TierTokens(*(count * size for count in blocks[:4]))
        there = tiers.gpu if tier == "gpu" else tiers.cpu
        return Prefetched(tiers, 0 if over else sum(tiers) - there)

    # ---- what moves ----

    async def _bring_all(self, wish: Wish) -> None:
        """What a remote store has after this host's tiers comes to cpu first."""
        if self._beyond is None:
            await self._bring(wish)
            return
        prompt = Prompt(wish.namespace, wish.asked, wish.pools)
        async with self._beyond.brought_to_cpu(prompt):
            await self._bring(wish)

    async def _bring(self, wish: Wish) -> None:
        """Each block moves once from tier to tier, unless others evict it as fast as it comes: then
        it is given up on."""
        left, touches = 2 * wish.blocks, True
        while left > 0:
            async with self._turn:
                await self._loader.until_idle()
                if not self._alive(wish):
                    return
                growing = (
                    not self.pools.arena.populated
                )  # asked first: `changed` tells what comes after
                step = self._next(wish, touches=touches, growing=growing)
                touches = False
                if isinstance(step, _core.Transfer):
                    left -= step.target_pages.size
                    await asyncio.wait([self._begin(wish, step)])
                    continue
            if step is not None:
                left -= 1
                await self._mover.ended(step.transfer)
            elif self._room_is_coming(wish, growing=growing):
                await self._loader.until_changed()
            else:
                return

    def _alive(self, wish: Wish) -> bool:
        over = wish.gpu is not None and wish.gpu.life.state != "ready"
        return not over and not wish.namespace.gone

    def _match(self, wish: Wish) -> tuple[int, ...]:
        """Blocks that are cached by tier, from the one that they shall come to."""
        number, asked = wish.namespace.number, wish.asked
        if not wish.namespace.opaque:
            return self._index.match(number, wish.pool, asked.tokens, wish.extras).tiers
        found = self._index.match_keys(number, wish.pool, asked.keys)
        return tuple(np.bincount(found, minlength=1 + len(wish.pools.chain))[1:].tolist())

    def _on_disk(self, wish: Wish) -> int:
        """Blocks of what is cached."""
        return self._match(wish)[-1] if isinstance(wish.pools, LayoutOnDisk) else 0

    def _next(
        self, wish: Wish, *, touches: bool, growing: bool
    ) -> _core.Transfer | _core.Wait | None:
        page_bytes = wish.pools.shape.page_bytes
        most = self.pools.arena.capacity_bytes // ARENA_SHARE // page_bytes
        pages = max(1, min(self._part_bytes(wish) // page_bytes, most))
        if on_disk := self._on_disk(wish):
            self.pools.make_room(wish.pools, min(pages, on_disk))
            if growing:  # nothing is evicted for want of memory that comes
                pages = min(pages, self._index.pool_counts(wish.pools.cpu.id).free)
        number, asked = wish.namespace.number, wish.asked
        if wish.namespace.opaque:
            return self._index.prefetch_keys(number, wish.pool, asked.keys, pages, touches=touches)
        return self._index.prefetch(
            number, wish.pool, asked.tokens, pages, touches=touches, extras=wish.extras
        )

    def _part_bytes(self, wish: Wish) -> int:
        """What comes in PART_S from the slowest tier on the way whose speed is known."""
        meters = self._mover.meters
        known = [meters[each].estimate for each in ("cpu", "disk")[wish.gpu is None :]]
        speeds = [each.bandwidth_bytes_per_s for each in known if each is not None]
        if not speeds:
            return PROBE_BYTES
        return round(min(PART_BYTES_MAX, min(speeds) * PART_S))

    def _begin(self, wish: Wish, step: _core.Transfer) -> Step:
        if isinstance(wish.pools, LayoutOnDisk) and step.source == wish.pools.disk.id:
            return self._mover.load(wish.pools, step)
        if wish.gpu is not None:
            self._mover.promote(wish.gpu, step)
        return self._mover.ended(step.id)

    def _room_is_coming(self, wish: Wish, *, growing: bool) -> bool:
        """Memory is, for what the disk has."""
        if not self._on_disk(wish):
            return False
        return growing or (not wish.pools.cpu.store.slabs() and self.pools.is_wanted(wish.pools))
