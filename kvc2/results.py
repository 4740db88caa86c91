"""What the cache answers: plain values, for the server to put on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
SIZES = (0.5, 1.0, 2.0, 4.0)  # of a tier, for which its hit rate is estimated


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
class FlushResult:
    """Blocks on disk, and blocks that are not by reason: no_disk, disk_full, error, deadline."""

    durable_blocks: int
    not_durable: dict[str, int]


@dataclass(frozen=True)
class EvictResult:
    evicted: int
    last_copies: int


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
class CacheStats:
    tiers: list[TierCounts]
    pools: list[TierCounts]  # of sessions
    blocks: int
    holes: int
    leases: int
    namespaces: int
    metadata_bytes: int
    hit_rate_unlimited: float  # estimated: of a cache that forgets nothing
