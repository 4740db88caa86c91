"""Blocks that requests use again go to the remote store, behind, out of the cpu tier.

A block is put when a request has found it here: its second use, since the first one committed it.
So what nobody comes back to costs no network, and what a store has was worth having. Its bytes are
those of the cpu tier; what isn't there just then is put after its next use. Parents go before their
children. What a request gave a time to live has it in the store too.

Nobody waits: the queue is bounded and drops, and while the store is left alone nothing is queued.
Not here: values (tiers/remote/codec.py), deadlines (tiers/remote/link.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.answers import U8, Asked, shorter
from kvc2.cache.arrivals import Means, Prompt
from kvc2.cache.chains import chain_of
from kvc2.moving.loading import Loader
from kvc2.tiers.remote.codec import Chain, Sealer, Shared
from kvc2.tiers.remote.queue import Known, PutQueue
from kvc2.tiers.remote.store import StoreError, StoreRefused

LOG = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20  # of one call: what of a core and of the network it takes at a time
BATCH_BLOCKS = 256
REFUSED_S = 10.0  # so long nothing is put into a store that has refused a value
PATIENCE_S = 0.5  # so long a batch yields to what requests wait for
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Reused:
    """Blocks [first, end) of a prompt, with the keys of all before `end`; the namespace's number in
    the index then."""

    prompt: Prompt
    shared: Shared
    keys: U8
    first: int
    end: int
    number: int

    @property
    def ttl_s(self) -> int:
        return shorter(self.prompt.hints.ttl_s, self.prompt.namespace.ttl_s)


class Puts:
    """All on the event loop."""

    def __init__(self, means: Means, *, queue_bytes: int) -> None:
        self._means = means
        self._link = means.link
        self._queue: PutQueue[Reused] = PutQueue(queue_bytes)
        self._known = Known(time.monotonic)
        self._under_way = False
        self._refused_until = 0.0

    async def run(self, loader: Loader) -> None:
        """Until it is cancelled."""
        while True:
            item = await self._queue.take()
            self._under_way = True
            try:
                await self._put(item, loader)
            except Exception:
                self._means.metrics.all.fault("internal_error")
                LOG.exception("putting blocks into the remote store")
            finally:
                self._under_way = False

    @property
    def idle(self) -> bool:
        return not len(self._queue) and not self._under_way

    def used(self, prompt: Prompt, blocks: int) -> None:
        """A request has found these leading blocks here."""
        namespace, shared = prompt.namespace, prompt.namespace.owner.shared
        if shared is None or not blocks or namespace.gone:
            return
        keys = _core.chain_keys(
            namespace.known, prompt.tokens(blocks), namespace.page_size, prompt.extras
        )
        # parents are put before their children: what is known comes first
        first = bisect_left(
            range(blocks), True, key=lambda at: keys[at].tobytes() not in self._known
        )
        if first == blocks:
            return
        if not self._link.up or time.monotonic() < self._refused_until:
            self._not_put("store_away" if not self._link.up else "store_refused", blocks - first)
            return
        # the tokens are a view of the call's message, which goes with the call
        asked = Asked(prompt.tokens(blocks).copy(), extras=tuple(prompt.asked.extras))
        own = Prompt(namespace, asked, prompt.pools, prompt.hints)
        item = Reused(own, shared, keys, first, blocks, namespace.number)
        if not self._queue.offer(item, (blocks - first) * prompt.pools.shape.page_bytes):
            self._not_put("queue_full", blocks - first)

    def _not_put(self, why: str, blocks: int) -> None:
        self._means.metrics.not_put.labels(why).inc(blocks)

    async def _put(self, item: Reused, loader: Loader) -> None:
        shape, namespace = item.prompt.pools.shape, item.prompt.namespace
        make = partial(chain_of, namespace, item.shared, item.prompt.asked, item.end)
        chain = await self._means.on_threads(make)
        step = max(1, min(BATCH_BLOCKS, BATCH_BYTES // shape.page_bytes))
        for first in range(item.first, item.end, step):
            end = min(first + step, item.end)
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await loader.until_idle()
            try:
                there = await self._link.exists(chain.names(shape, first, end))
                lacking = first + np.flatnonzero(~np.array(there))
                done = await self._send(item, chain, lacking, end)
            except StoreRefused:
                self._refused_until = time.monotonic() + REFUSED_S
                self._not_put("store_refused", item.end - first)
                return
            except StoreError:
                self._not_put("store_away", item.end - first)
                return
            for key in item.keys[first:done]:
                self._known.add(key.tobytes())
            if done < end:
                self._not_put("not_in_memory", item.end - done)
                return

    async def _send(self, item: Reused, chain: Chain, lacking: Rows, end: int) -> int:
        """Put those of the blocks before `end` that the store lacks. Up to which block it has them
        all now."""
        if not lacking.size:
            return end
        prompt, shape, start = item.prompt, item.prompt.pools.shape, int(lacking[0])
        if prompt.namespace.gone or prompt.namespace.number != item.number:
            return start
        lease = self._means.index.acquire(
            item.number,
            prompt.pools.cpu.id,
            prompt.tokens(end),
            end,
            skip_blocks=start,
            touches=False,
            extras=prompt.extras,
        )
        try:
            here = lease.arrived if lease.first_block == start else 0
            chosen = lacking[lacking < start + here]
            payloads = prompt.pools.payloads(lease.pages[chosen - start])
            sealer = Sealer(item.shared.key, shape)
            seal = partial(
                sealer.seal, self._means.pools.arena.memory, payloads, chain.records(chosen)
            )
            values = await self._means.on_threads(seal)
        finally:
            self._means.index.release_all(np.array([lease.id], np.uint64))
        if values:
            begun = time.monotonic()
            names = chain.names(shape, start, start + here)
            chosen_names = [names[each - start] for each in chosen.tolist()]
            await self._link.put(list(zip(chosen_names, values, strict=True)), item.ttl_s)
            self._count(len(values), shape.payload_bytes, time.monotonic() - begun)
        return min(start + here, end)

    def _count(self, blocks: int, payload_bytes: int, seconds: float) -> None:
        way = ("cpu", "remote")
        self._means.metrics.moved(way, blocks, payload_bytes)
        self._means.metrics.all.transfer_seconds.labels(*way).observe(seconds)
