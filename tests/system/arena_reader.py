"""A client that stores copies and reads in the arena, as a process: commands as those of
tiny_engine.py. A prompt's tokens and KV are functions of its seed, so that every byte is judged.

What it has read counts only where the view says so; what counts and is wrong is told as `wrong`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.client import ArenaView, Client, LeaseCommit, SessionOptions
from tests.doubles.engines import (
    LAYERS,
    NUM_PAGES,
    PAGE_SIZE,
    SEGMENT_BYTES,
    TinyEngine,
    identity,
    layout,
)
from tests.system.tiny_engine import answer_lines

PAYLOAD_BYTES = 2 * LAYERS * SEGMENT_BYTES


def tokens(seed: int, blocks: int) -> NDArray[np.uint32]:
    found = np.random.default_rng([1, seed]).integers(0, 1 << 20, blocks * PAGE_SIZE + 1)
    return found.astype(np.uint32)


def payloads(seed: int, blocks: int) -> NDArray[np.uint8]:
    return np.random.default_rng([2, seed]).integers(0, 256, (blocks, PAYLOAD_BYTES), np.uint8)


class Reader(TinyEngine):
    """Its session may be silent for expiry_s."""

    def __init__(self, address: str, expiry_s: float) -> None:
        super().__init__(address, "reader")
        self.client.close()
        options = SessionOptions("reader", arena=True, expiry_s=expiry_s)
        self.client = Client(address, pool=self.pool, layout=layout(), engine=self, options=options)


class Commands:
    def __init__(self, address: str, expiry_s: str = "0") -> None:
        self._engine = Reader(address, float(expiry_s))
        self._client = self._engine.client
        self._namespace = self._client.open_namespace(identity().encode())
        # by lease: the view that it was told of, its offsets, and what lies there
        self._leases: dict[str, tuple[ArenaView, NDArray[np.uint64], NDArray[np.uint8]]] = {}

    def attach(self) -> dict[str, Any]:
        return {"attached": self._client.wait_attached(10)}

    def status(self) -> dict[str, Any]:
        return {"state": self._client.state, "detached": self._engine.detached}

    def copy(self, seed: int, blocks: int, durable: bool = False) -> dict[str, Any]:
        """Copied commits of a prompt from its first block on."""
        pages = self._client.grant(blocks)
        assert pages.size == blocks, "the pool has no pages"
        segments = np.frombuffer(self._engine.pool.map, np.uint8)
        by_page = segments.reshape(-1, NUM_PAGES, SEGMENT_BYTES)
        by_page[:, pages] = payloads(seed, blocks).reshape(blocks, -1, SEGMENT_BYTES).swapaxes(0, 1)
        del segments, by_page
        commit = LeaseCommit(b"", 0, tokens(seed, blocks)[:-1], pages)
        answer = self._client.commit_copies(self._namespace, [commit], durable=durable)
        self._client.release([], returned=pages)
        return {"results": answer.results[0].tolist(), "durable": answer.durable}

    def copy_on(self, first: int, blocks: int) -> dict[str, Any]:
        """Durable copies of one prompt after the other until the daemon is gone: how many of them
        it has acknowledged."""
        print("{}", flush=True)  # it begins
        seed = first
        try:
            while self.copy(seed, blocks, durable=True)["durable"]:
                seed += 1
        except errors.Kvc2Error as error:
            return {"acknowledged": seed - first, "error": type(error).__name__}
        return {"acknowledged": seed - first, "error": ""}

    def lease(self, id: str, seed: int, blocks: int) -> dict[str, Any]:
        found = self._client.acquire_in_arena(self._namespace, id.encode(), tokens(seed, blocks))
        truth = payloads(seed, blocks)[: found.offsets.size]
        self._leases[id] = (self._client.arena, found.offsets, truth)
        return {"blocks": found.offsets.size, **self.read(id)}

    def read(self, id: str) -> dict[str, Any]:
        """Whether it counts, and how many blocks of it are wrong if so."""
        view, offsets, truth = self._leases[id]
        into = np.zeros(truth.shape, np.uint8)
        counts = view.read(offsets, PAYLOAD_BYTES, into)
        return {"counts": counts, "wrong": int((into != truth).any(axis=1).sum()) if counts else 0}

    def read_on(self, id: str) -> dict[str, Any]:
        """One read after the other until one doesn't count: how many did."""
        reads = wrong = 0
        while (found := self.read(id))["counts"]:
            reads += 1
            wrong += found["wrong"]
            if reads == 1:
                print("{}", flush=True)  # it goes on
        return {"reads": reads, "wrong": wrong}

    def release(self, id: str) -> dict[str, Any]:
        self._client.release([id.encode()])
        return {}


if __name__ == "__main__":
    answer_lines(Commands(*sys.argv[1:]))
