"""The C++ core as Python sees it: the index, block headers, page copies. Arrays in, arrays out.

Every call takes whole arrays and releases the GIL; none is made once per block. Shapes are written
[n, k]; all arrays are C-contiguous and little-endian. A wrong dtype or shape is a TypeError or
ValueError that names the argument. An unknown pool, lease or transfer id is a KeyError. A broken
invariant ends the process (csrc/base/check.h).
"""

import enum
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

U8: TypeAlias = NDArray[np.uint8]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]

# ---- index (csrc/index) ----------------------------------------------------------------------

ADOPTED: Final[int]  # the page is now that block's residency in this pool
DUPLICATE: Final[int]  # the block has a page here; this one stays private to its lease
REFUSED: Final[int]  # nothing happened: a gap, a page that is not private here, or a key collision

DURABLE_MARGIN: Final[float]  # times its victim's worth that a durable pool asks of a block (I14)
RESTORED: Final[int]  # in the tree
ORPHAN: Final[int]  # its parent is neither a namespace nor restored
FORGED: Final[int]  # digest != SHA-256(parent || tokens)
CONFLICT: Final[int]  # its page is taken, out of range, or its block has a page in the pool already

class PoolCounts:
    """A pool's pages by owner (I5: free + private + resident + in_flight == pages)."""

    slabs: int
    pages: int
    free: int
    private: int
    resident: int
    in_flight: int
    pinned: int  # of the resident and in-flight ones
    evicted: int  # since the pool was made; pages that faults took are not counted
    last_copies: int  # evicted pages whose block was in no other pool
    refused: int  # blocks that it would not have (I14), each time that it was offered them

class IndexCounts:
    namespaces: int
    nodes: int
    blocks: int  # with a page somewhere
    holes: int
    leases: int
    transfers: int
    metadata_bytes: int  # of the tree and the pools, beside the tokens
    collisions: int  # commits refused because a key stood for other tokens
    deaths: int  # of blocks whose last page went, since the start
    dead_known: int  # deaths that are remembered
    dead_bytes: int  # memory that they take: at most 40 bytes each

class Hints:
    """What a request says of the blocks that it uses; 0 and False say nothing.

    ttl_s: the blocks match for so long after their last use. The longest time that a request gave
    them holds; a request without ttl_s lets them match for ever. priority, 0 to 7: blocks of a
    lower one are evicted first, whatever their recency; the highest that a request gave them holds.
    session_end: blocks that no other request has used, and from which none goes on, are evicted
    first, unless they have a priority. expect_return_within_s: until four times as long has passed
    the blocks are evicted after others of their priority."""

    def __init__(
        self,
        *,
        ttl_s: int = 0,
        expect_return_within_s: int = 0,
        priority: int = 0,
        session_end: bool = False,
    ) -> None: ...

class Match:
    """What a lookup found. `tiers[i]` counts the blocks whose fastest page is in the i-th pool of
    the chain that starts at the pool asked for (gpu, cpu, disk)."""

    blocks: int
    tiers: tuple[int, ...]

class Transfer:
    """One batched move between two pools, or (plan_move) within one, in prefix order. Its source
    pages are pinned until `complete`, and so are the target's. `records` is None unless one of the
    two pools is durable."""

    id: int  # rises by one with each transfer of this index, from 1
    source: int
    target: int
    source_pages: U32  # [n]
    target_pages: U32  # [n]
    extents: U32  # [m, 3] (first source page, first target page, count): the same pages as runs
    records: Records | None

class Records:
    """The identity of a transfer's blocks, as the header and the catalogue write it."""

    namespaces: U8  # [n, 32]
    digests: U8  # [n, 32]
    parents: U8  # [n, 32] digest of the block before; of a first block its namespace
    keys: U8  # [n, 16]
    tokens: U32  # [n, page_size]; zeros where an external key names the block
    generations: U64  # [n] of the page in the durable pool
    external_bytes: U8  # [n] length of the external key, 1 to 64; 0: tokens name the block
    external_keys: U8  # [n, 64] padded with zeros
    extras: U8  # [n, 32] digest of what a block has beside its tokens; zeros: nothing

    def __init__(
        self,
        *,
        namespaces: U8,
        digests: U8,
        parents: U8,
        keys: U8,
        tokens: U32,
        generations: U64,
        external_bytes: U8 | None = None,
        external_keys: U8 | None = None,
        extras: U8 | None = None,
    ) -> None:
        """The last three: zeros where they are None."""

class Wait:
    """The next block is on its way in a transfer of someone else: await it, then ask again."""

    transfer: int

class Evicted:
    """Pages that were resident and are free now. In a durable pool the caller deletes these digests
    before it plans the next transfer into that pool: a page is reused only after its record is
    gone for good."""

    pages: U32  # [n]
    digests: U8  # [n, 32] in a durable pool, [0, 32] elsewhere
    last_copies: int  # pages whose block was in no other pool

class Lease:
    """The state of an open lease.

    `pages` are its pool's pages of its blocks from `first_block` on, in order: resident or being
    filled by a transfer <= `transfer`. Every one is pinned. `tiers` says where those blocks were
    found.

    An open lease may be carried on at any time, also much later: `promote` and `next_load` bring
    what it matched and has no page of, `lease` says what is there now. What others have committed
    since is found by a new acquire, not by the lease.
    """

    id: int
    matched: int  # blocks that some tier of the chain held at acquire, holes excluded
    first_block: (
        int  # that `pages` begins with: skip_blocks of acquire, or `matched` if that is less
    )
    pages: U32  # [blocks leased and committed so far]
    tiers: tuple[int, ...]  # of `pages` found at acquire, by the tier they were found in
    transfer: int  # the last transfer its pages depend on; 0 when all are resident
    arrived: int  # leading ones of `pages` that are resident
    computing: int  # blocks right after `matched` that another open lease is computing now
    ahead: U32  # [m, 2] (tier, blocks): runs of matched blocks after `pages`, as acquire found them
    # of the blocks asked for, as acquire found it (16 siblings are looked at, not 4096); empty
    # from `lease`
    explanation: Explanation

class KeyLease:
    """The state of an open lease on opaque keys. Each key is for itself: any may be missing."""

    id: int
    found: U8  # [n] as match_keys, when it was acquired
    pages: U32  # [n] of the lease's pool, pinned; NO_PAGE where the key is not there (yet)
    arrived: U8  # [n] 1 where the key has a page that is not being filled
    transfer: int  # the last transfer that fills one of `pages`; 0 when all are resident

class Why(enum.Enum):
    """Why the first missing block is not there. Compare with ==."""

    NOTHING = ...  # no full block is missing
    NEVER_SEEN = ...  # not in the tree, and not among the dead that are remembered
    DIVERGED = ...  # as NEVER_SEEN, but resident blocks stand in its place: `sibling`
    HOLE = ...  # in the tree, above a block that has a page: a fault took it
    ELSEWHERE = ...  # resident, but in none of the pools asked for
    ARRIVING = ...  # its only pages are still being filled
    DIED = ...  # it was in the tree, or is there still but matches no request any more: `death`

class Cause(enum.Enum):
    """How a block's last page went. Compare with ==."""

    EVICTED = ...  # for room, or because somebody asked for it
    LOST = ...  # a fault took its page
    SESSION_ENDED = ...  # it was in the pool of a session that is over, and nowhere else
    TRANSFER_FAILED = ...  # its only page was being filled when the transfer failed
    INVALIDATED = ...  # its namespace is retired
    EXPIRED = ...  # its time to live was over
    NOT_ADMITTED = ...  # a pool refused it (I14), and what had it meanwhile has evicted it

class Obituary:
    cause: Cause
    pool: int  # that held its last page, or refused it
    worth: float  # of NOT_ADMITTED: of its page, in hits an acquire, as the policy saw it
    victim_worth: float  # ... and of the page that would have been evicted for it; else 0
    when: int  # second of the caller's clock, as `advance` had told it

class Sibling:
    """The resident block in the missing one's place that begins most like it."""

    common: int  # leading tokens of the block that are the same; all: the extras differ
    tokens: U32  # [page_size] of the sibling

class Explanation:
    blocks: int  # leading ones that are there
    runs: U32  # [at most 64, 2] (tier, blocks) of them, in prefix order
    why: Why
    death: Obituary | None  # of DIED; of a HOLE where it is remembered
    sibling: Sibling | None  # of DIVERGED; of DIED where there is one

class PromptExtras:
    """Extras of some blocks of a prompt: each is part of its block's names, beside the tokens."""

    def __init__(self, blocks: U32, digests: U8) -> None:
        """blocks [n], rising: positions in the prompt; digests [n, 32], of which zeros mean none.
        ValueError for others."""

KV_CLEARED: Final[int]  # whatever was told: nothing is anywhere
KV_STORED: Final[int]  # the block is in the tier
KV_REMOVED: Final[int]  # it is there no more

class KvEvents:
    """Changes of what is in which tier, in their order."""

    kinds: U8  # [n] KV_CLEARED, KV_STORED or KV_REMOVED
    tiers: U8  # [n] as the pools were given them
    opaque: U8  # [n] 1: an opaque key names the block
    page_sizes: U32  # [n] tokens of a block
    words_of: U32  # [n] how many of `words` it has; a removed block without opaque key has none
    words: U32  # a stored block's tokens; of an opaque key its length in bytes, and 64 bytes
    namespaces: U8  # [n, 32]
    extras: U8  # [n, 32] zeros: none
    keys: U8  # [n, 16]
    parents: U8  # [n, 16] key of the block before; zeros: it is the first of its path

class Index:
    """The tree, its pools and the leases on it; csrc/index/index.h states its laws, I1-I14.

    It never moves a byte, waits, or reads a clock. Threads may share it: one lock inside.
    """

    def __init__(
        self,
        *,
        first_generation: int = 1,
        first_stamp: int = 1,
        policy: str = "lru",
        seed: int = 0,
        dead_blocks: int = 65536,
        admission: bool = False,
        kv_event_bytes: int = 0,
    ) -> None:
        """Generations (of pages in durable pools) rise from first_generation, stamps (recency) from
        first_stamp. The policy, "lru", "arc", "s3fifo" or "hazard", chooses what every pool evicts;
        under the same seed it decides the same. ValueError: another policy. The last `dead_blocks`
        deaths of blocks are remembered, 40 bytes each, and so are refused blocks. admission: pools
        may refuse blocks (I14), under a policy that knows what they are worth, as "hazard" does.
        kv_event_bytes: at most so much is kept of what `take_kv_events` answers; 0: nothing."""

    # pools and slabs
    def add_pool(
        self,
        *,
        page_size: int,
        pages_per_slab: int,
        below: int | None,
        durable: bool,
        tier: int = 0,
        page_bytes: int = 1,
        second_access: bool = False,
    ) -> int:
        """A pool without slabs. `below` is the next slower pool of its chain. Ids are never
        reused. Quotas count by `tier` (0 to 255), in blocks and in `page_bytes` for each.
        second_access: only blocks that an acquire has matched are demoted into it."""
    def add_slab(self, pool: int) -> int:
        """One more slab, at the lowest free number s: pages [s * pages_per_slab, (s+1) * ...)."""
    def take_slab(self, pool: int, slab: int) -> bool:
        """Remove the slab, open or closed, if nothing is in it; False otherwise. Its number becomes
        free."""
    def close_slab(self, pool: int, slab: int) -> bool:
        """Begin to empty a slab. No page of it is taken any more. Its free pages do not count as
        the pool's, nor do pages that are freed in it later. False, and nothing changes, when there
        is no open slab of that number, or a page of it is private, pinned or in flight."""
    def reopen_slab(self, pool: int, slab: int) -> bool:
        """Stop emptying the slab: pages that were freed in it are free again. False: not closed."""
    def slab_pages(self, pool: int) -> U32:
        """[slabs] by number the pages that are not free: what emptying it would evict or move;
        0xFFFFFFFF where there is no slab, or a closed one."""
    def victim_age(self, pool: int) -> int | None:
        """The age, in acquires of all pools, of the block that the pool would evict next if it went
        by age alone: acquires since that block was last used. None when it could evict none."""
    def pool_counts(self, pool: int) -> PoolCounts: ...
    def page_size(self, pool: int) -> int: ...
    def close_pool(self, pool: int) -> None:
        """A session ended: its leases are released, private pages freed, nothing is planned into it
        again. It stays a source for `plan_demote` until `remove_pool`."""
    def remove_pool(self, pool: int) -> None:
        """Forget a closed pool and what is resident in it. Transfers under way from or into it
        count as failed; completing one later is ignored."""

    # namespaces
    def open_namespace(self, namespace: bytes, page_size: int, *, opaque: bool = False) -> int:
        """32 bytes -> its id in this index; the same id when opened again. ValueError if it was
        opened with another page_size, or for the other kind of blocks. page_size is that of its
        pools. opaque: its blocks are named by keys, and the calls with `keys` are for it; those
        with `tokens` are for all others (ValueError)."""
    def close_namespace(self, namespace: int) -> bool:
        """Forget the namespace. Its id is unknown until another namespace gets it: the caller uses
        the id no more. False, and nothing changes, while it has blocks, open leases or pins."""
    def has_pins(self, namespace: int) -> bool:
        """Whether a prefix of the namespace is pinned (`pin`)."""
    def set_quota(
        self, tenant: int, tier: int, *, max_bytes: int = ..., max_blocks: int = ...
    ) -> None:
        """What the tenant (1 or more) may take of all pools of a tier; without one of the two, that
        is not limited. ValueError if it is the tenant's first there, after its namespaces."""
    def set_tenant(self, namespace: int, tenant: int) -> None:
        """The namespace is the tenant's: what it has counts in its quotas. ValueError if it is
        another's. Walks the namespace."""
    def quota_use(self, tenant: int, tier: int) -> tuple[int, int]:
        """Bytes and blocks that count in a tenant's quota; 0 where it has none."""
    def trim(self, pool: int) -> Evicted:
        """Evict blocks of the tenants that are over their quota in the pool's tier, the coldest of
        each first, until none is or none of their blocks may go. While a tenant is over its quota,
        no other's blocks are evicted there for want of a page."""
    def retire(self, namespace: int) -> int:
        """All blocks of the namespace are dead from now on, for ever: nothing of it matches or is
        committed, demoted or loaded, and `reap` frees its pages as pins end. Returns how many
        blocks it had; 0 when it was retired already. Walks the namespace."""

    # requests; `extras` are of the blocks of `tokens`, and of what lies beyond them none counts
    def match(
        self, namespace: int, pool: int, tokens: U32, extras: PromptExtras | None = None
    ) -> Match:
        """The longest cached prefix of full blocks along the chain of `pool`. Changes nothing. All
        full blocks of `tokens` count; a caller that must compute the last token cuts it off."""
    def explain(
        self,
        namespace: int,
        pools: Sequence[int],
        tokens: U32,
        extras: PromptExtras | None = None,
    ) -> Explanation:
        """The leading full blocks that some of `pools` (at most 255, fastest first) hold, and why
        the next one is missing. A tier is a position in `pools`. Changes nothing."""
    def acquire(
        self,
        namespace: int,
        pool: int,
        tokens: U32,
        max_blocks: int,
        hints: Hints = ...,
        *,
        skip_blocks: int = 0,
        touches: bool = True,
        extras: PromptExtras | None = None,
    ) -> Lease:
        """Open a lease on at most max_blocks matched blocks. Touches them, pins the leading ones
        that are in `pool` or on their way there, and registers the other full blocks of `tokens` as
        being computed. `pool` is any that is not durable: an engine's, or the one above the disk,
        whose pages are then read in place.

        The caller has the first skip_blocks blocks: they are matched and touched, but the lease
        neither pins nor brings them. As long as it has no page they may be evicted, and then
        nothing more of it can be brought or committed. Blocks of them that are not matched are not
        skipped: the lease begins with them, to be computed.

        touches: it is a use of these blocks. Else it only pins, and takes commits: nothing is
        learnt of it, no block lives longer for it, and it counts as computing nothing."""
    def next_load(self, lease: int, max_pages: int) -> Transfer | Wait | None:
        """The next part of the leased prefix that must come from a durable pool into the pool above
        it, evicting there; None when there is nothing left that can be loaded and must be. Always
        None where that pool is the lease's own: `promote` brings from the pool below."""
    def prefetch(
        self,
        namespace: int,
        pool: int,
        tokens: U32,
        max_pages: int,
        *,
        touches: bool,
        extras: PromptExtras | None = None,
    ) -> Transfer | Wait | None:
        """Bring the longest prefix that is cached in the chain of `pool` one pool nearer to `pool`:
        its next part, in prefix order, evicting there; None when there is nothing left that can be
        brought. No lease holds what has come: it may be evicted again. touches: the prefix counts
        as used now, but its expiry stays. Walks the path."""
    def promote(self, lease: int, max_pages: int = ...) -> Transfer | None:
        """Move the run that follows the lease's pages and is resident in the pool below, durable or
        not, into the lease's pool, as far as free and evictable pages go, but at most max_pages of
        it. The lease has these pages at once and depends on the transfer; it has at once, too, what
        has come into its pool by itself. None when there is nothing to move or no room."""
    def lease(self, lease: int) -> Lease: ...
    def shorten(self, lease: int, blocks: int) -> None:
        """The lease brings at most `blocks` of the blocks that it matched, or those that it has
        pages of, if these are more. It computes the others, and other leases see that
        (`computing`). Nothing changes after its first commit, or when a failed transfer has cost it
        pages that were there at acquire."""
    def held_in(self, lease: int, pool: int) -> int:
        """Of the blocks that the lease has pages of, how many are resident in `pool` too."""
    def commit(
        self,
        lease: int,
        first_block: int,
        tokens: U32,
        pages: U32,
        extras: PromptExtras | None = None,
    ) -> U8:
        """[k] of ADOPTED, DUPLICATE, REFUSED for blocks [first_block, first_block + k) of the
        lease's prompt, tokens [k * page_size], pages [k] private to the lease's pool. `extras`
        count from the prompt's first block. The same call again has the same answer, if pages,
        tokens and extras are the same. After one REFUSED all are refused."""
    def release(self, lease: int, hints: Hints = ...) -> None:
        """Close the lease: its pages are unpinned, the pages of duplicates are free, its blocks no
        longer count as being computed. `hints` replace acquire's, unless they say nothing. They
        hold for the blocks that the lease has; ttl_s counts from now."""
    def release_all(self, leases: U64) -> int:
        """Close those of these leases that are open, as close_pool does with its own, and pass over
        the others. Returns how many were open. For a session that ends and whose pool stays."""

    # opaque keys: sequences of bytes objects of 1 to 64 bytes. A key is a block of its own, with
    # 17 words (its length in bytes, the key padded with zeros to 64) in the place of tokens: its
    # digest is SHA-256(namespace || words), its block key xxh3_128(xxh3_128(namespace) || words).
    # next_load, promote, release, release_all and held_in take leases of both kinds.
    def match_keys(self, namespace: int, pool: int, keys: Sequence[bytes]) -> U8:
        """[n] 0: in no pool of the chain of `pool`, or dead; else 1 + the place in that chain of
        the fastest pool that has it. Changes nothing."""
    def explain_keys(
        self, namespace: int, pools: Sequence[int], keys: Sequence[bytes]
    ) -> list[Explanation]:
        """`explain` of each key, as a prompt of one block; there are no siblings."""
    def acquire_keys(
        self,
        namespace: int,
        pool: int,
        keys: Sequence[bytes],
        hints: Hints = ...,
        *,
        touches: bool = True,
    ) -> KeyLease:
        """Open a lease on those of the keys that are found. Touches them, and pins those that are
        in `pool` or on their way there. promote and next_load bring the others, in the order of the
        keys; one that cannot be brought is passed over. touches: as in acquire."""
    def key_lease(self, lease: int) -> KeyLease: ...
    def commit_keys(
        self,
        namespace: int,
        pool: int,
        keys: Sequence[bytes],
        pages: U32,
        *,
        lease: int | None = None,
        hints: Hints = ...,
    ) -> U8:
        """[n] of ADOPTED, DUPLICATE, REFUSED for pages [n] private to `pool`, each for itself. A
        duplicate's page stays private, the caller's. The same key and page again are ADOPTED again.
        With a lease on keys of the same namespace and pool (ValueError otherwise), what is adopted
        is pinned until its release, and its hints count; without one nothing is pinned, and the
        keys count as used now."""
    def prefetch_keys(
        self,
        namespace: int,
        pool: int,
        keys: Sequence[bytes],
        max_pages: int,
        *,
        touches: bool,
    ) -> Transfer | Wait | None:
        """As `prefetch`: some of the keys one pool nearer to `pool`; Wait where all that could be
        brought is on its way already."""
    def pin_keys(
        self,
        namespace: int,
        pool: int,
        keys: Sequence[bytes],
        *,
        hard: bool,
        max_blocks: int,
        ttl_s: int = 0,
        keep_stronger: bool = False,
    ) -> U8:
        """[n] 1 where `pin` of this key holds now, 0 where it was refused."""
    def unpin_keys(self, namespace: int, pool: int, keys: Sequence[bytes]) -> U8:
        """[n] 1 where there was a pin."""

    # private pages of a session
    def grant(self, pool: int, pages: int, namespace: int | None = None) -> U32:
        """Up to `pages` pages, free -> private, evicting as needed; fewer when the rest is
        pinned. For a namespace whose tenant has no room left in its quota, its own blocks are
        evicted first."""
    def grant_for(self, lease: int, first_block: int, blocks: int) -> U32:
        """Pages, as `grant`, of the lease's pool for at most so many of its blocks from first_block
        on: they end where the pool refuses one that the lease asked for, and did not find. Those
        of an engine's own pool are granted by `grant`, which refuses nothing."""
    def grant_for_keys(self, lease: int, keys: Sequence[bytes]) -> U32:
        """[n] a page for each of these keys; NO_PAGE where there is none, or where the pool refuses
        one that this lease on keys asked for, and did not find."""
    def keep(self, pool: int, pages: U32) -> bool:
        """These free pages become private (an engine re-attached with them); False, and nothing
        changes, when one of them is not free."""
    def give_back(self, pool: int, pages: U32) -> bool:
        """private -> free; False, and nothing changes, when one is not private or is a duplicate
        that an open lease still holds."""

    # behind
    def plan_demote(self, pool: int, max_pages: int, *, ahead: int = 0) -> Transfer | None:
        """Copy blocks to the pool below: those that were committed to `pool`, or came there by a
        transfer, and that the pool below neither has nor is getting; parents first, oldest first.
        Evicts below, unless that pool is durable: then only its free pages are used. A block is
        left out if its parent is not below. After all of these come the blocks that the pool below
        had and evicted before the next pool had them, as long as that evicts no block that awaits
        demotion itself. What the pool below refuses (I14) is not considered again until it is used
        again. A durable pool may refuse blocks while no more than `ahead` of its pages are free: so
        many are kept free by who evicts there."""
    def insist(self, lease: int) -> None:
        """No pool refuses what this lease has pages of, till all of it is in the last pool of the
        chain. What was refused is queued again."""
    def insist_all(self, pool: int) -> int:
        """The same of all that waits in pools above this one, is on its way there, or was refused;
        not of what this one had and has evicted. How many blocks that is, counted in each of those
        pools. Walks them."""
    def regret(self, tier: int) -> tuple[int, int]:
        """Of the blocks that pools of this tier refused, and that the policy watches (three in
        sixteen, for some time): how many there were, and how many of them a request asked for
        again, and missed."""
    def undemoted(self, pool: int) -> int:
        """Blocks that `plan_demote` has still to consider."""
    def not_admitted(self, pool: int) -> int:
        """Blocks in memory that are not demoted into this durable pool only since no acquire has
        matched them. Walks the pools above it."""
    def plan_move(self, pool: int, slab: int, max_pages: int) -> Transfer | None:
        """Move the blocks of a closed slab to free pages of the pool's other slabs (source and
        target are one pool), evicting nothing; None when there is no block that could be moved, or
        no free page. The blocks stay resident where they are until the move is complete. In a
        durable pool they keep their generations: a page's bytes, header included, stay the same."""
    def complete(self, transfer: int, done: int) -> U32:
        """The first `done` blocks are resident in the target; the pages of the rest are free again.
        Blocks that a demotion did not bring are queued again, behind the others. Returns the pages
        that blocks of a move have left, and that are gone; [0] for other transfers. A block that
        was pinned during its move stays where it was, and its target page is free again."""
    def evict(self, pool: int, pages: int) -> Evicted:
        """Evict up to `pages` leaves of the pool: the dead first, then those that a slower pool
        also holds, then the others, each as the policy chooses. Never a pinned page, and never one
        that would leave a hole."""
    def keep_free(self, pool: int, pages: int) -> Evicted:
        """Evict, in the order of `evict`, until `pages` are free in the pool, but only copies that
        a slower pool also holds. Fewer are free when there are no more such copies."""
    def pin(
        self,
        namespace: int,
        pool: int,
        tokens: U32,
        *,
        hard: bool,
        max_blocks: int,
        ttl_s: int = 0,
        keep_stronger: bool = False,
        extras: PromptExtras | None = None,
    ) -> bool:
        """Keep the full blocks of `tokens` (at least one) in `pool`, whether they are there now or
        come later. hard: they are never evicted from it; else they are evicted last. Dead blocks
        are not kept. False, and nothing changes, if more than `max_blocks` blocks of the pool would
        be pinned in this way, or the namespace is retired. Pinning the same prefix again replaces
        its pin; with keep_stronger not one that is hard where this one is soft, or as hard and ends
        as late or later. With ttl_s it is over after so many seconds. Walks the path."""
    def unpin(
        self, namespace: int, pool: int, tokens: U32, extras: PromptExtras | None = None
    ) -> int:
        """End the pin of exactly these full blocks. Returns how many blocks it had, 0: there is no
        such pin. Blocks of other pins stay pinned. Walks the path."""
    def pinned_blocks(self, pool: int, *, hard: bool, tenant: int | None = None) -> int:
        """Blocks with a pin of this kind, whether the pool has them or not; of one tenant, if it is
        named (0: of all that have no number): then it walks the namespaces."""
    def advance(self, now: int) -> int:
        """It is second `now`; an earlier one than before changes nothing. Blocks that have expired
        are dead, requests that are late are awaited no more, and pins that are over keep nothing.
        Returns in how many nodes of the tree any of these happened."""
    def reap(self, pool: int, pages: int) -> Evicted:
        """Evict up to `pages` pages of dead, unpinned blocks from this pool. A last copy goes only
        when the blocks below it in the tree have gone from all pools."""
    def lost(self, pool: int, pages: U32) -> Evicted:
        """A fault took these pages: unpinned residents are dropped (this may leave holes);
        others are left alone."""
    def restore(
        self,
        pool: int,
        digests: U8,
        parents: U8,
        tokens: U32,
        pages: U32,
        generations: U64,
        stamps: U32,
        expires: U32 | None = None,
        *,
        external_bytes: U8 | None = None,
        external_keys: U8 | None = None,
        extras: U8 | None = None,
    ) -> U8:
        """[n] of RESTORED, ORPHAN, FORGED, CONFLICT: rebuild a durable pool's residency from its
        catalogue, in any order. Slabs and namespaces must be there before. expires [n]: the second
        (as `advance` tells it) from which a block is dead, 0: never; without it none ever is.
        external_bytes [n], external_keys [n, 64]: as in Records; both or neither. extras [n, 32],
        zeros: none. A key's block in a namespace of tokens, or the other way round, is an ORPHAN;
        so is one with extras."""
    def lifetimes(self, pool: int) -> U32:
        """[2 * pages] by page the second from which its block is dead (0: never, or no block), and
        the lower 32 bits of the page's generation (0 in a pool that is not durable)."""
    def expire_by(self, namespace: int, second: int) -> None:
        """No block that the namespace has now matches from this second on. Walks the namespace."""
    def stamps(self, pool: int) -> U32:
        """[pages] recency by page; 0 where nothing is resident."""
    def residents(self, pool: int, first: int, count: int) -> tuple[U32, Records]:
        """What is resident in `count` pages of a durable pool from page `first` on: pages [n] in
        order, and their records. Pins nothing: a page with one generation before and after its
        bytes were read had one block all the time."""

    def hit_rates(self, capacities: U64) -> NDArray[np.float64]:
        """[n] of all tokens that `acquire` was asked for, the share that an LRU cache of so many
        tokens would have had (NO_LIMIT: any size); learnt from a sample since the start."""
    def take_kv_events(self, scan_pages: int = 256) -> tuple[KvEvents, bool]:
        """The oldest changes that nobody has taken, some hundred of them, and whether there is more
        by now. Who applies all of them to nothing has, by tier, just the blocks that are resident.
        Where more than `kv_event_bytes` waited, all of it is dropped: KV_CLEARED comes, and then
        what is there, of up to `scan_pages` pages a call, while changes go on. KV_CLEARED is what
        comes first of all, too."""
    def tell_kv_events_anew(self) -> None:
        """Drop what was not taken: KV_CLEARED comes next, and then what is there."""
    def kv_event_overflows(self) -> int:
        """How often changes were dropped because too many waited."""
    def counts(self) -> IndexCounts: ...
    def check(self) -> None:
        """Prove the laws I1-I14; ends the process with the facts if one is broken."""

NO_LIMIT: Final[int]  # capacity of an unlimited cache
NO_PAGE: Final[int]  # in KeyLease.pages
OPAQUE_KEY_MAX: Final[int]  # bytes

class ReuseCurve:
    """What caches of other sizes would have hit, from a bounded sample of blocks."""

    def __init__(self, *, sample_max: int = 8192) -> None: ...
    def access(self, keys: U8, page_size: int, tokens: int) -> None:
        """A prompt of `tokens` tokens asks for the blocks [n, 16], page_size tokens each. It is
        noted; `catch_up` learns from it."""
    def catch_up(self) -> bool:
        """Learn from the oldest access that is only noted; False when there is none."""
    def hit_rate(self, capacity: int) -> float:
        """The share of all tokens that an LRU cache of `capacity` tokens would have had."""
    def check(self) -> None: ...
    rate: float  # share of the blocks that is sampled
    sampled: int
    metadata_bytes: int

def chain_keys(
    namespace: bytes, tokens: U32, page_size: int, extras: PromptExtras | None = None
) -> U8:
    """[blocks, 16] xxh3_128(key[i-1] || tokens[i] || extras[i]) of the full blocks; key[-1] =
    xxh3_128(namespace)."""

# ---- block (csrc/block) ----------------------------------------------------------------------

HEADER_BYTES: Final[int]  # 4096: one sector before each payload
PAYLOAD_CHECKSUM_OFFSET: Final[int]  # in the header: 16 bytes

BLOCK_OK: Final[int]
BLOCK_BAD_HEADER: Final[int]  # magic, version, a reserved field or the header's checksum
BLOCK_OTHER: Final[int]  # a sound header of another block, namespace or layout
BLOCK_STALE: Final[int]  # the generation is not the expected one
BLOCK_BAD_PAYLOAD: Final[int]  # the payload's checksum

def chain_digests(
    parent: bytes, tokens: U32, page_size: int, extras: PromptExtras | None = None
) -> U8:
    """[blocks, 32] SHA-256(digest[i-1] || tokens[i] || extras[i]) of the full blocks; digest[-1] =
    parent."""

def xxh3_128(data: Buffer) -> bytes:
    """16 bytes, canonical (big-endian) as XXH128_canonicalFromHash writes them; seed 0."""

def sha256(data: Buffer) -> bytes: ...
def encode_headers(
    memory: Buffer, offsets: U64, records: Records, layout_digest: bytes, payload_bytes: int
) -> U8:
    """Write the header sector of page i at memory[offsets[i]:+4096]; its payload lies right
    after it. Returns [n, 16] xxh3_128 of the payloads. `memory` is writable, offsets are
    multiples of 4096. `records` may be any object with the arrays of Records."""

def verify_blocks(
    memory: Buffer, offsets: U64, records: Records, layout_digest: bytes, payload_bytes: int
) -> U8:
    """[n] of BLOCK_*: header against its checksum and the expected namespace, digest, parent,
    tokens or external key, extras, generation and layout, then the payload against the header.
    Changes nothing."""

class Headers:
    """What header sectors say; a row counts only where `sound` is 1."""

    sound: U8  # [n]
    namespaces: U8  # [n, 32]
    digests: U8  # [n, 32]
    parents: U8  # [n, 32]
    checksums: U8  # [n, 16] of the payloads
    tokens: U32  # [n, page_size]
    external_bytes: U8  # [n]; this and the next two as in Records
    external_keys: U8  # [n, 64]
    extras: U8  # [n, 32]

def read_headers(
    memory: Buffer, generations: U64, layout_digest: bytes, payload_bytes: int, page_size: int
) -> Headers:
    """Of the header sectors that lie one after the other in `memory`: sound where the header is,
    and of this layout, payload, page size and generation. Payloads are not looked at."""

# ---- copy (csrc/copy) ------------------------------------------------------------------------

class ThreadTeam:
    """A fixed team of threads that share the work of one call at a time; the caller is one of
    them."""

    def __init__(self, threads: int) -> None: ...
    threads: int

def gather(
    team: ThreadTeam, pool: Buffer, segments: U64, pages: U32, arena: Buffer, offsets: U64
) -> None:
    """Copy pages out of an engine's layer-major pool into block-contiguous payloads.

    segments [s, 3] = (offset, stride, bytes): segment j of page p lies at pool[offset + p *
    stride], and goes to arena[offsets[i] + sum(bytes of segments before j)]. IndexError names
    what is outside.
    """

def scatter(
    team: ThreadTeam,
    arena: Buffer,
    offsets: U64,
    pool: Buffer,
    segments: U64,
    pages: U32,
    *,
    layer_ends: U32,
    progress: Buffer | None = None,
    progress_base: int = 0,
    event_fd: int = -1,
) -> None:
    """The way back, all pages of a layer before the next layer's. layer_ends [layers]: how many
    segments there are up to the end of each layer, rising. After layer i the 8-byte word
    `progress` is set (release order) to progress_base + i + 1 and 1 is written to event_fd."""

def copy_each(team: ThreadTeam, sources: Sequence[Buffer], targets: Sequence[Buffer]) -> None:
    """Copy each source into its target, of as many bytes: ValueError otherwise, before anything is
    copied. Targets must not overlap."""

def copy_backend() -> str:
    """The instruction set that these copies use here: avx512, avx2 or portable."""

# ---- beat (csrc/bindings) --------------------------------------------------------------------

class Beat:
    """Sends one byte on a copy of the socket `fd` now and every interval_s, 0.001 to 3600, from a
    thread that never takes the GIL, until `close` or until the peer is gone. A frozen process sends
    nothing; a peer that doesn't read is not waited for. OSError: `fd` is no descriptor."""

    def __init__(self, fd: int, interval_s: float) -> None: ...
    def close(self) -> None:
        """Nothing is sent once it has returned. Idempotent."""
