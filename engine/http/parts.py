"""The parts of an answer that follow each other in a stream: reasoning, text, one call, another.

Interfaces that tell parts apart say where each begins and ends. Not responsible for their words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from engine.http.replies import Call, Choice

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """One of them, as far as it came. `call`: of a call."""

    index: int
    kind: Kind
    call: Call | None = None
    text: list[str] = field(default_factory=list)

    @property
    def whole(self) -> str:
        return "".join(self.text)


@dataclass(frozen=True)
class Change:
    """`begins`, then `adds` text, or `ends`."""

    part: Part
    what: Literal["begins", "adds", "ends"]
    text: str = ""


class Parts:
    """The parts of one choice, in the order of their beginnings."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open: Part | None = None

    def news(self, choice: Choice) -> Iterator[Change]:
        """What the choice's last output changes."""
        news = choice.news
        if news.reasoning:
            yield from self._add("reasoning", news.reasoning)
        if news.text:
            yield from self._add("text", news.text)
        for piece in news.calls:
            if piece.name is not None:
                yield from self._begin("call", choice.calls[piece.index])
            if piece.arguments and self._open is not None:
                yield self._added(self._open, piece.arguments)

    def close(self) -> Iterator[Change]:
        """What is open ends."""
        if self._open is not None:
            part, self._open = self._open, None
            yield Change(part, "ends")

    def _add(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        if self._open is not None:
            yield self._added(self._open, text)

    def _begin(self, kind: Kind, call: Call | None = None) -> Iterator[Change]:
        yield from self.close()
        part = self._open = Part(len(self.all), kind, call)
        self.all.append(part)
        yield Change(part, "begins")

    @staticmethod
    def _added(part: Part, text: str) -> Change:
        part.text.append(text)
        return Change(part, "adds", text)


def parts_of(choice: Choice) -> list[Part]:
    """Of a whole answer: its reasoning, its text, its calls."""
    found = Parts()
    if choice.reasoning:
        found.all.append(Part(len(found.all), "reasoning", text=[choice.reasoning]))
    if choice.text or not choice.calls:
        found.all.append(Part(len(found.all), "text", text=[choice.text]))
    for call in choice.calls:
        found.all.append(Part(len(found.all), "call", call, [call.arguments]))
    return found.all
