"""Damaged catalogues, slabs and superblocks: the tier starts every time and no wrong byte comes.
Damaged pages, by flipped bits, torn writes, other blocks' pages: none is served."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from kvc2 import _core
from kvc2.config import DiskConfig
from kvc2.layout import layer_major
from kvc2.metrics import Metrics
from kvc2.tiers.base import PageShape, RecordsPart
from kvc2.tiers.disk.batch import WriteBatch
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.tier import DiskTier
from tests.doubles.caches import folder_in_memory

BLOCKS = 64
PAGE_SIZE = 4
SECTOR = 512


def damaged(folder: Path, seed: int, count: int) -> None:
    command = [sys.executable, "-m", "tests.faults.damaged", folder, str(seed), str(count)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in said.splitlines()]
    assert len(rows) == count
    bad = [row for row in rows if row["status"]]
    assert not bad, f"{len(bad)} of {count}, seed {seed}: {bad[0]}"
    told = Counter(kind for row in rows for kind in row["faults"])
    print(f"{count} damaged directories: all started; counted {dict(told)}")
    assert told["catalogue_reset"] > count // 10


def test_a_damaged_directory_is_started_from() -> None:
    with folder_in_memory() as folder:
        damaged(folder, 1, 40)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_hundred_damaged_directories_are_started_from() -> None:
    with folder_in_memory() as folder:
        damaged(folder, 2, 500)


class Pages:
    """Blocks of one layout in a real slab: stored by the tier, damaged in its file, loaded."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.layout = layer_major(2, BLOCKS, segment_bytes=700, page_size=PAGE_SIZE)
        self.shape = PageShape.of(self.layout, BLOCKS * 2 * 8192)
        self.arena = np.frombuffer(np.zeros(2 * self.shape.slab_bytes, np.uint8), np.uint8)
        start = -self.arena.ctypes.data % 4096  # O_DIRECT wants it aligned
        self.arena = self.arena[start : start + self.shape.slab_bytes]
        self.tier = DiskTier(folder, DiskConfig.of_bytes(folder, 16 << 20), self.arena, Metrics())
        self.pool: DiskPool = self.tier.pool(self.shape)
        assert self.tier.grow(self.pool) == 0
        self.offsets = np.arange(BLOCKS, dtype=np.uint64) * np.uint64(self.shape.page_bytes)
        self.pages = np.arange(BLOCKS, dtype=np.uint32)
        self.file = next(self.pool.slabs.folder.iterdir())
        self.store(1)
        self.records, self.payloads = self.store(2)

    def store(self, generation: int) -> tuple[_core.Records, np.ndarray]:
        """Other blocks in the same pages; what they are and what they hold."""
        tokens = self.chance.integers(0, 50_000, BLOCKS * PAGE_SIZE).astype(np.uint32)
        name = self.chance.bytes(32)
        digests = _core.chain_digests(name, tokens, PAGE_SIZE)
        first = np.frombuffer(name, np.uint8)[None]
        rows = RecordsPart(
            namespaces=np.tile(first, (BLOCKS, 1)),
            digests=digests,
            parents=np.concatenate([first, digests[:-1]]),
            keys=_core.chain_keys(name, tokens, PAGE_SIZE),
            tokens=tokens.reshape(BLOCKS, PAGE_SIZE),
            generations=np.full(BLOCKS, generation, np.uint64),
            external_bytes=np.zeros(BLOCKS, np.uint8),
            external_keys=np.zeros((BLOCKS, 64), np.uint8),
            extras=np.zeros((BLOCKS, 32), np.uint8),
        )
        records = cast(_core.Records, rows)
        memory = self.arena.reshape(-1, self.shape.page_bytes)[:BLOCKS]
        memory[:] = self.chance.integers(0, 256, memory.shape, np.uint8)
        payloads = memory[:, 4096 : 4096 + self.shape.payload_bytes].copy()
        batch = WriteBatch(self.pool, self.pages, self.offsets, records)
        assert self.tier.finish(self.pool, self.tier.begin(batch)).written
        return records, payloads

    def read(self, page: int) -> bytes:
        with self.file.open("rb") as file:
            file.seek(page * self.shape.page_bytes)
            return file.read(self.shape.page_bytes)

    def write(self, page: int, data: bytes) -> None:
        with self.file.open("r+b") as file:
            file.seek(page * self.shape.page_bytes)
            file.write(data)

    def served(self, pages: np.ndarray, records: _core.Records) -> np.ndarray:
        """[n] which blocks the tier vouches for; each of those is compared."""
        self.arena[:] = 0xAA
        status = self.pool.load(self.arena, pages, self.offsets, records)
        rows = self.arena.reshape(-1, self.shape.page_bytes)[:BLOCKS, 4096:]
        came: np.ndarray = status == _core.BLOCK_OK
        right = (rows[:, : self.shape.payload_bytes] == self.payloads).all(axis=1)
        assert right[came].all(), "wrong bytes were served"
        return came


@pytest.fixture
def stored() -> Iterator[Pages]:
    with folder_in_memory() as folder:
        pages = Pages(folder, 7)
        yield pages
        pages.tier.close()


def test_no_flipped_bit_is_served(stored: Pages) -> None:
    """10,000 of them, one in each page at a time; in a page's padding it hurts nobody."""
    sound = [stored.read(page) for page in range(BLOCKS)]
    assert stored.served(stored.pages, stored.records).all()
    chance, found, count = random.Random(1), 0, 0
    end = 4096 + stored.shape.payload_bytes
    while count < 10_000:
        places = [chance.randrange(stored.shape.page_bytes) for _ in range(BLOCKS)]
        for page, place in enumerate(places):
            data = bytearray(sound[page])
            data[place] ^= 1 << chance.randrange(8)
            stored.write(page, data)
        came = stored.served(stored.pages, stored.records)
        inside = np.array(places) < end
        assert (came == ~inside).all()
        found, count = found + int(inside.sum()), count + BLOCKS
    print(f"{count} flipped bits, {found} of them in a header or a payload: none was served")


def test_no_torn_write_is_served(stored: Pages) -> None:
    """1,000 pages of which some sectors are of the block that was there before, or never came."""
    sound = [stored.read(page) for page in range(BLOCKS)]
    stored.store(3)
    before = [stored.read(page) for page in range(BLOCKS)]
    chance, count = random.Random(2), 0
    used = -(-(4096 + stored.shape.payload_bytes) // SECTOR)
    while count < 1000:
        whole = np.zeros(BLOCKS, bool)
        for page in range(BLOCKS):
            other = before[page] if chance.random() < 0.7 else bytes(stored.shape.page_bytes)
            kept = chance.random()
            came = [chance.random() < kept for _ in range(stored.shape.page_bytes // SECTOR)]
            parts = [
                (sound if new else [other])[page if new else 0][n * SECTOR : (n + 1) * SECTOR]
                for n, new in enumerate(came)
            ]
            stored.write(page, b"".join(parts))
            end = 4096 + stored.shape.payload_bytes
            whole[page] = b"".join(parts)[:end] == sound[page][:end]
            assert whole[page] or not all(came[:used])
        assert (stored.served(stored.pages, stored.records) == whole).all()
        count += BLOCKS
    print(f"{count} torn writes: none was served")


def test_no_block_in_anothers_place_is_served(stored: Pages) -> None:
    """200 swaps of whole pages, each sound in itself; and pages as they were a generation ago."""
    sound = [stored.read(page) for page in range(BLOCKS)]
    chance, count = random.Random(3), 0
    while count < 200:
        places = chance.sample(range(BLOCKS), BLOCKS)
        for page, other in enumerate(places):
            stored.write(page, sound[other])
        stays = np.array(places) == np.arange(BLOCKS)
        assert (stored.served(stored.pages, stored.records) == stays).all()
        count += int((~stays).sum())
    for page in range(BLOCKS):
        stored.write(page, sound[page])
    again = stored.records
    again.generations[:] += 1  # the same blocks, stored once more; these pages are stale
    assert not stored.served(stored.pages, again).any()
    print(f"{count} swapped pages: none was served")
