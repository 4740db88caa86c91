"""Prefixes that somebody asked to keep in a tier: which pool that is, and how much may be kept.

A pin is on the names of blocks (csrc/index/prefix_pins.h): it holds for what comes later too, and
ends with unpin, after its time, with its namespace, its session's pool or the daemon. Hard pins
take at most limits.hard_pin_percent of a tier, and soft ones of a tenant limits.soft_pin_percent:
its marks leave the others' blocks room. Not here: what a pin forbids (csrc/index).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from kvc2 import _core, errors
from kvc2.answers import U8, Asked, PrefixPinned
from kvc2.cache.counts import Counts
from kvc2.cache.extras import prompt_extras
from kvc2.cache.namespaces import Namespace, Namespaces
from kvc2.cache.sessions import Session
from kvc2.config import ServeConfig


@dataclass(frozen=True)
class PinRoom:
    """The pool of a namespace in a tier, and the blocks that may be pinned there in one way: `room`
    by all, or by `tenant` alone."""

    pool: int
    room: int
    tenant: int | None


@dataclass(frozen=True)
class Keeping:
    """How a prefix is kept. ttl_s: how long; 0: until it is unpinned. keep_stronger: a pin of it
    that is harder, or as hard and ends as late or later, stays."""

    tier: str
    hard: bool
    ttl_s: int = 0
    keep_stronger: bool = False


class _How(TypedDict):
    """The same, as the index is told."""

    hard: bool
    max_blocks: int
    ttl_s: int
    keep_stronger: bool


class Pins:
    """One thread (the event loop's) uses this. `tick` tells the index the time."""

    def __init__(
        self,
        index: _core.Index,
        namespaces: Namespaces,
        counts: Counts,
        config: ServeConfig,
        *,
        tick: Callable[[], int],
    ) -> None:
        self._tick = tick
        self._index = index
        self._namespaces = namespaces
        self._counts = counts
        self._percent = {
            True: config.limits.hard_pin_percent,
            False: config.limits.soft_pin_percent,
        }

    def pin(
        self, session: Session | None, namespace: Namespace, asked: Asked, keeping: Keeping
    ) -> PrefixPinned:
        """Keep the full blocks of a prompt, or each of some keys. Raises InvalidRequest, and
        LimitReached when no more may be pinned: then nothing changes. Of keys those are kept that
        there is room for, and the answer tells which."""
        self._check(namespace, asked)
        self._tick()
        tier, hard = keeping.tier, keeping.hard
        room = self._room(session, namespace, tier, hard=hard)
        number = namespace.number
        how = _How(
            hard=hard,
            max_blocks=self._most(room, hard=hard),
            ttl_s=keeping.ttl_s,
            keep_stronger=keeping.keep_stronger,
        )
        if namespace.opaque:
            kept = self._index.pin_keys(number, room.pool, asked.keys, **how)
            found = self._index.match_keys(number, room.pool, asked.keys)
            all_pinned = self._index.pinned_blocks(room.pool, hard=hard)
            return PrefixPinned(
                _distinct(asked, kept), _distinct(asked, kept & (found == 1)), all_pinned, kept
            )
        tokens, extras = asked.tokens, prompt_extras(asked.extras, namespace.page_size)
        if not self._index.pin(number, room.pool, tokens, **how, extras=extras):
            whose = "" if hard else f" by tenant {namespace.owner.tenant!r}"
            raise errors.LimitReached(
                f"limits.{'hard' if hard else 'soft'}_pin_percent",
                self._percent[hard],
                f"% of the {tier} tier ({room.room} blocks of this layout) may be pinned so{whose}",
            )
        resident = self._index.match(number, room.pool, tokens, extras).tiers[0]
        blocks = len(tokens) // namespace.page_size
        return PrefixPinned(blocks, resident, self._index.pinned_blocks(room.pool, hard=hard))

    def unpin(
        self, session: Session | None, namespace: Namespace, asked: Asked, *, tier: str
    ) -> int:
        """The blocks of the pin that has ended, or of those of keys; 0: there was none. Raises
        InvalidRequest."""
        self._check(namespace, asked)
        pool = self.pool(session, namespace, tier)
        if namespace.opaque:
            return int(self._index.unpin_keys(namespace.number, pool, asked.keys).sum())
        extras = prompt_extras(asked.extras, namespace.page_size)
        return self._index.unpin(namespace.number, pool, asked.tokens, extras)

    def _check(self, namespace: Namespace, asked: Asked) -> None:
        size = namespace.page_size
        if not namespace.opaque and len(asked.tokens) < size:
            raise errors.InvalidRequest(
                "tokens", f"{len(asked.tokens)} tokens", f"at least a block of {size}"
            )

    def pool(self, session: Session | None, namespace: Namespace, tier: str) -> int:
        """The index's id. Raises InvalidRequest for a tier that this caller or daemon lacks."""
        if tier == "gpu":
            if session is None or session.pool is None:
                raise errors.InvalidRequest("tier", tier, "cpu or disk, outside of a session")
            if session.layouts[namespace.id] is not session.pool.pools or namespace.opaque:
                allowed = "cpu or disk, for keys and for another layout than the session's"
                raise errors.InvalidRequest("tier", tier, allowed)
            return session.pool.id
        return self._below(namespace, tier)[0]

    def _below(self, namespace: Namespace, tier: str) -> tuple[int, int]:
        """The index's id of the pool in cpu or disk, and the bytes of a page there."""
        for link in namespace.pools.chain:
            if link.tier == tier:
                return link.id, link.store.shape.page_bytes
        raise errors.InvalidRequest("tier", tier, "a tier that this daemon has")

    def _room(
        self, session: Session | None, namespace: Namespace, tier: str, *, hard: bool
    ) -> PinRoom:
        percent = self._percent[hard]
        pool = self.pool(session, namespace, tier)
        tenant = None if hard else namespace.owner.number
        if tier == "gpu" and session is not None:
            return PinRoom(pool, session.num_pages * percent // 100, tenant)
        pool, page_bytes = self._below(namespace, tier)
        taken = self._bytes_elsewhere(tier, pool, tenant, hard=hard)
        limit = self._counts.tier(tier).capacity_bytes * percent // 100
        return PinRoom(pool, max(limit - taken, 0) // page_bytes, tenant)

    def _most(self, room: PinRoom, *, hard: bool) -> int:
        """Blocks that may be pinned in the pool by all, which is what the index is told: what the
        other tenants have there is theirs."""
        if room.tenant is None:
            return room.room
        blocks = partial(self._index.pinned_blocks, room.pool, hard=hard)
        return room.room + blocks() - blocks(tenant=room.tenant)

    def _bytes_elsewhere(self, tier: str, pool: int, tenant: int | None, *, hard: bool) -> int:
        """Pinned in the same way in the tier's pools of other layouts, by all or by a tenant."""
        chains = {each.pools.chain for each in self._namespaces}
        others = [link for chain in chains for link in chain if link.tier == tier]
        return sum(
            self._index.pinned_blocks(each.id, hard=hard, tenant=tenant)
            * each.store.shape.page_bytes
            for each in others
            if each.id != pool
        )


def _distinct(asked: Asked, chosen: U8) -> int:
    """How many keys were chosen, each counted once."""
    return len({key for key, one in zip(asked.keys, chosen.tolist(), strict=True) if one})
