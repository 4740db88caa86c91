"""The one call that a request waits for, and what the daemon costs before it has cached anything.

Acquire of 32k tokens: the daemon's own time, and the whole call against an empty handler that is
given the same bytes in the same run. `kvc2 serve` on an empty disk: time until it answers, and its
memory beside the arena, against a process that only imports its libraries. What clients of the
engine and the daemon see beside that: clients.py.
"""

from __future__ import annotations

import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import clients, empty_server, report
from benchmarks.processes import Daemon, peer
from engine import demo_model
from kvc2.client import Client, Detached, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions
from kvc2.client.channel import Channel
from kvc2.errors import Kvc2Error
from kvc2.host.address import Address
from kvc2.identity import Identity
from kvc2.layout import Layout, Segment
from kvc2.v1 import cache_pb2

TOKENS = 32_768
PAGE_SIZE = 16
BLOCKS = TOKENS // PAGE_SIZE
SEGMENT_BYTES = 1024  # of one layer's keys or values: the call carries no KV, so little will do
POOL_PAGES = 3 * BLOCKS
CALLS = 50  # of each kind in a repeat; a sample is their median
ATTACH_TIMEOUT_S = 20.0
IMPORTS = "import grpc, grpc.aio, numpy, lmdb, typer, rich, prometheus_client, yaml"
IDENTITY = Identity(
    weights_digest="ab" * 32,
    architecture="benchmark",
    dtypes=(("attention", "bfloat16"),),
    kv_dtype="bfloat16",
    layers=1,
    kv_heads=1,
    head_size=SEGMENT_BYTES // PAGE_SIZE // 2,
    rope_theta=1e4,
    page_size=PAGE_SIZE,
)


class PoolOwner:
    """The engine's part of a session: it keeps nothing and takes what it is granted."""

    def kept_pages(self) -> NDArray[np.uint32]:
        return np.zeros(0, np.uint32)

    def on_attached(self, granted: NDArray[np.uint32]) -> None:
        pass

    def on_attach_failed(self, error: Kvc2Error) -> None: ...

    def on_detached(self, detached: Detached) -> None:
        print(f"detached: {detached}", file=sys.stderr)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a repeat's medians; `own` is the daemon's mean, by its own clock."""

    own: float
    call: float
    empty: float
    raw: float


class BareEngine:
    """An engine without a model, and one namespace."""

    def __init__(self, daemon: Daemon, engine_name: str) -> None:
        size = SEGMENT_BYTES
        segments = (Segment(0, 0, size, 0, size), Segment(0, 1, size, POOL_PAGES * size, size))
        self._pool = PoolMemory(POOL_PAGES * 2 * size)
        self.client = Client(
            daemon.address,
            pool=self._pool,
            layout=Layout(segments, PAGE_SIZE),
            options=SessionOptions(engine_name),
            engine=PoolOwner(),
        )
        if not self.client.wait_attached(ATTACH_TIMEOUT_S):
            raise RuntimeError(f"not attached: {self.client.last_refusal}\n{daemon.tail()}")
        self.namespace: NamespaceHandle = self.client.open_namespace(IDENTITY.encode())

    def close(self) -> None:
        self.client.close()
        self._pool.close()

    def store(self, request_id: bytes, tokens: NDArray[np.uint32]) -> None:
        """Commit the whole prompt, so that an acquire of it matches all but the last block."""
        lease = self.client.acquire(self.namespace, request_id, tokens, grant_pages=BLOCKS)
        pages = lease.granted_pages
        commit = LeaseCommit(request_id, 0, tokens[: len(pages) * PAGE_SIZE], pages)
        (results,) = self.client.commit([commit]).results
        self.client.release([request_id])
        if len(pages) < BLOCKS or results.any():
            raise RuntimeError(f"{len(pages)} of {BLOCKS} pages granted, results {set(results)}")


class Bench(BareEngine):
    """A session whose pool holds a prompt of TOKENS, and the same call to the empty handler."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        super().__init__(daemon, "rpc")
        self._daemon = daemon
        place = f"unix:{folder / empty_server.GRPC_SOCKET}"
        self._empty = Channel(Address.of_daemon(place))
        self._raw = socket.socket(socket.AF_UNIX)
        self._raw.connect(str(folder / empty_server.RAW_SOCKET))
        self._count = 0

    def close(self) -> None:
        super().close()
        self._empty.close()
        self._raw.close()

    def repeat(self, tokens: NDArray[np.uint32], matched: int) -> Times:
        """CALLS of each kind, by turns. RuntimeError if one doesn't match `matched` tokens."""
        calls: dict[str, list[float]] = {"call": [], "empty": [], "raw": []}
        before = self._own_time()
        for _ in range(CALLS):
            self._count += 1
            request_id = b"request-%d" % self._count
            begin = time.perf_counter()
            lease = self.client.acquire(self.namespace, request_id, tokens)
            calls["call"].append(time.perf_counter() - begin)
            if lease.matched_tokens != matched:
                raise RuntimeError(f"matched {lease.matched_tokens} tokens, expected {matched}")
            self.client.release([request_id])
            begin = time.perf_counter()
            self._call_empty(tokens, request_id)
            calls["empty"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            self._send_raw(tokens)
            calls["raw"].append(time.perf_counter() - begin)
        after = self._own_time()
        own_s = (after[0] - before[0]) / (after[1] - before[1])
        medians = {name: statistics.median(times) * 1e3 for name, times in calls.items()}
        return Times(own=own_s * 1e3, **medians)

    def _call_empty(self, tokens: NDArray[np.uint32], request_id: bytes) -> None:
        request = cache_pb2.AcquireRequest(
            session=cache_pb2.SessionRef(secret=bytes(16), session_epoch=1),
            namespace_id=1,
            request_id=request_id,
            tokens=tokens.tobytes(),
        )
        self._empty.call("Acquire", request)

    def _send_raw(self, tokens: NDArray[np.uint32]) -> None:
        payload = tokens.tobytes()
        self._raw.sendall(len(payload).to_bytes(4, "little"))
        self._raw.sendall(payload)
        self._raw.recv(1)

    def _own_time(self) -> tuple[float, float]:
        """(seconds, calls) of all Acquires so far, by the daemon's clock."""
        counters = self._daemon.admin.stats().counters
        name = "rpc_seconds_{}{{rpc=Acquire}}"
        return counters[name.format("sum")], counters[name.format("count")]


def acquire_rows(folder: Path, repeats: int) -> list[report.Row]:
    random = np.random.default_rng(1)
    known, unknown = (random.integers(0, 50_000, TOKENS, dtype=np.uint32) for _ in range(2))
    daemon = Daemon(folder, cpu_gb=0.5, disk_gb=0.5)
    try:
        daemon.wait_ready()
        with peer("empty_server", folder):
            bench = Bench(daemon, folder)
            bench.store(b"prime", known)
            daemon.flush()
            hits, misses = [], []
            for _ in range(repeats):
                hits.append(bench.repeat(known, TOKENS - PAGE_SIZE))
                misses.append(bench.repeat(unknown, 0))
            bench.close()
    finally:
        daemon.stop()
    return [*rows_of("hit", hits), *rows_of("miss", misses)]


def rows_of(name: str, times: Sequence[Times]) -> list[report.Row]:
    empty = statistics.median(each.empty for each in times)
    raw = statistics.median(each.raw for each in times)
    return [
        report.row(
            f"acquire_32k_{name}_daemon",
            "ms",
            "lower",
            [each.own for each in times],
            goal="<= 0.3",
        ),
        report.row(
            f"acquire_32k_{name}_call",
            "ms",
            "lower",
            [each.call for each in times],
            limit=raw,
            limit_name="raw socket",
            peers={"empty gRPC handler": empty},
        ),
        report.row(
            f"acquire_32k_{name}_call_over_empty",
            "x",
            "lower",
            [each.call / each.empty for each in times],
            goal="<= 1.5",
        ),
    ]


def serve_rows(folder: Path, repeats: int) -> list[report.Row]:
    starts, memories, import_times, import_memories = [], [], [], []
    for number in range(repeats):
        place = folder / str(number)
        place.mkdir()
        begin = time.perf_counter()
        daemon = Daemon(place, cpu_gb=1.0, disk_gb=1.0)
        try:
            daemon.wait_ready()
            starts.append(time.perf_counter() - begin)
            memories.append(private_mib(daemon.child.pid))
        finally:
            daemon.stop()
        seconds, mib = import_cost()
        import_times.append(seconds)
        import_memories.append(mib)
    return [
        report.row(
            "serve_start",
            "s",
            "lower",
            starts,
            limit=statistics.median(import_times),
            limit_name="importing its libraries",
            goal="< 1",
        ),
        report.row(
            "serve_memory_beside_arena",
            "MiB",
            "lower",
            memories,
            limit=statistics.median(import_memories),
            limit_name="importing its libraries",
            goal="< 100",
        ),
    ]


def import_cost() -> tuple[float, float]:
    """(seconds, MiB) of a Python process that imports the daemon's libraries and ends."""
    code = f"{IMPORTS}; print('ready', flush=True); input()"
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        seconds = time.perf_counter() - begin
        mib = private_mib(child.pid)
        child.stdin.write("\n")
    return seconds, mib


def private_mib(pid: int) -> float:
    """Resident memory without shared memory, in which the arena and the pools lie."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = {key: int(value) for key, value in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.M)}
    return (kib["RssAnon"] + kib["RssFile"]) / 1024


def main() -> int:
    parser = report.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, help="the engine's; by default the embedded one")
    flags = parser.parse_args()
    if flags.model is None:
        with demo_model.console_progress() as progress:
            flags.model = demo_model.build(demo_model.default_directory(), progress=progress)
    with tempfile.TemporaryDirectory(prefix="kvc2-rpc-") as name:
        rows = acquire_rows(Path(name), flags.repeats)
        rows += serve_rows(Path(name), flags.repeats)
        rows += clients.rows(flags.model, Path(name), flags.repeats)
    report.finish("Calls of the daemon and the engine, and the daemon's start", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
