"""Hashes of a checkpoint's tensors, kept so that a later start need not read what it doesn't use.

    {"version", "files": [stamp of each], "hashes": {tensor: xxh3_128 of its bytes}}
    xxh3_128 of that line

Nothing is kept of files that were changed just before they were opened (kvc2.host.file_stamp). Not
responsible for reading tensors, nor for the check of a sample of them (weights): a file system may
lie, or a disk decay.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import xxhash

from kvc2.host.file_stamp import Stamp

log = logging.getLogger(__name__)

_VERSION = 1


def save(path: Path, stamps: Sequence[Stamp], hashes: Mapping[str, str]) -> None:
    """Logs what prevents it."""
    told = {"version": _VERSION, "files": [astuple(s) for s in stamps], "hashes": dict(hashes)}
    line = json.dumps(told).encode()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n")
        beside.replace(path)
    except OSError as error:
        log.warning("digests are not kept: %s", error)
        with suppress(OSError):
            beside.unlink()


def load(path: Path, stamps: Sequence[Stamp]) -> dict[str, str] | None:
    """The hashes of files with these stamps; None for others, or where the file is damaged."""
    try:
        line, seal, _ = path.read_bytes().split(b"\n")
        if xxhash.xxh3_128_hexdigest(line).encode() != seal:
            raise ValueError("it is damaged")
        told = json.loads(line)
        if told["version"] != _VERSION:
            return None
        if [Stamp(*each) for each in told["files"]] != list(stamps):
            return None
        return {str(name): str(digest) for name, digest in told["hashes"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("digests in %s are taken anew: %s", path, error)
        return None


def drop(path: Path) -> None:
    """What was kept there is wrong."""
    with suppress(OSError):
        path.unlink()
