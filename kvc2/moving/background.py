"""What is copied when nobody waits: wakes demotion and the disk's writer, and knows when both are
done.

Not here: gpu to cpu (demotion.py), cpu to disk (disk_writer.py), when a batch may begin (turns.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from kvc2 import _core
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.moving.demotion import Demotion
from kvc2.moving.disk_writer import DiskWriter
from kvc2.moving.free_pages import FreePages
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.mover import Mover
from kvc2.moving.turns import Turns
from kvc2.periodic import periodically
from kvc2.tiers.pools import Pools

LOG = logging.getLogger(__name__)

RECENCY_S = 30.0


class Worker:
    """A task that does its work whenever it is woken.

    | state   | to      | when [function]                                           |
    |---------|---------|-----------------------------------------------------------|
    | working | idle    | the work has ended, and nothing woke it meanwhile [run]   |
    | working | working | the work has ended, and something woke it meanwhile [run] |
    | idle    | working | something wakes it [wake]                                 |
    """

    def __init__(
        self, name: str, work: Callable[[], Awaitable[None]], *, on_idle: Callable[[], None]
    ) -> None:
        self.idle = False
        self._name = name
        self._work = work
        self._on_idle = on_idle
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self.idle = False
        self._woken.set()

    async def run(self, metrics: Metrics) -> None:
        """Until it is cancelled."""
        while True:
            self._woken.clear()
            try:
                await self._work()
            except Exception:
                metrics.fault("internal_error")
                LOG.exception("copying from %s", self._name)
            if not self._woken.is_set():
                self.idle = True
                self._on_idle()
            await self._woken.wait()


class Background:
    """All on the event loop. `gpus` is the cache's own table of open pools."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        pools: Pools,
        gpus: Mapping[int, GpuPool],
        *,
        config: ServeConfig,
        metrics: Metrics,
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._metrics = metrics
        self._turns = Turns(index, mover, config.write_policy, self.wake)
        self.free = FreePages(index, pools, gpus, config)
        self.demotion = Demotion(index, mover, pools, gpus, free=self.free, turns=self._turns)
        self.writer = DiskWriter(
            index, mover, pools, free=self.free, turns=self._turns, metrics=metrics
        )
        self._demoter = Worker("gpu to cpu", self.demotion.work, on_idle=self._on_idle)
        self._disk_worker = Worker("cpu to disk", self.writer.work, on_idle=self._on_idle)
        self._workers = (self._demoter, self._disk_worker)
        self._fell_idle = asyncio.Event()
        self._changed = asyncio.Event()  # something was woken, or has fallen idle
        self._tasks: list[asyncio.Task[None]] = []
        pools.on_want = self.wake

    def start(self) -> None:
        self._tasks = [asyncio.create_task(each.run(self._metrics)) for each in self._workers]
        recency = periodically(RECENCY_S, self.writer.save_recency, self._metrics)
        self._tasks.append(asyncio.create_task(recency))

    async def stop(self) -> None:
        """Ends after the batches under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """There may be something to copy, or room for it."""
        self._changed.set()
        self._turns.told()
        for each in self._workers:
            each.wake()

    def _on_idle(self) -> None:
        self._fell_idle.set()
        self._changed.set()

    @property
    def _idle(self) -> bool:
        return all(each.idle for each in self._workers)

    async def drained(self, deadline_s: float) -> bool:
        """Copy without yielding until nothing more can be; False when the time is over first. What
        has failed is tried at once, in new slabs too, and not again before the answer."""
        with self._turns.urgently():
            if self.failing:
                self.demotion.retry.at_once()
                self.writer.retry.at_once()
                self.writer.slabs.ask_again()  # not for room alone: each try takes from others
            self.wake()
            try:
                async with asyncio.timeout(deadline_s):
                    while not self._idle or self._room_is_coming():
                        self._fell_idle.clear()
                        await self._fell_idle.wait()
                return True
            except TimeoutError:
                return False

    def _room_is_coming(self) -> bool:
        """A daemon that just started had no slabs yet for what was committed, when it was tried."""
        return not self.demotion.tried_in_all and self.undemoted() > 0

    async def rescue(self, gpu: GpuPool, timeout_s: float) -> None:
        """Copy what a dead engine committed and no other tier holds; its memory is still mapped."""
        self.wake()  # the disk too: what it takes makes room in cpu
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    self._changed.clear()
                    populated = self._pools.arena.populated  # when it is later, that wakes us
                    if await self.demotion.rescue(gpu):
                        continue
                    stuck = populated and self._disk_worker.idle  # which makes room in cpu
                    if stuck or not self._index.undemoted(gpu.id):
                        break
                    await self._changed.wait()
        self.wake()

    async def synced(self) -> bool:
        """Whether what is on disk is durable, also where disk.durability is relaxed."""
        syncs = [self._mover.on_writer(each.sync) for each in self._pools.tiers.disks]
        return all(await asyncio.shield(asyncio.gather(*syncs)))

    @property
    def failing(self) -> bool:
        """Whether the last batch of either kind has failed: it will be tried again."""
        return self.demotion.retry.failing or self.writer.retry.failing

    def undemoted(self) -> int:
        """Blocks that a slower tier should have and has not."""
        return self.demotion.undemoted() + self.writer.undemoted()
