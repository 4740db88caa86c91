"""What a power cut may have left of a directory, from the journal of a process (journal.cpp).

What was synced is there. Of the rest a cut leaves any part: of each write any of its 4 KiB sectors,
of truncated and allocated sizes any, of names that were made, changed or deleted in a directory
that was not synced since any. Sectors are whole: a disk that tears one is not what this shows.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<IIQQqQ")
WRITE, SYNC, TRUNCATE, ALLOCATE, CREATE, FOLDER, UNLINK, RENAME, DONE, NOTE = range(1, 11)
SECTOR = 4096


@dataclass
class Operation:
    kind: int
    op: int
    inode: int = 0
    at: int = 0
    data: bytes = b""
    durable: bool = False  # O_DSYNC
    done: bool = False
    covers: list[Operation] = field(default_factory=list)  # of a sync


def journal(path: Path) -> list[Operation]:
    """The records, each as the operation that begins; of DONE `at` is the result."""
    data, start, found = path.read_bytes(), 0, []
    while start + HEAD.size <= len(data):
        kind, size, op, inode, at, durable = HEAD.unpack_from(data, start)
        start += HEAD.size
        found.append(Operation(kind, op, inode, at, data[start : start + size], bool(durable)))
        start += size
    return found


def sectors(operation: Operation) -> Iterator[tuple[int, bytes]]:
    """The write's parts, each within one sector of the file: offset, bytes."""
    done = 0
    while done < len(operation.data):
        place = operation.at + done
        size = min(SECTOR - place % SECTOR, len(operation.data) - done)
        yield place, operation.data[done : done + size]
        done += size


class File:
    """A file or a directory: what is durable of it, and what was done to it since."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.names: dict[str, File | None] = {}
        self.folder = False
        self.pending: list[Operation | tuple[Operation, list[tuple[str, File | None]]]] = []


def write(content: bytearray, place: int, data: bytes) -> None:
    if len(content) < place:
        content.extend(bytes(place - len(content)))
    content[place : place + len(data)] = data


def resize(content: bytearray, operation: Operation) -> None:
    size = operation.at
    if operation.kind == TRUNCATE:
        del content[size:]
    if len(content) < size:
        content.extend(bytes(size - len(content)))


class Medium:
    """Follows a journal; `cut` builds a directory as it may be after the last record fed."""

    def __init__(self, under: Path) -> None:
        self.under = str(under)
        self.root = File()
        self.root.folder = True
        self._inodes: dict[int, File] = {os.stat(under).st_ino: self.root}
        self._now: dict[str, File] = {"": self.root}  # by path, as the process sees it
        self._open: dict[int, Operation] = {}
        self.notes: list[dict[str, Any]] = []

    def feed(self, record: Operation) -> None:
        if record.kind == DONE:
            self._end(self._open.pop(record.op), record.at)
            return
        self._open[record.op] = record
        if record.kind in (WRITE, TRUNCATE, ALLOCATE):
            self._inodes[record.inode].pending.append(record)
        elif record.kind == SYNC:
            file = self._inodes[record.inode]
            record.covers = [each for each in map(_of, file.pending) if each.done]
        elif record.kind in (CREATE, FOLDER):
            made = File()
            made.folder = record.kind == FOLDER
            self._inodes[record.inode] = made
            path = self._path(record.data)
            self._now[path] = made
            self._name(record, [(path, made)])
        elif record.kind == UNLINK:
            path = self._path(record.data)
            self._now.pop(path, None)
            self._name(record, [(path, None)])
        elif record.kind == RENAME:
            source, target = map(self._path, record.data.split(b"\0"))
            self._now[target] = moved = self._now.pop(source)
            self._name(record, [(source, None), (target, moved)])

    def _end(self, operation: Operation, result: int) -> None:
        operation.done = True
        if operation.kind == NOTE:
            self.notes.append(json.loads(operation.data))
        elif result < 0:
            self._forget(operation)
        elif operation.kind == SYNC:
            file = self._inodes[operation.inode]
            self._settle(file, operation.covers)
        elif operation.kind == WRITE:
            operation.data = operation.data[:result]
            if operation.durable:
                self._settle(self._inodes[operation.inode], [operation])

    def _forget(self, operation: Operation) -> None:
        for file in self._inodes.values():
            file.pending = [each for each in file.pending if _of(each) is not operation]

    def _settle(self, file: File, covered: list[Operation]) -> None:
        left = []
        for each in file.pending:
            if all(_of(each) is not one for one in covered):
                left.append(each)
            elif isinstance(each, tuple):
                file.names.update(each[1])
            elif each.kind == WRITE:
                write(file.content, each.at, each.data)
            else:
                resize(file.content, each)
        file.pending = left

    def _path(self, data: bytes) -> str:
        return data.decode().removeprefix(self.under).strip("/")

    def _name(self, record: Operation, names: list[tuple[str, File | None]]) -> None:
        """Both names of a rename are in one directory here, so it happens or doesn't."""
        folder = self._now[str(Path(names[0][0]).parent).removeprefix(".")]
        folder.pending.append((record, [(Path(path).name, file) for path, file in names]))

    def cut(self, target: Path, chance: random.Random) -> None:
        """`target` becomes what may be left; which of it is drawn."""
        keep = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        self._build(self.root, target, lambda: chance.random() < keep)

    def _build(self, file: File, target: Path, kept: Any) -> None:
        if not file.folder:
            content = bytearray(file.content)
            for each in file.pending:
                assert isinstance(each, Operation)
                if each.kind != WRITE:
                    if kept():
                        resize(content, each)
                    continue
                for place, data in sectors(each):
                    if kept():
                        write(content, place, data)
            target.write_bytes(content)
            return
        target.mkdir(exist_ok=True, mode=0o700)
        names = dict(file.names)
        for each in file.pending:
            assert isinstance(each, tuple)
            if kept():
                names.update(each[1])
        for name, found in names.items():
            if found is not None:
                self._build(found, target / name, kept)


def _of(pending: Operation | tuple[Operation, Any]) -> Operation:
    return pending[0] if isinstance(pending, tuple) else pending


def owed(notes: list[dict[str, Any]]) -> dict[tuple[int, int], set[str]]:
    """What must be there after these notes: digests by (engine, seed of the prompt)."""
    found: dict[tuple[int, int], set[str]] = {}
    for note in notes:
        for number, seed, held in note.get("ack", []):
            found[number, seed] = set(held)
        dropped = set(note.get("dropped", []))
        for held in found.values() if dropped else []:
            held -= dropped
    return found


def gone(notes: list[dict[str, Any]]) -> set[str]:
    """Digests of blocks that must not be there after these notes."""
    found: set[str] = set()
    for note in notes:
        found |= set(note.get("gone", []))
        found -= set(note.get("back", []))
    return found
