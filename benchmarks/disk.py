"""The disk tier's speed: durable stores and verified loads, against fio and against two peers.

Example: python -m benchmarks.disk --folder /nvme --peers lmcache,vllm --json build/bench/disk.json

Ours: checksums made and verified, one fdatasync and one catalogue transaction a batch, O_DIRECT,
batches as large as the daemon makes them. The limit is the faster of two. fio, where it is
installed: 1 MiB requests at a depth of 8, its writes over blocks that are there, with an fdatasync
for each of our batches. And plain loops of preadv and pwritev on threads, of 8 MiB at a depth of
4, from and to our arena's own memory, which may lie in huge pages (arena.py) while fio's does not:
4 KiB pages that lie apart make more, and shorter, requests. All take turns; a ratio is the
median of the ratios within a turn. CPU seconds are of the whole process, per 10^9 bytes. A load is
cold: with O_DIRECT the page cache has none of it. "Again" is the same load once more, which is
warm only for who reads through the page cache.

Peers run in environments of their own below --venvs, made there by pip if need be, and are not
durable: neither syncs what it stores. Needs 7 GB of disk, 3 GB of memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from benchmarks.disk_path import DiskPath
from benchmarks.disk_peers import PEERS, Peer

TOTAL_BYTES = 512 << 20
BLOCK_BYTES = (64 << 10, 1 << 20, 4 << 20)
DEPTH, REQUEST_BYTES = 4, 8 << 20
FIO_DEPTH, FIO_BYTES = 8, 1 << 20
KINDS = {
    "store": ("durable store", "write"),
    "load": ("verified load, cold", "read"),
    "again": ("verified load, again", "read"),
}


class Plain:
    """A file of TOTAL_BYTES, written and read with O_DIRECT and nothing else."""

    def __init__(self, folder: Path, memory: memoryview) -> None:
        self._view = memory[:TOTAL_BYTES]
        self._fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, TOTAL_BYTES)

    def close(self) -> None:
        self._view.release()
        os.close(self._fd)

    def read(self) -> None:
        with ThreadPoolExecutor(DEPTH) as threads:
            list(threads.map(self._read, range(0, TOTAL_BYTES, REQUEST_BYTES)))

    def write(self, batch_bytes: int) -> None:
        with ThreadPoolExecutor(DEPTH) as threads:
            for batch in range(0, TOTAL_BYTES, batch_bytes):
                end = min(batch + batch_bytes, TOTAL_BYTES)
                list(threads.map(self._write, range(batch, end, REQUEST_BYTES)))
                os.fdatasync(self._fd)

    def _read(self, start: int) -> None:
        part = self._view[start : start + REQUEST_BYTES]
        if os.preadv(self._fd, [part], start) != len(part):
            raise OSError("short read")

    def _write(self, start: int) -> None:
        part = self._view[start : start + REQUEST_BYTES]
        if os.pwritev(self._fd, [part], start) != len(part):
            raise OSError("short write")


class Fio:
    """GB/s by fio, of a file that it has laid out before."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "fio"
        self.absent = None if shutil.which("fio") else report.Absent("fio is not installed")
        if self.absent is None:
            self._run("write", TOTAL_BYTES)

    def _run(self, way: str, batch_bytes: int) -> float:
        command = [
            "fio", "--name=limit", f"--filename={self._file}", f"--size={TOTAL_BYTES}",
            f"--rw={way}", f"--bs={FIO_BYTES}", f"--iodepth={FIO_DEPTH}", "--ioengine=libaio",
            "--direct=1", "--overwrite=1", "--output-format=json",
            *([f"--fdatasync={batch_bytes // FIO_BYTES}"] if way == "write" else []),
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        text = done.stdout[done.stdout.index("{") :]  # it may say something before
        return float(json.loads(text)["jobs"][0][way]["bw_bytes"]) / 1e9

    def add(self, found: Samples, batch_bytes: int) -> None:
        if self.absent is None:
            for way in ("write", "read"):
                found.rates.setdefault(f"fio {way}", []).append(self._run(way, batch_bytes))


@dataclass
class Samples:
    """GB/s and CPU seconds per GB, by way; one of each a turn."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    async def add(self, way: str, num_bytes: int, work: Callable[[], Awaitable[object]]) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        await work()
        seconds = time.perf_counter() - begin
        self.rates.setdefault(way, []).append(num_bytes / seconds / 1e9)
        self.cpu.setdefault(way, []).append((time.process_time() - cpu) / num_bytes * 1e9)

    def ratio(self, way: str, limit: str) -> float:
        pairs = zip(self.rates[way], self.rates[limit], strict=True)
        return statistics.median(one / other for one, other in pairs)


async def measure(path: DiskPath, folder: Path, fio: Fio, repeats: int) -> Samples:
    plain = Plain(folder, path.arena.memory.data)
    found, num_bytes = Samples(), path.blocks * path.block_bytes
    batch_bytes = path.batch_pages * path.block_bytes // REQUEST_BYTES * REQUEST_BYTES
    print(f"{path.block_bytes >> 10} KiB: batches of {batch_bytes >> 20} MiB", file=sys.stderr)

    async def limit(work: Callable[[], None]) -> None:
        work()

    for number in range(repeats + 1):
        if number == 1:  # the first turn only warms up
            found = Samples()
        path.commit()
        await found.add("store", num_bytes, path.store)
        for way in ("load", "again"):
            path.forget(disk=False)
            await found.add(way, num_bytes, path.load)
        path.forget(disk=True)
        await path.mover.write(path.pools)  # their records go
        await found.add("plain write", TOTAL_BYTES, lambda: limit(lambda: plain.write(batch_bytes)))
        await found.add("plain read", TOTAL_BYTES, lambda: limit(plain.read))
        fio.add(found, batch_bytes)
    plain.close()
    return found


def rows_of(block_bytes: int, found: Samples, fio: Fio, peers: Sequence[Peer]) -> list[report.Row]:
    size, rows = f"{block_bytes >> 10} KiB", []
    for way, (what, limit) in KINDS.items():
        names = [f"plain {limit}", *([] if fio.absent else [f"fio {limit}"])]
        limits = {name: statistics.median(found.rates[name]) for name in names}
        best = max(limits, key=limits.__getitem__)
        ratios = f"of fio {found.ratio(way, f'fio {limit}'):.2f}, " if not fio.absent else ""
        others: dict[str, report.Value] = {}
        for peer in peers:
            others |= peer.rates(way)
        rows.append(
            report.row(
                f"{what}, {size}", "GB/s", "higher", found.rates[way],
                limit=limits[best], limit_name=best,
                peers=limits | ({} if fio.absent is None else {"fio": fio.absent}) | others,
                goal=f">= 0.9: {ratios}of plain {found.ratio(way, f'plain {limit}'):.2f}",
            )
        )  # fmt: skip
        others = {}
        for peer in peers:
            others |= peer.cpu(way)
        rows.append(
            report.row(
                f"{what}, {size}: CPU", "s/GB", "lower", found.cpu[way],
                limit=statistics.median(found.cpu[f"plain {limit}"]), limit_name=f"plain {limit}",
                peers=others,
            )
        )  # fmt: skip
    return rows


def main() -> int:
    flags = report.parser(__doc__ or "")
    flags.add_argument("--folder", type=Path, help="on the disk in question (a temporary one)")
    flags.add_argument("--peers", default="", help=f"some of {','.join(PEERS)}, by commas")
    flags.add_argument(
        "--venvs", type=Path, default=Path("build/peers"), help="of the peers (%(default)s)"
    )
    options = flags.parse_args()
    names = [name for name in options.peers.split(",") if name]
    if unknown := set(names) - set(PEERS):
        flags.error(f"--peers: {unknown.pop()!r}, known are {', '.join(PEERS)}")
    peers = [PEERS[name](options.venvs / name) for name in names]
    rows = []
    with tempfile.TemporaryDirectory(prefix="kvc2-disk-", dir=options.folder) as name:
        folder = Path(name)
        fio = Fio(folder)
        for block_bytes in BLOCK_BYTES:
            blocks = TOTAL_BYTES // block_bytes
            path = DiskPath(folder / str(block_bytes), block_bytes, blocks)
            found = asyncio.run(measure(path, folder, fio, options.repeats))
            path.close()
            shutil.rmtree(folder / str(block_bytes))
            for peer in peers:
                peer.measure(folder / "peer", block_bytes, blocks, options.repeats)
            rows += rows_of(block_bytes, found, fio, peers)
    report.finish("The disk tier", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
