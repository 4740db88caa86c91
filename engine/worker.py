"""The thread that the scheduler runs on, and the way in from other threads.

Not responsible for any decision: see scheduler.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from engine.request import Request
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)

# Acquires and waits end without waking the thread; polling them this often adds at most this much
# to a first token and costs nothing measurable.
POLL_S = 0.002
IDLE_S = 0.5


class TooBusyError(Exception):
    """The queue is full: the caller may try again later."""


class Worker:
    """Runs a scheduler until `stop`. Its methods may be called from any thread."""

    def __init__(self, scheduler: Scheduler, max_queued: int) -> None:
        self._scheduler = scheduler
        self._max_queued = max_queued
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._queued = 0  # requests in the scheduler or on their way to it
        self._lock = threading.Lock()  # over _queued
        self._thread = threading.Thread(target=self._loop, name="kvc2-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """The thread runs: requests will be answered."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs come to `request.deliver`. Raises TooBusyError."""
        arrived = time.monotonic()
        with self._lock:
            if self._queued >= self._max_queued:
                raise TooBusyError(f"{self._max_queued} requests are queued already")
            self._queued += 1
        self._call(lambda: self._scheduler.add(request, arrived))

    def cancel(self, request_id: str) -> None:
        """The caller is gone: free what the request holds. Ended or unknown: no change."""
        self._call(lambda: self._scheduler.cancel(request_id))

    def stop(self, timeout_s: float) -> None:
        """End all requests with an error, and the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._wake.set()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                while self._calls:
                    self._calls.popleft()()
                busy = self._scheduler.step()
                with self._lock:
                    self._queued = self._scheduler.requests + len(self._calls)
                if not busy:
                    self._wake.wait(IDLE_S if self._scheduler.idle else POLL_S)
            self._scheduler.fail_all("the engine is stopping")
        except Exception:
            log.exception("the scheduler failed; every request ends")
            self._stopping = True
            self._scheduler.fail_all("the scheduler failed")
