"""Reasoning before an answer, and what a model's speech is put together from.

Not responsible for calls of tools (formats).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.http.speech.formats import Format
from engine.http.speech.reader import Reader, Steps, Tools


@dataclass(frozen=True)
class Marks:
    """What a model writes around its reasoning."""

    begin: str
    end: str


PAIRS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("◁think▷", "◁/think▷"),
    Marks("<seed:think>", "</seed:think>"),
)


def marks_of(template: str) -> Marks | None:
    """Those that a chat template shows; None: the model doesn't reason aloud."""
    return next((pair for pair in PAIRS if pair.end in template), None)


def speech(form: Format, tools: Tools, marks: Marks | None, *, inside: bool) -> Reader:
    """Reads an answer: reasoning first, where it begins with its mark or the prompt ends `inside`
    one; then text and calls."""

    def read(reader: Reader) -> Steps[None]:
        if marks is not None and (inside or (yield from reader.starts(marks.begin))):
            yield from reader.spaces()
            yield from reader.until((marks.end,), reader.reasoning)
            yield from reader.spaces()
        yield from form.read(reader, tools)

    return Reader(read, parallel=tools.parallel)
