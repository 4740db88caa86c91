"""Where a request goes: how often a call enters a file of kvc2/, for one acquire with a hit in each
tier, one commit, one copy towards each slower tier, and one load.

An entry is a call of a function from another file of kvc2/. Not counted: returns; what the event
loop resumes or a thread begins by itself; a property and a plain value's own functions (VALUES),
which read and do nothing. A file that is entered more often than twice is one whose work another
file does in pieces.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvc2
from kvc2 import _core
from kvc2.answers import Terms
from kvc2.cache.cache import Cache
from tests.doubles.caches import running
from tests.doubles.stand_in import StandIn, prompt

ROOT = Path(kvc2.__path__[-1])
BLOCKS = 4
ENTRIES_MAX = 2
# What is asked of a plain value, or of numbers that were measured, is no work of that file.
VALUES = {"answers.py", "layout.py", "tiers/base.py", "tiers/meter.py", "cache/namespaces.py"}
# A load and the promotion behind it are two transfers of one request: each is begun, the first is
# judged, and the request takes it before anybody else can evict it.
MORE = {("a hit on disk", "moving/routes.py"): 3, ("a hit on disk", "moving/loading.py"): 3}
INNER = {"<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>"}


def room(frame: FrameType | None) -> str:
    """The file of kvc2/ that this frame, or the nearest one above it, is in."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents:
            return str(path.relative_to(ROOT))
        frame = frame.f_back
    return ""


def is_read(frame: FrameType) -> bool:
    """Whether it is a property's."""
    owner = type(frame.f_locals.get("self"))
    found = inspect.getattr_static(owner, frame.f_code.co_name, None)
    return isinstance(found, property)


class Walk:
    """Counts entries while it is entered."""

    def __init__(self) -> None:
        self.entries: Counter[str] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or ROOT not in Path(frame.f_code.co_filename).parents:
            return
        to, by, name = room(frame), room(frame.f_back), frame.f_code.co_name
        resumed = frame.f_code.co_flags & inspect.CO_COROUTINE and frame.f_lasti > 8
        if name in INNER or resumed or by in ("", to) or to in VALUES or is_read(frame):
            return
        self.entries[to] += 1
        self.calls[to, name] += 1

    @contextmanager
    def on(self) -> Iterator[Walk]:
        sys.setprofile(self._seen)
        threading.setprofile(self._seen)
        try:
            yield self
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


async def acquired(cache: Cache, engine: StandIn, name: bytes) -> None:
    await cache.leases.acquire(
        engine.session, engine.opened, name, prompt(0, BLOCKS), Terms(0, 5.0)
    )


def planned(step: object) -> _core.Transfer:
    assert isinstance(step, _core.Transfer)
    return step


async def walked(folder: Path, what: str) -> Walk:
    walk = Walk()
    async with running(folder) as cache:
        engine = StandIn(cache, 64)
        await engine.ask(prompt(0, BLOCKS))
        await cache.flush(10)
        await cache._background.stop()  # it copies what it sees; here each copy is asked for
        (layout,) = cache._pools.on_disk()
        (gpu,) = cache._gpus.values()
        index, mover = cache.index, cache._mover
        if what in ("a hit in cpu", "a hit on disk"):
            index.evict(gpu.id, 64)
        if what in ("a hit on disk", "a load"):
            index.evict(layout.cpu.id, 64)
        found = await cache.leases.acquire(
            engine.session, engine.opened, b"c", prompt(1, BLOCKS), Terms(BLOCKS, 5.0)
        )

        def commit() -> None:
            cache.leases.commit(
                engine.session, b"c", 0, prompt(1, BLOCKS)[:-1], found.granted_pages
            )

        if what in ("a demotion", "a store"):
            commit()
        if what == "a store":
            transfer = index.plan_demote(gpu.id, 64)
            assert transfer is not None
            await mover.demote(gpu, transfer)
        if what == "a load":
            number, tokens = engine.opened.number, prompt(0, BLOCKS)
            step = index.prefetch(number, layout.cpu.id, tokens, 64, touches=False)
        else:
            step = index.plan_demote(gpu.id if what == "a demotion" else layout.cpu.id, 64)
        assert isinstance(step, _core.Transfer) == (what in ("a load", "a demotion", "a store"))
        calls: dict[str, Callable[[], Awaitable[object] | None]] = {
            "a hit in gpu": lambda: acquired(cache, engine, b"a"),
            "a hit in cpu": lambda: acquired(cache, engine, b"a"),
            "a hit on disk": lambda: acquired(cache, engine, b"a"),
            "a commit": commit,
            "a demotion": lambda: mover.demote(gpu, planned(step)),
            "a store": lambda: mover.write(layout, [planned(step)]),
            "a load": lambda: mover.load(layout, planned(step)),
        }
        with walk.on():
            work = calls[what]()
            if work is not None:
                await work
        while mover.waited_for:
            await cache.leases._loader.until_changed()
        cache._background.start()  # for the end
    return walk


@pytest.mark.parametrize(
    "what",
    [
        "a hit in gpu",
        "a hit in cpu",
        "a hit on disk",
        "a commit",
        "a demotion",
        "a store",
        "a load",
    ],
)
def test_a_call_enters_no_file_again_and_again(tmp_path: Path, what: str) -> None:
    walk = asyncio.run(walked(tmp_path, what))
    assert walk.entries, "nothing was traced"
    often = {
        to: [f"{name} {count}" for (file, name), count in walk.calls.items() if file == to]
        for to, count in walk.entries.items()
        if count > MORE.get((what, to), ENTRIES_MAX)
    }
    assert not often
