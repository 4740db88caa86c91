"""Blocks that requests use again go to the remote store, behind, out of the cpu tier.

A block is put when a request has found it here: its second use, since the first one committed it.
So what nobody comes back to costs no network, and what a store has was worth having. Its bytes are
those of the cpu tier; what isn't there just then is put after its next use. Parents go before their
children, and opaque keys each for itself. What a request gave a time to live has it in the store
too.

Nobody waits: the queue is bounded and drops, and while the store is left alone nothing is queued.
Not here: values (tiers/remote/codec.py), deadlines (tiers/remote/link.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kvc2 import _core
from kvc2.answers import U32, Asked, shorter
from kvc2.cache.chains import chain_of, chain_of_keys
from kvc2.cache.landing import Means, Prompt, Rows
from kvc2.moving.loading import Loader
from kvc2.tiers.remote.codec import Chain, Sealer, Shared
from kvc2.tiers.remote.queue import Known, PutQueue
from kvc2.tiers.remote.store import StoreError, StoreRefused, StoreUnable

LOG = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20  # of one call: what of a core and of the network it takes at a time
BATCH_BLOCKS = 256
REFUSED_S = 10.0  # so long nothing is put into a store that has refused a value
PATIENCE_S = 0.5  # so long a batch yields to what requests wait for


@dataclass(frozen=True)
class Reused:
    """Blocks [first, end) of a prompt, or of opaque keys, and what each before `end` is known as;
    the namespace's number in the index then."""

    prompt: Prompt
    shared: Shared
    known_as: Sequence[bytes]
    first: int
    end: int
    number: int

    @property
    def ttl_s(self) -> int:
        return shorter(self.prompt.hints.ttl_s, self.prompt.namespace.ttl_s)

    @property
    def of_keys(self) -> bool:
        """Each of its blocks is for itself."""
        return self.prompt.namespace.opaque

    def chain(self) -> Chain:
        namespace, asked = self.prompt.namespace, self.prompt.asked
        if self.of_keys:
            return chain_of_keys(namespace, self.shared, asked.keys)
        return chain_of(namespace, self.shared, asked, self.end)


@dataclass(frozen=True)
class Pinned:
    """Blocks that a lease of the index keeps in these pages of the cpu tier."""

    lease: int
    blocks: Rows
    pages: U32


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
        if first == blocks or self._is_left(blocks - first):
            return
        # the tokens are a view of the call's message, which goes with the call
        asked = Asked(prompt.tokens(blocks).copy(), extras=tuple(prompt.asked.extras))
        own, known_as = replace(prompt, asked=asked), [each.tobytes() for each in keys]
        self._offer(Reused(own, shared, known_as, first, blocks, namespace.number))

    def used_keys(self, prompt: Prompt) -> None:
        """A request has found the blocks of these keys here."""
        namespace, shared = prompt.namespace, prompt.namespace.owner.shared
        if shared is None or namespace.gone:
            return
        named = {namespace.known + key: key for key in prompt.asked.keys}
        lacking = {name: key for name, key in named.items() if name not in self._known}
        if lacking and not self._is_left(len(lacking)):
            own = replace(prompt, asked=Asked(keys=list(lacking.values())))
            self._offer(Reused(own, shared, list(lacking), 0, len(lacking), namespace.number))

    def _is_left(self, blocks: int) -> bool:
        """Whether nothing is put now: so many blocks are not."""
        why = "store_away" if not self._link.up else "store_refused"
        left = not self._link.up or time.monotonic() < self._refused_until
        if left:
            self._not_put(why, blocks)
        return left

    def _offer(self, item: Reused) -> None:
        blocks = item.end - item.first
        if not self._queue.offer(item, blocks * item.prompt.pools.shape.page_bytes):
            self._not_put("queue_full", blocks)

    def _not_put(self, why: str, blocks: int) -> None:
        self._means.metrics.not_put.labels(why).inc(blocks)

    async def _put(self, item: Reused, loader: Loader) -> None:
        shape = item.prompt.pools.shape
        chain = await self._means.on_threads(item.chain)
        step = max(1, min(BATCH_BLOCKS, BATCH_BYTES // shape.page_bytes))
        for first in range(item.first, item.end, step):
            end = min(first + step, item.end)
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await loader.until_idle()
            try:
                there = await self._link.exists(chain.names(shape, first, end))
                lacking = first + np.flatnonzero(~np.array(there))
                left = await self._send(item, chain, lacking)
            except StoreRefused:
                self._refused_until = time.monotonic() + REFUSED_S
                self._not_put("store_refused", item.end - first)
                return
            except StoreUnable:
                self._not_put("store_unable", item.end - first)
                return
            except StoreError:
                self._not_put("store_away", item.end - first)
                return
            if self._learn(item, np.arange(first, end), left):
                return

    def _learn(self, item: Reused, blocks: Rows, left: Rows) -> bool:
        """That the store has these blocks but those that are left. Whether those after them are
        left too: children of what isn't there."""
        if left.size and not item.of_keys:
            blocks, left = blocks[blocks < left[0]], np.arange(left[0], item.end)
        for each in np.setdiff1d(blocks, left).tolist():
            self._known.add(item.known_as[each])
        self._not_put("not_in_memory", left.size)
        return left.size > 0 and not item.of_keys

    async def _send(self, item: Reused, chain: Chain, lacking: Rows) -> Rows:
        """Put these blocks, which the store lacks. Those of them that it lacks still."""
        prompt, shape = item.prompt, item.prompt.pools.shape
        if not lacking.size or prompt.namespace.gone or prompt.namespace.number != item.number:
            return lacking
        pinned = self._pin_keys(item, lacking) if item.of_keys else self._pin(item, lacking)
        try:
            payloads = prompt.pools.payloads(pinned.pages)
            sealer = Sealer(item.shared.key, shape)
            arena, records = self._means.pools.arena.memory, chain.records(pinned.blocks)
            seal = partial(sealer.seal, arena, payloads, records)
            values = await self._means.on_threads(seal)
        finally:
            self._means.index.release_all(np.array([pinned.lease], np.uint64))
        if values:
            begun = time.monotonic()
            names = [chain.name_of(shape, each) for each in pinned.blocks.tolist()]
            await self._link.put(list(zip(names, values, strict=True)), item.ttl_s)
            self._count(len(values), shape.payload_bytes, time.monotonic() - begun)
        return np.setdiff1d(lacking, pinned.blocks)

    def _pin(self, item: Reused, lacking: Rows) -> Pinned:
        """Those of the blocks of a prompt that are in the cpu tier, with all between them."""
        prompt, start, end = item.prompt, int(lacking[0]), int(lacking[-1]) + 1
        lease = self._means.index.acquire(
            item.number,
            prompt.pools.cpu.id,
            prompt.tokens(end),
            end,
            skip_blocks=start,
            touches=False,
            extras=prompt.extras,
        )
        here = lease.arrived if lease.first_block == start else 0
        blocks = lacking[lacking < start + here]
        return Pinned(lease.id, blocks, lease.pages[blocks - start])

    def _pin_keys(self, item: Reused, lacking: Rows) -> Pinned:
        prompt = item.prompt
        keys = [prompt.asked.keys[each] for each in lacking.tolist()]
        lease = self._means.index.acquire_keys(
            item.number, prompt.pools.cpu.id, keys, touches=False
        )
        here = lease.arrived.astype(bool)
        return Pinned(lease.id, lacking[here], lease.pages[here])

    def _count(self, blocks: int, payload_bytes: int, seconds: float) -> None:
        way = ("cpu", "remote")
        self._means.metrics.moved(way, blocks, payload_bytes)
        self._means.metrics.all.transfer_seconds.labels(*way).observe(seconds)
