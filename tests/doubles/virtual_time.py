"""An event loop whose time passes only when everybody waits: seconds of a slow disk take none.

The loop's clock jumps to the next timer, or to the end of the next `Clock.sleep` of a thread, once
no thread that `run_in_executor` started is at work. Not for code that waits for other threads, or
that queues more work on an executor than it has threads while they all sleep: time would stand
still.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from kvc2.tiers.disk.slab_file import Files

T = TypeVar("T")
LOOK_S = 0.01  # real seconds between two looks at threads that are at work


class Clock:
    """Seconds that a loop moves on. Threads may read it and sleep on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.working = 0  # calls on executors that the loop has not seen the end of
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        self._count = 0
        self._over = False
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def wake_all(self) -> None:
        """Nobody sleeps any more: a test ends, perhaps with an error."""
        with self._lock:
            self._over = True
            for _, _, woken in self._sleepers:
                woken.set()
            self._sleepers.clear()

    def sleep_until(self, when: float) -> None:
        """Of a thread on an executor."""
        woken = threading.Event()
        with self._lock:
            if self._over:
                return
            self._count += 1
            heapq.heappush(self._sleepers, (when, self._count, woken))
        woken.wait()

    def jump(self, limit: float | None) -> bool:
        """To the first sleeper's time, or to `limit` if that is sooner. False while one works."""
        with self._lock:
            if self.working > len(self._sleepers):
                return False
            first = self._sleepers[0][0] if self._sleepers else None
            when = min((each for each in (first, limit) if each is not None), default=self.now)
            self.now = max(self.now, when)
            while self._sleepers and self._sleepers[0][0] <= self.now:
                heapq.heappop(self._sleepers)[2].set()
            return first is not None or limit is not None


class Selector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]  # epoll here
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        limit = None if timeout is None else self._clock.now + timeout
        return [] if self._clock.jump(limit) else super().select(LOOK_S)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(Selector(clock))
        self._virtual = clock

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> Any:
        self._virtual.working += 1
        running = super().run_in_executor(executor, func, *args)
        running.add_done_callback(self._ended)
        return running

    def _ended(self, _: object) -> None:
        self._virtual.working -= 1


def run(clock: Clock, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """asyncio.run in virtual time."""
    with asyncio.Runner(loop_factory=lambda: Loop(clock)) as runner:
        return runner.run(main())


class SlowFiles(Files):
    """A disk that reads `bytes_per_s`, one read after the other; its writes take no time. The next
    read takes `stall_s` longer."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        super().__init__()
        self.bytes_per_s = bytes_per_s
        self.stall_s = 0.0
        self._clock = clock
        self._free_at = 0.0
        self._lock = threading.Lock()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = super().read(fd, buffers, offset)
        with self._lock:
            begin = max(self._free_at, self._clock.now)
            self._free_at = end = begin + got / self.bytes_per_s + self.stall_s
            self.stall_s = 0.0
        self._clock.sleep_until(end)
        return got
