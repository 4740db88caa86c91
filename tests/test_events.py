"""Events: one line each, bounded in number and size."""

from __future__ import annotations

import io
import json

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


def test_a_flood_of_one_event_is_cut_and_counted() -> None:
    now = [0.0]
    stream = io.StringIO()
    writer = events.EventWriter(stream, "json", clock=lambda: now[0])
    for _ in range(100):
        events.warning("flood")
    events.warning("other")
    now[0] = 1.0
    events.warning("flood")
    writer.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == events.EVENTS_PER_SECOND + 2
    assert lines[-1]["left_out_before"] == 100 - events.EVENTS_PER_SECOND


def test_nothing_is_written_after_close() -> None:
    stream = io.StringIO()
    events.EventWriter(stream, "text").close()
    events.event("late")
    assert stream.getvalue() == ""
