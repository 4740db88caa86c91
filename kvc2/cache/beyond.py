"""What a remote store has of a prompt beyond this host's tiers, for leases.

Before a lease is opened in the index, what it lacks comes into the cpu tier, where the lease finds
it. Meanwhile it only pins what its pool has. Not here: how blocks come (fetches.py), what a lease
is (leases.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from kvc2 import _core, errors
from kvc2.answers import Acquired, Terms
from kvc2.cache.arrivals import Fetch, Prompt
from kvc2.cache.brought import Brought
from kvc2.cache.fetches import Wanted, never
from kvc2.cache.lease_views import LeaseViews, nothing
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
        begun, to = time.monotonic(), lease.to
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
        fetch = None
        if terms.at_once:
            self.remote.bring_behind(wanted)
        elif self.remote.may_bring(wanted):
            fetch = await self._fetch(session, lease, wanted)
            left_s = terms.deadline_s - (time.monotonic() - begun)
            terms = replace(terms, deadline_s=max(0.0, left_s))
        try:
            yield terms
        finally:
            if fetch is not None:
                self.remote.let_go(fetch)

    @asynccontextmanager
    async def brought_to_cpu(self, prompt: Prompt) -> AsyncIterator[None]:
        """All that the store has of the full blocks of these tokens after what cpu and disk hold is
        in the cpu tier, pinned while the body runs."""
        blocks = len(prompt.asked.tokens) // prompt.namespace.page_size
        held = self._match(prompt.pools.cpu.id, prompt, blocks)
        tiers = TIERS[1:]
        wanted = Wanted(prompt, tiers, held, 0.0, math.inf, never(), blocks)
        fetch = await self.remote.bring(wanted)
        try:
            yield
        finally:
            if fetch is not None:
                self.remote.let_go(fetch)

    def used(self, prompt: Prompt, answer: Acquired) -> None:
        """A request has found so much of the prompt here."""
        self.remote.used(prompt, answer.matched_tokens // prompt.namespace.page_size)

    async def tokens(self, to: Destination, prompt: Prompt) -> int:
        """That the store has after what the tiers hold. Brings nothing."""
        held, blocks = self._held(to, prompt), usable(prompt)
        wanted = Wanted(prompt, to.tiers, held, 0.0, math.inf, never(), blocks)
        return await self.remote.beyond(wanted) * prompt.namespace.page_size

    def _held(self, to: Destination, prompt: Prompt) -> tuple[int, ...]:
        """Blocks that a request can have of the prompt, by the tiers of its chain."""
        return self._match(to.pool, prompt, usable(prompt))

    def _match(self, pool: int, prompt: Prompt, blocks: int) -> tuple[int, ...]:
        tokens, number = prompt.tokens(blocks), prompt.namespace.number
        return self._index.match(number, pool, tokens, prompt.extras).tiers

    async def _fetch(self, session: Session, lease: OpenLease, wanted: Wanted) -> Fetch | None:
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
        session.leases[lease.request_id] = lease
        try:
            fetch = await self.remote.bring(wanted)
        except BaseException:  # the caller went away: it may ask again under this request_id
            lease.reply.set_result(self._views.there(lease) if lease.is_open else nothing())
            raise
        if fetch is not None:
            lease.brought = Brought(max(first, fetch.first), fetch.first + fetch.came)
        return fetch


def usable(prompt: Prompt) -> int:
    """Blocks that a request can have of it: its last token is computed."""
    return (len(prompt.asked.tokens) - 1) // prompt.namespace.page_size


def ended_meanwhile(session: Session, lease: OpenLease) -> Acquired:
    """The answer of a lease that was released, or whose session has ended. Raises SessionOver."""
    lease.reply.set_result(nothing())
    if session.state != "ready":
        raise errors.SessionOver(f"session {session.epoch} is {session.state}")
    return nothing()
