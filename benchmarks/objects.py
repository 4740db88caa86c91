"""Blocks under keys of an engine's own, as its process sees them: looked up, read, stored.

A look-up of 32 keys beside an empty gRPC call. Reads from the arena and stores into it beside plain
memcpy of the same buffers in the same process by one thread, where a client has two; all calls that
they need are in the time. What is read lies in the arena; what comes from the disk is disk.py's and
disk_path.py's. What is stored goes to memory that the arena touches for the first time, and to the
disk behind that.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import empty_server, report
from benchmarks.processes import Daemon, peer
from kvc2.client import Objects, open_objects
from kvc2.client.channel import Channel
from kvc2.foreign_identity import Foreign
from kvc2.host.address import Address
from kvc2.v1 import cache_pb2

LOOKED_UP = 32
CALLS = 100  # of each kind in a repeat, by turns; a sample is their median
SIZES = ((64 << 10, 32), (64 << 10, 512), (1 << 20, 32))  # bytes of a block; blocks of a batch
GETS, PUTS = 10, 3  # batches of a repeat
ATTACH_S = 20.0
IDENTITY = Foreign("benchmark", "none", {"page_size": 1}).encode()


def keys_of(prefix: str, count: int) -> list[bytes]:
    """As long as a SHA-256."""
    return [f"{prefix} {number}".encode().rjust(32, b"-") for number in range(count)]


def mean_s(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def opened(daemon: Daemon, num_bytes: int) -> Objects:
    objects = open_objects(daemon.address, IDENTITY, num_bytes)
    if not objects.client.wait_attached(ATTACH_S):
        raise RuntimeError(f"not attached: {objects.client.last_refusal}\n{daemon.tail()}")
    return objects


def look_up_rows(daemon: Daemon, folder: Path, repeats: int) -> list[report.Row]:
    """32 keys, half of them there."""
    objects = opened(daemon, 4096)
    keys = keys_of("look", LOOKED_UP)
    objects.put_from(keys[::2], bytearray(4096 * LOOKED_UP // 2))
    empty = Channel(Address.of_daemon(f"unix:{folder / empty_server.GRPC_SOCKET}"))
    request = cache_pb2.AcquireRequest(keys=keys)
    ours, peers = [], []
    for _ in range(repeats):
        if objects.exists(keys).tolist() != [True, False] * (LOOKED_UP // 2):
            raise RuntimeError("what was stored is not there")
        calls: tuple[list[float], list[float]] = ([], [])
        for _ in range(CALLS):
            calls[0].append(mean_s(lambda: objects.exists(keys), 1))
            calls[1].append(mean_s(lambda: empty.call("Acquire", request), 1))
        ours.append(1e3 * float(np.median(calls[0])))
        peers.append(1e3 * float(np.median(calls[1])))
    empty.close()
    objects.close()
    peer = {"empty gRPC call": float(np.median(peers))}
    return [report.row("look_up_32", "ms", "lower", ours, peers=peer, goal="<= 1")]


class Batch:
    """As many blocks as are read or stored at a time, in memory of this process."""

    def __init__(self, num_bytes: int, count: int) -> None:
        self.bytes = num_bytes * count
        self.source = np.random.default_rng(1).integers(0, 256, (count, num_bytes), np.uint8)
        self.target = np.zeros_like(self.source)

    def copy(self) -> None:
        """What memcpy does of the same buffers."""
        for source, target in zip(self.source, self.target, strict=True):
            np.copyto(target, source)

    def gb_per_s(self, call: Callable[[], object], batches: int) -> float:
        return self.bytes / mean_s(call, batches) / 1e9


def copied_rows(daemon: Daemon, num_bytes: int, count: int, repeats: int) -> list[report.Row]:
    objects, batch = opened(daemon, num_bytes), Batch(num_bytes, count)
    targets: list[NDArray[np.uint8]] = list(batch.target)
    names = (f"{number}" for number in range(1 << 30))
    gets, puts, copies = [], [], []

    def get() -> None:
        if not objects.get_into(keys, targets).all():
            raise RuntimeError("what was stored is not there")

    def put() -> None:
        if not objects.put_from(keys_of(next(names), count), batch.source.data).all():
            raise RuntimeError("what was told to be stored is not")

    for warm in (False, *[True] * repeats):
        keys = keys_of(next(names), count)
        objects.put_from(keys, batch.source.data)
        daemon.flush()  # so that nothing is written to the disk meanwhile
        found, copied = batch.gb_per_s(get, GETS), batch.gb_per_s(batch.copy, GETS)
        stored = batch.gb_per_s(put, PUTS)
        if not (batch.target == batch.source).all():
            raise RuntimeError("wrong bytes")
        if warm:  # the first touches the memory
            gets.append(found)
            copies.append(copied)
            puts.append(stored)
    objects.close()
    size = f"{num_bytes >> 10}k_x{count}"
    limit = {"limit": float(np.median(copies)), "limit_name": "memcpy"}
    return [
        report.row(f"get_{size}", "GB/s", "higher", gets, goal=">= 5 or 0.9 of memcpy", **limit),
        report.row(f"put_{size}", "GB/s", "higher", puts, **limit),
    ]


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="kvc2-objects-") as name:
        folder, rows = Path(name), []
        daemon = Daemon(folder, cpu_gb=3.0, disk_gb=4.0)
        try:
            daemon.wait_ready()
            with peer("empty_server", folder):
                rows += look_up_rows(daemon, folder, flags.repeats)
            for num_bytes, count in SIZES:
                rows += copied_rows(daemon, num_bytes, count, flags.repeats)
        finally:
            daemon.stop()
    report.finish("Blocks under keys: looked up, read from the arena, stored", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
