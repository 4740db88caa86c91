"""Two daemons, as on two hosts, and a store between them: what one computed the other serves, byte
by byte, also when the first is gone; a store that freezes is a miss, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvc2.client import LeaseCommit
from tests.doubles.engines import LAYERS, NUM_PAGES, PAGE_SIZE, SEGMENT_BYTES, TinyEngine, identity
from tests.doubles.stores import ServerProcess
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess

BLOCKS = 8
SEGMENTS = 2 * LAYERS


def prompt(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 50_000, BLOCKS * PAGE_SIZE + 1)
    return found.astype(np.uint32)


def content(seed: int) -> np.ndarray:
    """[blocks, segments, bytes] what an engine computes of that prompt."""
    shape = (BLOCKS, SEGMENTS, SEGMENT_BYTES)
    return np.random.default_rng([seed, 1]).integers(0, 256, shape, np.uint8)


class Engine(TinyEngine):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        assert self.client.wait_attached(20), self.client.last_refusal
        self.namespace = self.client.open_namespace(identity().encode())

    def page(self, page: int) -> np.ndarray:
        """[segments, bytes] its memory."""
        memory = np.frombuffer(self.pool.map, np.uint8).reshape(SEGMENTS, NUM_PAGES, SEGMENT_BYTES)
        return memory[:, page]

    def compute(self, seed: int) -> None:
        found = self.client.acquire(self.namespace, b"c", prompt(seed), grant_pages=BLOCKS)
        pages = found.granted_pages[:BLOCKS]
        for page, block in zip(pages.tolist(), content(seed), strict=True):
            self.page(page)[:] = block
        commit = LeaseCommit(b"c", 0, prompt(seed)[:-1], pages)
        assert not self.client.commit([commit]).results[0].any()
        self.client.release([b"c"])

    def ask(self, seed: int) -> tuple[int, int]:
        """Tokens of a prefix, and how many of them came from the store. Its bytes are judged."""
        found = self.client.acquire(self.namespace, b"a", prompt(seed))
        assert found.transfer == 0 or self.client.wait_layer(found.transfer, LAYERS - 1, 20)
        for page, block in zip(found.prefix_pages.tolist(), content(seed), strict=False):
            assert (self.page(page) == block).all(), "wrong bytes"
        self.client.release([b"a"])
        return found.matched_tokens, found.tiers.remote


@contextmanager
def daemon(
    folder: Path, url: str, *flags: str, before: Sequence[str] = ()
) -> Iterator[DaemonProcess]:
    """With a disk, and the store at this URL. `before` begins its command."""
    secret = folder.parent / "remote.secret"
    secret.write_bytes(b"of two hosts that trust each other")
    secret.chmod(0o600)
    folder.mkdir()
    given = (
        *("--disk-path", str(folder / "disk"), "--disk-size-gb", "0.05"),
        *("--remote-url", url, "--remote-secret-file", str(secret), *flags),
    )
    with DaemonProcess(folder, *given, before=before) as found:
        wait_until(lambda: found.admin().stats().counters["remote_up"] == 1)
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as found:
        yield found


PATIENT = ("--remote-patience-ms", "10000", "--acquire-deadline-ms", "20000")


def test_a_prefix_of_one_host_is_served_by_another_also_when_that_is_dead(
    tmp_path: Path, server: ServerProcess
) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(daemon(tmp_path / "a", server.url, *PATIENT))
        b = stack.enter_context(daemon(tmp_path / "b", server.url, *PATIENT))
        first = stack.enter_context(Engine(a.address))
        for seed in (1, 2):
            first.compute(seed)
            a.make_durable()
            assert first.ask(seed) == (BLOCKS * PAGE_SIZE, 0)
        wait_until(lambda: len(server.names()) == 2 * BLOCKS)
        second = stack.enter_context(Engine(b.address))
        assert second.ask(1) == (BLOCKS * PAGE_SIZE, BLOCKS * PAGE_SIZE)
        assert second.ask(1) == (BLOCKS * PAGE_SIZE, 0)
        a.kill()
        assert second.ask(2) == (BLOCKS * PAGE_SIZE, BLOCKS * PAGE_SIZE)
        told = b.admin().stats().counters
        assert told["transfer_blocks_total{source=remote,target=cpu}"] == 2 * BLOCKS
        assert told["matched_tokens_total{tier=remote}"] == 2 * BLOCKS * PAGE_SIZE


def test_a_frozen_store_is_a_miss_and_nothing_after_that(
    tmp_path: Path, server: ServerProcess
) -> None:
    with (
        daemon(tmp_path / "a", server.url) as a,
        Engine(a.address) as engine,
    ):
        server.freeze()
        try:
            assert [engine.ask(seed) for seed in (1, 2, 3)] == [(0, 0)] * 3
            told = a.admin().stats().counters
            assert told["faults_total{kind=remote_late}"] == 1
            assert told["remote_up"] == 0
        finally:
            server.thaw()
        wait_until(lambda: a.admin().stats().counters["remote_up"] == 1)
        engine.compute(1)
        a.make_durable()
        engine.ask(1)
        wait_until(lambda: len(server.names()) == BLOCKS)


def test_a_daemon_ends_in_time_with_a_store_that_is_frozen(
    tmp_path: Path, server: ServerProcess
) -> None:
    with daemon(tmp_path / "a", server.url) as a:
        server.freeze()
        assert a.stop() == 0
