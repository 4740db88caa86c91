"""Which 2-D copies move a page: rows of equal width at equal distances, on both sides. Pure.

A payload is a page's segments one after the other, so layers [a, b) of it are one run of bytes, and
in the pool they are rows: one copy moves all of them, where the pool is laid out as ours is.
Segments that lie side by side in the pool (K and V of a page) are one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

GROUPS_MAX = 12  # of layers: each is told apart, and costs a call for each page


@dataclass(frozen=True)
class Rows:
    """Of page p: `height` rows of `width` bytes at `offset + p * stride`, `pitch` apart in the
    pool, and one after the other from `start` on in its payload."""

    offset: int
    stride: int
    width: int
    height: int
    pitch: int
    start: int

    @property
    def bytes(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Group:
    """Layers that come together: the rows of all their segments, and how many layers are there
    after them."""

    rows: tuple[Rows, ...]
    layers_done: int

    @property
    def start(self) -> int:
        return self.rows[0].start

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.rows)


def groups(
    segments: Sequence[Sequence[int]], layer_ends: Sequence[int], max_pitch: int
) -> tuple[Group, ...]:
    """Of a layout: segments (offset, stride, bytes) in canonical order, `layer_ends` how many of
    them there are up to the end of each layer."""
    layers = len(layer_ends)
    size = -(-layers // GROUPS_MAX)
    starts = [0, *itertools.accumulate(each[2] for each in segments)]
    found, first = [], 0
    for done in [*range(size, layers, size), layers]:
        last = layer_ends[done - 1]
        lines = [
            Rows(offset, stride, width, 1, width, starts[first + number])
            for number, (offset, stride, width) in enumerate(segments[first:last])
        ]
        found.append(Group(tuple(_stacked(_joined(lines), max_pitch)), done))
        first = last
    return tuple(found)


def _joined(lines: Sequence[Rows]) -> list[Rows]:
    """Lines that follow one another in the pool as they do in the payload are one."""
    found: list[Rows] = []
    for each in lines:
        if found and _follows(found[-1], each):
            width = found[-1].width + each.width
            found[-1] = replace(found[-1], width=width, pitch=width)
        else:
            found.append(each)
    return found


def _follows(before: Rows, line: Rows) -> bool:
    beside = before.offset + before.width == line.offset and before.stride == line.stride
    return beside and before.width + line.width <= line.stride


def _stacked(lines: Sequence[Rows], max_pitch: int) -> Iterator[Rows]:
    """Lines of one width at one distance are rows of one copy."""
    stack: Rows | None = None
    for line in lines:
        if stack is None:
            stack = line
            continue
        pitch = line.offset - (stack.offset + (stack.height - 1) * stack.pitch)
        alike = line.width == stack.width and line.stride == stack.stride
        even = stack.height == 1 or pitch == stack.pitch
        if alike and even and line.width <= pitch <= max_pitch:
            stack = replace(stack, height=stack.height + 1, pitch=pitch)
        else:
            yield stack
            stack = line
    if stack is not None:
        yield stack


def cut(rows: Rows, begin: int, piece: int) -> Iterator[tuple[Rows, int]]:
    """The same bytes in copies of which none crosses a multiple of `piece` on the host's side,
    where they begin at `begin`, each with where it begins there. A row that crosses is copied in
    parts."""
    number = 0
    while number < rows.height:
        at, place = begin + number * rows.width, rows.offset + number * rows.pitch
        room = piece - at % piece
        if whole := min(rows.height - number, room // rows.width):
            yield replace(rows, height=whole, offset=place), at
            number += whole
            continue
        done = 0
        while done < rows.width:
            width = min(rows.width - done, piece - (at + done) % piece)
            part = replace(rows, height=1, width=width, pitch=width, offset=place + done)
            yield part, at + done
            done += width
        number += 1
