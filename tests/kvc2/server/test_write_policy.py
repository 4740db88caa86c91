"""When a committed block reaches slower tiers, by policy: through the wire over the real cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import NUM_PAGES, PAGE_SIZE
from tests.doubles.wires import Wire, grants, u32


@contextmanager
def opened(folder: Path, policy: str, *, disk: bool = True) -> Iterator[tuple[ServedDaemon, Wire]]:
    config = serve_config(folder, disk=disk, write_policy=policy)
    with ServedDaemon(config, cache=None) as served, Wire(served.address) as wire:
        yield served, wire.open()


def commit(wire: Wire, name: bytes, blocks: int, *, durable: bool = False) -> pb.CommitResponse:
    """Commit a prompt of its own and release it."""
    first = int.from_bytes(name, "big") * 1000
    tokens = u32(*range(first, first + blocks * PAGE_SIZE + 1))
    lease = wire.call(
        "Acquire",
        pb.AcquireRequest(
            session=wire.head,
            namespace_id=wire.namespace_id,
            request_id=name,
            tokens=tokens,
            grants=grants(blocks),
        ),
    )
    part = pb.LeaseCommit(request_id=name, tokens=tokens[:-4], pages=lease.granted)
    request = pb.CommitRequest(session=wire.head, leases=[part], durable=durable)
    answer = wire.call("Commit", request)
    assert answer.results == [bytes(blocks)]
    wire.call("Release", pb.ReleaseRequest(session=wire.head, request_ids=[name]))
    return answer


def resident(served: ServedDaemon) -> dict[str, int]:
    stats: Any = served.on_loop(served.daemon.cache.stats)
    return {each.tier: each.resident_pages for each in stats.tiers}


def test_through_answers_a_commit_when_it_is_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path, "through") as (served, wire):
        for name in (b"\1", b"\2"):
            assert commit(wire, name, 4).durable
            assert resident(served)["disk"] == 4 * name[0]


def test_through_without_a_disk_answers_when_it_is_in_memory(tmp_path: Path) -> None:
    with opened(tmp_path, "through", disk=False) as (served, wire):
        assert not commit(wire, b"\1", 4).durable
        assert resident(served)["cpu"] == 4


@pytest.mark.parametrize("policy", ["behind", "back"])
def test_a_durable_commit_is_answered_when_it_is_on_disk(tmp_path: Path, policy: str) -> None:
    with opened(tmp_path, policy) as (served, wire):
        assert commit(wire, b"\1", 4, durable=True).durable
        assert resident(served)["disk"] == 4


def test_a_durable_commit_without_a_disk_says_no_at_once(tmp_path: Path) -> None:
    with opened(tmp_path, "behind", disk=False) as (_, wire):
        started = time.monotonic()
        assert not commit(wire, b"\1", 4, durable=True).durable
        assert time.monotonic() - started < 1.0  # drain_timeout_s is 2


def test_back_copies_only_when_free_pages_run_short(tmp_path: Path) -> None:
    with opened(tmp_path, "back") as (served, wire):
        commit(wire, b"\1", 4)
        # 8 of the 64 pages are the session's first grant; a quarter free is enough
        wire.call(
            "Grant", pb.GrantRequest(session=wire.head, grants=grants(NUM_PAGES - 16 - 4 - 8))
        )
        served.on_loop(lambda: None)
        assert resident(served) == {"gpu": 4, "cpu": 0, "disk": 0}
        wire.call("Grant", pb.GrantRequest(session=wire.head, grants=grants(4)))
        deadline = time.monotonic() + 10
        while resident(served)["cpu"] < 4:
            assert time.monotonic() < deadline, "nothing was copied under pressure"
        assert resident(served)["gpu"] == 4


def test_a_detach_loses_no_block_that_only_the_engine_had(tmp_path: Path) -> None:
    """Under `back` nothing was copied yet; the stream ends when it is."""
    with opened(tmp_path, "back") as (served, wire):
        commit(wire, b"\1", 4)
        assert resident(served) == {"gpu": 4, "cpu": 0, "disk": 0}
        wire.send(pb.AttachRequest(detach=pb.Detach()))
        assert [each for each in wire.stream if not each.HasField("heartbeat")] == []
        assert resident(served) == {"gpu": 0, "cpu": 4, "disk": 0}
