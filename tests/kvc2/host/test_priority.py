"""Threads that nobody waits for yield the CPU, and those of loads do not."""

import asyncio
import os
import threading
from pathlib import Path

from kvc2.host.priority import NICE
from tests.doubles.caches import running
from tests.doubles.stand_in import StandIn, prompt

BLOCKS = 8


def nice_of(name: str) -> set[int]:
    """Of all threads whose name begins so."""
    threads = [each for each in threading.enumerate() if each.name.startswith(name)]
    return {os.getpriority(os.PRIO_PROCESS, each.native_id or 0) for each in threads}


def test_copies_behind_yield_the_cpu_and_loads_do_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 32)
            await engine.ask(prompt(1, BLOCKS))
            await cache.flush(10)
            await cache.evict("gpu", 0)
            await cache.evict("cpu", 0)
            assert (await engine.ask(prompt(1, BLOCKS))).tiers.disk > 0
            own = os.getpriority(os.PRIO_PROCESS, 0)
            for name in ("kvc2-demote", "kvc2-disk", "kvc2-write"):
                assert nice_of(name) == {max(own, NICE)}, name
            for name in ("kvc2-load", "kvc2-promote"):
                assert nice_of(name) == {own}, name

    asyncio.run(run())
