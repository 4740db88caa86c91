"""The pools of each layout in cpu and disk.

All sessions and namespaces of one layout share its pools. A cpu pool grows by a slab before
anything is evicted from it. Not here: moving pages (mover.py), slabs that go from one layout to
another (slabs.py), and the disk's slabs, which cost I/O (disk_slabs.py).

One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvc2 import _core, errors
from kvc2.arena import Arena
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.tiers.base import TIER_NUMBERS, PageShape
from kvc2.tiers.cpu import CpuPool
from kvc2.tiers.disk import restart
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.tier import DiskTier


@dataclass(eq=False)
class LayoutPools:
    """The cpu pool of a layout, and the disk pool below it where there is a disk."""

    shape: PageShape  # in the arena
    cpu_id: int
    cpu: CpuPool
    disk_id: int | None
    disk: DiskPool | None

    def drop_records(self, evicted: _core.Evicted) -> None:
        """Of pages that the index has freed on the disk: they go with the next commit."""
        assert self.disk is not None
        self.disk.drop(evicted.pages)


class Pools:
    """Index pools and their slabs, by layout."""

    def __init__(
        self,
        index: _core.Index,
        arena: Arena,
        disk: DiskTier | None,
        metrics: Metrics,
        config: ServeConfig,
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._max_layouts = config.limits.max_layouts
        self._second_access = config.disk.admission == "second_access"
        self.arena = arena
        self.disk = disk
        self.layouts: dict[bytes, LayoutPools] = {}
        self.wanted: dict[bytes, int] = {}  # free cpu pages by layout; slabs.py tries to serve it
        self.on_want: Callable[[], None] = lambda: None
        self.on_served: Callable[[], None] = lambda: None

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
            disk_id = restart.disk_pool(self._index, disk.shape, second_access=self._second_access)
        in_arena = shape.with_slabs(self.arena.unit_bytes)
        cpu_id = self._index.add_pool(
            page_size=shape.page_size,
            pages_per_slab=in_arena.pages_per_slab,
            below=disk_id,
            durable=False,
            tier=TIER_NUMBERS["cpu"],
            page_bytes=shape.page_bytes,
        )
        return LayoutPools(in_arena, cpu_id, CpuPool(self.arena, in_arena), disk_id, disk)

    def grow(self, pools: LayoutPools, pages: int) -> bool:
        """Slabs for the cpu pool until `pages` are free there or the arena is all taken. Whether
        they are."""
        while self._index.pool_counts(pools.cpu_id).free < pages:
            if not self._add_slab(pools):
                return False
        return True

    def make_room(self, pools: LayoutPools, pages: int) -> None:
        """The same now, and what that lacks soon, where other layouts need it less."""
        if not self.grow(pools, pages) and self.arena.populated:
            self.wanted[pools.shape.layout_digest] = pages
            self.on_want()

    def is_wanted(self, pools: LayoutPools) -> bool:
        """Whether more than it has may still come."""
        return pools.shape.layout_digest in self.wanted

    def served(self, pools: LayoutPools) -> None:
        """What was wanted is there, or is not to be had."""
        self.wanted.pop(pools.shape.layout_digest, None)
        self.on_served()

    def _add_slab(self, pools: LayoutPools) -> bool:
        run = pools.cpu.take_run()
        if run is None:
            return False
        pools.cpu.add_slab(self._index.add_slab(pools.cpu_id), run)
        return True

    # ---- restart ----

    def restore(self) -> dict[bytes, int]:
        """Rebuild what the disk held: namespaces, slabs, residency; drop records that don't fit.
        Returns the index's numbers of the namespaces that are left, by the name of their era."""
        disk = self.disk
        if disk is None:
            return {}
        numbers = restart.open_namespaces(self._index, disk.catalogue)
        used: set[bytes] = set()
        for pool in list(disk.pools.values()):
            used |= self._restore_pool(disk, self._known(pool.shape))
        disk.forget_namespaces(used)
        return {
            known: number
            for known, number in numbers.items()
            if known in used or not self._index.close_namespace(number)
        }

    def _restore_pool(self, disk: DiskTier, pools: LayoutPools) -> set[bytes]:
        """The parents of the records that were taken: among them the namespaces still in use."""
        assert pools.disk is not None
        assert pools.disk_id is not None
        stored = disk.stored(pools.disk)
        restart.add_slabs(self._index, pools.disk_id, pools.disk.slabs.numbers())
        number, recency = pools.disk.number, disk.recency
        result = restart.restore(
            self._index, pools.disk_id, stored, recency.stamps(number), recency.lifetimes(number)
        )
        refused = stored.pages[result != _core.RESTORED]
        if refused.size:
            self._metrics.fault("restore_refused", refused.size)
            pools.disk.drop(refused)
        parents = np.unique(stored.records["parent"][result == _core.RESTORED], axis=0)
        return {bytes(parent) for parent in parents}


def _sizes(shape: PageShape) -> tuple[int, int, int]:
    return shape.page_size, shape.payload_bytes, shape.page_bytes
