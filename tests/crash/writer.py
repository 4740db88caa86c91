"""A process that stores, evicts, moves and deletes blocks for real, and says in its journal what is
durable: what power.py cuts short. `python -m tests.crash.writer FOLDER SEED STEPS`.

Notes, JSON, in the journal's order: {"ack": [[engine, seed, [digest, ...]], ...]}: these blocks are
durable; {"dropped": [digest, ...]}: these are about to be evicted.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvc2 import _core
from kvc2.behind import Behind
from kvc2.cache import Cache
from kvc2.tiers.catalogue import Catalogue, Change
from kvc2.tiers.pools import LayoutPools
from tests.caches import running
from tests.stand_in import NAMESPACE, PAGE_SIZE, StandIn, prompt

SIZES: dict[str, Any] = {
    "cpu_bytes": 1 << 20,
    "disk_bytes": 3 << 20,
    "slab_bytes": 1 << 16,
}
SEGMENTS = (1024, 4096)  # bytes: two layouts, so that slabs go from one to the other
GPU_PAGES = 32
KNOWN = 10  # prompts that come back and are acknowledged again, of each engine
BLOCKS_MAX = 10


def engines(cache: Cache) -> list[StandIn]:
    return [StandIn(cache, GPU_PAGES, segment_bytes=each) for each in SEGMENTS]


def prompt_of(seed: int) -> _core.U32:
    """Two of three prompts begin like another one."""
    own = prompt(seed, 1 + seed % BLOCKS_MAX)
    if seed % 3 == 0:
        return own
    return np.concatenate([prompt(seed - seed % 3, 1 + seed % 4)[:-1], own])


def digests(tokens: _core.U32) -> list[str]:
    return [bytes(row).hex() for row in _core.chain_digests(NAMESPACE, tokens, PAGE_SIZE)]


class Ledger:
    """Which block lies in which disk page, as the catalogue was told, and which were dropped."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int], str] = {}
        self.gone: set[str] = set()
        try:
            self._note = ctypes.CDLL(None).journal_note
        except AttributeError:  # not under the journal
            self._note = lambda text: None

    def note(self, **what: Any) -> None:
        self._note(json.dumps(what).encode())

    def opened(self, catalogue: Catalogue) -> None:
        self.pages = {
            (number, page): bytes(digest).hex()
            for number in catalogue.layouts
            for stored in [catalogue.records(number)]
            for page, digest in zip(stored.pages.tolist(), stored.records["digest"], strict=True)
        }

    def committed(self, change: Change) -> None:
        for number, pairs in change.moves.items():
            for pair in pairs:
                for source, target in zip(*(each.tolist() for each in pair), strict=True):
                    if (number, source) in self.pages:
                        self.pages[number, target] = self.pages.pop((number, source))
        for number, arrays in change.deletes.items():
            for page in np.concatenate(arrays).tolist():
                self.pages.pop((number, page), None)
        for key, value in change.inserts:
            page = (int.from_bytes(key[:4], "big"), int.from_bytes(key[4:], "big"))
            self.pages[page] = value[:32].hex()
            self.gone.discard(self.pages[page])

    def dropping(self, pools: LayoutPools, pages: list[int]) -> None:
        assert pools.disk is not None
        moved = {
            target: source
            for pair in pools.disk.moves
            for source, target in zip(*(each.tolist() for each in pair), strict=True)
        }
        number = pools.disk.number
        found = [self.pages[number, moved.get(page, page)] for page in pages]
        self.gone.update(found)
        self.note(dropped=found)


@contextmanager
def followed(ledger: Ledger) -> Iterator[None]:
    """The ledger hears of each commit after it, of each eviction before it."""
    commit, drop = Catalogue.commit, Behind.drop

    def told_commit(self: Catalogue, change: Change) -> None:
        commit(self, change)
        ledger.committed(change)

    def told_drop(self: Behind, pools: LayoutPools, evicted: _core.Evicted) -> None:
        if evicted.pages.size:
            ledger.dropping(pools, evicted.pages.tolist())
        drop(self, pools, evicted)

    Catalogue.commit, Behind.drop = told_commit, told_drop  # type: ignore[method-assign]
    try:
        yield
    finally:
        Catalogue.commit, Behind.drop = commit, drop  # type: ignore[method-assign]


def acknowledge(ledger: Ledger, asked: list[list[int]], sessions: list[StandIn]) -> None:
    """After a flush that left nothing: whatever is cached at all is durable, unless it was evicted
    from the disk since it was stored there."""
    found = []
    for number, engine in enumerate(sessions):
        for seed in asked[number][-KNOWN:]:
            tokens = prompt_of(seed)
            match = engine.cache.match(engine.session, engine.number, tokens)
            held = digests(tokens)[: match.matched_tokens // PAGE_SIZE]
            found.append([number, seed, [each for each in held if each not in ledger.gone]])
    ledger.note(ack=found)


async def write(folder: Path, seed: int, steps: int) -> None:
    chance, ledger = random.Random(seed), Ledger()
    asked: list[list[int]] = [[] for _ in SEGMENTS]
    done = 0
    with followed(ledger):
        while done < steps:
            async with running(folder, **SIZES) as cache:
                assert cache._disk is not None
                ledger.opened(cache._disk.catalogue)
                sessions = engines(cache)
                for _ in range(chance.randrange(20, 60)):
                    done += 1
                    number = done // 25 % 2 if chance.random() < 0.8 else chance.randrange(2)
                    if asked[number] and chance.random() < 0.3:
                        again = chance.choice(asked[number][-KNOWN:])
                    else:
                        again = seed * 100_000 + done
                        asked[number].append(again)
                    await sessions[number].ask(prompt_of(again))
                    if chance.random() < 0.3 and (await cache.flush(20)).not_durable == {}:
                        acknowledge(ledger, asked, sessions)
                    if chance.random() < 0.05:
                        await cache.evict(chance.choice(["cpu", "disk"]), chance.randrange(1, 8))


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
