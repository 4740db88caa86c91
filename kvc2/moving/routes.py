"""How pages go from one tier to another: a route, a copy's parts on its threads, and what came.

Not here: which copies there are (mover.py), what a part does (tiers/).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from kvc2 import _core
from kvc2.host.priority import step_back
from kvc2.tiers.base import U8, U32, PageShape
from kvc2.tiers.meter import Meter

LOG = logging.getLogger(__name__)

LOAD_THREADS = 4  # depth of the disk's queue: 4 reads of 8 MiB keep an NVMe disk busy
NO_PAGES = np.empty(0, np.uint32)


@dataclass(frozen=True, eq=False)
class Transferred:
    """How a copy ended. `status`: [pages] of BLOCK_* or READ_FAILED; BLOCK_BAD_PAYLOAD where a
    thread failed. `asked`, `began`, `ended`: when it was asked for, when a thread began it, when
    the last one was done, by the mover's clock. `left`: the pages that moved blocks have left."""

    status: U8
    asked: float
    began: float
    ended: float
    error: BaseException | None = None  # what the first thread that failed raised
    left: U32 = field(default_factory=NO_PAGES.copy)

    @property
    def good(self) -> int:
        """How many leading pages came."""
        return leading(self.status)

    @property
    def bad(self) -> U32:
        """Positions of the pages that did not come."""
        return np.flatnonzero(self.status != _core.BLOCK_OK).astype(np.uint32)

    @property
    def whole(self) -> bool:
        return self.good == self.status.size

    def in_vain(self) -> Transferred:
        """The same, and no page of it counts."""
        return replace(self, status=none_of(self.status.size))


@dataclass(frozen=True)
class Part:
    """A thread's share of a copy. `work` answers [pages] of BLOCK_* or READ_FAILED, or None: all of
    them came. What it raises is logged, and none of them came."""

    pages: int
    work: Callable[[], U8 | None]


@dataclass(frozen=True)
class Timed:
    """What a part answered, and when it ran."""

    status: U8
    began: float
    ended: float


@dataclass(frozen=True)
class Route:
    """From one tier to another. `threads` carry what goes there; `meter` is told how long it took.
    `whole_pages`: the meter is told of pages with their headers, not of payloads alone."""

    source: str
    target: str
    threads: ThreadPoolExecutor
    meter: Meter | None = None
    whole_pages: bool = False

    def carry(
        self, parts: Sequence[Part], clock: Callable[[], float]
    ) -> asyncio.Future[Transferred]:
        """The parts, at least one, are on the threads when this returns, in their order. The future
        never raises; it is done in the callback of the last part's end."""
        carried: asyncio.Future[Transferred] = asyncio.get_running_loop().create_future()
        asked, left = clock(), len(parts)

        def ended(_: asyncio.Future[Timed]) -> None:
            nonlocal left
            left -= 1
            if not left and not carried.done():
                carried.set_result(self._sum(parts, running, asked, clock()))

        running = [self._begin(timed_work(each, clock)) for each in parts]
        for each in running:
            each.add_done_callback(ended)
        return carried

    def judge(self, shape: PageShape, came: Transferred, sizes: Sequence[int]) -> list[int]:
        """Tell the meter of a copy that came whole. Of each of the transfers of so many pages that
        it carried: how many leading ones came."""
        if self.meter is not None and came.whole:
            page_bytes = shape.page_bytes if self.whole_pages else shape.payload_bytes
            num_bytes = came.status.size * page_bytes
            self.meter.saw(num_bytes, came.ended - came.began, came.began - came.asked)
        ends = list(itertools.accumulate(sizes))
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        return [leading(came.status[slice(*each)]) for each in zip(starts, ends, strict=True)]

    def _begin(self, work: Callable[[], Timed]) -> asyncio.Future[Timed]:
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self.threads, work)
        except RuntimeError as error:  # these threads have ended
            failed: asyncio.Future[Timed] = loop.create_future()
            failed.set_exception(error)
            return failed

    def _sum(
        self,
        parts: Sequence[Part],
        running: Sequence[asyncio.Future[Timed]],
        asked: float,
        now: float,
    ) -> Transferred:
        """Of parts that have all ended."""
        errors = [error for each in running if (error := error_of(each)) is not None]
        timed = [each.result() for each in running if error_of(each) is None]
        for error in errors:
            if not isinstance(error, asyncio.CancelledError):
                LOG.error("copying from %s to %s: %r", self.source, self.target, error)
        status = [
            each.result().status if error_of(each) is None else none_of(part.pages)
            for part, each in zip(parts, running, strict=True)
        ]
        return Transferred(
            np.concatenate(status),
            asked,
            min((each.began for each in timed), default=now),
            max((each.ended for each in timed), default=now),
            errors[0] if errors else None,
        )


class Routes:
    """Those that all sessions share. A session's promotions have a route of their own."""

    def __init__(self, disk_meter: Meter) -> None:
        loads = ThreadPoolExecutor(LOAD_THREADS, "kvc2-load")
        demotions = ThreadPoolExecutor(1, "kvc2-demote", initializer=step_back)
        self.writer = ThreadPoolExecutor(1, "kvc2-disk", initializer=step_back)
        self.load = Route("disk", "cpu", loads, disk_meter, whole_pages=True)
        self.demote = Route("gpu", "cpu", demotions)
        self.write = Route("cpu", "disk", self.writer)
        self.move_in_arena = Route("cpu", "cpu", demotions)
        self.move_on_disk = Route("disk", "disk", self.writer)

    def close(self) -> None:
        """Waits for what runs; what has not begun is dropped."""
        for each in (self.load, self.demote, self.write):
            each.threads.shutdown(wait=True, cancel_futures=True)


def timed_work(part: Part, clock: Callable[[], float]) -> Callable[[], Timed]:
    """The part's work, timed."""

    def work() -> Timed:
        began = clock()
        status = part.work()
        if status is None:
            status = np.full(part.pages, _core.BLOCK_OK, np.uint8)
        return Timed(status, began, clock())

    return work


def error_of(ended: asyncio.Future[Timed]) -> BaseException | None:
    """What a thread has raised; CancelledError where it never began."""
    return asyncio.CancelledError() if ended.cancelled() else ended.exception()


def leading(status: U8) -> int:
    """How many pages came before the first that did not."""
    bad = np.flatnonzero(status != _core.BLOCK_OK)
    return int(bad[0]) if bad.size else status.size


def none_of(pages: int) -> U8:
    """The status of pages of which none came."""
    return np.full(pages, _core.BLOCK_BAD_PAYLOAD, np.uint8)
