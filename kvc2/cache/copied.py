"""Copied commits: the bytes of a client's pages go to the arena, and the pages stay the client's.

The blocks are then in the cpu tier as if they had come there by themselves, and go on to the disk
from there. Not here: which pages of the arena (csrc/index), the copy itself (moving/routes.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvc2 import _core, errors
from kvc2.answers import NO_ROOM, U8, U32
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import Session
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.routes import Part, Route
from kvc2.tiers.pools import Pools


@dataclass(frozen=True)
class CopiedBlocks:
    """Blocks [first_block, first_block + k) of a prompt of this namespace: `tokens` [k * page_size]
    and the session's `pages` [k] that hold them. `lease`: the index's, of a lease in the arena;
    None: the tokens begin with the prompt's first block. Or blocks of opaque `keys` [k]."""

    namespace: Namespace
    first_block: int
    tokens: U32
    pages: U32
    lease: int | None = None
    keys: tuple[bytes, ...] = ()


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

    async def store(self, session: Session, blocks: CopiedBlocks) -> Stored:
        """Answers when the bytes are in the arena. It goes on when its caller doesn't wait any
        more. Raises SessionOver, and InvalidRequest for a namespace of another layout."""
        gpu = session.mapped_pool()
        self._tick()
        if session.layouts[blocks.namespace.id] is not gpu.pools or not gpu.pools.chain:
            raise errors.InvalidRequest(
                "copied", True, "a namespace of the pool's layout, and a daemon with a cpu tier"
            )
        if blocks.keys:
            return await self._store_keys(gpu, blocks)
        lease, held, opened = self._lease(blocks, gpu.pools.cpu.id)
        try:
            task = asyncio.ensure_future(self._copy(gpu, blocks, lease, held))
            stored = await asyncio.shield(task)
        except BaseException:
            if opened:
                self._index.release(lease)
            raise
        self._wake()
        known = np.full(held, _core.DUPLICATE, np.uint8)
        return Stored(np.concatenate([known, stored]), lease, opened)

    def _lease(self, blocks: CopiedBlocks, cpu: int) -> tuple[int, int, bool]:
        """The lease that the blocks are committed in, how many of them it has already, and whether
        it was opened for this."""
        if blocks.lease is not None:
            return blocks.lease, 0, False
        tokens = np.ascontiguousarray(blocks.tokens, np.uint32)
        opened = self._index.acquire(blocks.namespace.number, cpu, tokens, blocks.pages.size)
        self._index.shorten(opened.id, 0)  # what isn't in memory comes from the client
        return opened.id, opened.pages.size, True

    async def _copy(self, gpu: GpuPool, blocks: CopiedBlocks, lease: int, held: int) -> U8:
        """Results of the blocks after the first `held`."""
        pages = blocks.pages[held:]
        granted = await self._into_arena(gpu, blocks, pages)
        results = np.full(pages.size, NO_ROOM, np.uint8)
        results[: granted.size] = self._commit(blocks, lease, held, granted)
        refused = granted[results[: granted.size] == _core.REFUSED]
        if refused.size:  # a duplicate's page is free with the lease's end
            self._index.give_back(gpu.pools.cpu.id, refused)
        return results

    async def _into_arena(self, gpu: GpuPool, blocks: CopiedBlocks, pages: U32) -> U32:
        """Private pages of the cpu pool that hold what is in these of the session; fewer where
        there is no room. Raises SessionOver."""
        pools = gpu.pools
        self._pools.make_room(pools, pages.size)
        granted = self._index.grant(pools.cpu.id, pages.size, blocks.namespace.number)
        if not granted.size:
            return granted
        read = partial(gpu.read, pages[: granted.size], pools.cpu.store.offsets(granted))
        async with gpu.demoting:  # while this reads its memory, it stays mapped
            came = await self._route.carry([Part(granted.size, read)], time.monotonic)
            whole = came.whole and await gpu.holds()
        if not whole:
            self._index.give_back(pools.cpu.id, granted)
            raise errors.SessionOver("the session ended while its pages were copied")
        return granted

    async def _store_keys(self, gpu: GpuPool, blocks: CopiedBlocks) -> Stored:
        results = await asyncio.shield(asyncio.ensure_future(self._copy_keys(gpu, blocks)))
        self._wake()
        if blocks.lease is not None:
            return Stored(results, blocks.lease, opened=False)
        opened = self._index.acquire_keys(
            blocks.namespace.number, gpu.pools.cpu.id, list(blocks.keys)
        )
        return Stored(results, opened.id, opened=True)

    async def _copy_keys(self, gpu: GpuPool, blocks: CopiedBlocks) -> U8:
        """Results by key. What is in memory already isn't copied again."""
        number, pool = blocks.namespace.number, gpu.pools.cpu.id
        lacking = np.flatnonzero(self._index.match_keys(number, pool, list(blocks.keys)) != 1)
        results = np.full(len(blocks.keys), _core.DUPLICATE, np.uint8)
        results[lacking] = NO_ROOM
        granted = await self._into_arena(gpu, blocks, blocks.pages[lacking])
        taken = lacking[: granted.size]
        keys = [blocks.keys[each] for each in taken.tolist()]
        try:
            results[taken] = self._index.commit_keys(
                number, pool, keys, granted, lease=blocks.lease
            )
        except KeyError:  # the lease was released meanwhile
            results[taken] = _core.REFUSED
        unused = granted[results[taken] != _core.ADOPTED]
        if unused.size:
            self._index.give_back(pool, unused)
        return results

    def _commit(self, blocks: CopiedBlocks, lease: int, held: int, granted: U32) -> U8:
        size = blocks.namespace.page_size
        tokens = blocks.tokens[held * size : (held + granted.size) * size]
        try:
            return self._index.commit(
                lease, blocks.first_block + held, np.ascontiguousarray(tokens, np.uint32), granted
            )
        except KeyError:  # it was released meanwhile
            return np.full(granted.size, _core.REFUSED, np.uint8)
