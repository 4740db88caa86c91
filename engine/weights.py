"""Reads safetensors checkpoints, whole or sharded, and digests them.

Not responsible for what a tensor means: models/ asks for them by name.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from platformdirs import user_cache_path
from safetensors import safe_open
from torch import Tensor

from engine.config import read_json
from engine.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a model directory by name. Files are mapped; a tensor is read when asked for,
    and put on `device`.

    Raises CheckpointError for a missing or unreadable file. Not for concurrent use.
    """

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: torch.device = torch.device("cpu")
    ) -> None:
        self.device = device
        self._dtype = dtype
        self._model_dir = model_dir
        self._files: dict[str, Any] = {}
        for path in shards(model_dir):
            try:
                opened: Any = safe_open(str(path), framework="pt")
            except Exception as error:  # safetensors raises its own class, OSError and others
                raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor in the checkpoint's run-time dtype; its shape must be the one given."""
        if name not in self._files:
            raise CheckpointError(f"{self._model_dir} lacks the tensor {name}")
        found: Tensor = self._files[name].get_tensor(name)
        if tuple(found.shape) != shape:
            raise CheckpointError(f"{name} has the shape {tuple(found.shape)}, expected {shape}")
        return found.to(self.device, self._dtype)


def shards(model_dir: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted. Names with a path in them are refused."""
    if not (model_dir / _INDEX).exists():
        if not (model_dir / _SINGLE).exists():
            raise CheckpointError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}")
        return [model_dir / _SINGLE]
    names = set(read_json(model_dir / _INDEX).get("weight_map", {}).values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{_INDEX} names a file outside its directory: {name!r}")
    missing = sorted(name for name in names if not (model_dir / name).exists())
    if missing or not names:
        raise CheckpointError(f"{model_dir} lacks the shards {missing} that {_INDEX} names")
    return [model_dir / name for name in sorted(names)]


def weights_digest(model_dir: Path, cache_dir: Path | None = None) -> bytes:
    """SHA-256 over the sorted (tensor name, dtype, shape, xxh3_128 of its bytes): 32 bytes.

    The same for any sharding and any directory name. Reads every weight once (GB/s), then only
    stats the files: the result is kept in `cache_dir` (the user's cache directory unless given)
    under the files' device, inode, size and modification time.
    """
    files = shards(model_dir)
    cached = (cache_dir or user_cache_path("kvc2") / "weights") / _stat_key(files)
    with suppress(OSError, ValueError):  # not known yet, or unreadable: it is computed again
        known = bytes.fromhex(cached.read_text(encoding="ascii"))
        if len(known) == 32:
            return known
    digest = hashlib.sha256()
    for line in sorted(line for path in files for line in _tensor_lines(path)):
        digest.update(line)
    _write_atomically(cached, digest.hexdigest())
    return digest.digest()


def _stat_key(files: list[Path]) -> str:
    stats = sorted((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, files))
    return hashlib.sha256(repr(stats).encode()).hexdigest()


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def _tensor_lines(path: Path) -> list[bytes]:
    """One canonical line per tensor of a safetensors file: JSON of name, dtype, shape, hash."""
    if path.stat().st_size == 0:  # can't be mapped
        raise CheckpointError(f"{path} has no readable safetensors header: it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        entries = _entries(path, data)
        view = memoryview(data)
        try:
            hashes = [xxhash.xxh3_128_hexdigest(view[e.begin : e.end]) for e in entries]
        finally:
            view.release()
    return [
        json.dumps([e.name, e.dtype, e.shape, digest]).encode() + b"\n"
        for e, digest in zip(entries, hashes, strict=True)
    ]


def _entries(path: Path, data: mmap.mmap) -> list[_Entry]:
    """The header of a safetensors file: u64 length, then JSON with offsets behind the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        entries = [
            _Entry(name, e["dtype"], e["shape"], start + begin, start + end)
            for name, e in header.items()
            for begin, end in [e["data_offsets"]]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no readable safetensors header: {error}") from error
    if any(not start <= e.begin <= e.end <= len(data) for e in entries):
        raise CheckpointError(f"{path} is shorter than its header says")
    return entries


def _write_atomically(path: Path, text: str) -> None:
    """A cache that can't be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        return
