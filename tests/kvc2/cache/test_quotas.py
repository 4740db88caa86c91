"""Quotas of tenants, as configuration, call and command, over a daemon in the same process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2.client import Admin, LeaseCommit, NamespaceHandle, TenantUse
from kvc2.commands import cli
from kvc2.config import TenantConfig
from kvc2.errors import InvalidConfig, InvalidRequest, NotFound
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.doubles.waiting import wait_until

QUOTA = 16  # blocks of each tier
PROMPT_BLOCKS = 4
WAIT_S = 20.0


def tenants(folder: Path) -> tuple[TenantConfig, ...]:
    found = []
    for name, most in (("quiet", 0), ("flood", QUOTA)):
        secret = folder / f"{name}.secret"
        secret.write_bytes(name.encode() * 8)
        secret.chmod(0o600)
        found.append(TenantConfig(name, secret, max_blocks=most))
    return (*found, TenantConfig("default", max_blocks=QUOTA))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    config = serve_config(tmp_path, disk=True, tenants=tenants(tmp_path))
    with ServedDaemon(config, cache=None) as daemon:
        yield daemon


@pytest.fixture
def engine(served: ServedDaemon) -> Iterator[TinyEngine]:
    with TinyEngine(served.address) as engine:
        yield engine


def prompt(number: int) -> np.ndarray:
    return np.arange(number * 1000, number * 1000 + PROMPT_BLOCKS * 16 + 1, dtype=np.uint32)


def ask(engine: TinyEngine, handle: NamespaceHandle, number: int) -> int:
    """A request's whole life; the tokens that were cached."""
    name, tokens = b"%d" % number, prompt(number)
    found = engine.client.acquire(handle, name, tokens, grant_pages=PROMPT_BLOCKS)
    first, granted = len(found.prefix_pages), found.granted_pages
    wanted, deadline = PROMPT_BLOCKS - first, time.monotonic() + WAIT_S
    while len(granted) < wanted:  # on a busy machine copies under way may pin the whole small pool
        assert time.monotonic() < deadline, "no pages became free"
        granted = np.concatenate([granted, engine.client.grant(wanted - len(granted))])
    commit = LeaseCommit(
        name, first, tokens[first * 16 : PROMPT_BLOCKS * 16], granted[:wanted].astype(np.uint32)
    )
    engine.client.commit([commit])
    engine.client.release([name], returned=granted[wanted:].astype(np.uint32))
    return int(found.matched_tokens)


def opened(engine: TinyEngine, tenant: str) -> NamespaceHandle:
    return engine.client.open_namespace(identity().encode(), tenant=tenant)


def in_gpu(engine: TinyEngine, handle: NamespaceHandle, numbers: range) -> int:
    return sum(engine.client.match(handle, prompt(each)).tiers.gpu // 16 for each in numbers)


def use(served: ServedDaemon, tenant: str, tier: str) -> TenantUse:
    with Admin(served.address) as admin:
        found = admin.stats().tenants
    return next(each for each in found if (each.tenant, each.tier) == (tenant, tier))


@pytest.mark.parametrize("limited", [True, False])
def test_who_floods_at_ten_times_its_quota_costs_nobody_else_a_twentieth(
    served: ServedDaemon, engine: TinyEngine, limited: bool
) -> None:
    quiet, flood = opened(engine, "quiet"), opened(engine, "flood")
    if not limited:  # the same flood does harm: this test can fail
        with Admin(served.address) as admin:
            admin.set_quota("flood", "gpu")
    mine = range(1, 8)
    for number in mine:
        ask(engine, quiet, number)
    before = in_gpu(engine, quiet, mine)
    assert before == len(mine) * PROMPT_BLOCKS
    for number in range(100, 100 + 10 * QUOTA // PROMPT_BLOCKS):
        ask(engine, flood, number)
    left = in_gpu(engine, quiet, mine)
    assert (left >= 0.95 * before) == limited
    if limited:
        assert 0 < use(served, "flood", "gpu").blocks <= QUOTA


def test_who_names_no_tenant_is_held_to_the_defaults_quota(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    quiet, nameless = opened(engine, "quiet"), opened(engine, "")
    mine = range(1, 8)
    for number in mine:
        ask(engine, quiet, number)
    for number in range(100, 100 + 10 * QUOTA // PROMPT_BLOCKS):
        ask(engine, nameless, number)
    assert in_gpu(engine, quiet, mine) == len(mine) * PROMPT_BLOCKS
    assert 0 < use(served, "default", "gpu").blocks <= QUOTA


def test_slower_tiers_hold_a_tenant_to_its_quota_too(
    served: ServedDaemon, engine: TinyEngine
) -> None:
    quiet, flood = opened(engine, "quiet"), opened(engine, "flood")
    for number in range(1, 8):
        ask(engine, quiet, number)
    for number in range(100, 140):
        ask(engine, flood, number)
    with Admin(served.address) as admin:
        admin.flush()
        ask(engine, flood, 200)
        admin.flush()
    for tier in ("cpu", "disk"):
        assert 0 < use(served, "flood", tier).blocks <= QUOTA
        assert use(served, "quiet", tier).blocks == 7 * PROMPT_BLOCKS


def test_a_quota_holds_for_what_a_restart_finds(tmp_path: Path) -> None:
    def config() -> object:
        return serve_config(tmp_path, disk=True, tenants=tenants(tmp_path))

    with (
        ServedDaemon(config(), cache=None) as served,  # type: ignore[arg-type]
        TinyEngine(served.address) as engine,
    ):
        ask(engine, opened(engine, "flood"), 1)
        with Admin(served.address) as admin:
            admin.flush()
    with (
        ServedDaemon(config(), cache=None) as served,  # type: ignore[arg-type]
        TinyEngine(served.address) as engine,
    ):
        assert use(served, "flood", "disk").blocks == 0  # nobody knows yet whose that is
        opened(engine, "flood")
        assert use(served, "flood", "disk").blocks == PROMPT_BLOCKS


def test_a_command_sets_a_quota(served: ServedDaemon, engine: TinyEngine) -> None:
    handle = opened(engine, "flood")
    for number in range(4):
        ask(engine, handle, number)
    command = ["quota", "flood", "--tier", "gpu", "--blocks", "8", "--json"]
    run = CliRunner().invoke(cli.app, [*command, "--address", served.address])
    assert json.loads(run.stdout)["max_blocks"] == 8

    def holds_after_a_request() -> bool:  # not for pages that are being copied just then
        ask(engine, handle, 9)
        return use(served, "flood", "gpu").blocks <= 8

    wait_until(holds_after_a_request)
    run = CliRunner().invoke(cli.app, ["stats", "--address", served.address])
    assert "flood" in run.stdout


def test_bad_quotas_name_the_field(served: ServedDaemon, tmp_path: Path) -> None:
    with Admin(served.address) as admin:
        with pytest.raises(NotFound, match="tenant"):
            admin.set_quota("nobody", "cpu", max_blocks=1)
        with pytest.raises(InvalidRequest, match="tier"):
            admin.set_quota("flood", "moon", max_blocks=1)
    with pytest.raises(InvalidConfig, match=r"tenants\.cpu_gb"):
        TenantConfig("a", tmp_path, cpu_gb=-1)
