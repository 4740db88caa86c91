"""What a remote store has of a prompt, or of opaque keys, beyond this host's tiers, for leases.

Before a lease is opened in the index, what it lacks comes into the cpu tier, where the lease finds
it. Meanwhile it only pins what its pool has. Not here: how blocks come (fetches.py,
key_fetches.py), what a lease is (leases.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import numpy as np

from kvc2 import _core, errors
from kvc2.answers import NOWHERE, U8, Acquired, Asked, Terms
from kvc2.cache.brought import Brought
from kvc2.cache.fetches import Wanted, never
from kvc2.cache.key_fetches import WantedKeys
from kvc2.cache.landing import Fetch, Prompt
from kvc2.cache.lease_views import REMOTE, LeaseViews, nothing
from kvc2.cache.remote import Remote
from kvc2.cache.sessions import OpenLease, Session
from kvc2.moving.loading import TIERS, Destination


class Beyond:
    """All on the event loop."""

    def __init__(self, index: _core.Index, remote: Remote, views: LeaseViews) -> None:
        self._index = index
        self._views = views
        self.remote = remote

    @asynccontextmanager
    async def brought(
        self, session: Session, lease: OpenLease, prompt: Prompt, terms: Terms
    ) -> AsyncIterator[Terms]:
        """What the store has and is worth it is in the cpu tier, pinned while the body runs, or
        isn't waited for. Yields the terms with the time that is left. `lease` is about to be
        opened, and may have ended meanwhile; what it pins is in the index under its id, unless that
        is 0."""
        begun = time.monotonic()
        bring = self._bring_keys if prompt.namespace.opaque else self._bring_prompt
        fetches = await bring(session, lease, prompt, terms)
        left_s = terms.deadline_s - (time.monotonic() - begun)
        try:
            yield replace(terms, deadline_s=max(0.0, left_s))
        finally:
            self.remote.let_go(fetches)

    async def _bring_prompt(
        self, session: Session, lease: OpenLease, prompt: Prompt, terms: Terms
    ) -> list[Fetch]:
        to = lease.to
        wanted = Wanted(
            prompt,
            to.tiers,
            self._held(to, prompt),
            session.prefill_rate,
            terms.deadline_s,
            lease.ended,
            usable(prompt),
            terms.skip_blocks,
        )
        if terms.at_once:
            self.remote.prompts.bring_behind(wanted)
        elif self.remote.prompts.may_bring(wanted):
            return await self._fetch(session, lease, wanted)
        return []

    async def _bring_keys(
        self, session: Session, lease: OpenLease, prompt: Prompt, terms: Terms
    ) -> list[Fetch]:
        wanted = self._lacking(prompt, lease.to.pool, terms.deadline_s, lease.ended)
        if terms.at_once:
            self.remote.keys.bring_behind(wanted, never())
        elif self.remote.keys.may_bring(wanted):
            return await self._fetch_keys(session, lease, prompt, wanted)
        return []

    @asynccontextmanager
    async def brought_to_cpu(self, prompt: Prompt) -> AsyncIterator[None]:
        """All that the store has of the full blocks of these tokens after what cpu and disk hold,
        or of these keys, is in the cpu tier, pinned while the body runs."""
        fetches = await self._fetch_all(prompt)
        try:
            yield
        finally:
            self.remote.let_go(fetches)

    async def _fetch_all(self, prompt: Prompt) -> list[Fetch]:
        cpu = prompt.pools.cpu.id
        if prompt.namespace.opaque:
            return await self.remote.keys.bring(self._lacking(prompt, cpu, math.inf, never()))
        blocks = len(prompt.asked.tokens) // prompt.namespace.page_size
        held = self._match(cpu, prompt, blocks)
        wanted = Wanted(prompt, TIERS[1:], held, 0.0, math.inf, never(), blocks)
        fetch = await self.remote.prompts.bring(wanted)
        return [] if fetch is None else [fetch]

    def used(self, prompt: Prompt, answer: Acquired) -> None:
        """A request has found so much of the prompt here, or of its keys those."""
        if not prompt.namespace.opaque:
            self.remote.used(prompt, answer.matched_tokens // prompt.namespace.page_size)
            return
        here = (answer.offsets != NOWHERE) & (answer.found != REMOTE)
        keys = [prompt.asked.keys[each] for each in np.flatnonzero(here).tolist()]
        self.remote.used_keys(replace(prompt, asked=Asked(keys=keys)))

    async def tokens(self, to: Destination, prompt: Prompt) -> int:
        """That the store has after what the tiers hold. Brings nothing."""
        held, blocks = self._held(to, prompt), usable(prompt)
        wanted = Wanted(prompt, to.tiers, held, 0.0, math.inf, never(), blocks)
        return await self.remote.prompts.beyond(wanted) * prompt.namespace.page_size

    async def found_keys(self, to: Destination, prompt: Prompt, found: U8) -> U8:
        """`found` [n], the tiers that have the keys, with REMOTE where the store alone has one.
        Brings nothing."""
        wanted = self._lacking(prompt, to.pool, math.inf, never())
        there = await self.remote.keys.beyond(wanted)
        has = {key for key, has in zip(wanted.keys, there.tolist(), strict=True) if has}
        return _with_remote(found, prompt.asked.keys, has)

    def _lacking(
        self, prompt: Prompt, pool: int, deadline_s: float, released: asyncio.Future[None]
    ) -> WantedKeys:
        """Those of the keys that no tier of the pool's chain has."""
        keys = prompt.asked.keys
        found = self._index.match_keys(prompt.namespace.number, pool, keys)
        lacking = dict.fromkeys(keys[each] for each in np.flatnonzero(found == 0).tolist())
        return WantedKeys(replace(prompt, asked=Asked(keys=list(lacking))), deadline_s, released)

    def _held(self, to: Destination, prompt: Prompt) -> tuple[int, ...]:
        """Blocks that a request can have of the prompt, by the tiers of its chain."""
        return self._match(to.pool, prompt, usable(prompt))

    def _match(self, pool: int, prompt: Prompt, blocks: int) -> tuple[int, ...]:
        tokens, number = prompt.tokens(blocks), prompt.namespace.number
        return self._index.match(number, pool, tokens, prompt.extras).tiers

    async def _fetch(self, session: Session, lease: OpenLease, wanted: Wanted) -> list[Fetch]:
        """Meanwhile the lease is known by its request_id, and may end."""
        prompt, first = wanted.prompt, wanted.first
        lease.id = self._index.acquire(
            prompt.namespace.number,
            lease.to.pool,
            prompt.tokens(first),
            first,
            touches=False,
            extras=prompt.extras,
        ).id
        with self._known(session, lease):
            fetch = await self.remote.prompts.bring(wanted)
        if fetch is None:
            return []
        lease.brought = Brought(max(first, fetch.first), fetch.first + fetch.came)
        return [fetch]

    async def _fetch_keys(
        self, session: Session, lease: OpenLease, prompt: Prompt, wanted: WantedKeys
    ) -> list[Fetch]:
        """The same, of opaque keys."""
        number, pool, keys = prompt.namespace.number, lease.to.pool, prompt.asked.keys
        lease.id = self._index.acquire_keys(number, pool, keys, touches=False).id
        with self._known(session, lease):
            fetches = await self.remote.keys.bring(wanted)
        if fetches and not prompt.namespace.gone:
            here = self._index.match_keys(prompt.namespace.number, pool, wanted.keys)
            came = {wanted.keys[each] for each in np.flatnonzero(here).tolist()}
            lease.keys_brought = np.array([each in came for each in keys], np.bool_)
        return fetches

    @contextmanager
    def _known(self, session: Session, lease: OpenLease) -> Iterator[None]:
        """By its request_id, while the body waits."""
        session.leases[lease.request_id] = lease
        try:
            yield
        except BaseException:  # the caller went away: it may ask again under this request_id
            lease.reply.set_result(self._views.there(lease) if lease.is_open else nothing())
            raise


def _with_remote(found: U8, keys: Sequence[bytes], has: Collection[bytes]) -> U8:
    return np.array(
        [tier or REMOTE * (key in has) for tier, key in zip(found.tolist(), keys, strict=True)],
        np.uint8,
    )


def usable(prompt: Prompt) -> int:
    """Blocks that a request can have of it: its last token is computed."""
    return (len(prompt.asked.tokens) - 1) // prompt.namespace.page_size


def ended_meanwhile(session: Session, lease: OpenLease) -> Acquired:
    """The answer of a lease that was released, or whose session has ended. Raises SessionOver."""
    lease.reply.set_result(nothing())
    if session.state != "ready":
        raise errors.SessionOver(f"session {session.epoch} is {session.state}")
    return nothing()
