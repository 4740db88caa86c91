"""Our disk tier without a daemon around it: the index plans and the mover carries out, as there.

Blocks are committed in the cpu pool, stored by demotion in batches, evicted from memory and loaded
back, verified whole. Nothing here measures; disk.py does.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np

from kvc2 import _core
from kvc2.arena import Arena
from kvc2.config import DiskConfig, ServeConfig
from kvc2.layout import ALIGNMENT, HEADER_BYTES, slab_shape
from kvc2.metrics import Metrics
from kvc2.moving.batches import Batches, pages_per_batch
from kvc2.moving.mover import Mover
from kvc2.moving.routes import Transferred
from kvc2.tiers.base import PageShape
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.pools import Pools, Tiers

PAGE_SIZE = 16
SLAB_BYTES = 64 << 20
DISK_BYTES = 4352 << 20  # of slabs: so many that batches are as large as they get
NAMESPACE = b"benchmark".ljust(32)


class DiskPath:
    """`blocks` of `block_bytes`, stored and loaded again and again, within one event loop."""

    def __init__(self, folder: Path, block_bytes: int, blocks: int) -> None:
        page_bytes = HEADER_BYTES + -(-block_bytes // ALIGNMENT) * ALIGNMENT
        slab = slab_shape(page_bytes, SLAB_BYTES)
        self.block_bytes, self.blocks = block_bytes, blocks
        slabs = -(-2 * blocks // slab.pages_per_slab) + 1
        metrics = Metrics()
        self.arena = Arena((slabs + 1) * slab.slab_bytes, SLAB_BYTES)
        self.arena.start()
        self.arena.wait_populated()
        size_bytes = DISK_BYTES + 2 * slab.slab_bytes + (256 << 20)  # the catalogue too
        config = DiskConfig.of_bytes(folder, size_bytes)
        self.disk = DiskTier(folder, config, self.arena.memory, metrics)
        self.index = _core.Index()
        tiers = Tiers.of(self.arena, (self.disk,), time.monotonic)
        self.mover = Mover(self.index, metrics, tiers.meters, lambda: None, clock=time.monotonic)
        pools = Pools(self.index, tiers, metrics, ServeConfig())
        digest = (b"%d" % block_bytes).ljust(32)
        sizes = (page_bytes, slab.slab_bytes, slab.pages_per_slab)
        pools.of(PageShape(digest, PAGE_SIZE, block_bytes, *sizes))
        (self.pools,) = pools.on_disk()
        pools.grow(self.pools, 2 * blocks)
        self._space = self.index.open_namespace(NAMESPACE, PAGE_SIZE)
        self._prompt = 0
        self._random = np.random.default_rng(0)
        self._grow_disk(DISK_BYTES // page_bytes - 2 * slab.pages_per_slab)
        self.batch_pages = pages_per_batch(self.index, self.pools)

    def _grow_disk(self, pages: int) -> None:
        while self.index.pool_counts(self.pools.disk.id).free < pages:
            if self.disk.grow(self.pools.disk.store) is None:
                raise RuntimeError("no room for the benchmark's slabs")
            self.index.add_slab(self.pools.disk.id)

    def close(self) -> None:
        self.mover.close()
        self.disk.close()
        self.arena.close()

    def commit(self) -> None:
        """New blocks in memory, of random bytes."""
        self._prompt += 1
        pages = self.index.grant(self.pools.cpu.id, self.blocks)
        for offset in self.pools.cpu.store.offsets(pages).tolist():
            payload = self.arena.memory[offset + HEADER_BYTES :][: self.block_bytes]
            payload[:] = np.frombuffer(self._random.bytes(self.block_bytes), np.uint8)
        tokens = self._tokens()
        lease = self.index.acquire(self._space, self.pools.cpu.id, tokens, 0)
        answers = self.index.commit(lease.id, 0, tokens, pages)
        self.index.release(lease.id)
        if answers.any() or pages.size < self.blocks:
            raise RuntimeError(f"{pages.size} of {self.blocks} blocks are in memory")

    def _tokens(self) -> np.ndarray:
        first = self._prompt * self.blocks * PAGE_SIZE
        return np.arange(first, first + self.blocks * PAGE_SIZE, dtype=np.uint32)

    async def store(self) -> None:
        """As disk_writer.py does: all that was committed is durable, data synced, records
        committed."""
        batches = Batches()
        while transfers := self._plan():
            batches.begin(self._commit(transfers))
            if batches.full:
                await batches.first_ended()
        while batches:
            await batches.first_ended()

    async def _commit(self, transfers: list[_core.Transfer]) -> bool:
        if not (await self.mover.write(self.pools, transfers)).written:
            raise RuntimeError("a batch was not stored")
        return True

    def _plan(self) -> list[_core.Transfer]:
        """As disk_writer.py does."""
        found, left = [], self.batch_pages
        while left > 0 and (transfer := self.index.plan_demote(self.pools.cpu.id, left)):
            found.append(transfer)
            left -= transfer.target_pages.size
        return found

    def forget(self, *, disk: bool) -> None:
        """Evict from memory; with `disk`, from there too (its records go with the next store)."""
        self.index.evict(self.pools.cpu.id, 2 * self.blocks)
        if disk:
            gone = self.index.evict(self.pools.disk.id, 2 * self.blocks).pages
            self.pools.disk.store.drop(gone)

    async def load(self) -> None:
        """The prompt from disk into memory, in order, two transfers on their way at a time."""
        lease = self.index.acquire(self._space, self.pools.cpu.id, self._tokens(), self.blocks)
        coming: list[asyncio.Future[Transferred]] = []
        good = 0
        while (step := self.index.promote(lease.id)) or coming:
            if step:
                coming.append(self.mover.load(self.pools, step))
            if len(coming) == 2 or not step:
                good += (await coming.pop(0)).good
        self.index.release(lease.id)
        if good != self.blocks:
            raise RuntimeError(f"{good} of {self.blocks} blocks came back whole")
