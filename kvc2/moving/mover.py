"""Carries out the index's transfers on threads and tells it how they ended.

    promote  cpu -> gpu  one FIFO thread a session: its progress word rises with its transfers
    load     disk -> cpu a few threads; a transfer is cut into parts so that the disk has depth
    demote   gpu -> cpu  one thread
    write    cpu -> disk one thread, the only one that writes the catalogue

Completions come back on the event loop, where `Index.complete` is called. What transfers towards
faster tiers took is told to that tier's meter (pace.py). Not here: which transfers there should be
(csrc/index) and when to ask for those that nobody waits for (background.py).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from kvc2 import _core
from kvc2.host.priority import step_back
from kvc2.metrics import Metrics
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.pace import Meter
from kvc2.tiers.base import U8, U32, joined, part_of
from kvc2.tiers.disk.batch import WriteBatch, Writing
from kvc2.tiers.disk.pool import READ_FAILED
from kvc2.tiers.disk.tier import FAULT_OF_STATUS, DiskTier, Outcome
from kvc2.tiers.pools import LayoutPools

LOG = logging.getLogger(__name__)

T = TypeVar("T")

LOAD_THREADS = 4  # depth of the disk's queue: 4 reads of 8 MiB keep an NVMe disk busy
LOAD_PART_BYTES = 8 << 20


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a thread's work returned, and when it ran."""

    result: T
    began: float
    ended: float


class Mover:
    """All methods are called on the event loop's thread; `clock` is read by its threads too.
    `arena` is [bytes] u8. `meters`: of the tiers that are brought from."""

    def __init__(
        self,
        index: _core.Index,
        metrics: Metrics,
        arena: U8,
        disk: DiskTier | None,
        on_done: Callable[[], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self.meters = {"cpu": Meter(clock), "disk": Meter(clock)}
        self._index = index
        self._metrics = metrics
        self._arena = arena
        self._disk = disk
        self._on_done = on_done
        self._loads = ThreadPoolExecutor(LOAD_THREADS, "kvc2-load")
        self._behind = ThreadPoolExecutor(1, "kvc2-demote", initializer=step_back)
        self._writer = ThreadPoolExecutor(1, "kvc2-disk", initializer=step_back)
        self._team = _core.ThreadTeam(1)
        self._under_way: set[int] = set()
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}
        # by pool: the batch begun last, while the index may take what fails yet for stored
        self._writing: dict[int, Writing] = {}
        self.loading_bytes = 0
        self._calm = threading.Event()  # no load is under way: what is written need not yield
        self._calm.set()
        self.promoting = 0

    def close(self) -> None:
        """Waits for what runs; what has not begun is dropped."""
        for each in (self._loads, self._behind, self._writer):
            each.shutdown(wait=True, cancel_futures=True)

    def ended(self, transfer: int) -> asyncio.Future[None]:
        """Done when the transfer is over and the index knows; a future for each caller."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if transfer in self._under_way:
            self._waiters.setdefault(transfer, []).append(waiter)
        else:
            waiter.set_result(None)
        return waiter

    @property
    def waited_for(self) -> bool:
        """Whether a transfer is under way that someone waits for: those behind yield to it."""
        return self.loading_bytes > 0 or self.promoting > 0

    # ---- towards faster tiers ----

    def promote(self, gpu: GpuPool, transfer: _core.Transfer) -> None:
        """cpu -> gpu, behind everything that was promoted to this session before."""
        assert gpu.pools is not None
        assert gpu.store is not None
        gpu.sequence += 1
        gpu.pending[transfer.id] = sequence = gpu.sequence
        self.promoting += 1
        store, pages = gpu.store, transfer.target_pages
        offsets = gpu.pools.cpu.offsets(transfer.source_pages)
        begun = self._clock()
        running = asyncio.get_running_loop().run_in_executor(
            gpu.queue, self._timed, lambda: store.write(pages, offsets, sequence=sequence)
        )
        self._under_way.add(transfer.id)
        running.add_done_callback(lambda done: self._promoted(gpu, transfer, done, begun))

    def _promoted(
        self,
        gpu: GpuPool,
        transfer: _core.Transfer,
        running: asyncio.Future[Timed[None]],
        begun: float,
    ) -> None:
        self.promoting -= 1
        gpu.pending.pop(transfer.id, None)
        good = transfer.target_pages.size
        if running.cancelled():
            good = 0
        elif error := running.exception():
            LOG.error("promotion failed: %r", error)
            gpu.fail()
            good = 0
        elif gpu.pools is not None:
            self._measure("cpu", good * gpu.pools.shape.payload_bytes, begun, [running.result()])
        self._end(transfer, good, gpu.pools, ("cpu", "gpu"), begun)

    def load(
        self,
        pools: LayoutPools,
        transfer: _core.Transfer,
        came: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[int]:
        """disk -> cpu, each block verified whole. The result is how many leading blocks came; the
        bad ones are dropped from the index and the catalogue. Never raises. `came` runs once the
        index has them, before anybody else can evict them."""
        task = asyncio.ensure_future(self._load(pools, transfer, came))
        self._under_way.add(transfer.id)
        self.loading_bytes += transfer.target_pages.size * pools.shape.page_bytes
        self._calm.clear()
        return task

    async def _load(
        self, pools: LayoutPools, transfer: _core.Transfer, came: Callable[[], None]
    ) -> int:
        assert pools.disk is not None
        assert transfer.records is not None
        count, page_bytes = transfer.target_pages.size, pools.shape.page_bytes
        offsets = pools.cpu.offsets(transfer.target_pages)
        begun = self._clock()
        loop, step = asyncio.get_running_loop(), max(1, LOAD_PART_BYTES // page_bytes)
        parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        running = [
            loop.run_in_executor(
                self._loads,
                self._timed,
                functools.partial(
                    pools.disk.load,
                    self._arena,
                    transfer.source_pages[part],
                    offsets[part],
                    part_of(transfer.records, part),
                ),
            )
            for part in parts
        ]
        results = await asyncio.gather(*running, return_exceptions=True)
        status = np.full(count, _core.BLOCK_BAD_PAYLOAD, np.uint8)
        for part, result in zip(parts, results, strict=True):
            if isinstance(result, BaseException):
                LOG.error("load failed: %r", result)
            else:
                status[part] = result.result
        self.loading_bytes -= count * page_bytes
        if not self.loading_bytes:
            self._calm.set()
        bad = np.flatnonzero(status != _core.BLOCK_OK)
        if not bad.size:
            timed = [each for each in results if isinstance(each, Timed)]
            self._measure("disk", count * page_bytes, begun, timed)
        good = int(bad[0]) if bad.size else count
        self._end(transfer, good, pools, ("disk", "cpu"), begun)
        came()
        if bad.size:
            self.drop_bad(pools, transfer.source_pages[bad], status[bad])
        return good

    def drop_bad(self, pools: LayoutPools, pages: U32, status: U8) -> None:
        """Blocks that the disk has spoiled: a miss from now on."""
        assert pools.disk is not None
        assert pools.disk_id is not None
        for kind, count in zip(*np.unique(status, return_counts=True), strict=True):
            self._metrics.fault(FAULT_OF_STATUS[int(kind)], int(count))
        LOG.warning("disk: %d blocks did not come whole, dropped", pages.size)
        lost = self._index.lost(pools.disk_id, pages)
        pools.disk.drop(lost.pages)
        self._on_done()

    # ---- within a tier ----

    async def move_in_arena(self, pools: LayoutPools, transfer: _core.Transfer) -> int:
        """Pages of one slab to other slabs of its cpu pool. How many went. Never raises."""
        begun = self._clock()
        copy = pools.cpu.move(self._team, transfer.source_pages, transfer.target_pages)
        good = transfer.target_pages.size
        try:
            await asyncio.get_running_loop().run_in_executor(self._behind, copy)
        except Exception as error:
            LOG.error("move failed: %r", error)
            good = 0
        return self._end(transfer, good, pools, ("cpu", "cpu"), begun).size

    async def move_on_disk(self, pools: LayoutPools, transfer: _core.Transfer) -> int:
        """Pages of one slab to other slabs of its disk pool, verified; their records go with the
        next commit. How many went. Never raises."""
        disk, records = pools.disk, transfer.records
        assert disk is not None
        assert records is not None
        begun, sources, targets = self._clock(), transfer.source_pages, transfer.target_pages
        status = np.full(sources.size, READ_FAILED, np.uint8)
        try:
            status = await self.on_writer(lambda _: disk.move(sources, targets, records))
        except Exception as error:
            self._metrics.fault("disk_write")
            LOG.warning("disk: moving %d pages: %r", sources.size, error)
            return self._end(transfer, 0, pools, ("disk", "disk"), begun).size
        bad = np.flatnonzero(status != _core.BLOCK_OK)
        good = int(bad[0]) if bad.size else sources.size
        left = self._end(transfer, good, pools, ("disk", "disk"), begun)
        if left.size:
            disk.moved(left, targets[np.isin(sources, left)])
        if bad.size:
            self.drop_bad(pools, sources[bad], status[bad])
        return left.size

    # ---- towards slower tiers ----

    async def demote(self, gpu: GpuPool, transfer: _core.Transfer) -> bool:
        """gpu -> cpu. Whether all of it came."""
        assert gpu.pools is not None
        assert gpu.store is not None
        offsets = gpu.pools.cpu.offsets(transfer.target_pages)
        begun = self._clock()
        running = asyncio.get_running_loop().run_in_executor(
            self._behind, gpu.store.read, transfer.source_pages, offsets
        )
        self._under_way.add(transfer.id)
        good = 0
        try:
            came = await running
            bad = np.flatnonzero(came == 0)
            good = int(bad[0]) if bad.size else came.size
            if not await gpu.holds():
                good = 0
        except Exception as error:
            LOG.error("demotion failed: %r", error)
        finally:
            self._end(transfer, good, gpu.pools, ("gpu", "cpu"), begun)
        return good == transfer.target_pages.size

    async def write(
        self,
        pools: LayoutPools,
        transfers: Sequence[_core.Transfer] = (),
        *,
        patience_s: float = 0.0,
    ) -> Outcome:
        """cpu -> disk: one batch of these transfers, and one commit of it with what the pool has
        dropped. In the order of the calls, which may be before those before them have ended: the
        next batch is written meanwhile. Writes yield to loads that come meanwhile, for so long."""
        disk, pool = self._disk, pools.disk
        assert disk is not None
        assert pool is not None
        begun, outcome, writing = self._clock(), Outcome(False, False), None
        self._under_way.update(each.id for each in transfers)
        try:
            if transfers:
                batch = self._batch(pools, transfers, patience_s)
                writing = disk.begin(batch, self._writing.get(pool.number))
                self._writing[pool.number] = writing
            outcome = await self.on_writer(lambda _: disk.store(pool, writing))
        except Exception as error:
            LOG.error("write failed: %r", error)
        for each in transfers:
            good = each.target_pages.size if outcome.written else 0
            self._end(each, good, pools, ("cpu", "disk"), begun)
        if writing is not None and self._writing.get(pool.number) is writing:
            del self._writing[pool.number]
        return outcome

    def _batch(
        self, pools: LayoutPools, transfers: Sequence[_core.Transfer], patience_s: float
    ) -> WriteBatch:
        assert pools.disk is not None
        return WriteBatch(
            pools.disk,
            np.concatenate([each.target_pages for each in transfers]),
            pools.cpu.offsets(np.concatenate([each.source_pages for each in transfers])),
            joined([each.records for each in transfers if each.records is not None]),
            self._calm,
            patience_s,
        )

    def on_writer(self, work: Callable[[DiskTier], T]) -> asyncio.Future[T]:
        """Run `work` on the thread that alone writes the disk's catalogue."""
        assert self._disk is not None
        return asyncio.get_running_loop().run_in_executor(self._writer, work, self._disk)

    # ---- how long it took ----

    def _timed(self, work: Callable[[], T]) -> Timed[T]:
        began = self._clock()
        return Timed(work(), began, self._clock())

    def _measure(
        self, tier: str, num_bytes: int, asked: float, parts: Sequence[Timed[Any]]
    ) -> None:
        began, ended = min(each.began for each in parts), max(each.ended for each in parts)
        self.meters[tier].saw(num_bytes, ended - began, began - asked)
        self._publish(tier)

    def overdue(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A transfer from this tier has not ended after `seconds`."""
        self.meters[tier].overdue(num_bytes, seconds)
        self._publish(tier)

    def _publish(self, tier: str) -> None:
        if estimate := self.meters[tier].estimate:
            self._metrics.bandwidth.labels(tier).set(estimate.bandwidth_bytes_per_s)
            if math.isfinite(estimate.queue_s):
                self._metrics.queue.labels(tier).set(estimate.queue_s)

    # ---- the end of a transfer ----

    def _end(
        self,
        transfer: _core.Transfer,
        good: int,
        pools: LayoutPools | None,
        way: tuple[str, str],
        begun: float,
    ) -> U32:
        """What Index.complete answers."""
        self._under_way.discard(transfer.id)
        left = np.empty(0, np.uint32)
        try:
            left = self._index.complete(transfer.id, good)
        except KeyError:
            good = 0  # its pool was removed meanwhile
        if good < transfer.target_pages.size:
            self._metrics.fault("transfer_failed")
        self._metrics.transfer_blocks.labels(*way).inc(good)
        if pools is not None:
            self._metrics.transfer_bytes.labels(*way).inc(good * pools.shape.payload_bytes)
        self._metrics.transfer_seconds.labels(*way).observe(self._clock() - begun)
        for waiter in self._waiters.pop(transfer.id, []):
            if not waiter.done():
                waiter.set_result(None)
        self._on_done()
        return left
