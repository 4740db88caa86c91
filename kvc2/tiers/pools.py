"""The tiers below the engines' own pools, and the pools of each layout in them.

All sessions and namespaces of one layout share its pools. A cpu pool grows by a slab before
anything is evicted from it. Not here: moving pages (mover.py), slabs that go from one layout to
another (slabs.py), and the disk's slabs, which cost I/O (disk_slabs.py).

One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from kvc2 import _core, errors
from kvc2.arena import Arena
from kvc2.config import ServeConfig
from kvc2.metrics import Metrics
from kvc2.tiers.base import TIER_NUMBERS, U32, U64, PageShape, payload_offsets
from kvc2.tiers.cpu import CpuPool
from kvc2.tiers.disk import restart
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.meter import Meter

Store = TypeVar("Store")


@dataclass(frozen=True)
class Tiers:
    """What lies below the engines' own pools: memory, and a disk where there is one (`disks` has
    it, or nothing). An arena of no bytes is no tier: then there are the engines' pools alone.
    `meters`: of the tiers that are brought from, by name."""

    arena: Arena
    disks: tuple[DiskTier, ...]
    meters: Mapping[str, Meter]

    @staticmethod
    def of(arena: Arena, disks: tuple[DiskTier, ...], clock: Callable[[], float]) -> Tiers:
        """`clock`: monotonic seconds."""
        return Tiers(arena, disks, {"cpu": Meter(clock), "disk": Meter(clock)})

    @property
    def names(self) -> tuple[str, ...]:
        """The fastest first."""
        cpu = ("cpu",) if self.arena.capacity_bytes else ()
        return cpu + ("disk",) * len(self.disks)

    def capacity_bytes(self, tier: str) -> int:
        if tier == "cpu":
            return self.arena.capacity_bytes
        return sum(each.size_bytes for each in self.disks)

    def close(self) -> None:
        """The slowest first."""
        for each in self.disks:
            each.close()
        self.arena.close()


@dataclass(frozen=True, eq=False)
class TierPool(Generic[Store]):
    """One link of a layout's chain: the index's `id` of the pool, and what holds its pages."""

    tier: str
    id: int
    store: Store
    meter: Meter


@dataclass(frozen=True, eq=False)
class LayoutPools:
    """The chain of a layout below an engine's own pool. `shape`: of pages in the arena. Where that
    has no bytes the cpu pool never has a page, and is no part of the chain."""

    shape: PageShape
    cpu: TierPool[CpuPool]

    def payloads(self, pages: U32) -> U64:
        """[n] where the payloads of cpu pages begin in the arena."""
        return payload_offsets(self.cpu.store.offsets(pages))

    @property
    def chain(self) -> tuple[TierPool[CpuPool] | TierPool[DiskPool], ...]:
        """The fastest first."""
        return (self.cpu,) if self.cpu.store.arena.capacity_bytes else ()


@dataclass(frozen=True, eq=False)
class LayoutOnDisk(LayoutPools):
    """The chain of a layout where there is a disk."""

    disk: TierPool[DiskPool]
    files: DiskTier

    @property
    def chain(self) -> tuple[TierPool[CpuPool] | TierPool[DiskPool], ...]:
        return (self.cpu, self.disk)

    def drop_records(self, evicted: _core.Evicted) -> None:
        """Of pages that the index has freed on the disk: they go with the next commit."""
        self.disk.store.drop(evicted.pages)


class Pools:
    """Index pools and their slabs, by layout."""

    def __init__(
        self, index: _core.Index, tiers: Tiers, metrics: Metrics, config: ServeConfig
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._max_layouts = config.limits.max_layouts
        self._second_access = config.disk.admission == "second_access"
        self.tiers = tiers
        self.arena = tiers.arena
        self.layouts: dict[bytes, LayoutPools] = {}
        self.wanted: dict[bytes, int] = {}  # free cpu pages by layout; slabs.py tries to serve it
        self.on_want: Callable[[], None] = lambda: None
        self.on_served: Callable[[], None] = lambda: None

    def on_disk(self) -> list[LayoutOnDisk]:
        """The layouts that have a pool there."""
        return [each for each in self.layouts.values() if isinstance(each, LayoutOnDisk)]

    def ids(self, tier: str) -> list[int]:
        """The index's, of the tier's pools."""
        links = [link for each in self.layouts.values() for link in each.chain]
        return [each.id for each in links if each.tier == tier]

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
        in_arena = shape.with_slabs(self.arena.unit_bytes)
        for files in self.tiers.disks:
            store = files.pool(shape)
            number = restart.disk_pool(self._index, store.shape, second_access=self._second_access)
            disk = TierPool("disk", number, store, self.tiers.meters["disk"])
            return LayoutOnDisk(in_arena, self._cpu(in_arena, below=number), disk, files)
        return LayoutPools(in_arena, self._cpu(in_arena, below=None))

    def _cpu(self, shape: PageShape, *, below: int | None) -> TierPool[CpuPool]:
        number = self._index.add_pool(
            page_size=shape.page_size,
            pages_per_slab=shape.pages_per_slab,
            below=below,
            durable=False,
            tier=TIER_NUMBERS["cpu"],
            page_bytes=shape.page_bytes,
        )
        return TierPool("cpu", number, CpuPool(self.arena, shape), self.tiers.meters["cpu"])

    def grow(self, pools: LayoutPools, pages: int) -> bool:
        """Slabs for the cpu pool until `pages` are free there or the arena is all taken. Whether
        they are."""
        while self._index.pool_counts(pools.cpu.id).free < pages:
            if not self._add_slab(pools.cpu):
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

    def _add_slab(self, cpu: TierPool[CpuPool]) -> bool:
        run = cpu.store.take_run()
        if run is None:
            return False
        cpu.store.add_slab(self._index.add_slab(cpu.id), run)
        return True

    # ---- restart ----

    def restore(self) -> dict[bytes, int]:
        """Rebuild what the disk held: namespaces, slabs, residency; drop records that don't fit.
        Returns the index's numbers of the namespaces that are left, by the name of their era."""
        found: dict[bytes, int] = {}
        for files in self.tiers.disks:
            numbers = restart.open_namespaces(self._index, files.catalogue)
            for pool in list(files.pools.values()):
                self._known(pool.shape)
            used: set[bytes] = set()
            for each in self.on_disk():
                used |= self._restore_pool(each)
            files.forget_namespaces(used)
            found |= {
                known: number
                for known, number in numbers.items()
                if known in used or not self._index.close_namespace(number)
            }
        return found

    def _restore_pool(self, pools: LayoutOnDisk) -> set[bytes]:
        """The parents of the records that were taken: among them the namespaces still in use."""
        disk, files = pools.disk, pools.files
        stored = files.stored(disk.store)
        restart.add_slabs(self._index, disk.id, disk.store.slabs.numbers())
        number, recency = disk.store.number, files.recency
        result = restart.restore(
            self._index, disk.id, stored, recency.stamps(number), recency.lifetimes(number)
        )
        refused = stored.pages[result != _core.RESTORED]
        if refused.size:
            self._metrics.fault("restore_refused", refused.size)
            disk.store.drop(refused)
        parents = np.unique(stored.records["parent"][result == _core.RESTORED], axis=0)
        return {bytes(parent) for parent in parents}


def _sizes(shape: PageShape) -> tuple[int, int, int]:
    return shape.page_size, shape.payload_bytes, shape.page_bytes
