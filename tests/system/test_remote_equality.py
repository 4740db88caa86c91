"""Greedy output with a prefix that comes from a remote store is that of an engine without a cache,
token for token in fp32: a real engine, daemon and server, each a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.settings import EngineConfig
from tests.doubles.stores import ServerProcess
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess
from tests.system.engine import EngineProcess, small_model, without_cache
from tests.system.test_equality import FLAGS, PAGES, prompt

HIT = 288  # of 300 tokens


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as found:
        yield found


@pytest.fixture
def daemon(tmp_path: Path, server: ServerProcess) -> Iterator[DaemonProcess]:
    secret = tmp_path / "remote.secret"
    secret.write_bytes(b"of all hosts that share the store")
    secret.chmod(0o600)
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.2")
    remote = ("--remote-url", server.url, "--remote-secret-file", str(secret))
    # where a tier is slower than this model, which a busy machine makes likely, a hit is one still
    patient = ("--load-policy", "always", "--acquire-deadline-ms", "20000")
    more = ("--remote-patience-ms", "10000", "--remote-deadline-ms", "20000")
    with DaemonProcess(tmp_path, *disk, *remote, *patient, *more) as process:
        wait_until(lambda: process.admin().stats().counters["remote_up"] == 1)
        yield process


def test_from_the_remote_tier(tmp_path: Path, server: ServerProcess, daemon: DaemonProcess) -> None:
    model, tokens = small_model(tmp_path / "model"), prompt(300, 1)
    config = EngineConfig(model=model, num_pages=PAGES, chunk_size=64, threads=1)
    with without_cache(config) as truth:
        wanted = truth(tokens)
    log = tmp_path / "engine.log"
    with EngineProcess(model, log, "--kvc2", daemon.address, *FLAGS) as engine:
        engine.wait_attached()
        engine.complete(tokens)
        daemon.make_durable()
        engine.complete(tokens)  # its second use
        wait_until(lambda: len(server.names()) >= HIT // 16)
        daemon.empty("gpu", "cpu", "disk")
        warm = engine.complete(tokens)
        assert warm.tokens == wanted
        assert warm.tiers == {"gpu": 0, "cpu": 0, "disk": 0, "remote": HIT}
        assert engine.complete(tokens).tokens == wanted
