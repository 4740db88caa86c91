"""Waits for the thing itself, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 20.0


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
    """Seconds until the condition held; fails after timeout_s."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - started
