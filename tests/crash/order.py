"""What the order of writes promises beside what was acknowledged: data, then records; deletes, then
reuse. Wherever it stops, no record names a page that holds anything else than its block."""

from __future__ import annotations

from pathlib import Path

from kvc2.tiers.disk.check import OF_STATUS, check


def spoiled_blocks(folder: Path) -> dict[str, int]:
    """By kind, blocks of a disk's directory that are not what their records say. The directory is
    served by nobody; nothing is changed."""
    if not folder.is_dir():
        return {}
    damage = check(folder).damage
    return {kind: damage[kind] for kind in OF_STATUS.values() if damage[kind]}
