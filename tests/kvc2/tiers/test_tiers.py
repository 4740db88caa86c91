"""What every PageStore must do, over the stand-in's pool and slab files."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2.layout import HEADER_BYTES, layer_major
from kvc2.tiers.base import PageShape, PageStore, SlabTable
from kvc2.tiers.disk.slab_file import Files, SlabFiles, runs
from kvc2.tiers.gpu import PROGRESS_STEP, Copier, GpuMemory, SharedMemoryPool

PAGES = 32
LAYOUT = layer_major(3, PAGES, segment_bytes=700, page_size=4)
SHAPE = PageShape.of(LAYOUT, 1 << 16)
Arena = NDArray[np.uint8]


def arena_of(pages: int) -> Arena:
    """Page-aligned, as O_DIRECT asks for."""
    return np.frombuffer(mmap.mmap(-1, pages * SHAPE.page_bytes), np.uint8)


def gpu_store(arena: Arena, path: Path) -> PageStore:
    memory = mmap.mmap(-1, PAGES * LAYOUT.payload_bytes)
    mapped = GpuMemory(LAYOUT, memory, mmap.mmap(-1, 4096), -1)
    return SharedMemoryPool(mapped, arena, Copier(2), Copier(2))


def slab_store(arena: Arena, path: Path) -> PageStore:
    slabs = SlabFiles(path / "layout", SHAPE, arena, Files())
    for number in range(PAGES // SHAPE.pages_per_slab + 1):
        slabs.add(number)
    return slabs


def offsets_of(arena_pages: NDArray[np.integer]) -> NDArray[np.uint64]:
    return arena_pages.astype(np.uint64) * np.uint64(SHAPE.page_bytes)


def payload(arena: Arena, pages: NDArray[np.integer]) -> Arena:
    rows = arena.reshape(-1, SHAPE.page_bytes)[pages]
    return rows[:, HEADER_BYTES : HEADER_BYTES + LAYOUT.payload_bytes].copy()


@pytest.mark.parametrize("make", [gpu_store, slab_store])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read_back_wherever_it_lies(
    make: Callable[[Arena, Path], PageStore], seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    arena = arena_of(2 * PAGES)
    store = make(arena, tmp_path)
    arena[: arena.size // 2] = rng.integers(0, 256, arena.size // 2, np.uint8)
    pages = rng.permutation(PAGES).astype(np.uint32)[: 8 * (seed + 1)]
    source = rng.permutation(PAGES)[: pages.size]
    target = PAGES + rng.permutation(PAGES)[: pages.size]
    store.write(pages, offsets_of(source))
    assert store.read(pages, offsets_of(target)).all()
    assert (payload(arena, target) == payload(arena, source)).all()


def test_runs_merge_what_lies_together() -> None:
    fds = np.array([5, 5, 5, 6, 5])
    places = np.array([2, 0, 1, 0, 7], np.uint64) * np.uint64(8192)
    offsets = np.array([12, 10, 11, 13, 14], np.uint64) * np.uint64(8192)
    found = [
        (run.fd, run.place // 8192, run.order.tolist()) for run in runs(fds, places, offsets, 8192)
    ]
    assert found == [(5, 0, [1, 2, 0]), (5, 7, [4]), (6, 0, [3])]
    first = next(runs(fds, places, offsets, 8192))
    assert first.pieces == ((10 * 8192, 3 * 8192),)


def test_a_pages_slab_must_be_there() -> None:
    slabs = SlabTable(SHAPE)
    slabs.put(2, 1000)
    pages = np.array([2 * SHAPE.pages_per_slab], np.uint32)
    assert slabs.bases(pages).tolist() == [1000]
    slabs.drop(2)
    with pytest.raises(KeyError):
        slabs.bases(pages)


def test_progress_rises_layer_by_layer_to_the_sequence(tmp_path: Path) -> None:
    arena, progress = arena_of(PAGES), mmap.mmap(-1, 4096)
    event_fd = os.eventfd(0, os.EFD_NONBLOCK)
    mapped = GpuMemory(LAYOUT, mmap.mmap(-1, PAGES * LAYOUT.payload_bytes), progress, event_fd)
    store = SharedMemoryPool(mapped, arena, Copier(2), Copier(2))
    pages = np.arange(4, dtype=np.uint32)
    store.write(pages, offsets_of(pages), sequence=7)
    assert struct.unpack_from("<Q", progress)[0] == 7 * PROGRESS_STEP + LAYOUT.layers
    assert os.eventfd_read(event_fd) == LAYOUT.layers
    os.close(event_fd)
