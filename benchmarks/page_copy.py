"""Pages between an engine's layer-major pool and block-contiguous payloads, against memcpy.

Example: python -m benchmarks.page_copy --repeats 7 --json build/bench/page_copy.json

Blocks of 64 KiB to 4 MiB, 32 layers of keys and values, in no order, and none is in a cache: each
pass goes over all of two buffers of a GiB each. The peer is glibc's memcpy of whole blocks, which
is less than a gather has to do, on as many threads; the limit is non-temporal stores of whole
blocks (stream_probe.cpp). They take turns.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from kvc2 import _core

SEGMENTS = 64  # 32 layers, keys and values
BUFFER_BYTES = 1 << 30
BLOCK_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
KINDS = {"shared memory": False, "private, huge pages": True}
Copy = Callable[[int, int, int], object]  # to, from, bytes


@dataclass(frozen=True)
class Buffers:
    """A pool and an arena of BUFFER_BYTES each, touched; addresses for the peers."""

    pool: mmap.mmap
    arena: mmap.mmap
    pool_at: int
    arena_at: int
    huge: bool


def buffers(huge: bool) -> Buffers:
    """`huge`: private memory that asks for huge pages; else shared, as engines' pools are."""
    made = []
    for _ in range(2):
        if huge:
            memory = mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            memory = mmap.mmap(-1, BUFFER_BYTES)
        np.frombuffer(memory, np.uint8)[:] = 1
        made.append(memory)
    at = [np.frombuffer(each, np.uint8).ctypes.data for each in made]
    return Buffers(made[0], made[1], at[0], at[1], huge)


def huge_bytes() -> int:
    """Of this process's private memory, in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def stream_copy(folder: Path) -> Copy:
    source = Path(__file__).with_name("stream_probe.cpp")
    library = folder / "stream_probe.so"
    command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).stream_copy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


def memcpy() -> Copy:
    function = ctypes.CDLL(None).memcpy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


LAYER_ENDS = np.arange(2, SEGMENTS + 1, 2, dtype=np.uint32)  # key and value


@dataclass(frozen=True)
class Case:
    """One block size over some buffers: `pages` in the pool, `offsets` of blocks in the arena."""

    at: Buffers
    block_bytes: int
    segments: NDArray[np.uint64]
    pages: NDArray[np.uint32]
    offsets: NDArray[np.uint64]

    @staticmethod
    def of(at: Buffers, block_bytes: int) -> Case:
        count, part = BUFFER_BYTES // block_bytes, block_bytes // SEGMENTS
        segments = np.array([(j * count * part, part, part) for j in range(SEGMENTS)], np.uint64)
        rng = np.random.default_rng(0)
        pages = rng.permutation(count).astype(np.uint32)
        offsets = (rng.permutation(count) * block_bytes).astype(np.uint64)
        return Case(at, block_bytes, segments, pages, offsets)

    def gather(self, team: _core.ThreadTeam) -> None:
        _core.gather(team, self.at.pool, self.segments, self.pages, self.at.arena, self.offsets)

    def scatter(self, team: _core.ThreadTeam) -> None:
        _core.scatter(
            team, self.at.arena, self.offsets, self.at.pool, self.segments, self.pages,
            layer_ends=LAYER_ENDS,
        )  # fmt: skip

    def by_blocks(self, copy: Copy, threads: ThreadPoolExecutor, share: int) -> None:
        """Whole blocks, contiguous on both sides: less than a gather has to do."""

        def some(first: int) -> None:
            for page, offset in zip(
                self.pages[first::share].tolist(), self.offsets[first::share].tolist(), strict=True
            ):
                copy(self.at.arena_at + offset, self.at.pool_at + page * self.block_bytes,
                     self.block_bytes)  # fmt: skip

        list(threads.map(some, range(share)))


def gb_per_s(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return BUFFER_BYTES / (time.perf_counter() - begin) / 1e9


def rows_of(case: Case, stream: Copy, repeats: int, kind: str) -> list[report.Row]:
    share = len(os.sched_getaffinity(0))
    team = _core.ThreadTeam(share)
    copy = memcpy()
    found: dict[str, list[float]] = {}
    with ThreadPoolExecutor(share) as threads:
        ways = {
            "gather": lambda: case.gather(team),
            "scatter": lambda: case.scatter(team),
            "memcpy": lambda: case.by_blocks(copy, threads, share),
            "limit": lambda: case.by_blocks(stream, threads, share),
        }
        for name, way in ways.items():  # once unmeasured
            way()
            found[name] = []
        for _ in range(repeats):
            for name, way in ways.items():
                found[name].append(gb_per_s(way))
    middle = {name: float(np.median(each)) for name, each in found.items()}
    size = f"{case.block_bytes >> 10} KiB"
    return [
        report.row(
            f"{way}, {size}, {kind}",
            "GB/s",
            "higher",
            found[way],
            limit=middle["limit"],
            limit_name="non-temporal stores",
            peers={"memcpy of whole blocks": middle["memcpy"]},
            goal=f"0.9 limit (is {middle[way] / middle['limit']:.2f}), "
            f"1.3 memcpy (is {middle[way] / middle['memcpy']:.2f})",
        )
        for way in ("gather", "scatter")
    ]


def main() -> None:
    options = report.parser("Page copies against memcpy and non-temporal stores.").parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_copy(Path(folder))
        for kind, huge in KINDS.items():
            at = buffers(huge)
            if huge:
                print(f"{huge_bytes() / 2**30:.2f} GiB of private memory are in huge pages")
            for block_bytes in BLOCK_BYTES:
                rows += rows_of(Case.of(at, block_bytes), stream, options.repeats, kind)
    report.finish("Page copies, cold", rows, options.json)


if __name__ == "__main__":
    main()
