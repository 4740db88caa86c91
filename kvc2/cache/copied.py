"""Copied commits: bytes go to the arena, out of a client's pages, which stay the client's, or as
they come over the wire.

The blocks are then in the cpu tier as if they had come there by themselves, and go on to the disk
from there. Not here: which pages of the arena (csrc/index), the copy itself (moving/routes.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import NO_HINTS, NO_PAGES, NO_ROOM, U8, U32, Asked
from kvc2.cache.extras import prompt_extras
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import OpenLease, Session
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.routes import Part, Route
from kvc2.tiers.pools import LayoutPools, Pools

AHEAD_BYTES = 1 << 20  # of pages that a Write holds and that aren't filled


@dataclass(frozen=True)
class GivenBlocks:
    """What a commit names: blocks [first_block, first_block + k) of a prompt of this namespace, by
    their tokens [k * page_size] and the extras that begin in them, or blocks of opaque keys [k].
    `pages` [k] of the session's hold them; none where they come over the wire. `lease`: whose they
    are; None: they are to be copied, and the tokens begin with the prompt's first block."""

    namespace: Namespace
    first_block: int
    asked: Asked
    pages: U32
    lease: OpenLease | None = None
    insists: bool = False  # its caller waits for the disk: nothing of it is refused

    @property
    def tokens(self) -> U32:
        return self.asked.tokens

    @property
    def keys(self) -> Sequence[bytes]:
        return self.asked.keys

    @cached_property
    def extras(self) -> _core.PromptExtras | None:
        """As the index knows them."""
        return prompt_extras(self.asked.extras, self.namespace.page_size)

    @property
    def count(self) -> int:
        return len(self.keys) or self.tokens.size // self.namespace.page_size

    @property
    def kept(self) -> tuple[int, ...]:
        """Results after which a granted page isn't to be given back: of tokens, a duplicate's is
        the lease's until its end."""
        return (_core.ADOPTED,) if self.keys else (_core.ADOPTED, _core.DUPLICATE)

    def cut(self, chosen: NDArray[np.intp]) -> tuple[U32, list[bytes]]:
        """Tokens or keys of the blocks at these places, which for tokens are the last ones."""
        if self.keys:
            return NO_PAGES, [self.keys[each] for each in chosen.tolist()]
        size = self.namespace.page_size
        first = int(chosen[0]) if chosen.size else 0
        tokens = self.tokens[first * size : (first + chosen.size) * size]
        return np.ascontiguousarray(tokens, np.uint32), []


@dataclass(frozen=True)
class _Copy:
    """What is under way: those of the blocks at `chosen` [n] go into the cpu pool's `granted` [n],
    and are then committed in this lease of the index."""

    blocks: GivenBlocks
    lease: int
    number: int
    chosen: NDArray[np.intp]
    granted: U32


@dataclass(frozen=True)
class _Into:
    """Where blocks that come over the wire are committed: the pools, and a lease of the index."""

    blocks: GivenBlocks
    to: LayoutPools
    lease: int
    number: int


@dataclass(frozen=True)
class Stored:
    """results [k] of ADOPTED, DUPLICATE, REFUSED, NO_ROOM. `lease` is one that has the blocks; the
    caller releases it where it was opened for that (`opened`)."""

    results: U8
    lease: int
    opened: bool


class CopiedCommits:
    """All on the event loop. `tick` tells the index what time it is. `wake`: there is something to
    copy to the disk."""

    def __init__(
        self,
        index: _core.Index,
        pools: Pools,
        *,
        tick: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self._index = index
        self._pools = pools
        self._tick = tick
        self._wake = wake
        # a thread of its own: a client waits, and no batch of demotions is to be before it
        self._route = Route("gpu", "cpu", ThreadPoolExecutor(1, "kvc2-copy-in"))

    def close(self) -> None:
        """Waits for what runs."""
        self._route.threads.shutdown(wait=True, cancel_futures=True)

    async def store(self, session: Session, blocks: GivenBlocks) -> Stored:
        """Answers when the bytes are in the arena. What its caller doesn't wait for any more is
        not committed. Raises SessionOver, NotFound for a namespace that was let go of, and
        InvalidRequest for one of another layout."""
        gpu = session.mapped_pool()
        self._tick()
        self._check_pools(session, blocks, gpu)
        lease, number, results = self._lease(blocks, gpu.pools.cpu.id)
        opened = blocks.lease is None
        try:
            # all that is decided here is decided before anything waits
            lacking = np.flatnonzero(results == NO_ROOM)
            chosen, granted = self._grant(gpu.pools, blocks, lacking, (lease, number))
            copy = _Copy(blocks, lease, number, chosen, granted)
            await asyncio.shield(asyncio.ensure_future(self._carry_out(gpu, copy, results)))
        except BaseException:
            if opened:
                self._index.release_all(np.array([lease], np.uint64))
            raise
        self._wake()
        return Stored(results, lease, opened)

    def written(self, blocks: GivenBlocks, to: LayoutPools) -> WrittenBlocks:
        """For blocks that come over the wire, into the pools of their layout. The caller closes it.
        Raises InvalidRequest where there is no arena."""
        if not to.chain:
            raise errors.InvalidRequest("commit", None, "a daemon with a cpu tier: this has none")
        self._tick()
        lease, number, results = self._lease(blocks, to.cpu.id)
        into = _Into(blocks, to, lease, number)
        return WrittenBlocks(self._index, self._pools, into, results, self._wake)

    def _check_pools(self, session: Session, blocks: GivenBlocks, gpu: GpuPool) -> None:
        if blocks.lease is not None:
            pools: LayoutPools | None = blocks.lease.to.pools
        else:
            pools = session.layouts.get(blocks.namespace.id)
        if pools is None:  # while an earlier commit of the call was copied
            wire_id, allowed = blocks.namespace.id + 1, "opened by this session with OpenNamespace"
            raise errors.NotFound("namespace_id", wire_id, allowed)
        if pools is not gpu.pools or not pools.chain:
            allowed = "a namespace of the pool's layout, and a daemon with a cpu tier"
            raise errors.InvalidRequest("copied", True, allowed)

    def _lease(self, blocks: GivenBlocks, cpu: int) -> tuple[int, int, U8]:
        """The index's lease that they are committed in; its namespace's number, which is no other's
        while the lease is open; results [k], NO_ROOM of those whose bytes are to be copied."""
        results = np.full(blocks.count, NO_ROOM, np.uint8)
        if (lease := blocks.lease) is not None:
            if not lease.is_open:
                results[:] = _core.REFUSED
            elif blocks.keys:
                found = self._index.match_keys(lease.number, cpu, list(blocks.keys))
                results[found == 1] = _core.DUPLICATE
            else:
                self._commit_again(lease.id, blocks, results)
            return lease.id, lease.number, results
        number, hints = blocks.namespace.number, blocks.namespace.hints(NO_HINTS)
        if blocks.keys:
            of_keys = self._index.acquire_keys(number, cpu, list(blocks.keys), hints)
            results[of_keys.pages != _core.NO_PAGE] = _core.DUPLICATE
            return of_keys.id, number, results
        tokens = np.ascontiguousarray(blocks.tokens, np.uint32)
        of_tokens = self._index.acquire(
            number, cpu, tokens, blocks.count, hints, extras=blocks.extras
        )
        self._index.shorten(of_tokens.id, 0)  # what isn't in memory comes from the client
        results[: of_tokens.pages.size] = _core.DUPLICATE
        return of_tokens.id, number, results

    def _commit_again(self, lease: int, blocks: GivenBlocks, results: U8) -> None:
        """What the lease has of them, as it may of a call that comes again, stays as it is."""
        view = self._index.lease(lease)
        skipped = blocks.first_block - view.first_block
        held = view.pages[skipped : skipped + results.size] if skipped >= 0 else NO_PAGES
        if not held.size:
            return
        tokens = np.ascontiguousarray(
            blocks.tokens[: held.size * blocks.namespace.page_size], np.uint32
        )
        again = self._index.commit(lease, blocks.first_block, tokens, held, blocks.extras)
        results[: held.size] = again
        if (again == _core.REFUSED).any():  # it is another prompt's from there on
            results[held.size :] = _core.REFUSED

    def _grant(
        self,
        pools: LayoutPools,
        blocks: GivenBlocks,
        lacking: NDArray[np.intp],
        at: tuple[int, int],
    ) -> tuple[NDArray[np.intp], U32]:
        """Private pages of the cpu pool, and which of the lacking blocks they are for: not all,
        where there is no room or the pool refuses some. `at`: the lease, the namespace."""
        if not lacking.size:
            return lacking, NO_PAGES
        self._pools.make_room(pools, lacking.size)
        lease, number = at
        if blocks.insists:
            granted = self._index.grant(pools.cpu.id, lacking.size, number)
        elif blocks.keys:
            keys = [blocks.keys[each] for each in lacking.tolist()]
            pages = self._index.grant_for_keys(lease, keys)
            given = pages != _core.NO_PAGE
            return lacking[given], pages[given]
        else:
            first = blocks.first_block + int(lacking[0])
            granted = self._index.grant_for(lease, first, lacking.size)
        return lacking[: granted.size], granted

    async def _carry_out(self, gpu: GpuPool, copy: _Copy, results: U8) -> None:
        """Into `results`. Pages that no block has then are free again. Raises SessionOver."""
        granted, cpu = copy.granted, gpu.pools.cpu.id
        if not granted.size:
            return
        if not await self._into_arena(gpu, copy):
            self._index.give_back(cpu, granted)
            raise errors.SessionOver("the session ended while its pages were copied")
        answers = self._commit(cpu, copy)
        results[copy.chosen] = answers
        unused = granted[~np.isin(answers, copy.blocks.kept)]
        if unused.size:
            self._index.give_back(cpu, unused)

    async def _into_arena(self, gpu: GpuPool, copy: _Copy) -> bool:
        """Whether the granted pages hold what the session's had."""
        pages = copy.blocks.pages[copy.chosen]
        read = partial(gpu.read, pages, gpu.pools.cpu.store.offsets(copy.granted))
        async with gpu.demoting:  # while this reads its memory, it stays mapped
            came = await self._route.carry([Part(pages.size, read)], time.monotonic)
            return came.whole and await gpu.holds()

    def _commit(self, cpu: int, copy: _Copy) -> U8:
        tokens, keys = copy.blocks.cut(copy.chosen)
        try:
            if keys:
                return self._index.commit_keys(
                    copy.number, cpu, keys, copy.granted, lease=copy.lease
                )
            first = copy.blocks.first_block + int(copy.chosen[0])
            return self._index.commit(copy.lease, first, tokens, copy.granted, copy.blocks.extras)
        except KeyError:  # the lease ended meanwhile
            return np.full(copy.granted.size, _core.REFUSED, np.uint8)


class WrittenBlocks:
    """Blocks that come over the wire, one after the other, each into a page of its own. `results`
    [count] as in Stored.

        waiting -> filling [begin: into a page that was granted for it]
        filling -> waiting [commit: the page is the block's, or the next one's too]
        filling -> waiting [close: pages without a block go back]

    What is committed stays, whatever becomes of the rest; it is pinned until `close`, since later
    blocks go on from it. So until then one holds a page, or AHEAD_BYTES of them, and pins what a
    lease would.
    """

    def __init__(
        self,
        index: _core.Index,
        pools: Pools,
        into: _Into,
        results: U8,
        wake: Callable[[], None],
    ) -> None:
        self.results = results
        self.done = 0
        self.payload_bytes = into.to.shape.payload_bytes
        self.lease = into.lease  # the index's, that has the blocks until `close`
        self._index, self._pools, self._into, self._wake = index, pools, into, wake
        self._starts: list[int] = []  # where payloads begin in the arena, of the last grant's pages
        self._pages: U32 = NO_PAGES  # granted, of which the first is filled now

    @property
    def is_whole(self) -> bool:
        return self.done == self.results.size

    @property
    def block(self) -> int:
        """The next one, as the wire counts."""
        return self._into.blocks.first_block + self.done

    def begin(self) -> memoryview | None:
        """Where the next block's payload is to be written, [payload_bytes]. None: there is no room
        now, or none for this block."""
        if not self._pages.size:
            self._grant()
        if not self._pages.size:
            return None
        to, start = self._into.to, self._starts[-self._pages.size]
        return to.cpu.store.arena.memory.data[start : start + self.payload_bytes]

    def _grant(self) -> None:
        """A page, or as many as AHEAD_BYTES has, which small blocks take too."""
        self._wake()  # those of before are filled
        to, left = self._into.to, self.results.size - self.done
        pages = min(left, max(1, AHEAD_BYTES // self.payload_bytes))
        self._pools.make_room(to, pages)
        if self._into.blocks.insists or self._into.blocks.keys:  # of keys, none can be passed over
            self._pages = self._index.grant(to.cpu.id, pages, self._into.number)
        else:
            self._pages = self._index.grant_for(self.lease, self.block, pages)
        self._starts = to.payloads(self._pages).tolist()

    def commit(self) -> None:
        """The first page holds the block, whole and checked. Its lease is open."""
        if self.results[self.done] == NO_ROOM:
            self.results[self.done] = result = self._commit()
            if result in self._into.blocks.kept:
                self._pages = self._pages[1:]
        self.done += 1

    def _commit(self) -> int:
        into = self._into
        tokens, keys = into.blocks.cut(np.array([self.done]))
        if keys:
            found = self._index.commit_keys(
                into.number, into.to.cpu.id, keys, self._pages[:1], lease=into.lease
            )
        else:
            extras = into.blocks.extras
            found = self._index.commit(into.lease, self.block, tokens, self._pages[:1], extras)
        return int(found[0])

    def close(self) -> None:
        if self._pages.size:
            self._index.give_back(self._into.to.cpu.id, self._pages)
            self._pages = NO_PAGES
        if self._into.blocks.lease is None:
            self._index.release_all(np.array([self.lease], np.uint64))
        self._wake()  # what was pinned is to be had
