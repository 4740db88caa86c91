"""What happens, as structured log lines: an event's name and its facts, as text or JSON.

Bounded everywhere: whatever a client sends, an event is logged once a second (once a process that
it names in `pid`, of at most PROCESSES_PER_SECOND), a fact is cut, and the queue to the writing
thread drops rather than waits, so that a full pipe never stops the daemon. What libraries log
passes here too, as the event `library`. Not here: counters (metrics.py). `kvc2` is the logger.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TextIO

QUEUE_LINES_MAX = 1024
PROCESSES_PER_SECOND = 20  # that an event may name; what is left out is counted in the next line
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
    """Writes the events of this process to `stream` from a thread of its own, until `close`; also
    what its libraries log."""

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
        for each in (_logger, logging.getLogger()):
            each.addHandler(self._entrance)
        _logger.setLevel(logging.INFO)

    def close(self) -> None:
        for each in (_logger, logging.getLogger()):
            each.removeHandler(self._entrance)
        self._listener.stop()


class _Entrance(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # its facts are formatted by the writing thread

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return  # a reader that doesn't read loses lines, the daemon nothing


@dataclass
class _Seen:
    """An event's lines of this second, by the process that they name, and those left out so far."""

    second: int
    processes: set[object] = field(default_factory=set)
    left_out: int = 0


class RateLimit(logging.Filter):
    """Lets an event through once in each second of `clock`, or once for each process that it names.
    A library's lines are one event: their texts are without number."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        facts, second = _facts(record), int(self._clock())
        seen = self._seen.setdefault(record.msg if _is_ours(record) else record.name, _Seen(second))
        if seen.second != second:
            seen.second, seen.processes = second, set()
        process = facts.get("pid")
        if process in seen.processes or len(seen.processes) == PROCESSES_PER_SECOND:
            seen.left_out += 1
            return False
        seen.processes.add(process)
        if seen.left_out:
            record.facts = {**facts, "left_out_before": seen.left_out}
            seen.left_out = 0
        return True


class EventFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info name key=value`, or the same as one JSON mapping a line.
    What a library logs is a fact, as what a client sent is: any letters may be in it."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{when}.{int(record.msecs):03d}Z"
        name, facts = record.getMessage(), _facts(record)
        if not _is_ours(record):
            name, facts = "library", {"logger": record.name, "message": name, **facts}
        facts = {key: _cut(value) for key, value in facts.items()}
        if record.exc_info and record.exc_info[1] is not None:
            facts["exception"] = _cut(self.formatException(record.exc_info))
        if self._form == "json":
            line = {
                "time": stamp,
                "level": record.levelname.lower(),
                "event": name,
                **facts,
            }
            return json.dumps(line)
        words = [f"{key}={json.dumps(value)}" for key, value in facts.items()]
        return " ".join([stamp, record.levelname.lower(), name, *words])


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.split(".")[0] == _logger.name


def _facts(record: logging.LogRecord) -> dict[str, object]:
    facts = getattr(record, "facts", {})
    return facts if isinstance(facts, dict) else {}


def _cut(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= FACT_TEXT_MAX else text[:FACT_TEXT_MAX] + "..."
