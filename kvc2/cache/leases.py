"""What a request does: a lease from its acquire to its release, commits, and pages to fill.

All on the event loop's thread. Index calls are inline; bytes move on the mover's threads. Not here:
sessions and what ends them (cache.py), which block goes where (csrc/index), how long it is worth to
wait (moving/loading.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import (
    NO_HINTS,
    U8,
    U32,
    Acquired,
    Asked,
    Hints,
    Matched,
    Terms,
    of_pages,
)
from kvc2.cache.beyond import Beyond, ended_meanwhile
from kvc2.cache.explain import Explainer, Found
from kvc2.cache.extras import prompt_extras
from kvc2.cache.landing import Prompt
from kvc2.cache.lease_views import (
    LeaseViews,
    blocks_by_tier,
    nothing,
    tiers_of_keys,
    tokens_by_tier,
)
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import OpenLease, Session
from kvc2.moving.loading import Destination, Loader

Blocks = U32 | Asked  # tokens alone stand for their prompt


class Leases:
    """`tick` tells the index what time it is. `wake`: there may be something to copy, or room."""

    def __init__(
        self,
        index: _core.Index,
        loader: Loader,
        explainer: Explainer,
        *,
        tick: Callable[[], int],
        wake: Callable[[], None],
        beyond: Beyond | None = None,
    ) -> None:
        self._index = index
        self._loader = loader
        self._explainer = explainer
        self._tick = tick
        self._wake = wake
        self._beyond = beyond
        self._views = LeaseViews(index, loader)

    async def acquire(
        self, session: Session, namespace: Namespace, request_id: bytes, what: Blocks, terms: Terms
    ) -> Acquired:
        """Open a lease on the longest prefix that comes sooner than it could be computed at
        session.prefill_rate; awaits only what comes from disk, till its deadline. While the lease
        is open the same request_id gets the same answer. Raises SessionOver."""
        if (again := await _again(self._views, session, request_id, terms)) is not None:
            return again
        to = _destination(session, namespace, terms)
        self._tick()
        lease, asked = OpenLease(request_id, 0, namespace, namespace.number, to), Asked.of(what)
        return await self._opened(session, lease, asked, terms)

    async def _opened(
        self, session: Session, lease: OpenLease, asked: Asked, terms: Terms
    ) -> Acquired:
        """Its answer, when what a remote store has beyond this host is here, or isn't waited
        for."""
        opening = self._open_keys if lease.namespace.opaque else self._open
        if self._beyond is None:
            return await opening(session, lease, asked, terms)
        prompt = Prompt(lease.namespace, asked, lease.to.pools, terms.hints)
        async with self._beyond.brought(session, lease, prompt, terms) as left:
            if not lease.is_open:
                return ended_meanwhile(session, lease)
            answer = await opening(session, lease, asked, left)
        self._beyond.used(prompt, answer)
        return answer

    def there(self, lease: OpenLease) -> Acquired:
        """What an open lease holds now. Changes nothing."""
        return self._views.there(lease)

    async def stop(self) -> None:
        """No remote store is asked any more."""
        if self._beyond is not None:
            await self._beyond.remote.stop()

    async def _open(
        self, session: Session, lease: OpenLease, asked: Asked, terms: Terms
    ) -> Acquired:
        """Its answer. What it pinned before, while a store was asked, is its own from here on."""
        namespace, to, pinned = lease.namespace, lease.to, lease.id
        opened = self._index.acquire(
            namespace.number,
            to.pool,
            u32(asked.tokens),
            (len(asked.tokens) - 1) // namespace.page_size,
            namespace.hints(terms.hints),
            skip_blocks=terms.skip_blocks,
            extras=prompt_extras(asked.extras, namespace.page_size),
        )
        lease.id, lease.number = opened.id, namespace.number
        self._unpin(pinned)
        found = Found(opened.explanation, to.tiers, lease.brought)
        tokens = len(asked.tokens)
        self._explainer.keep(session.epoch, namespace, lease.request_id, tokens, found)
        if opened.ahead.size or (to.in_arena and opened.transfer):
            return await self._bring(session, lease, terms)
        return self._settled(session, lease, terms, opened)

    def _settled(
        self, session: Session, lease: OpenLease, terms: Terms, view: _core.Lease
    ) -> Acquired:
        """The answer of a lease that was opened just now, for which nothing has to come."""
        session.leases[lease.request_id] = lease
        ready = session.state == "ready"
        grant_pages = terms.grant_pages if ready else 0  # nobody would hear of them
        granted = of_pages(self.grant(session, grant_pages, lease.namespace))
        answer = self._views.prefix(lease, granted, view)
        lease.reply.set_result(answer)
        if not ready:
            raise errors.SessionOver(f"session {session.epoch} is {session.state}")
        return answer

    async def acquire_keys(
        self,
        session: Session,
        namespace: Namespace,
        request_id: bytes,
        keys: Sequence[bytes],
        terms: Terms,
    ) -> Acquired:
        """As `acquire`, in the arena, of those of the opaque keys that are there."""
        if (again := await _again(self._views, session, request_id, terms)) is not None:
            return again
        if not terms.in_arena:
            raise errors.InvalidRequest("place", 0, "1 (arena), for opaque keys")
        to = _destination(session, namespace, terms)
        self._tick()
        lease = OpenLease(request_id, 0, namespace, namespace.number, to)
        return await self._opened(session, lease, Asked(keys=keys), terms)

    async def _open_keys(
        self, session: Session, lease: OpenLease, asked: Asked, terms: Terms
    ) -> Acquired:
        """As `_open`."""
        namespace, pinned, hints = lease.namespace, lease.id, lease.namespace.hints(terms.hints)
        opened = self._index.acquire_keys(namespace.number, lease.to.pool, asked.keys, hints)
        lease.id, lease.number = opened.id, namespace.number
        self._unpin(pinned)
        return await self._bring(session, lease, terms)

    def _unpin(self, lease: int) -> None:
        """What only pinned while a remote store was asked; 0: nothing did."""
        if lease:
            self._index.release_all(np.array([lease], np.uint64))

    async def _bring(self, session: Session, lease: OpenLease, terms: Terms) -> Acquired:
        """What becomes of a lease that was opened just now: its answer."""
        session.leases[lease.request_id] = lease
        grant_pages = terms.grant_pages
        try:
            errand = self._loader.begin(
                lease.to,
                lease.id,
                session.prefill_rate,
                terms.deadline_s,
                of_keys=lease.namespace.opaque,
            )
            if errand is not None:
                bringing = self._loader.settle(errand, lease.ended)
                if terms.at_once:
                    lease.bringing = asyncio.create_task(_suppressed(bringing))
                else:
                    await bringing
        except BaseException:
            grant_pages = 0  # nobody hears of them: they would be lost until the session's end
            raise
        finally:
            # also when the caller went away: it may ask again under this request_id
            answer = self._answer(session, lease, grant_pages) if lease.is_open else nothing()
            lease.reply.set_result(answer)
        if session.state != "ready":
            raise errors.SessionOver(f"session {session.epoch} is {session.state}")
        return answer

    def _nearest(self, session: Session, namespace: Namespace) -> Destination:
        """The session's pool, or the arena where the namespace is of another layout."""
        self._tick()
        other = session.layouts[namespace.id] is not session.mapped_pool().pools
        return _destination(session, namespace, Terms(0, 0.0, in_arena=other))

    def _answer(self, session: Session, lease: OpenLease, grant_pages: int) -> Acquired:
        """What an open lease holds now, and pages to compute the rest into."""
        return self._views.there(lease, of_pages(self.grant(session, grant_pages, lease.namespace)))

    def match(self, session: Session, namespace: Namespace, what: Blocks) -> Matched:
        """The longest cached prefix of less than all tokens. Changes nothing."""
        to, asked = self._nearest(session, namespace), Asked.of(what)
        extras = prompt_extras(asked.extras, namespace.page_size)
        found = self._index.match(namespace.number, to.pool, u32(asked.tokens[:-1]), extras)
        blocks = (*(0,) * (3 - len(to.tiers)), *found.tiers)
        tiers = tokens_by_tier(blocks, namespace.page_size)
        return Matched(sum(tiers), tiers)

    async def match_beyond(self, session: Session, namespace: Namespace, what: Blocks) -> Matched:
        """The same, and what a remote store has after it. Brings nothing."""
        found = self.match(session, namespace, what)
        if self._beyond is None:
            return found
        to, asked = self._nearest(session, namespace), Asked.of(what)
        tokens = await self._beyond.tokens(to, Prompt(namespace, asked, to.pools))
        return Matched(found.matched_tokens + tokens, replace(found.tiers, remote=tokens))

    def match_keys(self, session: Session, namespace: Namespace, keys: Sequence[bytes]) -> Matched:
        """The fastest tier that has each key. Changes nothing."""
        to = self._nearest(session, namespace)
        found = self._index.match_keys(namespace.number, to.pool, keys)
        return _matched_keys(namespace, tiers_of_keys(found, to.tiers))

    async def match_keys_beyond(
        self, session: Session, namespace: Namespace, keys: Sequence[bytes]
    ) -> Matched:
        """The same, and which others a remote store has. Brings nothing."""
        here = self.match_keys(session, namespace, keys)
        if self._beyond is None:
            return here
        to = self._nearest(session, namespace)
        prompt = Prompt(namespace, Asked(keys=list(keys)), to.pools)
        return _matched_keys(namespace, await self._beyond.found_keys(to, prompt, here.found))

    def commit(
        self, session: Session, request_id: bytes, first_block: int, what: Blocks, pages: U32
    ) -> U8:
        """[k] of ADOPTED, DUPLICATE, REFUSED. Raises NotFound for an unknown lease."""
        lease, asked = session.lease(request_id), Asked.of(what)
        extras = prompt_extras(asked.extras, lease.namespace.page_size)
        result = self._index.commit(lease.id, first_block, u32(asked.tokens), u32(pages), extras)
        self._index.trim(session.mapped_pool().id)
        self._wake()
        return result

    def close_leases(self, leases: list[int]) -> None:
        """Those that copied commits opened."""
        self._index.release_all(np.array(leases, np.uint64))
        self._wake()

    def release(self, session: Session, request_id: bytes, said: Hints = NO_HINTS) -> None:
        """Close a lease; an acquire of it that is under way answers with nothing. What is said here
        stands in the place of what acquire was told."""
        self._tick()  # what may fail comes first: a lease that is no more the session's is released
        gpu, lease = session.mapped_pool(), session.end_lease(request_id)
        if lease is None:
            return
        if said == NO_HINTS:
            self._index.release(lease.id)
        else:
            self._index.release(lease.id, lease.namespace.hints(said))
        self._index.trim(gpu.id)  # what was pinned is to be had
        self._wake()  # what it pinned may be dead

    def grant(self, session: Session, pages: int, namespace: Namespace | None = None) -> U32:
        """Up to `pages` pages to fill, evicting as needed; for a namespace, if it is known."""
        if not pages:
            return np.empty(0, np.uint32)
        number = _number_in_pool(session, namespace)
        granted = self._index.grant(session.mapped_pool().id, pages, number)
        self._wake()  # fewer are free now
        return granted

    def give_back(self, session: Session, pages: U32) -> None:
        """Granted pages come back unused. Raises InvalidRequest when one was not granted."""
        if not self._index.give_back(session.mapped_pool().id, u32(pages)):
            raise errors.InvalidRequest("returned", pages.size, "pages granted and not used")


async def _again(
    views: LeaseViews, session: Session, request_id: bytes, terms: Terms
) -> Acquired | None:
    """Of a lease that is open, the same answer to the same question. None: there is none."""
    lease = session.leases.get(request_id)
    if lease is None:
        if terms.poll:
            raise errors.InvalidRequest("poll", terms.poll, "0, which opens the lease")
        return None
    first = await asyncio.shield(lease.reply)
    if not terms.poll:
        return first
    if not terms.at_once or terms.poll not in (lease.poll, lease.poll + 1):
        allowed = f"{lease.poll} or {lease.poll + 1}, with at_once"
        raise errors.InvalidRequest("poll", terms.poll, allowed)
    if terms.poll > lease.poll or lease.polled is None:
        lease.poll = terms.poll
        lease.polled = views.there(lease) if lease.is_open else nothing()
    return lease.polled


def _destination(session: Session, namespace: Namespace, terms: Terms) -> Destination:
    """Where its lease pins. Raises InvalidRequest for a place that there isn't."""
    gpu, pools = session.mapped_pool(), session.layouts[namespace.id]
    if terms.in_arena and not pools.chain:
        raise errors.InvalidRequest("place", 1, "0: this daemon has no cpu tier")
    if not terms.in_arena and pools is not gpu.pools:
        raise errors.InvalidRequest("place", 0, "1: the namespace has another layout")
    return Destination(gpu, pools, terms.in_arena)


def _matched_keys(namespace: Namespace, found: U8) -> Matched:
    tiers = tokens_by_tier(blocks_by_tier(found), namespace.page_size)
    return Matched(sum(tiers), tiers, found)


def _number_in_pool(session: Session, namespace: Namespace | None) -> int | None:
    """The index's, where the namespace has its pages in the session's pool: then its tenant's quota
    counts there."""
    if namespace is None or session.layouts.get(namespace.id) is not session.mapped_pool().pools:
        return None
    return namespace.number


def u32(array: NDArray[np.integer]) -> U32:
    return np.ascontiguousarray(array, np.uint32)


async def _suppressed(bringing: Awaitable[None]) -> None:
    """What goes on behind an answer: a lease or session that ends meanwhile ends it."""
    with suppress(KeyError, errors.SessionOver):
        await bringing
