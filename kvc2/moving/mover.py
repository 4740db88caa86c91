"""Carries out the index's transfers on threads and tells it how they ended.

    promote        cpu -> gpu    a FIFO thread a session: its progress word rises with its transfers
    load           disk -> cpu   a few threads; cut into parts so that the disk has depth
    demote         gpu -> cpu    one thread
    write          cpu -> disk   one thread, the only one that writes the catalogue
    move_in_arena  cpu -> cpu    the thread of demotions
    move_on_disk   disk -> disk  the thread of writes

Each of them runs in one way. `_carry` puts its parts on the threads of its route (routes.py). When
they have ended `_end` tells, on the event loop, the route's meter, the index and whoever waits. Not
here: which transfers there should be (csrc/index), and when to ask for those that nobody waits for
(background.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from kvc2 import _core
from kvc2.metrics import Metrics
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.routes import NO_PAGES, Part, Route, Routes, Transferred, none_of
from kvc2.tiers.base import U8, U32, joined, part_of, records_of
from kvc2.tiers.disk.batch import WriteBatch, Writing
from kvc2.tiers.disk.tier import FAULT_OF_STATUS, Outcome
from kvc2.tiers.meter import Meter
from kvc2.tiers.pools import LayoutOnDisk, LayoutPools

LOG = logging.getLogger(__name__)

T = TypeVar("T")

LOAD_PART_BYTES = 8 << 20


class Mover:
    """All methods are called on the event loop's thread; `clock` is read by its threads too.
    `meters`: of the tiers that are brought from, by name."""

    def __init__(
        self,
        index: _core.Index,
        metrics: Metrics,
        meters: Mapping[str, Meter],
        on_done: Callable[[], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self.meters = meters
        self._index = index
        self._metrics = metrics
        self._on_done = on_done
        self._routes = Routes(meters["disk"])
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
        self._routes.close()

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
        """Whether a transfer is under way that someone waits for: the others yield to it."""
        return self.loading_bytes > 0 or self.promoting > 0

    def on_writer(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run `work` on the thread that alone writes the disk's catalogue."""
        return asyncio.get_running_loop().run_in_executor(self._routes.writer, work)

    # ---- towards faster tiers ----

    def promote(self, gpu: GpuPool, transfer: _core.Transfer) -> None:
        """cpu -> gpu, behind everything that was promoted to this session before."""
        gpu.sequence += 1
        gpu.pending[transfer.id] = gpu.sequence
        self.promoting += 1
        pages, offsets = transfer.target_pages, gpu.pools.cpu.store.offsets(transfer.source_pages)
        copy = partial(gpu.store.write, pages, offsets, sequence=gpu.sequence)
        route = Route("cpu", "gpu", gpu.queue, gpu.pools.cpu.meter)
        running = self._carry(route, [transfer], [Part(pages.size, copy)])
        running.add_done_callback(partial(self._promoted, gpu, route, transfer))

    def _promoted(
        self,
        gpu: GpuPool,
        route: Route,
        transfer: _core.Transfer,
        running: asyncio.Future[Transferred],
    ) -> None:
        came = running.result()
        self.promoting -= 1
        gpu.pending.pop(transfer.id, None)
        if came.error is not None and not isinstance(came.error, asyncio.CancelledError):
            gpu.fail()
        self._end(route, gpu.pools, [transfer], came)

    def load(
        self,
        pools: LayoutOnDisk,
        transfer: _core.Transfer,
        came: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[Transferred]:
        """disk -> cpu, each block verified whole. The bad ones are dropped from the index and the
        catalogue. Never raises. `came` runs once the index has them, before anybody else can evict
        them."""
        count, page_bytes = transfer.target_pages.size, pools.shape.page_bytes
        offsets, records = pools.cpu.store.offsets(transfer.target_pages), records_of(transfer)
        step = max(1, LOAD_PART_BYTES // page_bytes)
        slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        parts = [
            Part(
                each.stop - each.start,
                partial(
                    pools.disk.store.load,
                    pools.cpu.store.arena.memory,
                    transfer.source_pages[each],
                    offsets[each],
                    part_of(records, each),
                ),
            )
            for each in slices
        ]
        self.loading_bytes += count * page_bytes
        self._calm.clear()  # before a thread reads: what is written yields from now on
        running = self._carry(self._routes.load, [transfer], parts)
        return asyncio.ensure_future(self._loaded(pools, transfer, running, came))

    async def _loaded(
        self,
        pools: LayoutOnDisk,
        transfer: _core.Transfer,
        running: asyncio.Future[Transferred],
        came: Callable[[], None],
    ) -> Transferred:
        loaded = await running
        self.loading_bytes -= transfer.target_pages.size * pools.shape.page_bytes
        if not self.loading_bytes:
            self._calm.set()
        loaded = self._end(self._routes.load, pools, [transfer], loaded)
        came()
        self._drop_bad_of(pools, transfer, loaded)
        return loaded

    def _drop_bad_of(
        self, pools: LayoutOnDisk, transfer: _core.Transfer, came: Transferred
    ) -> None:
        if not came.whole:
            self.drop_bad(pools, transfer.source_pages[came.bad], came.status[came.bad])

    def drop_bad(self, pools: LayoutOnDisk, pages: U32, status: U8) -> None:
        """Blocks that the disk has spoiled: a miss from now on."""
        for kind, count in zip(*np.unique(status, return_counts=True), strict=True):
            self._metrics.fault(FAULT_OF_STATUS[int(kind)], int(count))
        LOG.warning("disk: %d blocks did not come whole, dropped", pages.size)
        lost = self._index.lost(pools.disk.id, pages)
        pools.disk.store.drop(lost.pages)
        self._on_done()

    # ---- within a tier ----

    async def move_in_arena(self, pools: LayoutPools, transfer: _core.Transfer) -> Transferred:
        """Pages of one slab to other slabs of its cpu pool. Never raises."""
        copy = pools.cpu.store.move(self._team, transfer.source_pages, transfer.target_pages)
        part = Part(transfer.target_pages.size, copy)
        moved = await self._carry(self._routes.move_in_arena, [transfer], [part])
        return self._end(self._routes.move_in_arena, pools, [transfer], moved)

    async def move_on_disk(self, pools: LayoutOnDisk, transfer: _core.Transfer) -> Transferred:
        """Pages of one slab to other slabs of its disk pool, verified; their records go with the
        next commit. Never raises."""
        disk = pools.disk.store
        sources, targets = transfer.source_pages, transfer.target_pages
        part = Part(sources.size, partial(disk.move, sources, targets, records_of(transfer)))
        moved = await self._carry(self._routes.move_on_disk, [transfer], [part])
        moved = self._end(self._routes.move_on_disk, pools, [transfer], moved)
        if moved.error is not None:
            self._metrics.fault("disk_write")
            return moved
        left = moved.left
        if left.size:
            disk.moved(left, targets[np.isin(sources, left)])
        self._drop_bad_of(pools, transfer, moved)
        return moved

    # ---- towards slower tiers ----

    async def demote(self, gpu: GpuPool, transfer: _core.Transfer) -> Transferred:
        """gpu -> cpu. Never raises."""
        pages = transfer.source_pages
        offsets = gpu.pools.cpu.store.offsets(transfer.target_pages)
        copy = partial(gpu.read, pages, offsets)
        demoted = await self._carry(self._routes.demote, [transfer], [Part(pages.size, copy)])
        if demoted.good and not await gpu.holds():
            demoted = demoted.in_vain()
        return self._end(self._routes.demote, gpu.pools, [transfer], demoted)

    async def write(
        self,
        pools: LayoutOnDisk,
        transfers: Sequence[_core.Transfer] = (),
        *,
        patience_s: float = 0.0,
    ) -> Outcome:
        """cpu -> disk: one batch of these transfers, and one commit of it with what the pool has
        dropped. In the order of the calls, which may be before those before them have ended: the
        next batch is written meanwhile. Writes yield to loads that come meanwhile, for so long.
        Never raises."""
        pool = pools.disk.store
        outcome, count = Outcome(False, False), sum(each.target_pages.size for each in transfers)
        writing = self._begin_batch(pools, transfers, patience_s)

        def commit() -> U8 | None:
            nonlocal outcome
            if transfers and writing is None:
                return none_of(count)
            outcome = pools.files.finish(pool, writing)
            return None if outcome.written else none_of(count)

        written = await self._carry(self._routes.write, transfers, [Part(count, commit)])
        self._end(self._routes.write, pools, transfers, written)
        if writing is not None and self._writing.get(pool.number) is writing:
            del self._writing[pool.number]
        return outcome

    def _begin_batch(
        self, pools: LayoutOnDisk, transfers: Sequence[_core.Transfer], patience_s: float
    ) -> Writing | None:
        """None: there is nothing to write, or it could not be begun."""
        if not transfers:
            return None
        batch = WriteBatch(
            pools.disk.store,
            np.concatenate([each.target_pages for each in transfers]),
            pools.cpu.store.offsets(np.concatenate([each.source_pages for each in transfers])),
            joined([records_of(each) for each in transfers]),
            self._calm,
            patience_s,
        )
        number = pools.disk.store.number
        try:
            writing = pools.files.begin(batch, self._writing.get(number))
        except Exception as error:
            LOG.error("a batch was not begun: %r", error)
            return None
        self._writing[number] = writing
        return writing

    # ---- how each of them runs ----

    def _carry(
        self, route: Route, transfers: Sequence[_core.Transfer], parts: Sequence[Part]
    ) -> asyncio.Future[Transferred]:
        """The parts are on the route's threads when this returns, in their order. The future never
        raises; who asked passes what it holds to `_end`."""
        running = route.carry(parts, self._clock)
        self._under_way.update(each.id for each in transfers)
        return running

    def _end(
        self,
        route: Route,
        pools: LayoutPools,
        transfers: Sequence[_core.Transfer],
        came: Transferred,
    ) -> Transferred:
        """What came is the index's now, and whoever waits is told. The result says too which pages
        moved blocks have left."""
        counts = route.judge(pools.shape, came, [each.target_pages.size for each in transfers])
        if route.meter is not None:
            self._publish(route.source)
        left = [
            self._complete(route, pools, each, good, came.asked)
            for each, good in zip(transfers, counts, strict=True)
        ]
        return replace(came, left=np.concatenate([NO_PAGES, *left]))

    def _complete(
        self,
        route: Route,
        pools: LayoutPools,
        transfer: _core.Transfer,
        good: int,
        asked: float,
    ) -> U32:
        """What Index.complete answers."""
        self._under_way.discard(transfer.id)
        left, way = NO_PAGES, (route.source, route.target)
        try:
            left = self._index.complete(transfer.id, good)
        except KeyError:
            good = 0  # its pool was removed meanwhile
        if good < transfer.target_pages.size:
            self._metrics.fault("transfer_failed")
        self._metrics.transfer_blocks.labels(*way).inc(good)
        self._metrics.transfer_bytes.labels(*way).inc(good * pools.shape.payload_bytes)
        self._metrics.transfer_seconds.labels(*way).observe(self._clock() - asked)
        for waiter in self._waiters.pop(transfer.id, []):
            if not waiter.done():
                waiter.set_result(None)
        self._on_done()
        return left

    # ---- what the meters say ----

    def overdue(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A transfer from this tier has not ended after `seconds`."""
        self.meters[tier].overdue(num_bytes, seconds)
        self._publish(tier)

    def _publish(self, tier: str) -> None:
        if estimate := self.meters[tier].estimate:
            self._metrics.bandwidth.labels(tier).set(estimate.bandwidth_bytes_per_s)
            if math.isfinite(estimate.queue_s):
                self._metrics.queue.labels(tier).set(estimate.queue_s)
