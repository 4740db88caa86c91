"""Demotion: committed blocks go from the engines' gpu pools to the cpu tier, soon after a commit.

Not here: which blocks (csrc/index), the copying (mover.py), room in the arena (slabs.py), when a
batch may begin (turns.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from kvc2 import _core
from kvc2.moving.free_pages import FreePages
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.mover import Mover
from kvc2.moving.slabs import Slabs
from kvc2.moving.turns import Retry, Turns
from kvc2.tiers.pools import Pools

GATHER_BYTES = 16 << 20  # about 4 ms of copying: what a promotion may have to wait for


class Demotion:
    """All on the event loop. Which copies come from a gpu pool, by its session's state
    (gpu_pools.py):

    | state         | to      | what is copied until then [function]                |
    |---------------|---------|-----------------------------------------------------|
    | ready, broken | silent  | what is wanted, each batch in its turn [work]       |
    | silent        | at_rest | nothing; of a batch under way nothing may count yet |
    | at_rest       | closed  | at once, what no other tier holds [rescue]          |
    | closed        |         | nothing: nothing reads the pool's memory any more   |

    A batch that failed is tried again (`Retry`). `tried_in_all`: whether all of the arena was
    there when copies into it were last tried.
    """

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        pools: Pools,
        gpus: Mapping[int, GpuPool],
        *,
        free: FreePages,
        turns: Turns,
    ) -> None:
        self._index = index
        self._mover = mover
        self._pools = pools
        self._gpus = gpus
        self._slabs = Slabs(index, mover, pools, free.high_watermark)
        self._free = free
        self._turns = turns
        self.retry = Retry(turns.wake)
        self.tried_in_all = False

    def undemoted(self) -> int:
        """Blocks that the cpu tier should have and has not."""
        return sum(self._index.undemoted(gpu.id) for gpu in self._gpus.values())

    async def work(self) -> None:
        """Copy until there is nothing to copy, no room, or no turn."""
        self.tried_in_all = self._pools.arena.populated  # when it is later, that wakes us
        moved = True
        self._free.reap()
        await self._slabs.serve()
        while moved:
            moved = False
            for gpu in list(self._gpus.values()):
                moved |= await self._demote(gpu)
                self._index.trim(gpu.pools.cpu.id)
                if not gpu.life.over:
                    self._free.keep(gpu.id)

    async def _demote(self, gpu: GpuPool) -> bool:
        """One batch; False when there was nothing to do."""
        await self._turns.quiet()
        async with gpu.demoting:
            if not self._wants(gpu) or gpu.life.over or not self._turns.wanted(gpu.id):
                return False
            if self.retry.must_wait:
                return False
            return await self._copy(gpu)

    async def rescue(self, gpu: GpuPool) -> bool:
        """One batch of a dead engine's pool, whose memory is still mapped, at once; False when
        there was nothing to do."""
        async with gpu.demoting:
            return self._wants(gpu) and await self._copy(gpu)

    def _wants(self, gpu: GpuPool) -> bool:
        """Whether the pools below it should get something from this one."""
        return gpu.life.state != "closed" and self._index.undemoted(gpu.id) > 0

    async def _copy(self, gpu: GpuPool) -> bool:
        pools = gpu.pools
        pages = max(1, GATHER_BYTES // pools.shape.page_bytes)
        coming = not self._pools.arena.populated  # when it is there, that wakes us
        await self._slabs.make_room(pools, min(pages, self._index.undemoted(gpu.id)))
        if coming:  # nothing is evicted for want of memory that comes
            pages = min(pages, self._index.pool_counts(pools.cpu.id).free)
        if not pages:
            return False
        transfer = self._index.plan_demote(gpu.id, pages)
        if transfer is None:
            return False
        came = await asyncio.shield(self._mover.demote(gpu, transfer))
        # a copy that the session's end made worthless says nothing of the next one
        self.retry.ended(good=came.whole or gpu.life.over)
        self._turns.wake()
        return came.whole
