"""A file of quantised experts, which a restart maps: they are packed once, and lie in memory once.

    tensors, each from a multiple of 4096 bytes on
    footer   JSON: what the file is made of, by which version, and the digest of each tensor
    trailer  length of the footer, xxh3_128 of it, magic: the last bytes of the file

While it is made the file has no name, so that a process that dies leaves nothing; its pages are the
memory of the weights that are being packed, and remain so. A file that is of other weights or of
another version, or whose bytes are not those that were written, is not used and is replaced.

Whoever writes into such a file while an engine has mapped it changes that engine's weights, so that
it is made readable alone. Not responsible for what the tensors mean (quantised).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

log = logging.getLogger(__name__)

VERSION = 1  # rises with any change of the file, of a record, or of how floats are quantised
_MAGIC = b"KVC2PACK"
_TRAILER_BYTES = 8 + 16 + len(_MAGIC)
_FOOTER_BYTES_MAX = 100_000_000
_PAGE = mmap.PAGESIZE
_HASHING = 2  # threads: as memory gives what they hash

Layout = Mapping[str, tuple[int, int]]  # of tensors of bytes by name: [count, bytes of one]


@dataclass(frozen=True)
class Made:
    """What a file is made of. `source`: the digest of the weights before they were quantised."""

    source: str
    format: str
    layout: Layout

    def facts(self) -> dict[str, Any]:
        layout = {name: list(shape) for name, shape in self.layout.items()}
        return {"version": VERSION, "source": self.source, "format": self.format, "layout": layout}


def plain(layout: Layout) -> dict[str, Tensor]:
    """The same tensors in memory that no file has."""
    return {name: torch.empty(shape, dtype=torch.uint8) for name, shape in layout.items()}


def load(path: Path, made: Made) -> dict[str, Tensor] | None:
    """The tensors of a file, mapped; None for one that can't be used, which the log says. They
    can't be written to."""
    try:
        with path.open("rb") as file:
            memory = _mapped(file.fileno(), os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s can't be mapped, and is made anew: %s", path, error)
        return None
    try:
        return _checked(memory, made)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s is made anew: %s", path, error)
        return None


class Draft:
    """A file that is being made. `tensors` are to be filled, and are its content from then on; the
    file gets its name by `keep`. Raises OSError, for one where there is no room."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._layout = layout
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o400)
        try:
            size = sum(_whole(count * each) for count, each in layout.values())
            os.posix_fallocate(self._fd, 0, max(1, size))  # a hole that finds no room is a signal
            memory = mmap.mmap(self._fd, max(1, size))
        except OSError:
            os.close(self._fd)
            raise
        self._size = size
        self.tensors = _tensors(memory, layout)

    def keep(self, made: Made) -> None:
        """Gives the file its name, in the place of another. Raises OSError, and leaves the tensors
        as they are in any case."""
        try:
            footer = json.dumps(made.facts() | {"tensors": _digests(self.tensors)}).encode()
            trailer = len(footer).to_bytes(8, "little") + xxhash.xxh3_128_digest(footer) + _MAGIC
            os.pwrite(self._fd, footer + trailer, self._size)
            os.fsync(self._fd)
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            with suppress(FileNotFoundError):
                beside.unlink()
            # src_dir_fd, which an absolute path doesn't need, is what makes Python follow the link
            source = f"/proc/self/fd/{self._fd}"
            os.link(source, beside, src_dir_fd=self._fd, follow_symlinks=True)
            beside.replace(self._path)
        finally:
            os.close(self._fd)


def _mapped(fd: int, size: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ)


def _checked(memory: mmap.mmap, made: Made) -> dict[str, Tensor]:
    """Raises ValueError, KeyError or TypeError with what is wrong."""
    with memoryview(memory) as view:
        end = len(view) - _TRAILER_BYTES
        if end < 0 or view[-len(_MAGIC) :] != _MAGIC:
            raise ValueError("it has no end")
        length = int.from_bytes(view[end : end + 8], "little")
        if length > min(end, _FOOTER_BYTES_MAX):
            raise ValueError("its footer is longer than the file")
        text = bytes(view[end - length : end])
        if xxhash.xxh3_128_digest(text) != view[end + 8 : end + 24]:
            raise ValueError("its footer is damaged")
    footer = json.loads(text)
    digests = footer.pop("tensors")
    facts = made.facts()
    for name in ("version", "format", "source", "layout"):
        if footer[name] != facts[name]:
            raise ValueError(f"it has another {name}")
    if sum(_whole(count * each) for count, each in made.layout.values()) != end - length:
        raise ValueError("it has another size")
    tensors = _tensors(memory, made.layout)
    if _digests(tensors) != digests:
        raise ValueError("its tensors are damaged")
    return tensors


def _tensors(memory: mmap.mmap, layout: Layout) -> dict[str, Tensor]:
    """One after the other. They keep the mapping."""
    found, begin = {}, 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, (count, each) in layout.items():
            part = torch.frombuffer(memory, dtype=torch.uint8, count=count * each, offset=begin)
            found[name] = part.view(count, each)
            begin += _whole(count * each)
    return found


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    def digest(tensor: Tensor) -> str:
        return xxhash.xxh3_128_hexdigest(tensor.numpy().data)

    with ThreadPoolExecutor(_HASHING) as threads:
        return dict(zip(tensors, threads.map(digest, tensors.values()), strict=True))


def _whole(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
