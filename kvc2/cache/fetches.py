"""What a request lacks is looked for in the remote store, and brought to the cpu tier.

A prompt's blocks that no tier of this host has are asked for right after those that cpu and disk
hold, so that the matched prefix goes on. The request waits while bringing is sooner than computing,
as for the disk (moving/pace.py), and no longer than `link.patience_s` for a store that is silent
(patience.py). What it gives up on goes on coming. Whatever goes wrong is a miss.

Not here: opaque keys (key_fetches.py), how blocks come (arrivals.py), what is put (puts.py), the
request's own lease (leases.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from functools import partial

from kvc2.cache.arrivals import Arrivals, leading
from kvc2.cache.chains import chain_of
from kvc2.cache.landing import Fetch, Means, Prompt
from kvc2.cache.patience import Patience
from kvc2.moving import pace
from kvc2.moving.loading import DEADLINE_SHARE, HERE
from kvc2.tiers.meter import PROBE_BYTES, Estimate
from kvc2.tiers.remote.codec import Chain, Sealer, Shared
from kvc2.tiers.remote.store import StoreError

WINDOW = 64  # blocks that are asked for at a time: a short prefix is found soon ...
WINDOW_MAX = 4096  # ... and each next time eight times as many, in a call that is still short


def never() -> asyncio.Future[None]:
    """The `released` of what nobody lets go of."""
    return asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class Wanted:
    """The leading `blocks` of a prompt; how many of them each tier of its chain (`tiers`, the
    fastest first) holds; what it would compute instead, at `prefill_rate` tokens/s (0: not known,
    or not asked). `released` is done when nobody waits any more."""

    prompt: Prompt
    tiers: tuple[str, ...]
    held: tuple[int, ...]
    prefill_rate: float
    deadline_s: float
    released: asyncio.Future[None]
    blocks: int
    skipped: int = 0  # leading ones that the client has

    @property
    def first(self) -> int:
        """The first block that is missing."""
        return sum(self.held)


class Fetches:
    """All on the event loop. always: also what an engine would compute sooner is brought."""

    def __init__(
        self, means: Means, arrivals: Arrivals, patience: Patience, *, always: bool
    ) -> None:
        self._means = means
        self._link = means.link
        self._arrivals, self._patience = arrivals, patience
        self._always = always

    def may_bring(self, wanted: Wanted) -> Shared | None:
        """None: nothing is asked for, since the store is left alone, nothing is missing, or the
        tiers from cpu on lack what an engine's pool has: it is about to come there."""
        prompt, shared = wanted.prompt, wanted.prompt.namespace.owner.shared
        if shared is None or not self._link.up or wanted.first >= wanted.blocks:
            return None
        if wanted.tiers[0] != "gpu" or not wanted.held[0]:
            return shared
        tokens, cpu = prompt.tokens(wanted.first), prompt.pools.cpu.id
        below = self._means.index.match(prompt.namespace.number, cpu, tokens, prompt.extras)
        return shared if below.blocks == wanted.first else None

    async def beyond(self, wanted: Wanted) -> int:
        """How many blocks the store has right after those that are held. Brings nothing."""
        shared = self.may_bring(wanted)
        if shared is None:
            return 0
        return await self._leading(wanted, await self._chain(wanted, shared))

    async def bring(self, wanted: Wanted) -> Fetch | None:
        """Answers when all that the store has of it, and that is worth it, is in the cpu tier, or
        isn't waited for any more. The caller leases what came, and then lets go of the fetch. None:
        there is nothing."""
        shared = self.may_bring(wanted)
        if shared is None:
            return None
        begun, chain = time.monotonic(), await self._chain(wanted, shared)
        fetch, patience_s = self._arrivals.coming(chain, wanted.first), None
        if fetch is None:
            there = await self._leading(wanted, chain)
            if not there or wanted.released.done():
                return None
            if wanted.first + there <= wanted.skipped:
                return None  # nobody would read them
            choice = self._choose(wanted, there)
            patience_s = choice.patience_s
            fetch = self._arrivals.coming(chain, wanted.first)  # begun while this asked
            if fetch is None:
                fetch = self._begin(wanted, shared, chain, choice.blocks - wanted.first)
        if fetch is None:
            return None
        await self._patience.arrivals(
            [fetch],
            begun=begun,
            released=wanted.released,
            deadline_s=wanted.deadline_s,
            patience_s=patience_s,
        )
        return fetch

    def bring_behind(self, wanted: Wanted) -> None:
        """The same, and nobody waits for it: also when the request is over."""

        async def bring() -> None:
            if (fetch := await self.bring(replace(wanted, released=never()))) is not None:
                self._arrivals.let_go(fetch)

        self._arrivals.keep(bring())

    # ---- what the store has ----

    async def _chain(self, wanted: Wanted, shared: Shared) -> Chain:
        prompt = wanted.prompt
        make = partial(chain_of, prompt.namespace, shared, prompt.asked, wanted.blocks)
        return await self._means.on_threads(make)

    async def _leading(self, wanted: Wanted, chain: Chain) -> int:
        """Blocks from `wanted.first` on; 0 too where the store doesn't say so in time."""
        pools = wanted.prompt.pools
        end = min(wanted.blocks, wanted.first + self._arrivals.room(pools))
        return await self._patience.answer(
            self._arrivals.keep(self._exist(wanted, chain, end)),
            0,
            released=wanted.released,
            deadline_s=wanted.deadline_s,
        )

    async def _exist(self, wanted: Wanted, chain: Chain, end: int) -> int:
        """How many leading ones of those from `wanted.first` to `end`. Never raises."""
        at, size, shape = wanted.first, WINDOW, wanted.prompt.pools.shape
        while at < end:
            make = partial(chain.names, shape, at, min(at + size, end))
            try:
                there = await self._link.exists(await self._means.on_threads(make))
            except StoreError:
                return 0
            at += leading(there)
            if not all(there):
                break
            size = min(8 * size, WINDOW_MAX)
        return at - wanted.first

    # ---- what is worth it ----

    def _choose(self, wanted: Wanted, there: int) -> pace.Choice:
        """Of the prompt's leading blocks, with those that are held."""
        shape = wanted.prompt.pools.shape
        held = zip(wanted.tiers, wanted.held, strict=True)
        offers = [
            pace.Offer(tier, blocks, self._estimate(wanted, tier))
            for tier, blocks in (*held, ("remote", there))
            if blocks
        ]
        choice = pace.choose(
            offers,
            page_bytes=shape.page_bytes,
            page_size=shape.page_size,
            prefill_rate=0.0 if self._always else wanted.prefill_rate,
            deadline_s=DEADLINE_SHARE * wanted.deadline_s,
        )
        left = wanted.first + there - max(choice.blocks, wanted.first)
        if left:
            self._means.metrics.all.recomputed_tokens.labels("slower").inc(left * shape.page_size)
        return choice

    def _estimate(self, wanted: Wanted, tier: str) -> Estimate | None:
        if tier == "remote":
            return self._arrivals.meter.estimate
        return HERE if tier == wanted.tiers[0] else self._means.pools.tiers.meters[tier].estimate

    def _begin(self, wanted: Wanted, shared: Shared, chain: Chain, blocks: int) -> Fetch | None:
        """None: nothing is worth it, or there is no room. A store that is too slow to wait for is
        measured again now and then, by a little that nobody waits for."""
        prompt, sealer = wanted.prompt, Sealer(shared.key, wanted.prompt.pools.shape)
        if blocks > 0:
            return self._arrivals.begin(prompt, chain, sealer, wanted.first, blocks)
        if self._arrivals.idle and self._arrivals.meter.may_probe():
            probe = max(1, PROBE_BYTES // prompt.pools.shape.page_bytes)
            self._arrivals.begin(
                prompt, chain, sealer, wanted.first, min(probe, wanted.blocks - wanted.first)
            )
        return None
