"""Daemons that tell routers what they have, each with an engine that stores and a router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from kvc2.client import Client, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions, admin
from kvc2.client.staging import Staging
from kvc2.config import KvEventsConfig
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.routers import Listener

SIZE, PAGES = 16, 32
IDENTITY = Foreign("test", "no weights", {"page_size": SIZE})
LAYOUT = Layout((Segment(0, 0, 4 * SIZE, 0, 4 * SIZE),), SIZE)


class Served:
    """A daemon that tells, an engine that stores, a router that listens."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        events = KvEventsConfig(listen=f"unix:{folder}/events")
        self.daemon = ServedDaemon(serve_config(folder, disk=True, kv_events=events), cache=None)
        self.daemon.__enter__()
        self.pool, self.staging = PoolMemory(LAYOUT.payload_bytes * PAGES), Staging(PAGES)
        options = SessionOptions("test", arena=True)
        self.client = Client(
            self.daemon.address,
            pool=self.pool,
            layout=LAYOUT,
            engine=self.staging,
            options=options,
        )
        assert self.client.wait_attached(10)
        self.handle = self.client.open_handle(NamespaceHandle(IDENTITY.encode()))
        self.listener = Listener(folder / "events")

    def store(self, tokens: np.ndarray) -> None:
        blocks = len(tokens) // SIZE
        pages = self.staging.take(blocks)
        rows = np.frombuffer(self.pool.map, np.uint32).reshape(PAGES, SIZE)
        rows[pages] = tokens.reshape(blocks, SIZE)
        commit = LeaseCommit(b"", 0, tokens, pages)
        assert not self.client.commit_copies(self.handle, [commit]).results[0].any()
        self.staging.give_back(pages)

    def cached(self, tokens: np.ndarray, salt: str | None = None) -> int:
        """Leading blocks of the prompt that the router believes to be here."""
        salt = salt or f"kvc2-{self.client.explain(self.handle, tokens).namespace}"
        return self.listener.catch_up().cached_blocks(tokens.tolist(), SIZE, salt)

    def admin(self) -> admin.Admin:
        return admin.Admin(self.daemon.address)

    def close(self) -> None:
        self.listener.close()
        self.client.close()
        self.pool.close()
        self.daemon.__exit__(None, None, None)


@contextmanager
def two_replicas(folder: Path) -> Iterator[list[Served]]:
    with ExitStack() as stack:
        found = []
        for name in ("a", "b"):
            found.append(Served(folder / name))
            stack.callback(found[-1].close)
        yield found


def prompt(seed: int, blocks: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, SIZE * blocks, np.uint32)
