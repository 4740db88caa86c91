"""Calls on threads of their own, for engines that poll: an eventfd says that something is done.

Not here: what is called (objects.py, or any blocking function).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Completions:
    """`fd` becomes readable when a call that was submitted here has ended. Threads may share it."""

    def __init__(self, threads: int = 1, name: str = "kvc2-calls") -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = ThreadPoolExecutor(threads, name)
        self._lock = threading.Lock()
        self._done: dict[Future[Any], None] = {}  # in the order in which they ended

    def submit(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> Future[T]:
        """Calls from one thread begin in order."""
        future = self._threads.submit(call, *args, **named)
        future.add_done_callback(self._ended)
        return future

    def completed(self) -> list[Future[Any]]:
        """Those that have ended since they were last told; `fd` is readable again with the next."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)  # first: what ends from here on writes it again
        with self._lock:
            told, self._done = list(self._done), {}
        return told

    def take(self, future: Future[T]) -> T | None:
        """The result of one, once it has ended; None before. For engines that read `fd` themselves:
        `completed` doesn't tell of it any more. Raises what its call raised."""
        if not future.done():
            return None
        with self._lock:
            self._done.pop(future, None)
        return future.result()

    def close(self) -> None:
        """Waits for what runs, and cancels the rest. `fd` is closed."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        os.close(self.fd)

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._done[future] = None
        os.eventfd_write(self.fd, 1)
