"""The real Mooncake Store as the remote tier: its master, a node that lends memory and our client,
in a network of their own. Whatever dies or freezes is a miss, and a daemon ends in time."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks.mooncake_servers import (
    MASTER_PORT,
    Servers,
    servers,
    site_packages,
    with_packages,
)
from benchmarks.own_network import own_network
from kvc2.tiers.remote.mooncake import Mooncake
from kvc2.tiers.remote.store import StoreError
from tests.doubles.engines import PAGE_SIZE
from tests.doubles.mooncakes import answering, mooncake
from tests.doubles.stores import holds_the_seam
from tests.doubles.waiting import on_a_loop, wait_until
from tests.peers.environments import mooncake_python
from tests.system.daemon import DaemonProcess
from tests.system.test_two_hosts import BLOCKS, PATIENT, Engine, daemon

pytestmark = pytest.mark.peers
TOKENS = BLOCKS * PAGE_SIZE
BLOCKED_S = 30.0  # its client was seen to wait so long on what is frozen


@pytest.fixture(scope="module")
def python() -> Path:
    return mooncake_python()


@pytest.fixture
def store(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """Daemons that are started meanwhile find the package."""
    packages = site_packages(python)
    with ExitStack() as stack:
        try:
            stack.enter_context(own_network())
        except PermissionError as error:
            pytest.skip(f"no network of its own: {error}")
        found = stack.enter_context(servers(python, tmp_path))
        monkeypatch.setenv("PYTHONPATH", with_packages(packages)["PYTHONPATH"])
        monkeypatch.syspath_prepend(str(packages))
        for name in [each for each in os.environ if each.startswith("MOONCAKE_")]:
            monkeypatch.delenv(name)
        yield found


@asynccontextmanager
async def connected(store: Servers, deadline_s: float = 20.0) -> AsyncIterator[Mooncake]:
    async with mooncake(store.url, deadline_s) as found:
        yield found


@on_a_loop
async def _holds_the_seam(url: str) -> None:
    async with mooncake(url) as store:
        await holds_the_seam(store)


def test_it_holds_what_every_store_must(store: Servers) -> None:
    _holds_the_seam(store.url)


def test_its_own_file_is_taken_as_it_is(store: Servers, tmp_path: Path) -> None:
    """As its documentation writes it, with memory that this client lends."""
    file = tmp_path / "mooncake.json"
    file.write_text(
        '{"local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp",'
        f'"device_name": "", "master_server_address": "127.0.0.1:{MASTER_PORT}",'
        '"global_segment_size": "64mb", "local_buffer_size": "16mb"}'
    )
    _holds_the_seam(f"mooncake+file://{file}")


def put_by(host: DaemonProcess, seeds: tuple[int, ...]) -> None:
    with Engine(host.address) as engine:
        for number, seed in enumerate(seeds, 1):
            engine.compute(seed)
            host.make_durable()
            engine.ask(seed)
            wait_until(partial(has_put, host, number * BLOCKS))


def has_put(host: DaemonProcess, blocks: int) -> bool:
    counters = host.admin().stats().counters
    return counters.get("transfer_blocks_total{source=cpu,target=remote}", 0) == blocks


def test_a_prefix_of_one_host_is_served_by_another(store: Servers, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(daemon(tmp_path / "a", store.url, *PATIENT))
        put_by(a, (1, 2))
        b = stack.enter_context(daemon(tmp_path / "b", store.url, *PATIENT))
        second = stack.enter_context(Engine(b.address))
        assert second.ask(1) == (TOKENS, TOKENS)
        a.kill()
        assert second.ask(2) == (TOKENS, TOKENS)
        assert b.stop() == 0


@pytest.mark.parametrize("who", ["master", "node"])
@pytest.mark.parametrize("fault", ["kill", "freeze"])
@pytest.mark.timeout(300)
def test_what_dies_or_freezes_is_a_miss_and_a_daemon_ends_in_time(
    store: Servers, tmp_path: Path, who: str, fault: str
) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(daemon(tmp_path / "a", store.url, *PATIENT))
        put_by(a, (1, 2))
        b = stack.enter_context(daemon(tmp_path / "b", store.url))
        engine = stack.enter_context(Engine(b.address))
        victim = store.master if who == "master" else store.node
        getattr(victim, fault)()
        took = []
        for seed in (1, 2, 3, 4):
            begun = time.monotonic()
            assert engine.ask(seed) == (0, 0)  # judges
            took.append(time.monotonic() - begun)
        print(f"{who} {fault}: {[round(1000 * each, 1) for each in took]} ms")
        assert max(took) < BLOCKED_S / 3
        if who == "master":
            wait_until(lambda: b.admin().stats().counters["remote_up"] == 0)
        if fault == "freeze":
            victim.thaw()
            # what was frozen may have lost all: it is used again
            wait_until(lambda: b.admin().stats().counters["remote_up"] == 1, 90)
            victim.freeze()
        children = children_of(b.pid)
        begun = time.monotonic()
        assert b.stop() == 0
        print(f"{who} {fault}: ended in {time.monotonic() - begun:.2f} s")
        wait_until(lambda: not any(Path(f"/proc/{each}").exists() for each in children))


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    words = [word for each in tasks for word in (each / "children").read_text().split()]
    return [int(word) for word in words]


def test_a_child_dies_with_a_daemon_that_is_killed(store: Servers, tmp_path: Path) -> None:
    with daemon(tmp_path / "a", store.url, *PATIENT) as a:
        children = children_of(a.pid)
        assert children
        a.kill()
        wait_until(lambda: not any(alive(each) for each in children))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@on_a_loop
async def _ping_sees_a_dead_master(store: Servers) -> None:
    async with connected(store) as found:
        store.master.kill()
        with pytest.raises(StoreError):
            await found.ping()


def test_a_dead_master_is_seen(store: Servers) -> None:
    _ping_sees_a_dead_master(store)


@on_a_loop
async def _its_process_is_replaced(store: Servers) -> None:
    async with connected(store, 1.0) as found:
        await found.put([(b"a", b"one")], 0)
        store.node.freeze()
        with pytest.raises(StoreError, match="its client is killed"):
            await found.get([b"a"], 10)
        store.node.thaw()
        await answering(found)


def test_a_call_that_its_client_would_wait_for_ends_in_time(store: Servers) -> None:
    begun = time.monotonic()
    _its_process_is_replaced(store)
    assert time.monotonic() - begun < BLOCKED_S
