"""Verifies what lies on the disk while the daemon runs: a pass over all resident blocks at a rate.

A part is read when no transfer is under way that somebody waits for, on the writer's thread, so
that no slab goes meanwhile. Nothing is pinned: a bad page counts only if its block is still the one
that was there before, by its generation. It is dropped like one that a load found bad. Blocks that
move or come during a pass may be left for the next one. Not here: directories that nobody serves
(tiers/check.py).

All on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import numpy as np

from kvc2 import _core, errors
from kvc2.answers import Scrubbed
from kvc2.moving.loading import Loader
from kvc2.moving.mover import Mover
from kvc2.tiers.base import U8, U32
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.slab_file import aligned
from kvc2.tiers.meter import PROBE_BYTES
from kvc2.tiers.pools import LayoutOnDisk, Pools

LOG = logging.getLogger(__name__)

RATE_MB_PER_S = 100  # where none is asked for: a tenth of what a small NVMe disk reads
RATE_MAX = 1_000_000
AGAIN_S = 86_400.0  # after a pass, where disk.scrub_mb_per_s asks for them
PART_BYTES_MAX = 4 << 20
PART_S = 0.02  # of one read: what a load that comes meanwhile may have to share the disk with
QUIET_S = 0.005  # between two loads of one request there is less
MB = 1_000_000


class Scrubber:
    def __init__(self, index: _core.Index, pools: Pools, *, loader: Loader, mover: Mover) -> None:
        self._index = index
        self._loader = loader
        self._mover = mover
        self._task: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._rate = 0.0  # bytes/s
        self._begun = self._ended = 0.0
        self._total = self._blocks = self._bytes = self._bad = self._passes = 0
        self.pools = pools

    def start(self, mb_per_s: int) -> asyncio.Task[None]:
        """Begin a pass, or go on with the one under way at this rate; 0: RATE_MB_PER_S. Raises
        InvalidRequest where there is no disk."""
        if not self.pools.tiers.disks:
            raise errors.InvalidRequest("start_mb_per_s", mb_per_s, "a daemon with a disk tier")
        if mb_per_s > RATE_MAX:
            raise errors.InvalidRequest("start_mb_per_s", mb_per_s, f"at most {RATE_MAX}")
        self._rate = float((mb_per_s or RATE_MB_PER_S) * MB)
        if self._task is not None and not self._task.done():
            return self._task
        self._begun = asyncio.get_running_loop().time()
        self._total = sum(self._resident(each) for each in self.pools.ids("disk"))
        self._blocks = self._bytes = self._bad = 0
        self._task = asyncio.create_task(self._pass())
        self._task.add_done_callback(self._over)
        return self._task

    def keep(self, mb_per_s: int) -> None:
        """A pass now and again AGAIN_S after each, until `stop`."""
        self._keeper = asyncio.create_task(self._keep(mb_per_s))

    async def stop(self) -> None:
        """End the pass under way; none begins by itself any more."""
        for task in (self._keeper, self._task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def progress(self) -> Scrubbed:
        """Of the pass under way, or of the last one."""
        now = asyncio.get_running_loop().time() if self._running else self._ended
        return Scrubbed(
            running=self._running,
            mb_per_s=round(self._rate / MB),
            total_blocks=self._total,
            verified_blocks=self._blocks,
            verified_bytes=self._bytes,
            bad_blocks=self._bad,
            seconds=now - self._begun,
            passes=self._passes,
        )

    @property
    def _running(self) -> bool:
        return self._task is not None and not self._task.done()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._ended = task.get_loop().time()
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("scrub failed: %r", error)

    async def _keep(self, mb_per_s: int) -> None:
        while True:
            await asyncio.wait([self.start(mb_per_s)])
            await asyncio.sleep(AGAIN_S)

    # ---- a pass ----

    async def _pass(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()  # when what was read so far is due at the rate
        for each in self.pools.on_disk():
            disk = each.disk.store
            memory = aligned(max(PART_BYTES_MAX, disk.shape.page_bytes))
            for slab in disk.slabs.numbers():
                for first, count in self._parts(disk, slab):
                    await asyncio.sleep(max(0.0, due - loop.time()))
                    await self._quiet()
                    due = max(due, loop.time() - PART_S)  # what others took is not made up for
                    due += await self._verify(each, memory, first, count) / self._rate
        await asyncio.sleep(max(0.0, due - loop.time()))
        self._passes += 1

    async def _quiet(self) -> None:
        """Until nothing is waited for, nor was just now: a request brings its prefix in parts."""
        while self._mover.waited_for:
            await self._loader.until_idle()
            await asyncio.sleep(QUIET_S)

    def _parts(self, disk: DiskPool, slab: int) -> Iterator[tuple[int, int]]:
        """First page and count, each as large as the disk's speed and the rate are at the time."""
        per_slab, at = disk.shape.pages_per_slab, 0
        while at < per_slab:
            count = min(per_slab - at, max(1, self._part_bytes() // disk.shape.page_bytes))
            yield slab * per_slab + at, count
            at += count

    def _part_bytes(self) -> int:
        estimate = self._mover.meters["disk"].estimate
        speed = PROBE_BYTES / PART_S if estimate is None else estimate.bandwidth_bytes_per_s
        return round(min(PART_BYTES_MAX, speed * PART_S, self._rate * 5 * PART_S))

    async def _verify(self, pools: LayoutOnDisk, memory: U8, first: int, count: int) -> int:
        """Bytes that were read."""
        disk = pools.disk.store
        pages, records = self._index.residents(pools.disk.id, first, count)
        if not pages.size:
            return 0

        def read() -> U8 | None:
            there = first // disk.shape.pages_per_slab in disk.slabs.numbers()
            return disk.verify(memory, pages, records) if there else None

        status = await self._mover.on_writer(read)
        if status is None:  # the slab went to another layout
            return 0
        self._blocks += pages.size
        self._bytes += pages.size * disk.shape.page_bytes
        bad = status != _core.BLOCK_OK
        if bad.any():
            bad &= self._unchanged(pools.disk.id, pages, records, first, count)
            self._bad += int(bad.sum())
            self._mover.drop_bad(pools, pages[bad], status[bad])
        return int(pages.size) * disk.shape.page_bytes

    def _unchanged(
        self, pool: int, pages: U32, records: _core.Records, first: int, count: int
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[n] whether each page holds the block that it did."""
        now, of_now = self._index.residents(pool, first, count)
        held = dict(zip(now.tolist(), of_now.generations.tolist(), strict=True))
        pairs = zip(pages.tolist(), records.generations.tolist(), strict=True)
        return np.array([held.get(page) == generation for page, generation in pairs], np.bool_)

    def _resident(self, pool: int) -> int:
        return self._index.pool_counts(pool).resident
