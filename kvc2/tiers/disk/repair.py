"""Mends the directory of a disk tier after a check: what the daemon would lose anyway goes at once.

A start (DiskTier) rebuilds a catalogue that can't be read, and deletes what nothing names; then
records of damaged blocks are deleted, and of what hangs below them, which a start refuses. Not
here: finding damage (check.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvc2 import _core
from kvc2.config import DiskConfig
from kvc2.metrics import Metrics
from kvc2.tiers.base import U32
from kvc2.tiers.disk import restart
from kvc2.tiers.disk.catalogue import Change
from kvc2.tiers.disk.check import Report
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.records import Stored
from kvc2.tiers.disk.tier import DiskTier

ANY_SIZE = 10**15  # the budget is the daemon's: nothing is dropped for it here


@dataclass
class Repaired:
    """What was deleted. `hanging_records` are of sound blocks below damaged ones, and of dead ones.
    `catalogue_aside`: it is catalogue.damaged now, if it was there, and another one has
    `rebuilt_records`: what was damaged among them, only the next check can tell."""

    damaged_records: int = 0
    hanging_records: int = 0
    unknown_records: int = 0
    orphan_slabs: int = 0
    rebuilt_records: int = 0
    catalogue_aside: bool = False
    complete: bool = True  # False: the disk refused a transaction


def repair(path: Path, report: Report) -> Repaired:
    """Delete what `report` found. A block that is not as it was then is left alone. Raises
    StartRefused when a daemon serves the directory."""
    metrics, found = Metrics(), Repaired()
    tier = DiskTier(path, DiskConfig.of_bytes(path, ANY_SIZE), np.empty(0, np.uint8), metrics)
    try:
        found.orphan_slabs = report.damage["orphan_slab"]
        found.catalogue_aside = metrics.values()["faults_total{kind=catalogue_reset}"] > 0
        if found.catalogue_aside:
            records = map(tier.catalogue.records, tier.catalogue.layouts)
            found.rebuilt_records = sum(each.pages.size for each in records)
        unknown = tier.catalogue.unknown()
        found.unknown_records = sum(pages.size for pages in unknown.values())
        found.unknown_records += report.damage["unread_record"]
        deletes = {number: [pages] for number, pages in unknown.items()}
        index = _core.Index()
        restart.open_namespaces(index, tier.catalogue)
        for pool in tier.pools.values():
            deletes[pool.number] = [_refused(tier, pool, index, report, found)]
        found.complete = tier.commit(Change(deletes=deletes)).committed
    finally:
        tier.close()
    return found


def _refused(
    tier: DiskTier, pool: DiskPool, index: _core.Index, report: Report, found: Repaired
) -> U32:
    """Pages of a layout whose records go."""
    before = tier.catalogue.records(pool.number).pages.size
    stored = tier.stored(pool)  # without those in lost slabs
    pairs = zip(stored.pages.tolist(), stored.records["generation"].tolist(), strict=True)
    bad = set(report.bad.get(pool.shape.layout_digest, ()))
    damaged = np.array([pair in bad for pair in pairs], bool)
    found.damaged_records += before - stored.pages.size + int(damaged.sum())
    left: Stored = stored.chosen(~damaged)
    number = restart.disk_pool(index, pool.shape)
    restart.add_slabs(index, number, pool.slabs.numbers())
    result = restart.restore(index, number, left, np.empty(0, np.uint32))
    hanging = left.pages[result != _core.RESTORED]
    found.hanging_records += hanging.size
    return np.concatenate([stored.pages[damaged], hanging])
