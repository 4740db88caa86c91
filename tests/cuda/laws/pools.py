"""What the laws of copies are checked on: pools with random pages, an arena in pieces, and what the
driver has to say about it all."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.cuda.driver import Gpu, ask, cu
from kvc2.cuda.memory import DeviceMemory, Registered
from kvc2.cuda.mover import DevicePages
from kvc2.cuda.rows import groups

PIECE = 1 << 20
PIECES = 4
Bytes = NDArray[np.uint8]
Segments = list[tuple[int, int, int]]


def shared(num_bytes: int) -> Bytes:
    """Whole pages, as registration asks for."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


@dataclass(frozen=True)
class Shape:
    """Of a pool; `segments` as in a layout."""

    pages: int
    segments: Segments
    layer_ends: list[int]

    @property
    def payload_bytes(self) -> int:
        return sum(each[2] for each in self.segments)

    @property
    def num_bytes(self) -> int:
        return max(o + (self.pages - 1) * s + b for o, s, b in self.segments)

    def page(self, memory: Bytes, page: int) -> Bytes:
        """The page's payload as the layout's words say, byte by byte."""
        places = [(o + page * s, b) for o, s, b in self.segments]
        return np.concatenate([memory[at : at + size] for at, size in places])


def layer_major(layers: int, pages: int, size: int) -> Shape:
    """Ours: for each layer the keys of all pages, then the values."""
    segments = [(j * pages * size, size, size) for j in range(2 * layers)]
    return Shape(pages, segments, [2 * layer for layer in range(1, layers + 1)])


def side_by_side(layers: int, pages: int, size: int) -> Shape:
    """Keys and values of a page beside one another."""
    segments = [
        (2 * layer * pages * size + kv * size, 2 * size, size)
        for layer in range(layers)
        for kv in (0, 1)
    ]
    return Shape(pages, segments, [2 * layer for layer in range(1, layers + 1)])


def records(layers: int, pages: int, size: int) -> Shape:
    """A page is one run of bytes."""
    payload = 2 * layers * size
    segments = [(j * size, payload, size) for j in range(2 * layers)]
    return Shape(pages, segments, [2 * layer for layer in range(1, layers + 1)])


def unlike(layers: int, pages: int, size: int) -> Shape:
    """Each layer has other segments: one, two or three, of other sizes."""
    segments, ends, at = [], [], 0
    for layer in range(layers):
        for kv in range(1 + layer % 3):
            width = size // (1 + (layer + kv) % 2)
            segments.append((at, width + 64 * (layer % 2), width))
            at += pages * (width + 64 * (layer % 2))
        ends.append(len(segments))
    return Shape(pages, segments, ends)


SHAPES = {
    "layer major": layer_major(4, 24, 4096),
    "side by side": side_by_side(4, 24, 4096),
    "records": records(4, 24, 4096),
    "unlike layers": unlike(5, 24, 4096),
    "many layers": layer_major(31, 8, 512),
    "odd sizes": layer_major(3, 9, 700),
}


@dataclass
class Bench:
    """A pool on the device and an arena of PIECES pieces, with random bytes in both."""

    gpu: Gpu
    shape: Shape
    memory: DeviceMemory
    arena: Bytes
    registered: Registered
    pages: DevicePages

    def pool(self) -> Bytes:
        """What lies in the pool now."""
        found = np.empty(self.memory.num_bytes, np.uint8)
        ask(cu.cuMemcpyDtoH, found.ctypes.data, self.memory.address, found.nbytes)
        return found

    def offsets(self, count: int, *, anywhere: bool = False, seed: int = 0) -> NDArray[np.uint64]:
        """Of so many payloads that lie apart. `anywhere`: also over the borders of pieces."""
        size = self.shape.payload_bytes
        step = size if anywhere else size + 4096
        places = np.arange(0, self.arena.size - step, step)
        if not anywhere:
            places = places[places // PIECE == (places + size - 1) // PIECE]
        return np.random.default_rng(seed).permutation(places)[:count].astype(np.uint64)

    def payload(self, offset: int) -> Bytes:
        return self.arena[int(offset) : int(offset) + self.shape.payload_bytes]

    def close(self) -> None:
        self.registered.close()
        self.memory.close()
        self.gpu.close()


def bench(shape: Shape, seed: int = 1) -> Bench:
    random = np.random.default_rng(seed)
    gpu, arena = Gpu(0), shared(PIECES * PIECE)
    arena[:] = random.integers(0, 256, arena.size, np.uint8)
    memory = DeviceMemory(shape.num_bytes)
    content = random.integers(0, 256, shape.num_bytes, np.uint8)
    ask(cu.cuMemcpyHtoD, memory.address, content.ctypes.data, content.nbytes)
    rows = groups(shape.segments, shape.layer_ends, gpu.max_pitch)
    pages = DevicePages(memory.mapping, rows)
    return Bench(gpu, shape, memory, arena, Registered(arena, PIECE), pages)


class Hostile:
    """The hostile driver's own calls."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.hostile_report.restype = ctypes.c_char_p
        library.hostile_calls.restype = ctypes.c_uint64

    def words(self, words: str) -> None:
        assert self._library.hostile_set(words.encode()) == 0, words

    def report(self) -> str:
        told: bytes = self._library.hostile_report()
        return told.decode()

    def calls(self, name: str) -> int:
        return int(self._library.hostile_calls(name.encode()))


def hostile() -> Hostile | None:
    """None on a real driver."""
    library = ctypes.CDLL("libcuda.so.1")
    return Hostile(library) if hasattr(library, "hostile_report") else None


@contextmanager
def judged() -> Iterator[Hostile | None]:
    """On the hostile driver nothing may have been wrong when the body ends, and nothing be left."""
    driver = hostile()
    if driver is None:
        yield None
        return
    ask(cu.cuInit, 0)
    driver.report()
    yield driver
    report = driver.report()
    assert "violation" not in report, report
    assert "ranges 0 pinned 0 handles 0 streams 0 events 0" in report, report
