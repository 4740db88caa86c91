"""Prefixes that somebody asked to keep in a tier: which pool that is, and how much may be kept.

A pin is on the names of blocks (csrc/index/prefix_pins.h): it holds for what comes later too, and
ends with unpin, with its namespace, its session's pool or the daemon. Hard pins take at most
limits.hard_pin_percent of a tier, soft ones all of it. Not here: what a pin forbids (csrc/index).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvc2 import _core, errors
from kvc2.answers import U32, PrefixPinned
from kvc2.cache.counts import Counts
from kvc2.cache.namespaces import Spaces
from kvc2.cache.sessions import Session
from kvc2.config import ServeConfig
from kvc2.tiers.pools import LayoutPools


@dataclass(frozen=True)
class PinRoom:
    """The pool of a namespace in a tier; `room`: blocks that may be pinned there in one way."""

    pool: int
    room: int


class Pins:
    """One thread (the event loop's) uses this."""

    def __init__(
        self, index: _core.Index, spaces: Spaces, counts: Counts, config: ServeConfig
    ) -> None:
        self._index = index
        self._spaces = spaces
        self._counts = counts
        self._hard_percent = config.limits.hard_pin_percent
        self._layouts: dict[int, LayoutPools] = {}  # by the number of a namespace

    def opened(self, number: int, pools: LayoutPools | None) -> None:
        """A session has opened the namespace; `pools` are those of its layout, below the gpu."""
        if pools is not None:
            self._layouts[number] = pools

    def gone(self, number: int) -> None:
        """The namespace is let go of: nothing of it is pinned."""
        self._layouts.pop(number, None)

    def pin(
        self, session: Session | None, number: int, tokens: U32, *, tier: str, hard: bool
    ) -> PrefixPinned:
        """Keep the full blocks of `tokens`. Raises InvalidRequest, and LimitReached when no more
        may be pinned: then nothing changes."""
        blocks = self._blocks(number, tokens)
        room = self._room(session, number, tier, hard=hard)
        space = self._spaces[number]
        if not self._index.pin(space, room.pool, tokens, hard=hard, max_blocks=room.room):
            percent = self._hard_percent if hard else 100
            raise errors.LimitReached(
                "limits.hard_pin_percent" if hard else "tier",
                percent,
                f"% of the {tier} tier ({room.room} blocks of this layout) may be pinned so",
            )
        resident = self._index.match(space, room.pool, tokens).tiers[0]
        return PrefixPinned(blocks, resident, self._index.pinned_blocks(room.pool, hard=hard))

    def unpin(self, session: Session | None, number: int, tokens: U32, *, tier: str) -> int:
        """The blocks of the pin that has ended; 0: there was none. Raises InvalidRequest."""
        self._blocks(number, tokens)
        room = self._room(session, number, tier, hard=False)
        return self._index.unpin(self._spaces[number], room.pool, tokens)

    def _blocks(self, number: int, tokens: U32) -> int:
        size = self._spaces.page_size(number)
        if len(tokens) < size:
            raise errors.InvalidRequest(
                "tokens", f"{len(tokens)} tokens", f"at least a block of {size}"
            )
        return len(tokens) // size

    def layout(self, number: int) -> LayoutPools | None:
        """The pools below the gpu of a namespace."""
        return self._layouts.get(number)

    def pool(self, session: Session | None, number: int, tier: str) -> int:
        """The index's id. Raises InvalidRequest for a tier that this caller or daemon lacks."""
        if tier == "gpu":
            if session is None or session.pool is None:
                raise errors.InvalidRequest("tier", tier, "cpu or disk, outside of a session")
            return session.pool.id
        pools = self._layouts.get(number)
        pool = None if pools is None else pools.cpu_id if tier == "cpu" else pools.disk_id
        if pool is None:
            raise errors.InvalidRequest("tier", tier, "a tier that this daemon has")
        return pool

    def _room(self, session: Session | None, number: int, tier: str, *, hard: bool) -> PinRoom:
        percent = self._hard_percent if hard else 100
        pool = self.pool(session, number, tier)
        if tier == "gpu" and session is not None:
            return PinRoom(pool, session.num_pages * percent // 100)
        page_bytes = self._layouts[number].shape.page_bytes
        taken = self._bytes_of_others(tier, pool, hard=hard)
        limit = self._counts.tier(tier).capacity_bytes * percent // 100
        return PinRoom(pool, max(limit - taken, 0) // page_bytes)

    def _bytes_of_others(self, tier: str, pool: int, *, hard: bool) -> int:
        """Pinned in the same way in the tier's pools of other layouts."""
        found = set()
        for each in self._layouts.values():
            other = each.cpu_id if tier == "cpu" else each.disk_id
            if other is not None and other != pool:
                found.add((other, each.shape.page_bytes))
        return sum(
            self._index.pinned_blocks(other, hard=hard) * page_bytes for other, page_bytes in found
        )
