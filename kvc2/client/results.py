"""What the calls answer, as frozen dataclasses; arrays are numpy's, read-only views of messages."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kvc2.v1 import cache_pb2

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
NO_PAGES: U32 = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True)
class TierTokens:
    """Tokens by the tier that they were found in."""

    gpu: int
    cpu: int
    disk: int
    remote: int


@dataclass(frozen=True)
class Hints:
    """What a request says of the blocks that it uses; 0 and False say nothing.

    session_end: nobody goes on from it. expect_return_within_s: a request that does is expected,
    and until four times that they are evicted after others of their priority.
    priority: 0 to 7, goes before recency. ttl_s: they match nobody so long after their last use."""

    session_end: bool = False
    expect_return_within_s: int = 0
    priority: int = 0
    ttl_s: int = 0


NO_HINTS = Hints()


@dataclass(frozen=True)
class Matched:
    """matched_tokens: a multiple of page_size, less than the tokens given."""

    matched_tokens: int
    tiers: TierTokens


@dataclass(frozen=True)
class Acquired:
    """A lease. prefix_pages [matched_tokens / page_size] lie in the session's pool, in order; layer
    i of them may be read when Client.wait_layer(transfer, i) is true, at once when transfer is 0.
    granted_pages: new private pages, maybe fewer than asked for. computing_tokens: tokens right
    after the prefix that another lease is computing now."""

    matched_tokens: int
    tiers: TierTokens
    prefix_pages: U32
    transfer: int
    granted_pages: U32
    computing_tokens: int


@dataclass(frozen=True)
class LeaseCommit:
    """Filled pages of one lease: tokens [k * page_size] of blocks [first_block, first_block + k),
    pages [k]."""

    request_id: bytes
    first_block: int
    tokens: U32
    pages: U32


@dataclass(frozen=True)
class Committed:
    """results: of each lease [k] of 0 adopted, 1 duplicate, 2 refused. durable: all adopted blocks
    are on disk; False unless asked for."""

    results: list[U8]
    granted: U32
    durable: bool


@dataclass(frozen=True)
class Released:
    granted: U32


@dataclass(frozen=True)
class Flushed:
    """not_durable_blocks by reason: no_disk, disk_full, error, deadline, pinned."""

    durable_blocks: int
    not_durable_blocks: dict[str, int]


@dataclass(frozen=True)
class Evicted:
    """last_copies: of the evicted blocks those that no tier holds any more."""

    evicted_blocks: int
    last_copies: int


@dataclass(frozen=True)
class PrefixPinned:
    """In blocks: of the prompt, of them in the tier now, of all pins of this kind there."""

    blocks: int
    resident_blocks: int
    pinned_blocks: int


@dataclass(frozen=True)
class Scrubbed:
    """A pass over the disk's blocks: the one under way, or the last one."""

    running: bool
    mb_per_s: int
    total_blocks: int
    verified_blocks: int
    verified_bytes: int
    bad_blocks: int
    seconds: float
    passes: int


@dataclass(frozen=True)
class Prefetched:
    """Tokens of the cached prefix by the tier they are in now; `coming_tokens` of them are still on
    their way to a faster one."""

    tiers: TierTokens
    coming_tokens: int


@dataclass(frozen=True)
class Invalidated:
    """`blocks` of `namespaces` are dead; durable: a restart knows it."""

    namespaces: int
    blocks: int
    durable: bool


@dataclass(frozen=True)
class TierStats:
    """pages == free + private + resident + in_flight; pinned ones are resident or in flight."""

    tier: str
    capacity_bytes: int
    pages: int
    free_pages: int
    private_pages: int
    resident_pages: int
    in_flight_pages: int
    pinned_pages: int


@dataclass(frozen=True)
class HitRates:
    """Shares of all prompts' tokens found in a tier or a faster one. `estimated`: had the tier been
    0.5, 1, 2 and 4 times as large; empty when it has no pages."""

    real: float
    estimated: tuple[float, ...]


@dataclass(frozen=True)
class SessionStats:
    session_epoch: int
    engine_name: str
    pid: int
    leases: int
    seconds: float
    pool: TierStats
    prefill_tokens_per_s: float  # 0: not known


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
class LayoutSlabs:
    """What one layout holds of the arena (tier cpu) or of the disk; `engines` that have it now."""

    layout: str
    tier: str
    engines: tuple[str, ...]
    page_size: int
    page_bytes: int
    slab_bytes: int
    slabs: int
    pages: int
    resident_pages: int


@dataclass(frozen=True)
class DaemonStats:
    """counters: every counter of /metrics by name, without kvc2_."""

    version: str
    instance: str
    uptime_s: float
    tiers: tuple[TierStats, ...]
    sessions: tuple[SessionStats, ...]
    blocks: int
    holes: int
    leases: int
    namespaces: int
    metadata_bytes: int
    counters: dict[str, float]
    hit_rates: dict[str, HitRates]  # by tier
    hit_rate_unlimited: float  # estimated: of a cache that forgets nothing
    tenants: tuple[TenantUse, ...]  # of the configuration, by tier
    slabs: tuple[LayoutSlabs, ...]  # by tier and layout


@dataclass(frozen=True)
class OtherNamespace:
    """Of the same tenant and salt; `fields` of the identity that differ: name, ours, theirs."""

    namespace: str
    hit_tokens: int
    fields: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Explained:
    """Which blocks of a prompt hit, `runs` of them by tier, and why the next one did not: the
    fields and words are those of kvc2.v1.ExplainResponse. namespace: hexadecimal."""

    page_size: int
    tokens: int
    hit_blocks: int
    runs: tuple[tuple[str, int], ...]
    why: str
    cause: str
    tier: str
    policy: str
    died_s_ago: float
    sibling: U32
    sibling_equal: int
    other: OtherNamespace | None
    namespace: str
    asked_s_ago: float
    uptime_s: float
    dead_known: int
    dead_forgotten: int


def explained(message: cache_pb2.ExplainResponse) -> Explained:
    other = message.other
    return Explained(
        page_size=message.page_size,
        tokens=message.tokens,
        hit_blocks=message.hit_blocks,
        runs=tuple((each.tier, each.blocks) for each in message.runs),
        why=message.why,
        cause=message.cause,
        tier=message.tier,
        policy=message.policy,
        died_s_ago=message.died_s_ago,
        sibling=pages(message.sibling),
        sibling_equal=message.sibling_equal,
        other=OtherNamespace(
            other.namespace.hex(),
            other.hit_tokens,
            tuple((each.name, each.ours, each.theirs) for each in other.fields),
        )
        if message.HasField("other")
        else None,
        namespace=message.namespace.hex(),
        asked_s_ago=message.asked_s_ago,
        uptime_s=message.uptime_s,
        dead_known=message.dead_known,
        dead_forgotten=message.dead_forgotten,
    )


def pages(data: bytes) -> U32:
    return np.frombuffer(data, dtype="<u4")


def packed(array: NDArray[np.uint32]) -> bytes:
    """A u32 array as the wire has it. Lists and other integer dtypes are converted."""
    return np.ascontiguousarray(array, dtype="<u4").tobytes()


def hints(said: Hints) -> cache_pb2.Hints:
    return cache_pb2.Hints(
        session_end=said.session_end,
        expect_return_within_s=said.expect_return_within_s,
        priority=said.priority,
        ttl_s=said.ttl_s,
    )


def tier_tokens(message: cache_pb2.TierTokens) -> TierTokens:
    return TierTokens(message.gpu, message.cpu, message.disk, message.remote)


def flushed(message: cache_pb2.FlushResponse) -> Flushed:
    return Flushed(message.durable_blocks, dict(message.not_durable_blocks))


def prefix_pinned(message: cache_pb2.PinResponse) -> PrefixPinned:
    return PrefixPinned(message.blocks, message.resident_blocks, message.pinned_blocks)


def scrubbed(message: cache_pb2.ScrubResponse) -> Scrubbed:
    return Scrubbed(**{each.name: getattr(message, each.name) for each in fields(Scrubbed)})


def prefetched(message: cache_pb2.PrefetchResponse) -> Prefetched:
    return Prefetched(tier_tokens(message.tiers), message.coming_tokens)


def invalidated(message: cache_pb2.InvalidateResponse) -> Invalidated:
    return Invalidated(message.namespaces, message.blocks, message.durable)


def tier_stats(message: cache_pb2.TierStats) -> TierStats:
    return TierStats(
        tier=message.tier,
        capacity_bytes=message.capacity_bytes,
        pages=message.pages,
        free_pages=message.free_pages,
        private_pages=message.private_pages,
        resident_pages=message.resident_pages,
        in_flight_pages=message.in_flight_pages,
        pinned_pages=message.pinned_pages,
    )


def daemon_stats(message: cache_pb2.StatsResponse) -> DaemonStats:
    return DaemonStats(
        version=message.version,
        instance=message.instance.hex(),
        uptime_s=message.uptime_s,
        tiers=tuple(tier_stats(each) for each in message.tiers),
        sessions=tuple(
            SessionStats(
                session_epoch=each.session_epoch,
                engine_name=each.engine_name,
                pid=each.pid,
                leases=each.leases,
                seconds=each.seconds,
                pool=tier_stats(each.pool),
                prefill_tokens_per_s=each.prefill_tokens_per_s,
            )
            for each in message.sessions
        ),
        blocks=message.blocks,
        holes=message.holes,
        leases=message.leases,
        namespaces=message.namespaces,
        metadata_bytes=message.metadata_bytes,
        counters=dict(message.counters),
        hit_rates={
            tier: HitRates(each.real, tuple(each.estimated))
            for tier, each in message.hit_rates.items()
        },
        hit_rate_unlimited=message.hit_rate_unlimited,
        tenants=tuple(tenant_use(each) for each in message.tenants),
        slabs=tuple(layout_slabs(each) for each in message.slabs),
    )


def layout_slabs(message: cache_pb2.LayoutSlabs) -> LayoutSlabs:
    return LayoutSlabs(
        layout=message.layout.hex(),
        tier=message.tier,
        engines=tuple(message.engines),
        page_size=message.page_size,
        page_bytes=message.page_bytes,
        slab_bytes=message.slab_bytes,
        slabs=message.slabs,
        pages=message.pages,
        resident_pages=message.resident_pages,
    )


def tenant_use(message: cache_pb2.TenantUse) -> TenantUse:
    return TenantUse(
        message.tenant,
        message.tier,
        message.bytes,
        message.blocks,
        message.max_bytes,
        message.max_blocks,
    )
