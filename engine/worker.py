"""The thread that the scheduler runs on, and the way in from other threads.

Not responsible for any decision: see scheduler.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.errors import InvalidRequestError
from engine.request import Bounds, Output, Request
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)

# Acquires and waits end without waking the thread; polling them this often adds at most this much
# to a first token and costs nothing measurable.
POLL_S = 0.002
IDLE_S = 0.5


class TooBusyError(Exception):
    """The queue is full: the caller may try again later."""


class StoppedError(Exception):
    """The engine is stopping, or its scheduler has failed: nothing new is taken."""


@dataclass(frozen=True)
class Arrival:
    """A request on its way to the scheduler; `arrived`: monotonic seconds."""

    request: Request
    arrived: float


class Worker:
    """Runs a scheduler until `stop`. Its methods may be called from any thread.

    The one way in: what is outside the `bounds` is refused here, so that the scheduler never sees
    it. Every request that was taken is answered, also when the scheduler fails; `on_failure` is
    called then, on its thread.
    """

    def __init__(self, scheduler: Scheduler, max_queued: int, bounds: Bounds) -> None:
        self.bounds = bounds
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None
        self.on_prompt: Callable[[Request], None] = lambda _: None  # of each request that is taken
        self._scheduler = scheduler
        self._max_queued = max_queued
        self._lock = threading.Lock()  # over the three below
        self._incoming: deque[Arrival | str] = deque()  # requests, and ids of unwanted ones
        self._queued = 0  # requests in the scheduler or on their way to it
        self._stopping = False  # set once: nothing comes in any more
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="kvc2-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """The thread runs: requests will be answered."""
        return self._thread.is_alive() and not self._stopping

    def check_room(self) -> None:
        """Raises what `submit` would now: what is refused anyway need not be read first."""
        if self._stopping:
            raise StoppedError("the engine is stopping or has failed")
        if self._queued >= self._max_queued:
            raise TooBusyError(f"{self._max_queued} requests are queued already")

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none; the outputs of each come to its `deliver`. Raises
        InvalidRequestError, TooBusyError, and StoppedError when nobody would ever answer them."""
        for request in requests:
            self.bounds.check(request)
        if len(requests) > self._max_queued:
            allowed = f"at most {self._max_queued} answers are computed at once"
            raise InvalidRequestError("n", len(requests), allowed)
        arrived = time.monotonic()
        with self._lock:
            self.check_room()
            if self._queued + len(requests) > self._max_queued:
                raise TooBusyError(f"there is no room for {len(requests)} more requests")
            self._queued += len(requests)
            self._incoming.extend(Arrival(request, arrived) for request in requests)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """The caller is gone: free what the request holds. Ended or unknown: no change."""
        with self._lock:
            if not self._stopping:
                self._incoming.append(request_id)
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """End all requests with an error, and the thread."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            log.exception("the scheduler failed; every request ends")
            self.failed = True
        try:
            self._end("the scheduler failed" if self.failed else "the engine is stopping")
        finally:
            if self.failed:
                self.on_failure()

    def _turn(self) -> None:
        """Take what came in, compute a step; without work, wait for some."""
        self._wake.clear()
        for each in self._taken():
            if isinstance(each, Arrival):
                self._add(each)
            else:
                self._scheduler.cancel(each)
        busy = self._scheduler.step()
        with self._lock:
            self._queued = self._scheduler.requests + len(self._incoming)
        if not busy:
            self._wake.wait(IDLE_S if self._scheduler.idle else POLL_S)

    def _add(self, arrival: Arrival) -> None:
        """What can't be added is answered, and is nobody else's concern."""
        try:
            self.on_prompt(arrival.request)
            self._scheduler.add(arrival.request, arrival.arrived)
        except Exception:
            log.exception("%s can't be added; it ends", arrival.request.request_id)
            arrival.request.deliver(Output(finish="error", error="the request can't be added"))

    def _taken(self) -> Iterator[Arrival | str]:
        """What came in, one at a time. It leaves the queue when it has been dealt with, so that
        `_end` answers one that the scheduler failed on."""
        while self._incoming:
            yield self._incoming[0]
            with self._lock:
                self._incoming.popleft()

    def _end(self, error: str) -> None:
        """Answer everything that was taken; from here on `submit` refuses."""
        with self._lock:
            self._stopping = True
        for each in self._taken():
            if isinstance(each, Arrival):
                each.request.deliver(Output(finish="error", error=error, unavailable=True))
        self._scheduler.fail_all(error)
