"""Reads a model's text as it comes, and says what of it is prose, reasoning or a call.

A format is a generator over a `Reader`: it reads by the reader's methods, each of which waits for
text that has not come, and says what it found. What it gives up on is prose. Not responsible for
any format (formats), nor for the words of an interface (replies).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Found = TypeVar("Found")
Steps = Generator[None, None, Found]  # each yield waits for more text
Out = Callable[[str], None]


@dataclass(frozen=True)
class CallPiece:
    """News of the call `index` of an answer: its name at first, then more of its arguments, JSON.
    `call_id`: the model's own, where it has one."""

    index: int
    arguments: str = ""
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class Said:
    """What some text says."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


class Speech(Protocol):
    """Turns one answer's text into what it says."""

    def push(self, text: str) -> Said:
        """What this text makes certain."""

    def flush(self) -> Said:
        """What is still held back, at the end. Call it once."""


class Prose:
    """A speech in which everything is text."""

    def push(self, text: str) -> Said:
        return Said(text)

    def flush(self) -> Said:
        return Said()


@dataclass(frozen=True)
class Tools:
    """What may be called: the JSON schemas of the arguments by the name. `parallel`: more than
    once in an answer."""

    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    parallel: bool = True

    def value(self, tool: str, parameter: str, text: str) -> str:
        """The JSON of an argument that a format writes as bare text: a string where its schema says
        so, or where the text is no JSON."""
        properties = self.parameters.get(tool, {}).get("properties")
        schema = properties.get(parameter) if isinstance(properties, dict) else None
        kinds = schema.get("type") if isinstance(schema, dict) else None
        if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
            return json.dumps(text, ensure_ascii=False)
        try:
            return json.dumps(json.loads(text, parse_constant=_no_json), ensure_ascii=False)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class Reader:
    """A Speech that reads by a format. Spaces before a call, and at the ends of a text that has
    one, are nothing that is said."""

    def __init__(self, read: Callable[[Reader], Steps[None]], *, parallel: bool = True) -> None:
        self.calls = 0
        self._parallel = parallel
        self._rest = ""  # has come, and isn't read
        self._ended = False
        self._trail: list[str] | None = None  # what was read since `begin`
        self._spaces = ""  # of a text, held back
        self._behind_call = False  # no text was said since the last call
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._pieces: list[CallPiece] = []
        self._steps: Steps[None] | None = read(self)

    # what comes

    def push(self, text: str) -> Said:
        self._rest += text
        self._read()
        return self._news()

    def flush(self) -> Said:
        self._ended = True
        self._read()
        if not self.calls:
            self._text.append(self._spaces)
        return self._news()

    def _read(self) -> None:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        if self._steps is None:  # the format is through: what follows is prose
            self.text(self._taken(len(self._rest)))

    def _news(self) -> Said:
        said = Said("".join(self._text), "".join(self._reasoning), tuple(self._pieces))
        self._text, self._reasoning, self._pieces = [], [], []
        return said

    # what a format says

    def text(self, text: str) -> None:
        if self._behind_call:
            text = text.lstrip()
        shown = text.rstrip()
        if not shown:
            self._spaces += text
            return
        self._text += [self._spaces, shown]
        self._spaces = text[len(shown) :]
        self._behind_call = False

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def call(self, name: str, call_id: str | None = None) -> Out:
        """A call begins; its arguments go to what is returned. A call too many is dropped."""
        if self.calls and not self._parallel:
            return drop
        index, self._spaces, self._behind_call = self.calls, "", True
        self.calls += 1
        self._pieces.append(CallPiece(index, name=name, call_id=call_id))
        return lambda text: self._pieces.append(CallPiece(index, text)) if text else None

    # what a format reads by

    def begin(self, read: str) -> None:
        """From here on what is read may turn out to be prose; so does `read`."""
        self._trail = [read]

    def give_up(self) -> None:
        """What was read since `begin` is prose."""
        trail, self._trail = self._trail, None
        self.text("".join(trail or ()))

    def _taken(self, count: int) -> str:
        text, self._rest = self._rest[:count], self._rest[count:]
        if self._trail is not None:
            self._trail.append(text)
        return text

    def until(self, marks: Sequence[str], out: Out) -> Steps[str | None]:
        """The text before the first of `marks` goes out as it comes; the mark is read and returned.
        None: the text ended without one."""
        while True:
            found = [(at, mark) for mark in marks if (at := self._rest.find(mark)) >= 0]
            if found:
                at, mark = min(found, key=lambda each: (each[0], -len(each[1])))
                out(self._taken(at))
                self._taken(len(mark))
                return mark
            held = 0
            if not self._ended:
                held = max((overlap(self._rest, mark) for mark in marks), default=0)
            text = self._taken(len(self._rest) - held)
            if text:
                out(text)
            if self._ended:
                return None
            yield

    def find(self, marks: Sequence[str]) -> Steps[tuple[str, str | None]]:
        """The same, at once when it has come."""
        parts: list[str] = []
        mark = yield from self.until(marks, parts.append)
        return "".join(parts), mark

    def spaces(self) -> Steps[None]:
        """Reads them."""
        while True:
            self._taken(len(self._rest) - len(self._rest.lstrip()))
            if self._rest or self._ended:
                return
            yield

    def next(self, marks: Sequence[str]) -> Steps[str | None]:
        """Reads one of `marks` if the text goes on with it; else nothing is read, and None."""
        while True:
            found = [mark for mark in marks if self._rest.startswith(mark)]
            if found:
                self._taken(len(found[0]))
                return found[0]
            if self._ended or not any(mark.startswith(self._rest) for mark in marks):
                return None
            yield

    def starts(self, mark: str) -> Steps[bool]:
        """Whether the text goes on with spaces and `mark`, which are read then."""
        while True:
            begin = self._rest.lstrip()
            if begin.startswith(mark):
                self._taken(len(self._rest) - len(begin) + len(mark))
                return True
            if self._ended or not mark.startswith(begin):
                return False
            yield

    def value(self, out: Out) -> Steps[bool]:
        """One JSON value goes out as it comes; whether it is whole. Brackets are counted, nothing
        else of it is checked."""
        depth, begun = 0, False
        quoted = escaped = False
        while True:
            for at, letter in enumerate(self._rest):
                if quoted:
                    if escaped or letter == "\\":
                        escaped = not escaped
                    elif letter == '"':
                        quoted = False
                elif letter == '"':
                    quoted = True
                elif letter in "{[":
                    depth += 1
                elif letter in "}]":
                    if depth == 0:  # of what the value stands in
                        out(self._taken(at))
                        return begun
                    depth -= 1
                elif depth == 0 and (letter == "," or letter.isspace()):
                    out(self._taken(at))
                    return begun
                begun = True
                if depth == 0 and not quoted and letter in '"}]':
                    out(self._taken(at + 1))
                    return True
            out(self._taken(len(self._rest)))
            if self._ended:
                return begun and depth == 0 and not quoted
            yield


def drop(text: str) -> None:
    """Where what is of no interest goes."""


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
