"""A process that stores, evicts, moves and deletes blocks for real, and says in its journal what is
durable: what power.py cuts short. `python -m tests.crash.writer FOLDER SEED STEPS`.

Notes, JSON, in the journal's order: {"ack": [[engine, seed, [digest, ...]], ...]}: these blocks are
durable; {"dropped": [digest, ...]}: these are about to be evicted; {"gone": [digest, ...]}: their
deletes are committed; {"back": [digest, ...]}: these may be there from now on.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kvc2 import _core
from kvc2.cache.cache import Cache
from kvc2.moving import batches
from kvc2.moving.mover import Mover
from kvc2.tiers.disk.catalogue import Change
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.tier import Outcome
from kvc2.tiers.pools import LayoutOnDisk
from tests.doubles.caches import running
from tests.doubles.stand_in import PAGE_SIZE, StandIn, prompt

SIZES: dict[str, Any] = {
    "cpu_bytes": 1 << 20,
    "disk_bytes": 3 << 20,
    "slab_bytes": 1 << 16,
}
SEGMENTS = (1024, 4096)  # bytes: two layouts, so that slabs go from one to the other
NAMESPACES = tuple(hashlib.sha256(bytes([each])).digest() for each in range(len(SEGMENTS)))
GPU_PAGES = 32
KNOWN = 10  # prompts that come back and are acknowledged again, of each engine
BLOCKS_MAX = 10
BATCH_PAGES = 3  # so small that most of the time two batches are under way


def engines(cache: Cache) -> list[StandIn]:
    return [
        StandIn(cache, GPU_PAGES, segment_bytes=each, namespace=name)
        for each, name in zip(SEGMENTS, NAMESPACES, strict=True)
    ]


def prompt_of(seed: int) -> _core.U32:
    """Two of three prompts begin like another one."""
    own = prompt(seed, 1 + seed % BLOCKS_MAX)
    if seed % 3 == 0:
        return own
    return np.concatenate([prompt(seed - seed % 3, 1 + seed % 4)[:-1], own])


def digests(engine: int, tokens: _core.U32) -> list[str]:
    return texts(_core.chain_digests(NAMESPACES[engine], tokens, PAGE_SIZE))


def texts(digests: _core.U8) -> list[str]:
    return [bytes(row).hex() for row in digests]


class Ledger:
    """The blocks that are on disk, as those are told who wait for it."""

    def __init__(self) -> None:
        self.stored: set[str] = set()
        # by layout number: dropped, and then in a transaction, and not gone yet
        self.leaving: dict[int, list[str]] = {}
        self.going: dict[int, list[str]] = {}
        self.lock = threading.Lock()
        try:
            self._note = ctypes.CDLL(None).journal_note
        except AttributeError:  # not under the journal
            self._note = lambda text: None

    def note(self, **what: Any) -> None:
        self._note(json.dumps(what).encode())

    def dropping(self, found: list[str]) -> None:
        self.stored.difference_update(found)
        self.note(dropped=found)


@contextmanager
def followed(ledger: Ledger) -> Iterator[None]:
    """The ledger hears of each batch after it, of each eviction before it, and of what is gone
    before a page of it may be used again."""
    write, drop = Mover.write, LayoutOnDisk.drop_records
    take, ended = DiskPool.take, DiskPool.ended

    async def told_write(
        self: Mover,
        pools: LayoutOnDisk,
        transfers: Sequence[_core.Transfer] = (),
        *,
        patience_s: float = 0.0,
    ) -> Outcome:
        for transfer in transfers:
            assert transfer.records is not None
            ledger.note(back=texts(transfer.records.digests))
        outcome = await write(self, pools, transfers, patience_s=patience_s)
        for transfer in transfers if outcome.written else ():
            assert transfer.records is not None
            ledger.stored.update(texts(transfer.records.digests))
        return outcome

    def told_drop(self: LayoutOnDisk, evicted: _core.Evicted) -> None:
        with ledger.lock:
            if evicted.pages.size:
                found = texts(evicted.digests)
                ledger.dropping(found)
                ledger.leaving.setdefault(self.disk.store.number, []).extend(found)
            drop(self, evicted)

    def told_take(self: DiskPool) -> Change:
        with ledger.lock:
            ledger.going[self.number] = ledger.leaving.pop(self.number, [])
            return take(self)

    def told_ended(self: DiskPool, *, committed: bool) -> None:
        with ledger.lock:
            going = ledger.going.pop(self.number)
            if committed and going:
                ledger.note(gone=going)
            elif going:
                ledger.leaving.setdefault(self.number, [])[:0] = going
            ended(self, committed=committed)

    with (
        patch.object(Mover, "write", told_write),
        patch.object(LayoutOnDisk, "drop_records", told_drop),
        patch.object(DiskPool, "take", told_take),
        patch.object(DiskPool, "ended", told_ended),
        patch.object(batches, "batch_pages", lambda *_: BATCH_PAGES),
    ):
        yield


def acknowledge(ledger: Ledger, asked: list[list[int]], sessions: list[StandIn]) -> None:
    """After a flush that left nothing: what is cached and was stored is durable. (What memory
    evicted before its turn came is not on disk, and no flush says so.)"""
    found = []
    for number, engine in enumerate(sessions):
        for seed in asked[number][-KNOWN:]:
            tokens = prompt_of(seed)
            match = engine.cache.leases.match(engine.session, engine.opened, tokens)
            held = digests(number, tokens)[: match.matched_tokens // PAGE_SIZE]
            found.append([number, seed, [each for each in held if each in ledger.stored]])
    ledger.note(ack=found)


async def write(folder: Path, seed: int, steps: int) -> None:
    chance, ledger = random.Random(seed), Ledger()
    asked: list[list[int]] = [[] for _ in SEGMENTS]
    done = 0
    with followed(ledger):
        while done < steps:
            async with running(folder, **SIZES) as cache:
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
                    if chance.random() < 0.3 and (await cache.flush(20)).not_durable_blocks == {}:
                        acknowledge(ledger, asked, sessions)
                    if chance.random() < 0.05:
                        await cache.evict(chance.choice(["cpu", "disk"]), chance.randrange(1, 8))


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
