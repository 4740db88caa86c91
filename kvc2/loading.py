"""Brings the rest of a lease's prefix from slower tiers, in prefix order, within its deadline.

Not here: which blocks those are (csrc/index) and how they move (mover.py).
"""

from __future__ import annotations

import asyncio

from kvc2 import _core, errors
from kvc2.metrics import Metrics
from kvc2.mover import GpuPool, Mover
from kvc2.tiers.pools import Pools

LOAD_BYTES = 64 << 20  # of one transfer from disk: 50 ms of reading, in parts on a few threads
ARENA_SHARE = 4  # at most a quarter of the arena is being loaded at a time
Step = asyncio.Future[int] | asyncio.Future[None]


class Loader:
    """All on the event loop. `pools` is None where there is only the gpu tier."""

    def __init__(self, index: _core.Index, mover: Mover, metrics: Metrics) -> None:
        self._index = index
        self._mover = mover
        self._metrics = metrics
        self._waiters: list[asyncio.Future[None]] = []
        self.pools: Pools | None = None

    def changed(self) -> None:
        """A transfer has ended or the arena has grown."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def until_changed(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def begin(self, gpu: GpuPool, lease: int) -> Step | None:
        """Promote what memory holds, begin to load what the disk holds. None: it is settled."""
        self._promote(gpu, lease)
        return self._next_load(gpu, lease)

    async def settle(
        self,
        gpu: GpuPool,
        lease: int,
        step: Step,
        released: asyncio.Future[None],
        deadline_s: float,
    ) -> None:
        """Load and promote until nothing more can come, the deadline, or `released` is done."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        while True:
            left = max(0.0, deadline - loop.time())
            await asyncio.wait([step, released], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if released.done():
                return
            if not step.done():
                self._metrics.fault("acquire_deadline")
                return
            self._promote(gpu, lease)
            if step.result() == 0:  # a load that brought nothing would be tried for ever
                return
            following = self._next_load(gpu, lease)
            if following is None:
                return
            step = following

    def _promote(self, gpu: GpuPool, lease: int) -> None:
        """cpu -> gpu as far as pages go."""
        if gpu.broken:
            raise errors.SessionOver("a transfer into the session's pool has failed: attach again")
        transfer = self._index.promote(lease)
        if transfer is not None:
            self._mover.promote(gpu, transfer)

    def _next_load(self, gpu: GpuPool, lease: int) -> Step | None:
        """Begin the next load of the lease, or find the one that it waits for."""
        pools = gpu.pools
        if pools is None or pools.disk is None or self.pools is None:
            return None
        view = self._index.lease(lease)
        wanted = view.matched - view.pages.size
        if wanted == 0:
            return None
        arena, page_bytes = self.pools.arena, pools.shape.page_bytes
        room = arena.capacity_bytes // ARENA_SHARE - self._mover.loading_bytes
        if room < page_bytes and self._mover.loading_bytes:
            return self.until_changed()
        pages = min(wanted, max(1, min(LOAD_BYTES, room) // page_bytes))
        self.pools.make_room(pools, pages)
        step = self._index.next_load(lease, pages)
        if isinstance(step, _core.Wait):
            return self._mover.ended(step.transfer)
        if step is not None:
            return self._mover.load(pools, step)
        if not pools.cpu.slabs() and not arena.populated:
            return self.until_changed()  # a daemon just started: its first slab is coming
        return None
