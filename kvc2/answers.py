"""What the daemon is asked and answers: one plain value for each message, for server and client.

A value has the names of its message's fields, and wire.py turns one into the other. Arrays that
come from a message are read-only views of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
NO_PAGES: U32 = np.zeros(0, dtype=np.uint32)
NO_KEYS: U8 = np.zeros(0, dtype=np.uint8)
NO_OFFSETS: U64 = np.zeros(0, dtype=np.uint64)
NOWHERE = np.uint64(0xFFFFFFFFFFFFFFFF)  # the offset of a key that isn't in the arena (yet)
NO_ROOM = 3  # result of a copied commit, beside _core.ADOPTED, DUPLICATE and REFUSED
SIZES = (0.5, 1.0, 2.0, 4.0)  # of a tier, for which its hit rate is estimated


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


def shorter(ttl_s: int, other_s: int) -> int:
    """Of two times to live, of which 0 is for ever."""
    return min(ttl_s or other_s, other_s or ttl_s)


class Media(NamedTuple):
    """An image or a sound: num_tokens of a prompt, from first_token on, stand for what has this
    digest of 32 bytes."""

    first_token: int
    num_tokens: int
    digest: bytes


def beginning(extras: Sequence[Media], first: int, end: int) -> tuple[Media, ...]:
    """Those that begin in tokens [first, end) of their prompt."""
    return tuple(each for each in extras if first <= each.first_token < end)


@dataclass(frozen=True)
class Asked:
    """Which blocks a call means: those of a prompt's tokens and `extras`, in the order in which
    these begin, or those of opaque keys (1 to 64 bytes each, every one for itself), as its
    namespace has it."""

    tokens: U32 = field(default_factory=lambda: NO_PAGES)
    keys: Sequence[bytes] = ()
    extras: Sequence[Media] = ()

    @staticmethod
    def of(what: U32 | Asked) -> Asked:
        """Tokens alone stand for their prompt."""
        return what if isinstance(what, Asked) else Asked(what)


@dataclass(frozen=True)
class Terms:
    """What a lease is asked for with: pages for its delta, how long its prefix may take, hints.
    in_arena: where it pins. skip_blocks: leading ones that the client has. at_once: answer with
    what is there; `poll` counts how often that was asked for."""

    grant_pages: int
    deadline_s: float
    hints: Hints = NO_HINTS
    in_arena: bool = False
    skip_blocks: int = 0
    at_once: bool = False
    poll: int = 0


@dataclass(frozen=True)
class TierTokens:
    """Tokens by the fastest tier that holds them, or by the tier that they were found in."""

    gpu: int = 0
    cpu: int = 0
    disk: int = 0
    remote: int = 0

    def from_remote(self, tokens: int) -> TierTokens:
        """The same, but so many of those of the cpu tier came there from the remote store."""
        came = min(tokens, self.cpu)
        return replace(self, cpu=self.cpu - came, remote=self.remote + came)

    def __iter__(self) -> Iterator[int]:
        """From the fastest tier on."""
        return iter((self.gpu, self.cpu, self.disk, self.remote))


@dataclass(frozen=True)
class Matched:
    """matched_tokens: a multiple of page_size, less than the tokens given. found: of each opaque
    key 0 (nowhere), or 1 gpu, 2 cpu, 3 disk, 4 remote."""

    matched_tokens: int
    tiers: TierTokens
    found: U8 = field(default_factory=lambda: NO_KEYS)


@dataclass(frozen=True)
class ComponentPages:
    """Pages of one component of the KV: ids of the session's pool, or where their payloads begin in
    the arena. Component 0, full attention, is the only one now."""

    component: int
    pages: U32 = field(default_factory=lambda: NO_PAGES)
    offsets: U64 = field(default_factory=lambda: NO_OFFSETS)


Components = tuple[ComponentPages, ...]


def of_pages(pages: U32) -> Components:
    """Of component 0; none where there are none."""
    return (ComponentPages(0, pages),) if pages.size else ()


def of_offsets(offsets: U64) -> Components:
    """Of component 0, in the arena."""
    return (ComponentPages(0, offsets=offsets),) if offsets.size else ()


def pages_of(components: Components) -> U32:
    """Of component 0."""
    return next((each.pages for each in components if not each.component), NO_PAGES)


@dataclass(frozen=True)
class Acquired:
    """A lease. prefix_pages [matched_tokens / page_size] lie in the session's pool, in order; layer
    i of them may be read when Client.wait_layer(transfer, i) is true, at once when transfer is 0.
    granted_pages: new private pages, maybe fewer than asked for. computing_tokens: tokens right
    after the prefix that another lease is computing now. `held` begins at block first_block; of a
    lease in the arena it has offsets. found: of opaque keys, as in Matched. coming_blocks: still on
    their way, for about expected_ms (0: not known)."""

    matched_tokens: int
    tiers: TierTokens
    transfer: int = 0
    computing_tokens: int = 0
    held: Components = ()
    granted: Components = ()
    first_block: int = 0
    found: U8 = field(default_factory=lambda: NO_KEYS)
    coming_blocks: int = 0
    expected_ms: int = 0

    @property
    def prefix_pages(self) -> U32:
        return pages_of(self.held)

    @property
    def offsets(self) -> U64:
        """[blocks] where each payload begins in the arena."""
        return next((each.offsets for each in self.held if not each.component), NO_OFFSETS)

    @property
    def granted_pages(self) -> U32:
        return pages_of(self.granted)


@dataclass(frozen=True)
class LeaseCommit:
    """Filled pages of one lease: tokens [k * page_size] of blocks [first_block, first_block + k),
    pages [k]; extras that begin in these, counted from the start of the prompt."""

    request_id: bytes
    first_block: int
    tokens: U32
    pages: U32
    extras: Sequence[Media] = ()


@dataclass(frozen=True)
class Committed:
    """results: of each lease [k] of 0 adopted, 1 duplicate, 2 refused, 3 no room (copied). durable:
    all adopted blocks are on disk; False unless asked for."""

    results: list[U8]
    durable: bool
    granted: Components = ()

    @property
    def granted_pages(self) -> U32:
        return pages_of(self.granted)


@dataclass(frozen=True)
class Released:
    granted: Components = ()

    @property
    def granted_pages(self) -> U32:
        return pages_of(self.granted)


@dataclass(frozen=True)
class Limits:
    """What a daemon takes of one call or session; the names are those of its configuration."""

    max_tokens: int
    max_leases: int
    max_namespaces: int
    max_leases_per_call: int
    max_grant_pages: int
    max_keys: int
    max_message_bytes: int
    acquire_deadline_ms: int
    max_streams: int


class TierBlocks(NamedTuple):
    tier: str
    blocks: int


class DifferingField(NamedTuple):
    """A field of the identity in which two namespaces differ."""

    name: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class OtherNamespace:
    """One of the same tenant and salt that has more of the prompt, and how its identity differs.
    namespace: hexadecimal."""

    namespace: str
    hit_tokens: int
    fields: tuple[DifferingField, ...]


@dataclass(frozen=True)
class Explained:
    """Which leading blocks of a prompt hit (`runs` of them by tier, at most 64), and `why` the next
    one did not, in the words of kvc2.v1.ExplainResponse. `cause`, `tier`, `policy`, `died_s_ago`:
    of a block that died; `worth`, `victim_worth`: why a tier refused it. `sibling`: tokens of the
    block in its place, `sibling_equal` of them equal; where all are, other extras begin in it.
    namespace: hexadecimal. asked_s_ago: of a request that is over."""

    page_size: int
    tokens: int
    hit_blocks: int = 0
    runs: tuple[TierBlocks, ...] = ()
    why: str = "nothing"
    cause: str = ""
    tier: str = ""
    policy: str = ""
    died_s_ago: float = 0.0
    sibling: U32 = field(default_factory=lambda: NO_PAGES)
    sibling_equal: int = 0
    other: OtherNamespace | None = None
    namespace: str = ""
    asked_s_ago: float = 0.0
    uptime_s: float = 0.0
    dead_known: int = 0
    dead_forgotten: int = 0
    worth: float = 0.0
    victim_worth: float = 0.0


@dataclass(frozen=True)
class Flushed:
    """Blocks on disk, and blocks that are not by reason: no_disk, disk_full, error, deadline,
    not_admitted."""

    durable_blocks: int
    not_durable_blocks: dict[str, int]


@dataclass(frozen=True)
class Evicted:
    """last_copies: of the evicted blocks those that no tier holds any more."""

    evicted_blocks: int
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
class PrefixPinned:
    """In blocks: of the prompt, or of the keys that are pinned now; of them in the tier now; of all
    pins of this kind in its pool. pinned [n]: 1 for each key that is pinned, 0 where there was no
    room."""

    blocks: int
    resident_blocks: int
    pinned_blocks: int
    pinned: U8 = field(default_factory=lambda: NO_KEYS)


@dataclass(frozen=True)
class Prefetched:
    """Tokens of the cached prefix by the tier they are in now; `coming_tokens` of them are still on
    their way to a faster one."""

    tiers: TierTokens
    coming_tokens: int


@dataclass(frozen=True)
class Scrubbed:
    """A pass over the disk's blocks: the one under way, or the last one; `passes` that came to
    their end since the start. Blocks that came or went meanwhile make verified_blocks another
    number than total_blocks."""

    running: bool
    mb_per_s: int
    total_blocks: int
    verified_blocks: int
    verified_bytes: int
    bad_blocks: int
    seconds: float
    passes: int


@dataclass(frozen=True)
class Invalidated:
    """`blocks` of `namespaces` are dead; durable: a restart knows it."""

    namespaces: int
    blocks: int
    durable: bool


@dataclass(frozen=True)
class TierStats:
    """Pages of a tier, or of one session's pool, by owner: pages == free + private + resident +
    in_flight; pinned ones are resident or in flight."""

    tier: str = ""
    capacity_bytes: int = 0
    pages: int = 0
    free_pages: int = 0
    private_pages: int = 0
    resident_pages: int = 0
    in_flight_pages: int = 0
    pinned_pages: int = 0


class Refusals(NamedTuple):
    """Blocks that a tier refused since the start. Of those that the policy watches, some were asked
    for again and missed: regretted."""

    blocks: int = 0
    watched: int = 0
    regretted: int = 0


NONE_REFUSED = Refusals()


@dataclass(frozen=True)
class TierCounts(TierStats):
    """What the cache counts besides. `evicted` since the start, of these `last_copies` were in no
    other pool. session_epoch: of a session's pool."""

    evicted: int = 0
    last_copies: int = 0
    refusals: Refusals = NONE_REFUSED
    session_epoch: int = 0
    hit_rates: tuple[float, ...] = ()  # of a tier: estimated, at SIZES times its capacity


@dataclass(frozen=True)
class HitRates:
    """Shares of all prompts' tokens found in a tier or a faster one. `estimated`: had the tier been
    SIZES times as large; empty when it has no pages."""

    real: float
    estimated: tuple[float, ...]


@dataclass(frozen=True)
class SessionStats:
    """pool: all zero until the session has one. prefill_tokens_per_s: 0 when it is not known."""

    session_epoch: int
    engine_name: str
    pid: int
    leases: int
    seconds: float
    pool: TierStats
    prefill_tokens_per_s: float


@dataclass(frozen=True)
class LayoutSlabs:
    """What one layout (its digest, hexadecimal) holds of the arena (tier cpu) or of the disk;
    `engines` that have it now."""

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
    """counters: every counter of /metrics by name, without kvc2_. instance: hexadecimal."""

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
class CacheStats:
    """What the cache itself knows of DaemonStats; `pools` of sessions."""

    tiers: tuple[TierCounts, ...]
    pools: tuple[TierCounts, ...]
    blocks: int
    holes: int
    leases: int
    namespaces: int
    metadata_bytes: int
    hit_rate_unlimited: float
    slabs: tuple[LayoutSlabs, ...]
