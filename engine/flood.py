"""A log that can't flood: the same line once a second, and twenty others of its kind.

A kind is the place in the code that logs it, of which there are only so many. Not responsible for
where lines go, nor for the daemon's (kvc2/events.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

LINES_PER_SECOND = 20  # different ones, of one place


@dataclass
class _Second:
    """What one place has logged in it."""

    number: int
    lines: set[str] = field(default_factory=set)
    left_out: int = 0


class OncePerSecond(logging.Filter):
    """For a handler. What is left out is counted in the next line of the same place; where threads
    log at the same time, a few may be missed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], _Second] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        number = int(self._clock())
        second = self._places.setdefault(place, _Second(number))
        before = 0
        if second.number != number:
            before = second.left_out
            second = self._places[place] = _Second(number)
        try:
            line = record.getMessage()
        except (TypeError, ValueError):  # a wrong format: the handler tells which
            line = str(record.msg)
        if line in second.lines or len(second.lines) == LINES_PER_SECOND:
            second.left_out += 1
            return False
        second.lines.add(line)
        if before:
            record.msg, record.args = f"{line} ({before} more lines like it were left out)", ()
        return True
