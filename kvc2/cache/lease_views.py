"""What an open lease holds now, as its answer says it.

Changes nothing. Not here: what opens and ends a lease (leases.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvc2 import _core
from kvc2.answers import (
    NOWHERE,
    U8,
    Acquired,
    Components,
    TierTokens,
    of_offsets,
    of_pages,
)
from kvc2.cache.sessions import OpenLease
from kvc2.moving.loading import Loader

REMOTE = 4  # where a key was found: in the remote store


class LeaseViews:
    def __init__(self, index: _core.Index, loader: Loader) -> None:
        self._index = index
        self._loader = loader

    def there(self, lease: OpenLease, granted: Components = ()) -> Acquired:
        """With pages that were granted to compute the rest into. Raises KeyError for one that isn't
        open."""
        if lease.namespace.opaque:
            return self._keys_there(lease, granted)
        return self.prefix(lease, granted, self._index.lease(lease.id))

    def prefix(self, lease: OpenLease, granted: Components, view: _core.Lease) -> Acquired:
        """Of a lease on tokens that the index shows so."""
        to, size = lease.to, lease.namespace.page_size
        pages = view.pages[: view.arrived] if to.in_arena else view.pages
        tiers = (0, *_leading(view.tiers, pages.size)) if to.in_arena else view.tiers
        end = view.first_block + pages.size
        found = tokens_by_tier(tiers, size)
        coming = 0 if lease.is_brought else view.matched - end
        return Acquired(
            matched_tokens=end * size,
            tiers=found.from_remote(lease.brought.of(end) * size),
            transfer=0 if to.in_arena else to.gpu.pending.get(view.transfer, 0),
            computing_tokens=view.computing * size if end == view.matched else 0,
            held=of_offsets(to.pools.payloads(pages)) if to.in_arena else of_pages(pages),
            granted=granted,
            first_block=view.first_block,
            coming_blocks=coming,
            expected_ms=_expected_ms(self._loader, lease, coming),
        )

    def _keys_there(self, lease: OpenLease, granted: Components) -> Acquired:
        """By key where it is in the arena."""
        view, pools = self._index.key_lease(lease.id), lease.to.pools
        there = view.arrived.astype(bool)
        offsets = np.full(there.size, NOWHERE, np.uint64)
        offsets[there] = pools.payloads(view.pages[there])
        found = tiers_of_keys(view.found, lease.to.tiers)
        if lease.keys_brought.size:
            found[lease.keys_brought & there] = REMOTE
        blocks = blocks_by_tier(found[there])
        missing = int(np.count_nonzero(found) - np.count_nonzero(there))
        coming = 0 if lease.is_brought else missing
        return Acquired(
            matched_tokens=sum(blocks) * lease.namespace.page_size,
            tiers=tokens_by_tier(blocks, lease.namespace.page_size),
            held=of_offsets(offsets),
            granted=granted,
            found=found,
            coming_blocks=coming,
            expected_ms=_expected_ms(self._loader, lease, coming),
        )


def _expected_ms(loader: Loader, lease: OpenLease, coming_blocks: int) -> int:
    """In which they should be there; 0: it isn't known, or nothing comes."""
    if not coming_blocks:
        return 0
    return round(1000 * loader.seconds(coming_blocks * lease.to.pools.shape.page_bytes))


def tiers_of_keys(found: U8, tiers: Sequence[str]) -> U8:
    """By key 0, or 1 gpu, 2 cpu, 3 disk, of what the index found in these tiers."""
    return np.where(found, found + (3 - len(tiers)), 0).astype(np.uint8)


def blocks_by_tier(found: U8) -> list[int]:
    """How many keys were found in gpu, cpu, disk and remote."""
    return [int(np.count_nonzero(found == tier)) for tier in (1, 2, 3, REMOTE)]


def tokens_by_tier(blocks: Sequence[int], page_size: int) -> TierTokens:
    return TierTokens(*(count * page_size for count in blocks))


def nothing() -> Acquired:
    """The answer to an acquire that was released meanwhile."""
    return Acquired(0, TierTokens())


def _leading(tiers: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Of the first so many blocks, where the others came from the slowest tiers."""
    found = []
    for count in tiers:
        found.append(min(count, blocks))
        blocks -= found[-1]
    return tuple(found)
