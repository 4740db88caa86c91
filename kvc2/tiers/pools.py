"""The pools of each layout in cpu and disk, and the slabs they get, share and lose.

All sessions and namespaces of one layout share its pools. A pool grows by a slab before anything is
evicted from it; when the arena is all taken, a layout without slabs takes one from the largest
pool. Not here: moving pages (mover.py), and the disk's slabs, which cost I/O (behind.py).

One thread (the event loop's) uses this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvc2 import _core, errors
from kvc2.arena import Arena
from kvc2.metrics import Metrics
from kvc2.namespace import of_era
from kvc2.tiers.base import U32, PageShape
from kvc2.tiers.cpu import CpuPool
from kvc2.tiers.disk import DiskPool, DiskTier


@dataclass(eq=False)
class LayoutPools:
    """The cpu pool of a layout, and the disk pool below it where there is a disk."""

    shape: PageShape  # in the arena
    cpu_id: int
    cpu: CpuPool
    disk_id: int | None
    disk: DiskPool | None


class Pools:
    """Index pools and their slabs, by layout."""

    def __init__(
        self,
        index: _core.Index,
        arena: Arena,
        disk: DiskTier | None,
        metrics: Metrics,
        max_layouts: int,
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._max_layouts = max_layouts
        self.arena = arena
        self.disk = disk
        self.layouts: dict[bytes, LayoutPools] = {}

    def of(self, shape: PageShape) -> LayoutPools:
        """The pools of a layout, made when it has none yet. Raises InvalidRequest when the disk has
        it with other sizes: what was copied by them would lie outside of pages; LimitReached for
        one too many: pools are never removed."""
        new = shape.layout_digest not in self.layouts
        if new and len(self.layouts) >= self._max_layouts:
            raise errors.LimitReached("limits.max_layouts", self._max_layouts, "are known")
        known = self._known(shape)
        wanted, found = _sizes(shape), _sizes(known.shape)
        if wanted != found:
            raise errors.InvalidRequest("layout", wanted, f"as the disk has it: {found}")
        return known

    def _known(self, shape: PageShape) -> LayoutPools:
        known = self.layouts.get(shape.layout_digest)
        if known is None:
            known = self.layouts[shape.layout_digest] = self._make(shape)
        return known

    def _make(self, shape: PageShape) -> LayoutPools:
        disk = None if self.disk is None else self.disk.pool(shape)
        disk_id = None
        if disk is not None:
            disk_id = self._index.add_pool(
                page_size=shape.page_size,
                pages_per_slab=disk.shape.pages_per_slab,
                below=None,
                durable=True,
            )
        in_arena = shape.with_slabs(self.arena.unit_bytes)
        cpu_id = self._index.add_pool(
            page_size=shape.page_size,
            pages_per_slab=in_arena.pages_per_slab,
            below=disk_id,
            durable=False,
        )
        return LayoutPools(in_arena, cpu_id, CpuPool(self.arena, in_arena), disk_id, disk)

    def make_room(self, pools: LayoutPools, pages: int) -> None:
        """Slabs for the cpu pool until `pages` are free there or the arena is all taken."""
        while self._index.pool_counts(pools.cpu_id).free < pages:
            if not self._add_slab(pools):
                return

    def ensure_slab(self, pools: LayoutPools) -> None:
        """A layout without a slab in the arena takes one from the largest pool. While the arena is
        still being faulted in, one will come by itself."""
        if pools.cpu.slabs() or self._add_slab(pools) or not self.arena.populated:
            return
        others = [each for each in self.layouts.values() if each.cpu.slabs()]
        for owner in sorted(others, key=_cpu_bytes, reverse=True):
            if self._take_over(owner, pools):
                return

    def _take_over(self, owner: LayoutPools, needy: LayoutPools) -> bool:
        """Empty slabs of `owner` only where the run that results holds a slab of `needy`."""
        wanted = needy.shape.slab_bytes
        stuck: set[int] = set()
        for run in self.arena.runs_beside(wanted, owner.cpu.runs(), owner.shape.slab_bytes):
            numbers = owner.cpu.slabs_within(run, wanted)
            if stuck.intersection(numbers):
                continue
            kept = next((each for each in numbers if not self._take_slab(owner, each)), None)
            if kept is None:
                return self._add_slab(needy)
            stuck.add(kept)
        return False

    def _add_slab(self, pools: LayoutPools) -> bool:
        run = pools.cpu.take_run()
        if run is None:
            return False
        pools.cpu.add_slab(self._index.add_slab(pools.cpu_id), run)
        return True

    def _take_slab(self, pools: LayoutPools, number: int) -> bool:
        self._index.empty_slab(pools.cpu_id, number)
        if not self._index.take_slab(pools.cpu_id, number):
            return False  # something in it is pinned or under way
        pools.cpu.remove_slab(number)
        return True

    # ---- restart ----

    def restore(self) -> set[bytes]:
        """Rebuild what the disk held: namespaces, slabs, residency; drop records that don't fit.
        The names that the index knows now, each of its era."""
        disk = self.disk
        if disk is None:
            return set()
        names = set()
        for name, (page_size, _) in disk.catalogue.namespaces.items():
            names.add(of_era(name, disk.catalogue.eras.get(name, 0)))
            self._index.open_namespace(of_era(name, disk.catalogue.eras.get(name, 0)), page_size)
        used: set[bytes] = set()
        for pool in list(disk.pools.values()):
            used |= self._restore_pool(disk, self._known(pool.shape))
        disk.forget_namespaces(used)
        return names

    def _restore_pool(self, disk: DiskTier, pools: LayoutPools) -> set[bytes]:
        """The parents of the records that were taken: among them the namespaces still in use."""
        assert pools.disk is not None
        assert pools.disk_id is not None
        stored = disk.stored(pools.disk)
        numbers = pools.disk.slabs.numbers()
        for _ in range(max(numbers, default=-1) + 1):
            self._index.add_slab(pools.disk_id)
        for gap in set(range(max(numbers, default=-1) + 1)) - set(numbers):
            self._index.take_slab(pools.disk_id, gap)
        rows = stored.records
        result = self._index.restore(
            pools.disk_id,
            np.ascontiguousarray(rows["digest"]),
            np.ascontiguousarray(rows["parent"]),
            np.ascontiguousarray(rows["tokens"].astype(np.uint32)),
            stored.pages,
            np.ascontiguousarray(rows["generation"].astype(np.uint64)),
            _stamps_of(disk.read_recency(pools.disk), stored.pages),
        )
        refused = stored.pages[result != _core.RESTORED]
        if refused.size:
            self._metrics.fault("restore_refused", refused.size)
            pools.disk.deletes.append(refused)
        parents = np.unique(rows["parent"][result == _core.RESTORED], axis=0)
        return {bytes(parent) for parent in parents}


def _sizes(shape: PageShape) -> tuple[int, int, int]:
    return shape.page_size, shape.payload_bytes, shape.page_bytes


def _cpu_bytes(pools: LayoutPools) -> int:
    return len(pools.cpu.slabs()) * pools.shape.slab_bytes


def _stamps_of(recency: U32, pages: U32) -> U32:
    """[n] the stamp of each page; 1, the oldest there is, where none was written aside."""
    stamps = np.ones(pages.size, np.uint32)
    known = pages < recency.size
    stamps[known] = np.maximum(recency[pages[known]], 1)
    return stamps
