"""Events: one line each, bounded in number and size."""

from __future__ import annotations

import io
import json
import logging

from kvc2 import events


def test_an_event_is_one_line_with_its_facts() -> None:
    for form in ("text", "json"):
        stream = io.StringIO()
        writer = events.EventWriter(stream, form)  # type: ignore[arg-type]
        events.event("attached", pid=5, engine="a\nb", key=b"\x01\x02", long="x" * 1000)
        writer.close()
        (line,) = stream.getvalue().splitlines()
        if form == "json":
            values = json.loads(line)
            assert (values["event"], values["pid"], values["engine"]) == ("attached", 5, "a\nb")
            assert values["key"] == "0102"
            assert len(values["long"]) < 310
        else:
            assert 'attached pid=5 engine="a\\nb"' in line


class Log:
    """What is written while it is entered, on a clock that is set by hand."""

    def __enter__(self) -> Log:
        self.now = 0.0
        self._stream = io.StringIO()
        self._writer = events.EventWriter(self._stream, "json", clock=lambda: self.now)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self.lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]


def test_a_flood_of_one_event_is_one_line_a_second_and_a_count() -> None:
    with Log() as log:
        for second in range(3):
            log.now = float(second)
            for _ in range(100):
                events.warning("flood", reason=object())
        events.warning("other")
    floods = [each.get("left_out_before", 0) for each in log.lines if each["event"] == "flood"]
    assert floods == [0, 99, 99]
    assert log.lines[-1]["event"] == "other"


def test_one_processes_flood_hides_no_others_line() -> None:
    with Log() as log:
        for _ in range(100):
            events.event("attached", pid=1)
        events.event("attached", pid=2)
        for pid in range(1000):
            events.event("attached", pid=pid)
    assert [each["pid"] for each in log.lines[:3]] == [1, 2, 0]
    assert len(log.lines) == events.PROCESSES_PER_SECOND
    assert log.lines[1]["left_out_before"] == 99


def test_what_libraries_log_is_bounded_too() -> None:
    with Log() as log:
        for number in range(100):
            logging.getLogger("grpc._cython").warning("line\n%d", number)
            try:
                raise ValueError("x" * 10_000)
            except ValueError:
                logging.getLogger("asyncio").exception(f"a text of its own each time {number}")
    assert [(each["event"], each["logger"]) for each in log.lines] == [
        ("library", "grpc._cython"),
        ("library", "asyncio"),
    ]
    assert log.lines[0]["message"] == "line\n0"
    assert len(log.lines[1]["exception"]) < 310


def test_nothing_is_written_after_close() -> None:
    stream = io.StringIO()
    events.EventWriter(stream, "text").close()
    events.event("late")
    logging.getLogger("grpc").info("late")
    assert stream.getvalue() == ""
