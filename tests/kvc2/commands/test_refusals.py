"""What tiers refused, as their owner sees it: `kvc2 stats`, /metrics and `kvc2 explain`."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2.answers import U32, Explained
from kvc2.commands import cli, prompts
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE
from tests.doubles.wires import Wire

PAGES = 32  # free in the arena, the rest is taken
ONCE = 24  # blocks of a prompt that nobody sends again
TURNS = range(1000, 1008)  # blocks of a prompt that comes back every time
run = CliRunner().invoke


def tokens_of(blocks: range) -> U32:
    return np.repeat(np.arange(blocks.start, blocks.stop, dtype=np.uint32), PAGE_SIZE)


def refuse(served: ServedDaemon) -> U32:
    """Has the arena's pool learn who comes back, then refuse a part of a prompt twice: its tokens.
    By the index alone, which is asked as copies of clients ask it: nobody reads a byte."""
    cache = served.daemon.cache
    [layout], [namespace] = cache.counts.pools.layouts.values(), cache.namespaces
    index, pool = cache.index, layout.cpu.id
    cache.counts.pools.grow(layout, PAGES)
    index.grant(pool, index.pool_counts(pool).free - PAGES)

    def ask(blocks: range) -> None:
        tokens = tokens_of(blocks)
        lease = index.acquire(namespace.number, pool, tokens, len(blocks))
        pages = index.grant_for(lease.id, lease.matched, len(blocks) - lease.matched)
        end = lease.matched + pages.size
        if end < len(blocks):  # once more: refused twice, and watched once
            assert index.grant_for(lease.id, end, 1).size == 0
        stored = tokens[lease.matched * PAGE_SIZE : end * PAGE_SIZE]
        index.commit(lease.id, lease.matched, stored, pages)
        index.release(lease.id)

    for turn in range(200):
        ask(TURNS)
        ask(range(turn * ONCE + 10_000, (turn + 1) * ONCE + 10_000))
    last = range(100_000, 100_000 + PAGES)
    ask(last)
    ask(last)
    return tokens_of(last)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    config = serve_config(tmp_path, metrics_port=0)
    with ServedDaemon(config, cache=None) as daemon, Wire(daemon.address) as wire:
        wire.open()
        yield daemon


def counters(served: ServedDaemon) -> dict[str, float]:
    """kvc2_refused_* of the cpu tier, as they are scraped."""
    url = f"http://127.0.0.1:{served.daemon.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    found = re.findall(r'^kvc2_refused_(\w+)_total\{tier="cpu"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def table(served: ServedDaemon) -> list[list[str]]:
    """Rows of the table of refusals in `kvc2 stats`."""
    lines = run(cli.app, ["stats", "--address", served.address]).stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if "asked for again" in line), len(lines))
    rows = (line.split("│") for line in lines[start + 2 :])
    return [[cell.strip() for cell in row[1:4]] for row in rows if len(row) == 5]


def test_what_was_refused_is_counted_and_shown_by_tier(served: ServedDaemon) -> None:
    assert counters(served) == {"blocks": 0, "watched": 0, "regretted": 0}
    assert table(served) == []
    served.on_loop(lambda: refuse(served))
    index = served.daemon.cache.index
    [pool] = served.daemon.cache.counts.pool_ids("cpu")
    watched, regretted = index.regret(1)
    blocks = index.pool_counts(pool).refused
    assert 0 < regretted < watched < blocks
    assert counters(served) == {"blocks": blocks, "watched": watched, "regretted": regretted}
    assert table(served) == [["cpu", f"{blocks} blocks", f"{regretted / watched:.1%}"]]


def test_a_refused_block_is_explained_with_both_worths(served: ServedDaemon) -> None:
    tokens = served.on_loop(lambda: refuse(served))
    file = Path(served.config.listen.removeprefix("unix:")).parent / "tokens"
    file.write_text(json.dumps([*tokens.tolist(), 7]))
    asked = ["explain", "--tokens", str(file), "--address", served.address]
    told = json.loads(run(cli.app, [*asked, "--json"]).stdout)
    assert (told["why"], told["cause"], told["tier"]) == ("not_admitted", "not_admitted", "cpu")
    assert told["policy"] == ""
    assert 0 < told["worth"] < told["victim_worth"]
    at = told["hit_blocks"]
    worths = f"worth {told['worth']:.2g} hits a request, its victim {told['victim_worth']:.2g}"
    line = rf"block {at}, from token {at * PAGE_SIZE}: not admitted to cpu \d+ s ago: "
    assert re.search(line + re.escape(worths) + "$", run(cli.app, asked).stdout, re.MULTILINE)


def test_of_a_disk_it_is_said_that_more_is_asked() -> None:
    refused = {"why": "not_admitted", "cause": "not_admitted", "worth": 1.2, "victim_worth": 1.0}
    for tier, more in (("cpu", ""), ("disk", ", of which a disk asks for 1.5 times")):
        found = Explained(page_size=16, tokens=32, tier=tier, **refused)
        (line,) = (each for each in prompts.lines(found, None, None) if "not admitted" in each)
        assert line.endswith(f"worth 1.2 hits a request, its victim 1{more}")
