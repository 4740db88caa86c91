"""What the cache is asked and answers: plain values, as the server has them on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
SIZES = (0.5, 1.0, 2.0, 4.0)  # of a tier, for which its hit rate is estimated


@dataclass(frozen=True)
class Hints:
    """What a request says of its blocks; 0 and False say nothing. See cache.proto, Hints."""

    session_end: bool = False
    expect_return_within_s: int = 0
    priority: int = 0
    ttl_s: int = 0


def shorter(ttl_s: int, other_s: int) -> int:
    """Of two times to live, of which 0 is for ever."""
    return min(ttl_s or other_s, other_s or ttl_s)


@dataclass(frozen=True)
class Terms:
    """What a lease is asked for with: pages for its delta, how long its prefix may take, hints."""

    grant_pages: int
    deadline_s: float
    hints: Hints = Hints()


@dataclass(frozen=True)
class MatchResult:
    """tiers: tokens by the fastest tier that holds them (gpu, cpu, disk, remote)."""

    matched_tokens: int
    tiers: tuple[int, ...]


@dataclass(frozen=True)
class AcquireResult:
    """`transfer` is the session's sequence number that the prefix depends on; 0: all is there."""

    matched_tokens: int
    tiers: tuple[int, ...]
    prefix_pages: U32
    transfer: int
    granted_pages: U32
    computing_tokens: int


@dataclass(frozen=True)
class Elsewhere:
    """A namespace of the same tenant and salt that has more of the prompt; `fields` are those of
    the identity that differ: name, ours, theirs."""

    namespace: bytes
    hit_tokens: int
    fields: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Explained:
    """Which leading blocks hit (`runs` of them by tier, at most 64), and `why` the next one did
    not, in the words of kvc2.v1.ExplainResponse. `cause`, `tier`, `policy`, `died_s_ago`: of a
    block that died. `sibling`: tokens of the block in its place, `sibling_equal` of them equal."""

    page_size: int
    tokens: int
    hit_blocks: int = 0
    runs: list[tuple[str, int]] = field(default_factory=list)
    why: str = "nothing"
    cause: str = ""
    tier: str = ""
    policy: str = ""
    died_s_ago: float = 0.0
    sibling_equal: int = 0
    sibling: U32 = field(default_factory=lambda: np.empty(0, np.uint32))
    other: Elsewhere | None = None
    namespace: bytes = b""
    asked_s_ago: float = 0.0  # of a request that is over
    uptime_s: float = 0.0
    dead_known: int = 0
    dead_forgotten: int = 0


@dataclass(frozen=True)
class FlushResult:
    """Blocks on disk, and blocks that are not by reason: no_disk, disk_full, error, deadline,
    not_admitted."""

    durable_blocks: int
    not_durable: dict[str, int]


@dataclass(frozen=True)
class EvictResult:
    evicted: int
    last_copies: int


@dataclass(frozen=True)
class TenantUse:
    """What a declared tenant takes of a tier, and may take; max 0: no limit."""

    tenant: str
    tier: str
    bytes: int
    blocks: int
    max_bytes: int
    max_blocks: int


@dataclass(frozen=True)
class PinResult:
    """In blocks: of the prompt, of them in the tier now, of all pins of this kind in its pool."""

    blocks: int
    resident: int
    pinned: int


@dataclass(frozen=True)
class PrefetchResult:
    """Cached tokens by the fastest tier that holds them, and those that are still on their way."""

    tiers: tuple[int, ...]
    coming: int


@dataclass(frozen=True)
class ScrubResult:
    """Of a pass over the disk's blocks; `passes` that came to their end since the start. Blocks
    that came or went meanwhile make verified_blocks another number than total_blocks."""

    running: bool
    mb_per_s: int
    total_blocks: int
    verified_blocks: int
    verified_bytes: int
    bad_blocks: int
    seconds: float
    passes: int


@dataclass(frozen=True)
class InvalidateResult:
    """`blocks` of `namespaces` are dead; `durable`: also to a restart."""

    namespaces: int
    blocks: int
    durable: bool


@dataclass(frozen=True)
class TierCounts:
    """Pages by owner of a tier, or of one session's pool (session_epoch). `evicted` since the
    start, of these `last_copies` were in no other pool."""

    tier: str
    capacity_bytes: int
    pages: int = 0
    free: int = 0
    private: int = 0
    resident: int = 0
    in_flight: int = 0
    pinned: int = 0
    evicted: int = 0
    last_copies: int = 0
    session_epoch: int = 0
    hit_rates: tuple[float, ...] = ()  # of a tier: estimated, at SIZES times its capacity


@dataclass(frozen=True)
class LayoutSlabs:
    """What one layout holds of the arena (tier cpu) or of the disk; `engines` that have it now."""

    layout: bytes
    tier: str
    engines: list[str]
    page_size: int
    page_bytes: int
    slab_bytes: int
    slabs: int
    pages: int
    resident_pages: int


@dataclass(frozen=True)
class CacheStats:
    tiers: list[TierCounts]
    pools: list[TierCounts]  # of sessions
    blocks: int
    holes: int
    leases: int
    namespaces: int
    metadata_bytes: int
    hit_rate_unlimited: float  # estimated: of a cache that forgets nothing
    slabs: list[LayoutSlabs]  # of cpu, then of disk
