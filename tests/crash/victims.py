"""Daemons that are killed, and the engine that works on one until then.

The engine's KV is a function of the tokens, so that each byte of a hit can be judged. It keeps what
a daemon has acknowledged: that has to be there when the next one serves the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.client import Admin, LeaseCommit
from kvc2.client.channel import Channel, probe
from kvc2.host.address import Address
from tests.doubles.engines import LAYERS, PAGE_SIZE, TinyEngine, identity, layout

U32 = NDArray[np.uint32]
START_S = 30.0
BLOCKS_MAX = 8
CHECKED = 12  # of what was acknowledged is looked for after each restart
LAYOUT = layout()
FLAGS = ("--cpu-memory-size-gb", "0.008", "--slab-bytes", "262144", "--disk-size-gb", "0.064")


class Nursery:
    """The process that daemons are forked from (failpoints.py)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.failpoints"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def start(self, folder: Path, failpoint: str | None = None, count: int = 1) -> Victim:
        address = f"unix:{folder / 'kvc2.sock'}"
        argv = ["serve", *FLAGS, "--listen", address, "--disk-path", str(folder / "disk")]
        log = str(folder / "daemon.log")
        order = {"argv": argv, "log": log, "failpoint": failpoint, "count": count}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return Victim(int(self._process.stdout.readline()), address, Path(log))

    def close(self) -> None:
        self._process.communicate()


class Victim:
    """A daemon's process. `fd`: its pidfd, readable when it is dead."""

    def __init__(self, pid: int, address: str, log: Path) -> None:
        self.pid, self.address, self.log = pid, address, log
        self.place = Address.of_daemon(address)
        self.fd = os.pidfd_open(pid)

    def dead(self, timeout_s: float = 0.0) -> bool:
        return bool(select.select([self.fd], [], [], timeout_s)[0])

    def kill(self, number: int = signal.SIGKILL) -> None:
        signal.pidfd_send_signal(self.fd, number)

    def serves(self) -> bool:
        """Waits until it does; False when it died first."""
        started = time.monotonic()
        while not self.dead(0.005):
            if probe(self.place):
                channel = Channel(self.place)
                try:
                    if channel.serves(1.0):
                        return True
                finally:
                    channel.close()
            assert time.monotonic() - started < START_S, self.tail()
        return False

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def close(self) -> None:
        if not self.dead():
            self.kill()
            self.dead(10)
        os.close(self.fd)


def tokens_of(seed: int) -> U32:
    """One of three prompts goes on from another."""
    chance = np.random.default_rng(seed)
    blocks = 1 + seed % BLOCKS_MAX
    own = chance.integers(0, 50_000, blocks * PAGE_SIZE + 4).astype(np.uint32)
    if seed % 3:
        return own
    return np.concatenate([tokens_of(seed + 1)[:-2], own])


def truth(tokens: U32, payload_bytes: int) -> NDArray[np.uint8]:
    """[blocks, payload_bytes]: all of a block's prefix decides every byte of it."""
    ends = range(PAGE_SIZE, tokens.size + 1, PAGE_SIZE)
    keys = [hashlib.sha256(tokens[:end].tobytes()).digest() for end in ends]
    rows = [np.random.default_rng(list(key)).bytes(payload_bytes) for key in keys]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), payload_bytes)


class Engine:
    """Works on whatever daemon serves the address, one `attach` each."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.next = seed * 1_000_000
        self.requests = 0
        self.acknowledged: dict[int, int] = {}  # blocks by seed of the prompt
        self.committed: dict[int, int] = {}  # since the last flush
        self.judged = 0

    def attach(self, address: str) -> bool:
        self.committed = {}
        self.tiny = TinyEngine(address, "victim's")
        self.admin = Admin(address)
        if not self.tiny.client.wait_attached(5):
            return False
        self.namespace = self.tiny.client.open_namespace(identity().encode())
        return True

    def detach(self) -> None:
        self.tiny.client.close()
        self.tiny.pool.close()
        self.admin.close()

    def pieces(self, page: int) -> list[slice]:
        """Where a page's payload lies in the pool, in order."""
        table = LAYOUT.segment_table().tolist()
        return [
            slice(offset + page * stride, offset + page * stride + length)
            for offset, stride, length in table
        ]

    def ask(self, seed: int, *, durable: bool = False) -> int:
        """A whole request; how many blocks hit. AssertionError for a wrong byte."""
        client, tokens = self.tiny.client, tokens_of(seed)
        blocks = tokens.size // PAGE_SIZE
        self.requests += 1
        name = b"%d" % self.requests
        found = client.acquire(self.namespace, name, tokens, grant_pages=blocks, deadline_s=10)
        if found.transfer and not client.wait_layer(found.transfer, LAYERS - 1, 5):
            raise errors.Detached("dead")
        rows = truth(tokens, LAYOUT.payload_bytes)
        held = found.prefix_pages.size
        for page, row in zip(found.prefix_pages.tolist(), rows, strict=False):
            came = b"".join(bytes(self.tiny.pool.map[each]) for each in self.pieces(page))
            assert came == row.tobytes(), "wrong bytes"
            self.judged += 1
        count = min(blocks - held, found.granted_pages.size)
        pages = found.granted_pages[:count]
        for page, row in zip(pages.tolist(), rows[held : held + count], strict=True):
            start = 0
            for each in self.pieces(page):
                size = each.stop - each.start
                self.tiny.pool.map[each] = row[start : start + size].tobytes()
                start += size
        rest = tokens[held * PAGE_SIZE : (held + count) * PAGE_SIZE]
        if count:
            done = client.commit([LeaseCommit(name, held, rest, pages)], durable=durable)
            self.committed[seed] = held + count
            if durable and done.durable:
                self.acknowledged[seed] = held + count
        client.release([name], returned=found.granted_pages[count:])
        return held

    def flush(self) -> None:
        if not self.admin.flush(20).not_durable_blocks:
            self.acknowledged.update(self.committed)
            self.committed = {}

    def look(self) -> None:
        """What was acknowledged is there, and right."""
        seeds = list(self.acknowledged)
        chosen = seeds[-CHECKED // 2 :] + self.chance.sample(seeds, min(len(seeds), CHECKED // 2))
        for seed in set(chosen):
            hit, due = self.ask(seed), self.acknowledged[seed]
            assert hit >= due, f"prompt {seed}: {due} blocks were acknowledged, {hit} are there"

    def store(self, prompts: int) -> None:
        for _ in range(prompts):
            self.next += 1
            self.ask(self.next)
        self.flush()
        assert self.acknowledged
        assert not self.committed, "a flush left something"

    def work(self, steps: int) -> None:
        """Commits, flushes, evictions from memory (so that the disk is read) and, rarely, from
        disk; raises when the daemon is gone."""
        for _ in range(steps):
            self.next += 1
            self.ask(self.next, durable=self.chance.random() < 0.2)
            if self.chance.random() < 0.4:
                self.flush()
            if self.acknowledged and self.chance.random() < 0.4:
                self.admin.evict("gpu")
                self.admin.evict("cpu")
                self.ask(self.chance.choice(list(self.acknowledged)))
            if self.chance.random() < 0.1:
                self.acknowledged.clear()  # from now on these may go, ...
                self.committed.clear()  # ... and of these what is on disk before a flush says so
                self.admin.evict("disk", 3)


def sink(engine: Engine, victim: Victim, steps: int) -> bool:
    """Work until the daemon is dead or the steps are done. Whether it died of itself."""
    try:
        if engine.attach(victim.address):
            engine.look()
            engine.work(steps)
    except errors.Kvc2Error:
        assert victim.dead(5), victim.tail()
    finally:
        engine.detach()
    return victim.dead()
