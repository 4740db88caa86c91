"""The disk tier's speed: durable stores and verified cold loads, against what the disk can do.

Example: python -m benchmarks.disk --folder /nvme --repeats 5 --json build/bench/disk.json

Ours: checksums made and verified, one fdatasync and one catalogue transaction a batch, O_DIRECT.
The limit is a plain loop of O_DIRECT reads, or of writes with an fdatasync for each 32 MiB, of 1
or 8 MiB at a depth of 1 to 8 (threads), whichever is the fastest; fio beside it where it is
installed. All take turns. CPU seconds are of the whole process, per 10^9 bytes.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.disk_path import STORE_BYTES, DiskPath

TOTAL_BYTES = 512 << 20
BLOCK_BYTES = (64 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8)
REQUEST_BYTES = (1 << 20, 8 << 20)


class Plain:
    """Files of TOTAL_BYTES, written and read with O_DIRECT and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._memory = mmap.mmap(-1, TOTAL_BYTES)
        self._memory.write(np.random.default_rng(0).bytes(TOTAL_BYTES))
        self._fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, TOTAL_BYTES)
        self._view = memoryview(self._memory)

    def close(self) -> None:
        self._view.release()
        os.close(self._fd)

    def read(self, depth: int, request: int) -> None:
        def some(start: int) -> None:
            part = self._view[start : start + request]
            if os.preadv(self._fd, [part], start) != request:
                raise OSError("short read")

        with ThreadPoolExecutor(depth) as threads:
            list(threads.map(some, range(0, TOTAL_BYTES, request)))

    def write(self, depth: int, request: int) -> None:
        def some(start: int) -> None:
            part = self._view[start : start + request]
            if os.pwritev(self._fd, [part], start) != request:
                raise OSError("short write")

        with ThreadPoolExecutor(depth) as threads:
            for batch in range(0, TOTAL_BYTES, STORE_BYTES):
                list(threads.map(some, range(batch, batch + STORE_BYTES, request)))
                os.fdatasync(self._fd)


@dataclass
class Samples:
    """GB/s by way, and CPU seconds per GB of ours."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def add(self, way: str, num_bytes: int, work: Callable[[], object]) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        seconds = time.perf_counter() - begin
        self.rates.setdefault(way, []).append(num_bytes / seconds / 1e9)
        self.cpu.setdefault(way, []).append((time.process_time() - cpu) / num_bytes * 1e9)


def ways() -> list[tuple[int, int]]:
    return [(depth, request) for depth in DEPTHS for request in REQUEST_BYTES]


def best_ways(plain: Plain) -> dict[str, tuple[int, int]]:
    """Which depth and request are fastest here, by one pass of each."""
    found = {}
    for name, work in (("read", plain.read), ("write", plain.write)):
        seconds = {}
        for way in ways():
            begin = time.perf_counter()
            work(*way)
            seconds[way] = time.perf_counter() - begin
        found[name] = min(seconds, key=seconds.__getitem__)
        depth, request = found[name]
        print(f"plain {name}: best at depth {depth}, {request >> 20} MiB", file=sys.stderr)
    return found


def fio(folder: Path, way: str) -> float | report.Absent:
    """GB/s of 1 MiB requests at depth 8; stores with an fdatasync each 32."""
    if shutil.which("fio") is None:
        return report.Absent("fio is not installed")
    command = [
        "fio", "--name=limit", f"--filename={folder / 'fio'}", f"--size={TOTAL_BYTES}",
        f"--rw={way}", "--bs=1m", "--iodepth=8", "--ioengine=libaio", "--direct=1",
        "--output-format=json", *(["--fdatasync=32"] if way == "write" else []),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["jobs"][0][way]["bw_bytes"]) / 1e9


async def measure(
    path: DiskPath, plain: Plain, best: dict[str, tuple[int, int]], repeats: int
) -> Samples:
    found, num_bytes = Samples(), path.blocks * path.block_bytes

    async def timed(way: str, work: Callable[[], object]) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        await work()  # type: ignore[misc]
        seconds = time.perf_counter() - begin
        found.rates.setdefault(way, []).append(num_bytes / seconds / 1e9)
        found.cpu.setdefault(way, []).append((time.process_time() - cpu) / num_bytes * 1e9)

    for number in range(repeats + 1):
        if number == 1:  # the first round only warms up
            found = Samples()
        path.commit()
        await timed("store", path.store)
        path.forget(disk=False)
        await timed("load", path.load)
        path.forget(disk=True)
        await path.mover.store(path.pools, None)  # their records go
        found.add("plain write", TOTAL_BYTES, lambda: plain.write(*best["write"]))
        found.add("plain read", TOTAL_BYTES, lambda: plain.read(*best["read"]))
    return found


def rows_of(
    block_bytes: int, found: Samples, fio_rates: dict[str, float | report.Absent]
) -> list[report.Row]:
    size, rows = f"{block_bytes >> 10} KiB", []
    for ours, limit, name in (("store", "plain write", "write"), ("load", "plain read", "read")):
        middle = statistics.median(found.rates[limit])
        ratio = statistics.median(found.rates[ours]) / middle
        what = "durable store" if ours == "store" else "verified cold load"
        rows.append(
            report.row(
                f"{what}, {size}", "GB/s", "higher", found.rates[ours],
                limit=middle, limit_name=f"plain O_DIRECT {name}",
                peers={"fio": fio_rates[name]},
                goal=f">= 0.9 of the limit (is {ratio:.2f})",
            )
        )  # fmt: skip
        rows.append(
            report.row(
                f"{what}, {size}: CPU", "s/GB", "lower", found.cpu[ours],
                limit=statistics.median(found.cpu[limit]), limit_name=f"plain O_DIRECT {name}",
            )
        )  # fmt: skip
    return rows


def main() -> int:
    flags = report.parser(__doc__ or "")
    flags.add_argument("--folder", type=Path, help="on the disk in question (a temporary one)")
    options = flags.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="kvc2-disk-", dir=options.folder) as name:
        folder = Path(name)
        plain = Plain(folder)
        best = best_ways(plain)
        rates = {way: fio(folder, way) for way in ("write", "read")}
        for block_bytes in BLOCK_BYTES:
            path = DiskPath(folder / str(block_bytes), block_bytes, TOTAL_BYTES // block_bytes)
            rows += rows_of(
                block_bytes, asyncio.run(measure(path, plain, best, options.repeats)), rates
            )
            path.close()
        plain.close()
    report.finish("The disk tier", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
