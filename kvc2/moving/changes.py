"""Tells those who wait for pages, or have some to copy, that something may be had now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """Futures that are done at the next change, one for each who waits."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    def until_changed(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        return waiter


class Changes:
    """Call it when something has changed: whoever listens is called, in the order of listening."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], object]] = []

    def listen(self, call: Callable[[], object]) -> None:
        self._listeners.append(call)

    def __call__(self) -> None:
        for call in self._listeners:
            call()
