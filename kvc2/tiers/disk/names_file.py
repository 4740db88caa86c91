"""Which namespaces the disk's blocks may be of, beside the catalogue: what headers can't tell.

    DIR/namespaces   Head; a Row a namespace, its identity's place among those that follow; checksum

A header names the namespace of one era, by a hash. Here is the name, how often it was invalidated,
and its identity, durable before an Invalidate answers. A rebuild takes blocks of present eras of
names that are listed, and no others: what isn't here is lost to it. Not here: what a start knows
when its catalogue is sound (catalogue.py), whose a namespace is (server/tenants.py).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from kvc2 import _core, errors
from kvc2.tiers.disk.lmdb_file import Damaged
from kvc2.tiers.disk.records import NamespaceEntry
from kvc2.tiers.disk.slab_file import Files

MAGIC = b"KVC2NAME"
VERSION = 1
HEAD = struct.Struct("<8sIII")  # magic, version, rows, identities
ROW = struct.Struct("<32sQII")  # name, era, word of its entry, identity: 0 none, else 1 + index
LENGTH = struct.Struct("<I")  # of an identity, before it
CHECKSUM_BYTES = 16


@dataclass
class Names:
    """As the catalogue has them: namespaces, and eras, also of others."""

    namespaces: dict[bytes, NamespaceEntry] = field(default_factory=dict)
    eras: dict[bytes, int] = field(default_factory=dict)


def read(path: Path) -> Names | None:
    """None where it is not there or can't be what we wrote. Raises StartRefused for a version that
    this one does not know."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = data[:-CHECKSUM_BYTES]
    if len(body) < HEAD.size or data[-CHECKSUM_BYTES:] != _core.xxh3_128(body):
        return None
    magic, version, rows, count = HEAD.unpack_from(body)
    if magic != MAGIC:
        return None
    if version != VERSION:
        raise errors.StartRefused(
            f"{path}: format {version}, this version reads {VERSION};"
            " serve it with the version that wrote it, or give another disk.path"
        )
    place = HEAD.size + rows * ROW.size
    identities = []
    for _ in range(count):
        (length,) = LENGTH.unpack_from(body, place)
        identities.append(body[place + LENGTH.size :][:length])
        place += LENGTH.size + length
    names = Names()
    for row in range(rows):
        name, era, word, identity = ROW.unpack_from(body, HEAD.size + row * ROW.size)
        if era:
            names.eras[name] = era
        if identity:
            try:
                names.namespaces[name] = NamespaceEntry.of(word, identities[identity - 1])
            except Damaged:  # a later version's: nothing of it is rebuilt
                continue
    return names


def pack(names: Names, bytes_max: int) -> bytes:
    """The file of these names. What does not fit is left out, those that were never invalidated
    first."""
    rows: list[bytes] = []
    identities: dict[bytes, int] = {}
    size = HEAD.size + CHECKSUM_BYTES
    known = names.namespaces.keys() | names.eras.keys()
    for name in sorted(known, key=lambda name: (name not in names.eras, name)):
        entry = names.namespaces.get(name, NamespaceEntry(0, b""))
        identity = entry.identity
        new = ROW.size
        if identity and identity not in identities:
            new += LENGTH.size + len(identity)
        if size + new > bytes_max:
            continue
        size += new
        number = identities.setdefault(identity, len(identities) + 1) if identity else 0
        rows.append(ROW.pack(name, names.eras.get(name, 0), entry.word, number))
    body = HEAD.pack(MAGIC, VERSION, len(rows), len(identities)) + b"".join(rows)
    body += b"".join(LENGTH.pack(len(each)) + each for each in identities)
    return body + _core.xxh3_128(body)


def write(path: Path, names: Names, bytes_max: int, files: Files) -> None:
    """Durable when this returns. OSError: the file is that of before, or this one."""
    data = pack(names, bytes_max)
    aside = path.with_suffix(".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if files.write(fd, [memoryview(data)], 0) != len(data):
            raise OSError(f"{aside}: short write")
        files.sync(fd)
    finally:
        os.close(fd)
    os.replace(aside, path)
    files.sync_folder(path.parent)
