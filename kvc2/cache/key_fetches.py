"""Blocks of opaque keys that no tier of this host has are looked for in the remote store, and
brought to the cpu tier, each for itself.

What a block would take to compute nobody here knows, so that a request waits until its deadline, as
for the disk, and for a store that is silent no longer than any other does. What it gives up on goes
on coming. Whatever goes wrong is a miss. Not here: prompts (fetches.py), how blocks come
(arrivals.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvc2.answers import Asked
from kvc2.cache.arrivals import Arrivals
from kvc2.cache.chains import chain_of_keys
from kvc2.cache.landing import Fetch, Means, Prompt
from kvc2.cache.patience import Patience
from kvc2.tiers.remote.codec import Chain, Sealer, Shared
from kvc2.tiers.remote.store import StoreError

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class WantedKeys:
    """Blocks of these keys, which no tier of this host has: each once. `released` is done when
    nobody waits any more."""

    prompt: Prompt
    deadline_s: float
    released: asyncio.Future[None]

    @property
    def keys(self) -> Sequence[bytes]:
        return self.prompt.asked.keys


class KeyFetches:
    """All on the event loop."""

    def __init__(self, means: Means, arrivals: Arrivals, patience: Patience) -> None:
        self._means, self._link = means, means.link
        self._arrivals, self._patience = arrivals, patience

    def may_bring(self, wanted: WantedKeys) -> Shared | None:
        """None: nothing is asked for, since the store is left alone, or nothing is missing."""
        shared = wanted.prompt.namespace.owner.shared
        return shared if self._link.up and wanted.keys else None

    async def beyond(self, wanted: WantedKeys) -> Bools:
        """[n] whether the store has each. Brings nothing."""
        shared = self.may_bring(wanted)
        if shared is None:
            return np.zeros(len(wanted.keys), np.bool_)
        return await self._there(wanted, await self._chain(wanted, shared))

    async def bring(self, wanted: WantedKeys) -> list[Fetch]:
        """Answers when all that the store has of them is in the cpu tier, or isn't waited for any
        more. The caller leases what came, and then lets go of each fetch."""
        shared = self.may_bring(wanted)
        if shared is None:
            return []
        begun, chain = time.monotonic(), await self._chain(wanted, shared)
        fetches = await self._begun(wanted, shared, chain)
        await self._patience.arrivals(
            fetches, begun=begun, released=wanted.released, deadline_s=wanted.deadline_s
        )
        return fetches

    def bring_behind(self, wanted: WantedKeys, nobody: asyncio.Future[None]) -> None:
        """The same, and nobody waits for it: also when the request is over."""

        async def bring() -> None:
            for fetch in await self.bring(replace(wanted, released=nobody)):
                self._arrivals.let_go(fetch)

        self._arrivals.keep(bring())

    async def _chain(self, wanted: WantedKeys, shared: Shared) -> Chain:
        make = partial(chain_of_keys, wanted.prompt.namespace, shared, wanted.keys)
        return await self._means.on_threads(make)

    async def _begun(self, wanted: WantedKeys, shared: Shared, chain: Chain) -> list[Fetch]:
        """What brings those of the keys that the store has: fetches that are under way, and one
        for the others."""
        coming = self._arrivals.coming_keys(chain)
        if not all(coming):
            there = await self._there(wanted, chain)
            if wanted.released.done():
                return []
            coming = self._arrivals.coming_keys(chain)  # also what was begun while this asked
            lacking = np.flatnonzero(there & np.array([each is None for each in coming]))
            coming.append(self._begin(wanted.prompt, shared, chain, lacking))
        return list(dict.fromkeys(each for each in coming if each is not None))

    def _begin(
        self, prompt: Prompt, shared: Shared, chain: Chain, rows: NDArray[np.int64]
    ) -> Fetch | None:
        """None: there is nothing, or no room for it now."""
        if not rows.size:
            return None
        asked = Asked(keys=[prompt.asked.keys[each] for each in rows.tolist()])
        sealer = Sealer(shared.key, prompt.pools.shape)
        return self._arrivals.begin(
            replace(prompt, asked=asked), chain.chosen(rows), sealer, 0, rows.size
        )

    async def _there(self, wanted: WantedKeys, chain: Chain) -> Bools:
        """[n] whether the store has each; none where it doesn't say so in time."""
        none = np.zeros(len(wanted.keys), np.bool_)
        return await self._patience.answer(
            self._arrivals.keep(self._exist(wanted, chain)),
            none,
            released=wanted.released,
            deadline_s=wanted.deadline_s,
        )

    async def _exist(self, wanted: WantedKeys, chain: Chain) -> Bools:
        """Never raises."""
        count = len(wanted.keys)
        make = partial(chain.names, wanted.prompt.pools.shape, 0, count)
        try:
            there = await self._link.exists(await self._means.on_threads(make))
        except StoreError:
            return np.zeros(count, np.bool_)
        return np.array(there, np.bool_)
