"""Polls of leases in the arena, on a disk that answers when the test says so: what is on its way is
not told, each number has one answer, and what comes is right."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvc2 import errors
from kvc2.answers import NOWHERE, Acquired, Terms
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import is_slab, with_arena
from tests.doubles.in_arena import InArena
from tests.doubles.stand_in import prompt

KEYS = [b"a", b"b", b"c"]
WAIT_S = 20.0


class GatedFiles(Files):
    """Pages are read once `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if is_slab(fd):
            assert self.gate.wait(WAIT_S)
        return super().read(fd, buffers, offset)


def polled(number: int) -> Terms:
    return Terms(0, WAIT_S, in_arena=True, at_once=True, poll=number)


def told(found: Acquired) -> int:
    return int((found.offsets != NOWHERE).sum())


@pytest.mark.parametrize("keys", [False, True])
def test_what_is_on_its_way_is_told_when_it_is_there(tmp_path: Path, keys: bool) -> None:
    async def run() -> None:
        files = GatedFiles()
        async with with_arena(tmp_path, files=files) as cache:
            engine = InArena(cache, 32)
            await (engine.copy_keys(KEYS) if keys else engine.copy(prompt(1, 3)))
            await cache.flush(WAIT_S)
            await cache.evict("cpu", 0)
            files.gate.clear()
            reading = (
                engine.read_keys(KEYS, polled(0)) if keys else engine.read(prompt(1, 3), polled(0))
            )
            request, first = await reading

            async def poll(number: int) -> Acquired:
                session, leases = engine.session, cache.leases
                if keys:
                    of = engine.keyed
                    return await leases.acquire_keys(session, of, request, KEYS, polled(number))
                of, tokens = engine.opened, prompt(1, 3)
                return await leases.acquire(session, of, request, tokens, polled(number))

            second = await poll(1)
            assert [(told(each), each.coming_blocks) for each in (first, second)] == [(0, 3)] * 2
            files.gate.set()
            number, found = 1, second
            while found.coming_blocks:
                assert await poll(number) is found  # whatever has come by now
                number += 1
                found = await poll(number)
                await asyncio.sleep(0)
            assert told(found) == 3
            engine.judge_offsets(
                found, engine.truth_of(KEYS) if keys else engine.truth(prompt(1, 3))
            )
            assert await poll(number) is found
            assert await poll(0) is first
            with pytest.raises(errors.InvalidRequest, match="poll"):
                await poll(number + 2)

    asyncio.run(run())
