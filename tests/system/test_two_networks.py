"""Two daemons on two hosts that a network joins, each in a network namespace of its own, and a
store on the first: what A computed comes to B over the wire; without the link it is a miss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.doubles.stores import ServerProcess
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess
from tests.system.networks import PlayedHost, two_hosts
from tests.system.test_two_hosts import BLOCKS, PAGE_SIZE, SEGMENT_BYTES, SEGMENTS, Engine, daemon

PORT = 6379
WHOLE = BLOCKS * PAGE_SIZE
PATIENCE_MS = 3000  # more than a busy machine needs for a hit
FLAGS = ("--remote-patience-ms", str(PATIENCE_MS), "--acquire-deadline-ms", "20000")
AGAIN_S = 60.0  # the store is tried again after rests that double


@pytest.fixture
def hosts() -> Iterator[tuple[PlayedHost, PlayedHost]]:
    with two_hosts() as found:
        yield found


def counter(host: DaemonProcess, name: str) -> float:
    return host.admin().stats().counters[name]


def test_what_one_host_computed_another_has_over_the_network(
    tmp_path: Path, hosts: tuple[PlayedHost, PlayedHost]
) -> None:
    first, second = hosts
    listen = ("--port", str(PORT), "--bind", first.address, "--protected-mode", "no")
    url = f"redis://{first.address}:{PORT}"
    with ExitStack() as stack:
        store = stack.enter_context(ServerProcess(tmp_path, *listen, before=first.enter))
        a, b = (
            stack.enter_context(daemon(tmp_path / each.name, url, *FLAGS, before=each.enter))
            for each in hosts
        )
        on_a, on_b = (stack.enter_context(Engine(each.address)) for each in (a, b))
        for seed in range(4):
            on_a.compute(seed)
            a.make_durable()
            assert on_a.ask(seed) == (WHOLE, 0)
        wait_until(lambda: len(store.names()) == 4 * BLOCKS)

        before = second.received_bytes()
        assert on_b.ask(0) == (WHOLE, WHOLE)
        assert second.received_bytes() - before > BLOCKS * SEGMENTS * SEGMENT_BYTES
        assert on_b.ask(0) == (WHOLE, 0)

        second.cut()
        begun = time.monotonic()
        assert on_b.ask(1) == (0, 0)
        print(f"without the link: a miss after {time.monotonic() - begun:.3f} s")
        faults = [f"faults_total{{kind=remote_{kind}}}" for kind in ("late", "error")]
        assert sum(counter(b, each) for each in faults) >= 1
        assert counter(b, "remote_up") == 0
        assert on_b.ask(0) == (WHOLE, 0)  # what it has needs no network
        late = [counter(b, each) for each in faults]
        assert on_b.ask(2) == (0, 0)
        assert counter(b, faults[0]) == late[0]  # and nobody waits again

        second.join()
        wait_until(lambda: counter(b, "remote_up") == 1, AGAIN_S)
        assert on_b.ask(1) == (WHOLE, WHOLE)
        a.kill()
        assert on_b.ask(2) == (WHOLE, WHOLE)
        assert counter(b, "matched_tokens_total{tier=remote}") == 3 * WHOLE
