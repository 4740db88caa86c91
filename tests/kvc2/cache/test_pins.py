"""Pin and Unpin, as call and as command, over a daemon in the same process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2.client import Admin, LeaseCommit, NamespaceHandle
from kvc2.commands import cli
from kvc2.commands.exits import FAILED
from kvc2.errors import InvalidRequest, LimitReached, NotFound
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.kvc2.cache.test_life_calls import BLOCKS, TOKENS, commit

FIRST = TOKENS[:48]  # three blocks


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path), cache=None) as daemon:
        yield daemon


@pytest.fixture
def engine(served: ServedDaemon) -> Iterator[TinyEngine]:
    with TinyEngine(served.address) as engine:
        yield engine


def opened(engine: TinyEngine) -> NamespaceHandle:
    return engine.client.open_namespace(identity().encode())


def in_cpu(served: ServedDaemon) -> int:
    with Admin(served.address) as admin:
        return next(tier.resident_pages for tier in admin.stats().tiers if tier.tier == "cpu")


def evict_all(served: ServedDaemon) -> None:
    with Admin(served.address) as admin:
        admin.flush()
        admin.evict("gpu")
        admin.evict("cpu")


def test_a_hard_pin_keeps_a_prefix_when_all_else_is_evicted(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    handle = opened(engine)
    commit(engine, handle)
    with Admin(served.address) as admin:
        admin.evict("gpu")  # which copies first; a flush without a disk has nothing to wait for
    found = engine.client.pin(handle, FIRST, hard=True)
    assert (found.blocks, found.resident_blocks, found.pinned_blocks) == (3, 3, 3)
    evict_all(served)
    assert in_cpu(served) == 3
    assert engine.client.unpin(handle, FIRST) == 3
    assert engine.client.unpin(handle, FIRST) == 0
    evict_all(served)
    assert in_cpu(served) == 0


def test_a_pin_holds_for_what_comes_later_and_outlives_its_session(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine:
        handle = opened(engine)
        found = engine.client.pin(handle, FIRST, hard=True)
        assert (found.blocks, found.resident_blocks) == (3, 0)
        commit(engine, handle)
        with Admin(served.address) as admin:
            admin.flush()
    evict_all(served)
    assert in_cpu(served) == 3


def test_a_soft_pin_goes_last(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    commit(engine, handle)
    other = np.arange(1000, 1065, dtype=np.uint32)
    granted = engine.client.acquire(handle, b"other", other, grant_pages=4).granted_pages
    engine.client.commit([LeaseCommit(b"other", 0, other[:64], granted)])
    engine.client.release([b"other"])
    engine.client.pin(handle, TOKENS, hard=False)
    with Admin(served.address) as admin:
        admin.flush()
        admin.evict("gpu")
        admin.evict("cpu", 4)  # the pinned ones were used longer ago
    tiers = engine.client.match(handle, TOKENS).tiers
    assert tiers.cpu == BLOCKS * 16
    assert engine.client.match(handle, other).matched_tokens == 0


def test_more_than_its_share_can_not_be_pinned_hard(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    handle = opened(engine)
    too_many = np.zeros(100_000, np.uint32)
    for tier in ("gpu", "cpu"):
        assert engine.client.pin(handle, FIRST, tier=tier, hard=True).pinned_blocks == 3
        with pytest.raises(LimitReached, match=r"hard_pin_percent.*25"):
            engine.client.pin(handle, too_many, tier=tier, hard=True)
        assert engine.client.pin(handle, FIRST, tier=tier, hard=True).pinned_blocks == 3


def test_bad_pins_name_the_field(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    with pytest.raises(InvalidRequest, match=r"tokens.*block of 16"):
        engine.client.pin(handle, TOKENS[:15], hard=True)
    with pytest.raises(InvalidRequest, match="tier"):
        engine.client.pin(handle, FIRST, tier="moon", hard=True)
    with Admin(served.address) as admin:
        with pytest.raises(InvalidRequest, match=r"tier.*session"):
            admin.pin(FIRST, tier="gpu", hard=True)
        with pytest.raises(NotFound, match="namespace"):
            admin.pin(FIRST, hard=True, namespace=b"x" * 32)


def test_a_pin_ends_with_its_namespace(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine)
    engine.client.pin(handle, FIRST, hard=True)
    engine.client.invalidate(handle)
    assert engine.client.unpin(handle, FIRST) == 0


def test_a_command_pins_and_unpins(
    served: ServedDaemon, engine: TinyEngine, tmp_path: Path
) -> None:
    handle = opened(engine)
    commit(engine, handle)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(FIRST.tolist()))
    command = ["--tokens", str(prompt), "--address", served.address]
    run = CliRunner().invoke(cli.app, ["pin", *command, "--hard", "--json"])
    assert json.loads(run.stdout)["blocks"] == 3
    evict_all(served)
    assert in_cpu(served) == 3
    run = CliRunner().invoke(cli.app, ["unpin", *command])
    assert (run.exit_code, run.stdout) == (0, "3 blocks are not pinned by this any more\n")
    run = CliRunner().invoke(cli.app, ["unpin", *command])
    assert run.exit_code == FAILED
    assert "no pin of exactly these blocks" in run.stderr
