"""The calls and commands about blocks' lives, over a daemon in the same process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from kvc2 import earlier_identity
from kvc2.answers import SIZES
from kvc2.client import Admin, Hints, LeaseCommit, NamespaceHandle
from kvc2.commands import cli
from kvc2.errors import InvalidRequest, NotFound
from kvc2.foreign_identity import Foreign
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, TinyEngine, identity

TOKENS = np.arange(100, dtype=np.uint32)
BLOCKS = 6


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path), cache=None) as daemon:
        yield daemon


def commit(engine: TinyEngine, handle: NamespaceHandle) -> None:
    """All full blocks of TOKENS, and their lease's end."""
    found = engine.client.acquire(handle, b"r", TOKENS, grant_pages=BLOCKS)
    first = len(found.prefix_pages)
    tokens = TOKENS[first * 16 : BLOCKS * 16]
    pages = found.granted_pages[: BLOCKS - first]
    answer = engine.client.commit([LeaseCommit(b"r", first, tokens, pages)])
    assert answer.results[0].tolist() == [0] * len(pages)
    engine.client.release([b"r"], returned=found.granted_pages[BLOCKS - first :])


def test_an_engine_an_operator_and_a_command_invalidate(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine, Admin(served.address) as admin:
        client = engine.client
        handle = client.open_namespace(identity().encode())
        commit(engine, handle)
        assert client.invalidate(handle).blocks == BLOCKS
        assert client.match(handle, TOKENS).matched_tokens == 0
        commit(engine, handle)
        found = admin.invalidate(weights_digest=identity().weights_digest)
        assert (found.namespaces, found.blocks) == (1, BLOCKS)
        commit(engine, handle)
        name = served.on_loop(lambda: next(iter(served.daemon.cache.namespaces)).name)
        run = CliRunner().invoke(
            cli.app,
            ["invalidate", "--namespace", name.hex(), "--address", served.address, "--json"],
        )
        assert json.loads(run.stdout) == {"namespaces": 1, "blocks": BLOCKS, "durable": True}
        assert client.match(handle, TOKENS).matched_tokens == 0
        with pytest.raises(NotFound, match="namespace"):
            admin.invalidate(namespace=bytes(32))
        with pytest.raises(InvalidRequest, match="weights_digest"):
            admin.invalidate(weights_digest="12")


def test_both_versions_of_an_identity_name_one_namespace(served: ServedDaemon) -> None:
    then = earlier_identity.encode(identity())
    assert then is not None
    with TinyEngine(served.address) as engine:
        commit(engine, engine.client.open_namespace(then))
        handle = engine.client.open_namespace(identity().encode())
        assert engine.client.match(handle, TOKENS).matched_tokens == BLOCKS * PAGE_SIZE
        assert served.on_loop(lambda: len(list(served.daemon.cache.namespaces))) == 1


def test_another_engines_namespace_is_cached_and_invalidated_by_its_weights(
    served: ServedDaemon,
) -> None:
    known = Foreign("vllm", "main@5f1d", {"page_size": PAGE_SIZE, "layout": "NHD"})
    with TinyEngine(served.address) as engine, Admin(served.address) as admin:
        handle = engine.client.open_namespace(known.encode())
        commit(engine, handle)
        assert engine.client.match(handle, TOKENS).matched_tokens == BLOCKS * PAGE_SIZE
        assert admin.invalidate(weights_digest="main@5f1d").blocks == BLOCKS
        assert engine.client.match(handle, TOKENS).matched_tokens == 0
        with pytest.raises(InvalidRequest, match=r"identity\.page_size"):
            engine.client.open_namespace(replace(known, fields={"page_size": 8}).encode())


def test_hints_travel_with_acquire_and_release(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine:
        client = engine.client
        handle = client.open_namespace(identity().encode(), ttl_s=1000)
        said = Hints(session_end=True, expect_return_within_s=3, priority=7, ttl_s=4)
        client.acquire(handle, b"1", TOKENS, hints=said)
        client.acquire(handle, b"2", TOKENS)
        client.release([b"1", b"2"], hints=[Hints(), said])
        for priority, field in [(8, "hints.priority"), (1 << 31, "hints.priority")]:
            with pytest.raises(InvalidRequest, match=field):
                client.acquire(handle, b"3", TOKENS, hints=Hints(priority=priority))
        with pytest.raises(InvalidRequest, match="one for each of 2"):
            client.release([b"1", b"2"], hints=[Hints()])
        with pytest.raises(InvalidRequest, match=r"hints\[1\].priority"):
            client.release([b"1", b"2"], hints=[Hints(), Hints(priority=9)])


@pytest.mark.parametrize("flags", [[], ["--namespace", "12", "--weights-digest", "12"]])
def test_invalidate_takes_one_of_two(flags: list[str]) -> None:
    found = CliRunner().invoke(cli.app, ["invalidate", *flags])
    assert found.exit_code == 2
    assert "one of them" in found.output


def test_metrics_have_the_hit_rates_that_the_stats_have(served: ServedDaemon) -> None:
    with TinyEngine(served.address) as engine, Admin(served.address) as admin:
        handle = engine.client.open_namespace(identity().encode())
        commit(engine, handle)
        for turn in range(40):  # 8 prompts of 6 blocks: more than half of the 64 pages
            tokens = TOKENS + np.uint32(1000 * (turn % 8))
            engine.client.acquire(handle, b"again", tokens)
            engine.client.release([b"again"])
        told = admin.stats().hit_rates
        text = generate_latest(served.daemon.metrics.registry).decode()
    assert told["gpu"].estimated[-1] > 0.5 > told["gpu"].estimated[0]
    rows = dict(re.findall(r"^kvc2_estimated_hit_rate(\{\S+\}) (\S+)$", text, re.MULTILINE))
    expected = {
        f'{{multiple="{multiple:g}",tier="{tier}"}}': rate
        for tier, each in told.items()
        for multiple, rate in zip(SIZES, each.estimated, strict=False)
    }
    assert {name: float(rate) for name, rate in rows.items()} == expected
