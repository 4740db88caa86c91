"""What happens, as structured log lines: an event's name and its facts, as text or JSON.

Bounded everywhere: an event may be logged EVENTS_PER_SECOND times a second, a fact is cut, and the
queue to the writing thread drops rather than waits, so that a full pipe never stops the daemon.
Not here: counters (metrics.py). `kvc2` is the name of the logger.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import time
from collections.abc import Callable
from typing import Literal, TextIO

QUEUE_LINES_MAX = 1024
EVENTS_PER_SECOND = 20  # of one name; what is left out is counted in the next line
FACT_TEXT_MAX = 300

_logger = logging.getLogger("kvc2")
_logger.propagate = False
_logger.addHandler(logging.NullHandler())


def event(name: str, *, level: int = logging.INFO, **facts: object) -> None:
    """Log that `name` happened. Threads may call it; it neither blocks nor raises."""
    _logger.log(level, name, extra={"facts": facts})


def warning(name: str, **facts: object) -> None:
    event(name, level=logging.WARNING, **facts)


class EventWriter:
    """Writes the events of this process to `stream` from a thread of its own, until `close`."""

    def __init__(
        self,
        stream: TextIO,
        form: Literal["text", "json"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        lines: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LINES_MAX)
        self._entrance = _Entrance(lines)
        self._entrance.addFilter(RateLimit(clock))
        sink = logging.StreamHandler(stream)
        sink.setFormatter(EventFormatter(form))
        self._listener = logging.handlers.QueueListener(lines, sink)
        self._listener.start()
        _logger.addHandler(self._entrance)
        _logger.setLevel(logging.INFO)

    def close(self) -> None:
        _logger.removeHandler(self._entrance)
        self._listener.stop()


class _Entrance(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # its facts are formatted by the writing thread

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return  # a reader that doesn't read loses lines, the daemon nothing


class RateLimit(logging.Filter):
    """Lets EVENTS_PER_SECOND of a name through in each second of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, tuple[int, int]] = {}  # name -> (second, events in it)

    def filter(self, record: logging.LogRecord) -> bool:
        second = int(self._clock())
        last, count = self._seen.get(record.msg, (second, 0))
        if last != second:
            left_out = max(0, count - EVENTS_PER_SECOND)
            if left_out:
                record.facts = {**_facts(record), "left_out_before": left_out}
            count = 0
        self._seen[record.msg] = (second, count + 1)
        return count < EVENTS_PER_SECOND


class EventFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info name key=value`, or the same as one JSON mapping a line."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{when}.{int(record.msecs):03d}Z"
        facts = {key: _cut(value) for key, value in _facts(record).items()}
        if record.exc_info and record.exc_info[1] is not None:
            facts["exception"] = _cut(self.formatException(record.exc_info))
        if self._form == "json":
            line = {
                "time": stamp,
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                **facts,
            }
            return json.dumps(line)
        words = [f"{key}={json.dumps(value)}" for key, value in facts.items()]
        return " ".join([stamp, record.levelname.lower(), record.getMessage(), *words])


def _facts(record: logging.LogRecord) -> dict[str, object]:
    facts = getattr(record, "facts", {})
    return facts if isinstance(facts, dict) else {}


def _cut(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= FACT_TEXT_MAX else text[:FACT_TEXT_MAX] + "..."
