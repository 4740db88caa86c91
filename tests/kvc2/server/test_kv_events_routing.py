"""Two daemons and a router that hears both: a prompt goes where its prefix is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvc2.client import Client, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions, admin
from kvc2.client.staging import Staging
from kvc2.config import KvEventsConfig
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.routers import Listener
from tests.doubles.waiting import wait_until

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


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Served]]:
    found = [Served(tmp_path / name) for name in ("a", "b")]
    yield found
    for each in found:
        each.close()


def prompt(seed: int, blocks: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, SIZE * blocks, np.uint32)


def chosen(replicas: list[Served], tokens: np.ndarray) -> int | None:
    """Where most of the prompt is; None: nowhere."""
    cached = [each.cached(tokens) for each in replicas]
    return cached.index(max(cached)) if max(cached) else None


def test_a_prompt_goes_to_the_replica_that_has_its_prefix(replicas: list[Served]) -> None:
    first, second = prompt(1), prompt(2)
    replicas[0].store(first)
    replicas[1].store(second)
    wait_until(lambda: chosen(replicas, first) == 0)
    wait_until(lambda: chosen(replicas, second) == 1)
    asked = np.concatenate([first, prompt(3)])  # the next turn of what the first one has
    assert chosen(replicas, asked) == 0
    found = replicas[0].client.match(replicas[0].handle, asked)
    assert found.matched_tokens == 8 * SIZE
    assert chosen(replicas, prompt(4)) is None
    replicas[1].store(asked)
    wait_until(lambda: chosen(replicas, asked) == 1)  # it has more of it now


def test_another_namespace_of_the_same_tokens_is_not_taken_for_it(replicas: list[Served]) -> None:
    tokens = prompt(1)
    replicas[0].store(tokens)
    wait_until(lambda: replicas[0].cached(tokens) == 8)
    assert replicas[0].cached(tokens, salt="kvc2-" + "00" * 32) == 0


def test_what_is_evicted_is_not_routed_to_and_what_the_disk_has_is(
    replicas: list[Served], tmp_path: Path
) -> None:
    here, tokens = replicas[0], prompt(1)
    here.store(tokens)
    with here.admin() as asked:
        assert not asked.flush().not_durable_blocks
        asked.evict("cpu")
        wait_until(lambda: not here.listener.catch_up().there["CPU"])
        assert here.cached(tokens) == 8
        assert len(here.listener.replica.there["STORAGE"]) == 8
        asked.evict("disk")
        wait_until(lambda: here.cached(tokens) == 0)


def test_a_daemon_that_comes_back_tells_what_its_disk_has(tmp_path: Path) -> None:
    here, tokens = Served(tmp_path / "a"), prompt(1)
    here.store(tokens)
    with here.admin() as asked:
        assert not asked.flush().not_durable_blocks
    here.close()
    again = Served(tmp_path / "a")
    wait_until(lambda: again.cached(tokens) == 8)
    assert again.listener.replica.there.keys() == {"STORAGE"}
    assert again.listener.replica.orphans == 0
    again.close()
