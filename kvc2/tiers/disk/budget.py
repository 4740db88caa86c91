"""How many bytes a directory takes at most: slabs, catalogue, and what lies beside them.

`disk.size_gb` bounds it at all times: a slab is added only if the bound with it fits. Not here: who
asks (disk.py).
"""

from __future__ import annotations

from pathlib import Path

from kvc2.tiers.base import PageShape
from kvc2.tiers.disk.catalogue import DATA_FILE
from kvc2.tiers.disk.live import ROW_BYTES, TABLE_BYTES
from kvc2.tiers.disk.records import room_bytes

SLACK_SHARE = 64  # of the budget is for what the catalogue holds beside records
SLACK_BYTES_MAX = 64 << 20
NAMES_SHARE = 8  # of the slack is for the list of namespaces, and as much for the next one
LOCK_FILES_BYTES = 16 << 10  # our lock, LMDB's lock.mdb


def slack_bytes(size_bytes: int) -> int:
    """What the catalogue may take beside records."""
    return max(1 << 20, min(SLACK_BYTES_MAX, size_bytes // SLACK_SHARE))


def names_bytes(size_bytes: int) -> int:
    """What a list of namespaces may take."""
    return slack_bytes(size_bytes) // NAMES_SHARE


def bytes_bound(
    path: Path, size_bytes: int, slabs: list[PageShape], *, tables: int, table_bytes: int = 0
) -> int:
    """Bytes of the directory at most, with these slabs and so many tables of generations, which
    have `table_bytes` now; files that replace others are counted beside them."""
    room = slack_bytes(size_bytes) + sum(map(room_bytes, slabs))
    data, aside = path / "catalogue" / DATA_FILE, path / "catalogue.damaged"
    catalogue = max(room, data.stat().st_size if data.exists() else 0)
    kept = sum(each.stat().st_size for each in aside.glob("*")) if aside.exists() else 0
    rows = sum(each.pages_per_slab for each in slabs) * ROW_BYTES
    beside = max(rows, 2 * table_bytes) + TABLE_BYTES * tables + 2 * names_bytes(size_bytes)
    files = sum(each.slab_bytes for each in slabs)
    return files + catalogue + kept + beside + LOCK_FILES_BYTES
