"""Blocks that keys name, written by the tier, come back by its catalogue or by their headers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvc2 import _core
from kvc2.config import DiskConfig
from kvc2.layout import layer_major
from kvc2.metrics import Metrics
from kvc2.tiers.base import U8, PageShape
from kvc2.tiers.disk import restart
from kvc2.tiers.disk.batch import WriteBatch
from kvc2.tiers.disk.check import check
from kvc2.tiers.disk.records import NamespaceEntry
from kvc2.tiers.disk.slab_file import aligned
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.pools import TIER_NUMBERS

NAME = hashlib.sha256(b"a namespace of keys").digest()
KEYS = [b"k", b"x" * 32, bytes(range(64)), b"\0" * 16, b"\0" * 17]


def bytes_of(rows: list[bytes]) -> U8:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1).copy()


def records_of(keys: list[bytes], page_size: int) -> _core.Records:
    """Words of a key: its length, then it, padded to 64 bytes."""
    padded = [key.ljust(64, b"\0") for key in keys]
    words = [len(key).to_bytes(4, "little") + row for key, row in zip(keys, padded, strict=True)]
    root = _core.xxh3_128(NAME)
    return _core.Records(
        namespaces=bytes_of([NAME] * len(keys)),
        digests=bytes_of([hashlib.sha256(NAME + each).digest() for each in words]),
        parents=bytes_of([NAME] * len(keys)),
        keys=bytes_of([_core.xxh3_128(root + each) for each in words]),
        tokens=np.zeros((len(keys), page_size), np.uint32),
        generations=np.arange(1, len(keys) + 1, dtype=np.uint64),
        external_bytes=np.array([len(key) for key in keys], np.uint8),
        external_keys=bytes_of(padded),
    )


def tier_in(path: Path, arena: U8) -> DiskTier:
    return DiskTier(path, DiskConfig.of_bytes(path, 16 << 20), arena, Metrics())


def store(path: Path, shape: PageShape, arena: U8) -> None:
    tier = tier_in(path, arena)
    pool = tier.pool(shape)
    assert tier.grow(pool) == 0
    assert tier.catalogue.add_namespace(NAME, NamespaceEntry(shape.page_size, b"{}", opaque=True))
    count = np.arange(len(KEYS))
    offsets = count.astype(np.uint64) * np.uint64(shape.page_bytes)
    batch = WriteBatch(pool, count.astype(np.uint32), offsets, records_of(KEYS, shape.page_size))
    assert tier.finish(pool, tier.begin(batch)).written
    tier.close()


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("lost", [False, True], ids=["catalogue", "headers"])
def test_blocks_of_keys_come_back(tmp_path: Path, page_size: int, lost: bool) -> None:
    layout = layer_major(2, 8, segment_bytes=512, page_size=page_size)
    shape = PageShape.of(layout, 1 << 16)
    arena = aligned(len(KEYS) * shape.page_bytes)
    arena[:] = np.random.default_rng(1).integers(0, 256, arena.size, np.uint8)
    store(tmp_path, shape, arena)
    report = check(tmp_path)
    assert (report.sound, report.verified_blocks, report.unproven) == (True, len(KEYS), 0)
    if lost:
        shutil.rmtree(tmp_path / "catalogue")
    tier, index = tier_in(tmp_path, arena), _core.Index()
    (number,) = restart.open_namespaces(index, tier.catalogue).values()
    disk = restart.disk_pool(index, shape)
    cpu = index.add_pool(
        page_size=page_size,
        pages_per_slab=8,
        below=disk,
        durable=False,
        tier=TIER_NUMBERS["cpu"],
        page_bytes=shape.page_bytes,
    )
    pool = tier.pool(shape)
    restart.add_slabs(index, disk, pool.slabs.numbers())
    result = restart.restore(index, disk, tier.stored(pool), np.empty(0, np.uint32))
    assert (result == _core.RESTORED).all()
    index.check()
    assert index.match_keys(number, cpu, [*KEYS, b"another"]).tolist() == [2] * len(KEYS) + [0]
    pages, records = index.residents(disk, 0, 8)
    memory = aligned(len(KEYS) * shape.page_bytes)
    assert (pool.verify(memory, pages, records) == _core.BLOCK_OK).all()
    assert memory[4096 : shape.page_bytes].tobytes() == arena[4096 : shape.page_bytes].tobytes()
    tier.close()
