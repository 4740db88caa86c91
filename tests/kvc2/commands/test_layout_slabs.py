"""Which layout holds how many slabs of arena and disk: counted by the cache, printed by
`kvc2 stats`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from kvc2.answers import LayoutSlabs
from kvc2.client import Admin, LeaseCommit
from kvc2.commands import cli
from tests.doubles.caches import MIB, running
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, TinyEngine, identity, layout
from tests.doubles.stand_in import StandIn, prompt

BLOCKS = 8
run = CliRunner().invoke


def shown(at: list[str], name: str) -> list[str]:
    """The slabs of this layout in the tables of `kvc2 stats`."""
    lines = [line.split("│") for line in run(cli.app, ["stats", *at]).stdout.splitlines()]
    return [cells[3].strip() for cells in lines if len(cells) > 3 and cells[1].strip() == name]


def test_slabs_are_counted_by_layout_and_tier(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(tmp_path / "disk", cpu_bytes=8 * MIB) as cache:
            small = StandIn(cache, 3 * BLOCKS, segment_bytes=4096, page_size=4)
            other = hashlib.sha256(b"another model").digest()
            large = StandIn(cache, 3 * BLOCKS, segment_bytes=6144, page_size=8, namespace=other)
            for engine, prompts in ((small, 20), (large, 2)):  # more than a slab of the small one
                for seed in range(prompts):
                    await engine.ask(prompt(seed, BLOCKS, engine.layout.page_size))
                    await cache.flush(10)
            stats = cache.stats()
            rows = {(each.tier, each.layout): each for each in stats.slabs}
            assert len(rows) == len(stats.slabs) == 4
            for engine, prompts in ((small, 20), (large, 2)):
                for tier in ("cpu", "disk"):
                    row = rows[tier, engine.layout.digest.hex()]
                    blocks = prompts * BLOCKS
                    per_slab = row.slab_bytes // row.page_bytes
                    assert row == LayoutSlabs(
                        layout=engine.layout.digest.hex(),
                        tier=tier,
                        engines=(engine.session.engine_name,),
                        page_size=engine.layout.page_size,
                        page_bytes=engine.layout.page_bytes,
                        slab_bytes=row.slab_bytes,
                        slabs=row.slabs,
                        pages=row.pages,
                        resident_pages=blocks,
                    )
                    assert row.slabs >= -(-blocks // per_slab)
                    assert row.pages <= row.slabs * per_slab
            for tier in stats.tiers[1:]:
                held = [each for each in stats.slabs if each.tier == tier.tier]
                assert sum(each.pages for each in held) == tier.pages
                assert sum(each.resident_pages for each in held) == tier.resident_pages
                assert sum(each.slabs * each.slab_bytes for each in held) <= tier.capacity_bytes

    asyncio.run(go())


def test_stats_show_which_layout_has_which_slabs(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path, disk=True), cache=None) as served:
        at = ["--address", served.address]
        with TinyEngine(served.address, "first of two") as engine:
            handle = engine.client.open_namespace(identity().encode())
            tokens = np.arange(2 * PAGE_SIZE + 1, dtype=np.uint32)
            found = engine.client.acquire(handle, b"r", tokens, grant_pages=2)
            commit = LeaseCommit(b"r", 0, tokens[: 2 * PAGE_SIZE], found.granted_pages)
            engine.client.commit([commit])
            engine.client.release([b"r"])
            with Admin(served.address) as admin:
                admin.flush()
                told = admin.stats().slabs
            assert [(e.tier, e.engines, e.slabs, e.resident_pages) for e in told] == [
                ("cpu", ("first of two",), 1, 2),
                ("disk", ("first of two",), 1, 2),
            ]
            assert {each.layout for each in told} == {layout().digest.hex()}
            assert shown(at, "first of two") == ["1 x 1.0 MB", "1 x 1.0 MB"]
        idle = json.loads(run(cli.app, ["stats", "--json", *at]).stdout)["slabs"]
        assert [(each["tier"], each["engines"], each["slabs"]) for each in idle] == [
            ("cpu", [], 1),
            ("disk", [], 1),
        ]
        assert shown(at, layout().digest.hex()[:12]) == ["1 x 1.0 MB", "1 x 1.0 MB"]
