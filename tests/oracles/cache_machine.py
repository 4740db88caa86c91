"""The cache beside a dictionary: leases in the pool, in the arena and on keys, polls, commits and
copies, evictions, restarts, in any order.

The model knows which blocks were ever committed in a namespace's present era, and which of them are
on disk. KV is a function of tokens, images and keys. So: every byte that is told is right, nothing
is told that was not committed, what is on disk is found, and in the end no page and no lease is
left over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvc2 import errors
from kvc2.answers import NOWHERE, U8, Acquired, Asked, Media, Terms
from kvc2.cache.cache import Cache
from tests.doubles.caches import folder_in_memory, with_arena
from tests.doubles.in_arena import KEYED, InArena
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE

T = TypeVar("T")
Block = tuple[int, ...] | bytes  # the leaders of a prompt's blocks up to it, or a key

SEEN: Counter[str] = Counter()
WAIT_S = 20.0
PAGES = 24  # of the session's pool
IMAGES = (11, 21)  # which begin in blocks of 1's tokens
prompts = st.lists(st.sampled_from([1, 1, 2, *IMAGES]), min_size=1, max_size=5).map(tuple)
keys = st.lists(
    st.sampled_from([b"k", b"k\0", b"\0", b"kk", b"x" * 64]), min_size=1, max_size=4, unique=True
)
choice = st.integers(0, 7)
tiers = st.sampled_from(["gpu", "cpu", "disk"])


def asked_of(prompt: tuple[int, ...]) -> Asked:
    """A block of each number, and one token more, which no match takes. An image goes on after its
    block."""
    blocks = [np.arange(PAGE_SIZE, dtype=np.uint32) + 100 * (number % 10) for number in prompt]
    extras = [
        Media(block * PAGE_SIZE + 1, PAGE_SIZE, bytes([number]) * 32)
        for block, number in enumerate(prompt)
        if number in IMAGES
    ]
    return Asked(np.concatenate([*blocks, np.zeros(1, np.uint32)]), extras=extras)


@dataclass
class Model:
    """Committed since the namespace's era began; of these, `durable` ones are on disk for sure.
    `evicted`: maybe evicted from it, so that no flush brings them there again."""

    committed: set[Block] = field(default_factory=set)
    durable: set[Block] = field(default_factory=set)
    evicted: set[Block] = field(default_factory=set)

    def add(self, block: Block) -> None:
        self.committed.add(block)

    def leading(self, prompt: tuple[int, ...], among: set[Block]) -> int:
        """How many leading blocks of the prompt are among these."""
        blocks = 0
        while blocks < len(prompt) and prompt[: blocks + 1] in among:
            blocks += 1
        return blocks

    def lose(self, kind: type) -> None:
        """All blocks of tokens (tuple) or of keys (bytes)."""
        self.committed = {each for each in self.committed if not isinstance(each, kind)}
        self.durable = {each for each in self.durable if not isinstance(each, kind)}
        self.evicted = {each for each in self.evicted if not isinstance(each, kind)}


@dataclass
class Held:
    """A lease in the arena that is open: what it was told last. `first`: of `truth`'s rows."""

    request: bytes
    asked: tuple[int, ...] | list[bytes]
    truth: U8
    told: Acquired
    terms: Terms
    poll: int = 0

    @property
    def of_keys(self) -> bool:
        return isinstance(self.asked, list)


class CacheMachine(RuleBasedStateMachine):
    """One session at a time, on a cache with all three tiers."""

    @initialize()
    def start(self) -> None:
        self.stack = contextlib.ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.folder = self.stack.enter_context(folder_in_memory())
        self.model = Model()
        self.open()

    def open(self) -> None:
        """A cache over what lies in the folder, and a session."""
        self.held: list[Held] = []
        self.running = with_arena(self.folder / "disk", cpu_bytes=2 << 20)
        self.cache: Cache = self.run(self.running.__aenter__())
        self.engine = self.run(self.engine_of(self.cache))

    async def engine_of(self, cache: Cache) -> InArena:
        return InArena(cache, PAGES)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.running.__aexit__(None, None, None))

    # ---- leases

    @rule(prompt=prompts, releases=st.booleans())
    def compute(self, prompt: tuple[int, ...], releases: bool) -> None:
        """A whole request in the pool: its bytes are judged, the rest is computed and committed."""
        before = self.model.leading(prompt, self.model.committed)
        request, found = self.run(self.engine.compute(asked_of(prompt)))
        assert found.matched_tokens <= before * PAGE_SIZE
        SEEN["pool: hit beyond an image"] += any(
            each in IMAGES for each in prompt[: found.prefix_pages.size - 1]
        )
        SEEN["pool: hit"] += found.matched_tokens > 0
        held = found.prefix_pages.size
        for block in range(held, held + min(len(prompt) - held, found.granted_pages.size)):
            self.model.add(prompt[: block + 1])
        if releases or len(self.engine.session.leases) > 6:
            self.engine.release(request)

    @rule(prompt=prompts, skip=st.integers(0, 2), at_once=st.booleans())
    def read(self, prompt: tuple[int, ...], skip: int, at_once: bool) -> None:
        terms = Terms(0, WAIT_S, in_arena=True, skip_blocks=skip, at_once=at_once)
        most = self.model.leading(prompt, self.model.committed)
        least = 0 if at_once else self.model.leading(prompt, self.model.durable)
        request, found = self.run(self.engine.read(asked_of(prompt), terms))
        assert least * PAGE_SIZE <= found.matched_tokens <= most * PAGE_SIZE
        assert found.first_block <= skip
        assert found.first_block + found.offsets.size == found.matched_tokens // PAGE_SIZE
        truth = self.engine.truth(asked_of(prompt))[found.first_block :]
        self.held.append(Held(request, prompt, truth, found, terms))
        SEEN["arena: hit"] += found.offsets.size > 0
        SEEN["arena: from disk"] += found.tiers.disk > 0
        SEEN["arena: skipped"] += found.first_block > 0

    @rule(asked=keys, at_once=st.booleans())
    def read_keys(self, asked: list[bytes], at_once: bool) -> None:
        terms = Terms(0, WAIT_S, in_arena=True, at_once=at_once)
        request, found = self.run(self.engine.read_keys(asked, terms))
        self.check_keys(asked, found.found)
        there = found.offsets != NOWHERE if found.offsets.size else np.zeros(len(asked), bool)
        assert (found.found[there] != 0).all()
        if not at_once:
            assert {key for key, one in zip(asked, there, strict=True) if one} >= {
                key for key in asked if key in self.model.durable
            }
        self.held.append(Held(request, asked, self.engine.truth_of(asked), found, terms))
        SEEN["keys: hit"] += bool(there.any())
        SEEN["keys: from disk"] += found.tiers.disk > 0

    def check_keys(self, asked: list[bytes], found: U8) -> None:
        """Nothing is told that isn't there; what is on disk is told."""
        for key, tier in zip(asked, found.tolist(), strict=True):
            assert not tier or key in self.model.committed
            assert tier or key not in self.model.durable

    @rule(asked=keys)
    def match_keys(self, asked: list[bytes]) -> None:
        found = self.cache.leases.match_keys(self.engine.session, self.engine.keyed, asked)
        self.check_keys(asked, found.found)

    @precondition(lambda self: any(each.terms.at_once for each in self.held))
    @rule(pick=choice, again=st.booleans(), waits=st.booleans())
    def poll(self, pick: int, again: bool, waits: bool) -> None:
        """The next number answers what is there by now, which is no less; the same one the same."""
        polled = [each for each in self.held if each.terms.at_once]
        lease = polled[pick % len(polled)]
        before, lease.poll = lease.told, lease.poll + (not again)
        found = self.run(self.ask_again(lease))
        if again:
            assert found is before
            SEEN["poll: the same"] += 1
            return
        lease.told = found = self.run(self.all_that_comes(lease, found)) if waits else found
        there, earlier = told(found), told(before)
        assert {at for at, _ in earlier} <= {at for at, _ in there}
        SEEN["poll: more came"] += len(there) > len(earlier)

    async def ask_again(self, lease: Held) -> Acquired:
        terms = Terms(0, WAIT_S, in_arena=True, at_once=True, poll=lease.poll)
        leases, session = self.cache.leases, self.engine.session
        if isinstance(lease.asked, list):
            keyed = self.engine.keyed
            return await leases.acquire_keys(session, keyed, lease.request, lease.asked, terms)
        of, asked = self.engine.opened, asked_of(lease.asked)
        return await leases.acquire(session, of, lease.request, asked, terms)

    async def all_that_comes(self, lease: Held, found: Acquired) -> Acquired:
        """Polls until nothing is on its way any more."""
        async with asyncio.timeout(WAIT_S):
            while found.coming_blocks:
                await asyncio.sleep(0.001)
                lease.poll += 1
                found = await self.ask_again(lease)
        return found

    @precondition(lambda self: self.held)
    @rule(pick=choice)
    def release(self, pick: int) -> None:
        self.engine.release(self.held.pop(pick % len(self.held)).request)

    # ---- copies

    @rule(prompt=prompts)
    def copy(self, prompt: tuple[int, ...]) -> None:
        results = self.run(self.engine.copy(asked_of(prompt)))
        self.copied([prompt[: block + 1] for block in range(len(prompt))], results)

    @precondition(lambda self: any(not each.of_keys for each in self.held))
    @rule(pick=choice)
    def copy_in_lease(self, pick: int) -> None:
        """What the lease lacks of its prompt."""
        of_tokens = [each for each in self.held if not each.of_keys]
        lease = of_tokens[pick % len(of_tokens)]
        assert isinstance(lease.asked, tuple)
        first = lease.told.matched_tokens // PAGE_SIZE
        if first == len(lease.asked) or lease.told.coming_blocks:
            return
        results = self.run(self.engine.copy(asked_of(lease.asked), lease.request, first))
        self.copied([lease.asked[: block + 1] for block in range(first, len(lease.asked))], results)
        SEEN["copies: in a lease"] += results is not None

    @rule(asked=keys)
    def copy_keys(self, asked: list[bytes]) -> None:
        results = self.run(self.engine.copy_keys(asked))
        self.copied(asked, results)

    @precondition(lambda self: any(each.of_keys for each in self.held))
    @rule(pick=choice, asked=keys)
    def copy_keys_in_lease(self, pick: int, asked: list[bytes]) -> None:
        of_keys = [each for each in self.held if each.of_keys]
        lease = of_keys[pick % len(of_keys)]
        self.copied(asked, self.run(self.engine.copy_keys(asked, lease.request)))

    def copied(self, blocks: list[Any], results: list[int] | None) -> None:
        """A duplicate is there; what is refused, or has no room, isn't by this."""
        for block, result in zip(blocks, results or [], strict=False):
            if result in (0, 1):
                assert result == 0 or block in self.model.committed
                self.model.add(block)
            SEEN[f"copies: result {result}"] += 1

    # ---- all of it

    @rule()
    def flush(self) -> None:
        found = self.run(self.cache.flush(WAIT_S))
        assert not found.not_durable_blocks
        self.model.durable |= self.there() - self.model.evicted

    def there(self) -> set[Block]:
        """Of what was committed, what some tier has now: evictions may have ended the rest."""
        found = set()
        for block in self.model.committed:
            if isinstance(block, bytes):
                match = self.cache.leases.match_keys(
                    self.engine.session, self.engine.keyed, [block]
                )
                there = bool(match.found[0])
            else:
                match = self.cache.leases.match(
                    self.engine.session, self.engine.opened, asked_of(block)
                )
                there = match.matched_tokens == len(block) * PAGE_SIZE
            found |= {block} if there else set()
        return found

    @rule(tier=tiers, blocks=st.sampled_from([0, 0, 1, 3]))
    def evict(self, tier: str, blocks: int) -> None:
        found = self.run(self.cache.evict(tier, blocks))
        SEEN[f"evicted: {tier}"] += found.evicted_blocks > 0
        if tier == "disk" and found.evicted_blocks:
            self.model.durable.clear()
            self.model.evicted = set(self.model.committed)

    @rule(of_keys=st.booleans())
    def invalidate(self, of_keys: bool) -> None:
        """What was leased before may be read on, but takes no more: such leases are let go of."""
        found = self.run(self.cache.invalidate([KEYED if of_keys else NAMESPACE]))
        assert found.durable
        self.model.lose(bytes if of_keys else tuple)
        for each in [each for each in self.held if each.of_keys == of_keys]:
            self.judge(each)
            self.held.remove(each)
            self.engine.release(each.request)
        for request in list(self.engine.session.leases):
            if request not in {each.request for each in self.held}:
                self.engine.release(request)

    @rule(at_rest=st.booleans())
    def session_ends(self, at_rest: bool) -> None:
        """Its leases end with it, in the arena too."""
        self.run(self.engine.close(at_rest=at_rest))
        found = self.cache.stats()
        assert (found.leases, private(self.cache)) == (0, 0)
        self.held = []
        self.engine = self.run(self.engine_of(self.cache))

    @rule()
    def restart(self) -> None:
        """The daemon stops in order and starts again: what is in memory alone was written."""
        self.run(self.engine.close(at_rest=True))
        kept = self.model.durable
        self.close()
        self.open()
        assert kept <= self.there()
        SEEN["restart: something is there"] += bool(kept)

    # ---- what always holds

    def judge(self, lease: Held) -> None:
        self.engine.judge_offsets(lease.told, lease.truth)

    @invariant()
    def what_is_leased_stays_as_it_is(self) -> None:
        for each in getattr(self, "held", []):
            self.judge(each)

    @invariant()
    def the_index_keeps_its_laws(self) -> None:
        if hasattr(self, "cache"):
            self.cache.index.check()

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        try:
            for request in list(self.engine.session.leases):
                self.engine.release(request)
            self.run(self.settled())
            assert (self.cache.stats().leases, private(self.cache)) == (0, 0)
            granted = next(iter(self.cache.stats().pools)).private_pages
            assert granted == 0, f"{granted} pages of the session's pool are nobody's"
        finally:
            self.run(self.engine.close(at_rest=False))
            self.close()
            self.stack.close()

    async def settled(self) -> None:
        """What went on behind answers is over."""
        while private(self.cache):
            await asyncio.sleep(0)


def told(found: Acquired) -> set[tuple[int, int]]:
    """(place in the lease, offset) of what is told to be there."""
    places = enumerate(found.offsets.tolist())
    return {(at, offset) for at, offset in places if offset != int(NOWHERE)}


def private(cache: Cache) -> int:
    """Pages of the arena that were granted and belong to no block."""
    with contextlib.suppress(StopIteration, errors.Kvc2Error):
        return next(each.private_pages for each in cache.stats().tiers if each.tier == "cpu")
    return 0
