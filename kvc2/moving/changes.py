"""Tells those who wait for pages, or have some to copy, that something may be had now."""

from __future__ import annotations

from collections.abc import Callable


class Changes:
    """Call it when something has changed: whoever listens is called, in the order of listening."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], object]] = []

    def listen(self, call: Callable[[], object]) -> None:
        self._listeners.append(call)

    def __call__(self) -> None:
        for call in self._listeners:
            call()
