"""Which executor moves a session's pages: the kind of its memory says so.

Not here: how they move (gpu.py, device.py), what an engine may say of its memory (server/hello.py).
"""

from __future__ import annotations

import asyncio
import mmap
import weakref
from collections.abc import Callable

from kvc2 import events
from kvc2.cuda.nursery import NO_CUDA, CudaHost, Found
from kvc2.cuda.workers import WorkerProcess, Workers
from kvc2.layout import Layout
from kvc2.tiers.base import U8
from kvc2.tiers.device import DevicePool, DeviceShare
from kvc2.tiers.gpu import Copier, GpuExecutor, GpuMemory, SharedMemoryPool

OnLost = Callable[[], None]


class Executors:
    """Of one cache, on the event loop. `copy_threads`: of each way, for memory that is mapped
    here."""

    def __init__(self, arena: U8, copy_threads: int, cuda: CudaHost = NO_CUDA) -> None:
        self._arena = arena
        self._promoter = Copier(copy_threads)
        self._demoter = Copier(copy_threads, behind=True)
        self._cuda = cuda
        self._workers = None if cuda.nursery is None else Workers(cuda.nursery)
        self._watched: dict[WorkerProcess, weakref.WeakKeyDictionary[DevicePool, OnLost]] = {}

    def of_memory(
        self, layout: Layout, memory: mmap.mmap, progress: mmap.mmap, event_fd: int
    ) -> SharedMemoryPool:
        """Over memory that an engine shares. No view of it is left after the pool's `close`."""
        mapped = GpuMemory(layout, memory, progress, event_fd)
        return SharedMemoryPool(mapped, self._arena, self._promoter, self._demoter)

    async def found(self) -> Found:
        """The CUDA devices of this host, or why there are none."""
        if self._cuda.nursery is None:
            return Found({}, self._cuda.why)
        found = await asyncio.to_thread(self._cuda.nursery.found)
        if not found.devices:
            await asyncio.to_thread(self._cuda.nursery.close)  # nobody will need it
        return found

    async def of_device(self, layout: Layout, share: DeviceShare, on_lost: OnLost) -> DevicePool:
        """Over memory of a device. `on_lost` is called on the event loop when the worker that has
        the pool dies. Raises RefusedByWorker, WorkerLost, NoWorker."""
        if self._workers is None:
            raise LookupError(share.uuid)
        pool = await asyncio.to_thread(DevicePool, layout, share, self._workers)
        worker = pool.worker
        if worker not in self._watched:
            self._watched[worker] = weakref.WeakKeyDictionary()
            asyncio.get_running_loop().add_reader(worker.pidfd, self._died, worker)
        self._watched[worker][pool] = on_lost
        return pool

    async def let_go(self, pool: GpuExecutor) -> None:
        """Close it; that of a device may take a second."""
        if isinstance(pool, DevicePool):
            await asyncio.to_thread(pool.close)
        else:
            pool.close()

    def _died(self, worker: WorkerProcess) -> None:
        asyncio.get_running_loop().remove_reader(worker.pidfd)
        pools = self._watched.pop(worker)
        events.warning("worker_died", device=worker.uuid, pools=len(pools))
        for lost in list(pools.values()):
            lost()

    async def close(self) -> None:
        """Every pool is closed."""
        for worker in self._watched:
            asyncio.get_running_loop().remove_reader(worker.pidfd)
        self._watched.clear()
        if self._workers is not None:
            await asyncio.to_thread(self._workers.close)
