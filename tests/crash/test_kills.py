"""kill -9 of a daemon at every failpoint and at random moments, while an engine works: what it has
acknowledged is there when the next daemon serves the directory, and every byte is right."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.failpoints import AT_START, AT_STOP, FAILPOINTS
from tests.crash.order import spoiled_blocks
from tests.crash.victims import Engine, Nursery, Victim, sink

ONCE = (
    "table_begun",
    "names_written",
    "dropping",
    "dropped",
    "slab_growing",
    "slab_opened",
    "slab_allocating",
    "slab_allocated",
)
COUNTS = {  # of calls; 3 elsewhere, so that blocks are acknowledged before
    **dict.fromkeys((*ONCE, *AT_START, *AT_STOP), 1),
    **dict.fromkeys(("deleting", "deleted_not_committed"), 2),  # the first is at the start
}
FRESH = 50  # kills, then a new directory
STEPS = 400  # of the engine: one in ten evicts from disk, which some failpoints wait for
LOST = 0.3  # of the starts find no catalogue
SOON_S = 0.5  # a random moment is within this after the start


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


class Deaths:
    """One directory, one engine, one daemon after the other."""

    def __init__(self, nursery: Nursery, folder: Path, seed: int) -> None:
        self.nursery, self.folder, self.seed = nursery, folder, seed
        self.chance = random.Random(seed)
        self.count = 0
        self.judged = 0
        self.engine = Engine(seed)

    def renew(self) -> None:
        if self.count and self.count % FRESH == 0:
            self.judged += self.engine.judged
            shutil.rmtree(self.folder / "disk")
            self.engine = Engine(self.seed + self.count)

    def start(self, failpoint: str | None = None, count: int = 1) -> Victim:
        self.renew()
        self.count += 1
        assert spoiled_blocks(self.folder / "disk") == {}
        if self.chance.random() < LOST:  # what was acknowledged is rebuilt
            shutil.rmtree(self.folder / "disk" / "catalogue", ignore_errors=True)
        return self.nursery.start(self.folder, failpoint, count)

    def after_work(self) -> None:
        """Some blocks are acknowledged, then it dies."""
        victim = self.start()
        try:
            assert victim.serves(), victim.tail()
            assert self.engine.attach(victim.address)
            self.engine.store(4)
            self.engine.detach()
        finally:
            victim.close()

    def at(self, failpoint: str, count: int) -> None:
        victim = self.start(failpoint, count)
        try:
            if victim.serves():
                sink(self.engine, victim, 2 if failpoint in AT_STOP else STEPS)
                if not victim.dead() and failpoint in AT_STOP:
                    victim.kill(signal.SIGTERM)
                    victim.dead(20)
            assert victim.dead(), f"{failpoint}: it was not come by"
        finally:
            victim.close()

    def at_random(self) -> None:
        victim = self.start()
        timer = threading.Timer(self.chance.uniform(0, SOON_S), victim.kill)
        try:
            assert victim.serves(), victim.tail()
            timer.start()
            sink(self.engine, victim, STEPS)
            timer.join()
            assert victim.dead(10)
        finally:
            timer.cancel()
            victim.close()

    def last(self) -> None:
        """A daemon that nobody kills: all is there, it stops as asked."""
        victim = self.nursery.start(self.folder)
        try:
            assert victim.serves(), victim.tail()
            assert self.engine.attach(victim.address)
            self.engine.look()
            self.engine.work(3)
            self.engine.flush()
            self.engine.detach()
            victim.kill(signal.SIGTERM)
            assert victim.dead(20), victim.tail()
        finally:
            victim.close()
        self.judged += self.engine.judged
        print(f"{self.count} kills, {self.judged} blocks judged")


def test_it_may_die_at_every_failpoint(nursery: Nursery, tmp_path: Path) -> None:
    deaths = Deaths(nursery, tmp_path, seed=1)
    deaths.after_work()
    for name in FAILPOINTS:
        deaths.at(name, COUNTS.get(name, 3))
    deaths.last()


def test_it_may_die_at_any_moment(nursery: Nursery, tmp_path: Path) -> None:
    deaths = Deaths(nursery, tmp_path, seed=2)
    deaths.after_work()
    for _ in range(60):
        deaths.at_random()
    deaths.last()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_may_die_two_thousand_times(nursery: Nursery, tmp_path: Path) -> None:
    deaths = Deaths(nursery, tmp_path, seed=3)
    names = list(FAILPOINTS)
    for number in range(2000):
        if number % 100 == 0:
            print(f"{number} kills at random moments", flush=True)
        if number % FRESH == 0:
            deaths.after_work()
        deaths.at_random()
        if number % 4 == 0:
            name = names[number // 4 % len(names)]
            deaths.at(name, COUNTS.get(name) or deaths.chance.randrange(1, 4))
    deaths.last()
