"""A bridge over a small daemon, on executors that a test turns. No threads, no torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvc2.client import Bridge, BridgeConfig, Counters, PageBook
from tests.doubles.small_daemon import PAGE_SIZE, SmallDaemon


class Inline(Executor):
    """Runs what is submitted at once, or when `run` is called if `held`."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.calls: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((future, lambda: fn(*args, **kwargs)))
        if not self.held:
            self.run()
        return future

    def run(self) -> None:
        while self.calls:
            future, call = self.calls.pop(0)
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
                raise  # nothing that runs here may fail: a fault is a value, or it is a bug


@dataclass
class Counted(Counters):
    """Remembers what it was told."""

    told: list[tuple[Any, ...]] = field(default_factory=list)

    def attached(self) -> None:
        self.told.append(("attached",))

    def detached(self, reason: str) -> None:
        self.told.append(("detached", reason))

    def attach_failed(self, reason: str) -> None:
        self.told.append(("attach_failed", reason))

    def fault(self, call: str) -> None:
        self.told.append(("fault", call))

    def committed(self, answer: str, blocks: int) -> None:
        self.told += [("committed", answer)] * blocks

    def salt_let_go(self) -> None:
        self.told.append(("salt_let_go",))


class Bridged:
    """A bridge and the small daemon that it is attached to."""

    def __init__(self, num_pages: int = 32, *, low_water: int = 2) -> None:
        self.pool = np.full((num_pages, PAGE_SIZE), -1, np.int64)
        self.daemon = SmallDaemon(self.pool)
        self.ordered, self.acquires = Inline(), Inline()
        self.counted = Counted()
        config = BridgeConfig(
            page_size=PAGE_SIZE,
            low_water=low_water,
            high_water=8,
            load_timeout_s=0.1,
            grant_timeout_s=0.0,
        )
        self.bridge = Bridge(PageBook(num_pages), config, counters=self.counted)
        self.bridge.connect(self.daemon.attach, ordered=self.ordered, acquires=self.acquires)
