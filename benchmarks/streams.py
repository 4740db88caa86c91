"""Read and Write over a unix socket, against plain gRPC streams of the same messages.

The same sizes and the same kind of server and client, by turns in one run: the daemon's have the
leases, the pages and a hash a block beside that; the plain ones (plain_streams.py) copy from memory
to memory. Blocks lie in the arena; each Write is of keys that are new.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks import plain_streams, report
from benchmarks.processes import Daemon, peer
from benchmarks.rpc import ATTACH_TIMEOUT_S, PoolOwner
from kvc2.client import Client, NamespaceHandle, PoolMemory, SessionOptions, Streams
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment
from kvc2.payloads import MESSAGE_BYTES, blocks_per_message
from kvc2.v1 import cache_pb2

TOTAL_BYTES = 256 << 20  # of a stream
SIZES = (64 << 10, 1 << 20, 4 << 20)  # of a payload
PAGE_SIZE = 16
TURNS = 3  # of each in a repeat; the best counts: others share the machine
IDENTITY = Foreign("benchmark", "none", {"page_size": PAGE_SIZE}).encode()


class Remote:
    """A session without memory, with a lease on `blocks` keys."""

    def __init__(self, daemon: Daemon, payloads: NDArray[np.uint8]) -> None:
        payload_bytes = payloads.shape[1]
        self._pool, self.count = PoolMemory(0), 0
        self.client = Client(
            daemon.address,
            pool=self._pool,
            layout=Layout((Segment(0, 0, payload_bytes, 0, payload_bytes),), PAGE_SIZE),
            engine=PoolOwner(),
            options=SessionOptions("streams"),
        )
        if not self.client.wait_attached(ATTACH_TIMEOUT_S):
            raise RuntimeError(f"not attached: {self.client.last_refusal}\n{daemon.tail()}")
        self._streams, self._payloads = Streams(self.client), payloads
        self._namespace = self.client.open_handle(NamespaceHandle(IDENTITY, opaque=True))
        self.write()
        self.client.acquire_keys(self._namespace, b"leased", self._keys())

    def _keys(self) -> list[bytes]:
        return [b"%d.%d" % (self.count, each) for each in range(len(self._payloads))]

    def write(self) -> None:
        self.count += 1
        results = self._streams.write_keys(self._namespace, self._keys(), self._payloads)
        if results.any():
            raise RuntimeError(f"results {set(results.tolist())}")

    def read(self, into: NDArray[np.uint8]) -> None:
        if len(self._streams.read(b"leased", into)) != len(into):
            raise RuntimeError("blocks are missing")


class Plain:
    """The same with the peer, into the same buffers."""

    def __init__(self, folder: Path, payloads: NDArray[np.uint8]) -> None:
        options = [("grpc.max_receive_message_length", 64 << 20)]
        self._channel = grpc.insecure_channel(f"unix:{folder / plain_streams.SOCKET}", options)
        self._payloads = payloads

    def write(self) -> None:
        stub = self._channel.stream_unary(
            "/plain/Write", request_serializer=cache_pb2.WriteRequest.SerializeToString
        )
        stub(self._messages())

    def _messages(self) -> Iterator[cache_pb2.WriteRequest]:
        several = blocks_per_message(self._payloads.shape[1])
        for block in range(0, len(self._payloads), several):
            payload = self._payloads[block : block + several].reshape(-1).data
            for offset in range(0, len(payload), MESSAGE_BYTES):
                part = payload[offset : offset + MESSAGE_BYTES]
                last = offset + len(part) == len(payload)
                yield cache_pb2.WriteRequest(
                    block=block,
                    offset=offset,
                    payload=bytes(part),
                    checksum=bytes(16 * several) if last else b"",
                )

    def read(self, into: NDArray[np.uint8]) -> None:
        stub = self._channel.unary_stream(
            "/plain/Read",
            request_serializer=cache_pb2.ReadRequest.SerializeToString,
            response_deserializer=cache_pb2.ReadResponse.FromString,
        )
        memory = into.reshape(-1).data
        for each in stub(cache_pb2.ReadRequest()):
            at = each.block * into.shape[1] + each.offset
            memory[at : at + len(each.payload)] = each.payload

    def close(self) -> None:
        self._channel.close()


def seconds(call: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def rows_of(folder: Path, payload_bytes: int, repeats: int) -> list[report.Row]:
    blocks = TOTAL_BYTES // payload_bytes
    filled = np.random.default_rng(1).bytes(TOTAL_BYTES)
    payloads = np.frombuffer(filled, np.uint8).reshape(blocks, payload_bytes)
    into = np.zeros_like(payloads)
    speeds: dict[str, list[float]] = {name: [] for name in ("read", "write", "p-read", "p-write")}
    daemon = Daemon(folder, cpu_gb=3.0, disk_gb=0.0)
    try:
        daemon.wait_ready()
        with peer("plain_streams", folder, *payloads.shape):
            ours, plain = Remote(daemon, payloads), Plain(folder, payloads)
            for _ in range(repeats):
                turns = [
                    (
                        seconds(ours.read, into),
                        seconds(plain.read, into),
                        seconds(ours.write),
                        seconds(plain.write),
                    )
                    for _ in range(TURNS)
                ]
                best = [TOTAL_BYTES / 1e9 / min(each) for each in zip(*turns, strict=True)]
                for name, speed in zip(("read", "p-read", "write", "p-write"), best, strict=True):
                    speeds[name].append(speed)
            plain.close()
            ours.client.close()
    finally:
        daemon.stop()
    return [row for name in ("read", "write") for row in of_case(name, payload_bytes, speeds)]


def of_case(name: str, payload_bytes: int, speeds: dict[str, list[float]]) -> list[report.Row]:
    ours, plain = speeds[name], speeds[f"p-{name}"]
    case = f"{name}_{payload_bytes >> 10}k"
    peers = {"plain gRPC stream": float(np.median(plain))}
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    return [
        report.row(case, "GB/s", "higher", ours, peers=peers),
        report.row(f"{case}_over_plain", "x", "higher", ratios, goal=">= 0.9"),
    ]


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    rows = []
    for payload_bytes in SIZES:
        with tempfile.TemporaryDirectory(prefix="kvc2-streams-") as name:
            rows += rows_of(Path(name), payload_bytes, flags.repeats)
    report.finish("Read and Write over a unix socket", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
