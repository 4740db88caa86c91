"""Reads safetensors checkpoints, whole or sharded, into memory, and digests what it read.

Not responsible for what a tensor means: models/ asks for them by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from engine import digests
from engine.config import read_json
from engine.device import CPU, Device
from engine.errors import CheckpointError
from engine.extents import Extent
from engine.quantised import BLOCK, FP8, Quantised, floats, of_blocks
from kvc2.host.file_stamp import Stamp

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit
_READ_BYTES = 1 << 20  # hashed while it is still in the processor's cache
_SAMPLE_BYTES = 64 << 20  # read again of what was digested before
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_FP8_SCALES = "_scale_inv"  # behind a tensor's name, where there is a scale for each block of it


class Checkpoint:
    """The tensors of a model directory by name, each read when it is asked for, converted to
    `dtype` and put into the memory of `device`. `with Checkpoint(...)` closes the files.

    What is loaded is what is digested: bytes come by read(2) into memory of their own and are
    hashed there. Hashes that an earlier start kept stand for what isn't loaded, where `recall`
    finds them right. Nothing is mapped: whoever writes, cuts or replaces a file later changes
    neither the weights in memory nor their digest. Written while it is being read, a file is
    loaded and digested as the mixture that was read, or refused by `digest`, where the file's time
    stamp tells.

    Raises CheckpointError for a missing or unreadable file. Not for concurrent use.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        device: Device = CPU,
        *,
        experts_on_disk: bool = False,
        experts_on: Device | None = None,
    ) -> None:
        self.device = device
        self.experts_on = experts_on or device  # where their weights are read to
        self.experts_on_disk = experts_on_disk  # whoever builds a model leaves them there
        self._dtype = dtype
        self.model_dir = model_dir
        self._hashes: dict[_Entry, str] = {}  # of the tensors read so far, or recalled
        self._recalled: Path | None = None
        with ExitStack() as stack:
            self._files = [_File(path, stack) for path in shards(model_dir)]
            self._opened = stack.pop_all()
        self._entries = {entry.name: entry for file in self._files for entry in file.entries}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def memory_bytes(self) -> int:
        """What all tensors take in the run-time dtype."""
        return sum(math.prod(e.shape) for e in self._entries.values()) * self._dtype.itemsize

    def tensor(self, name: str, *shape: int, device: Device | None = None) -> Tensor:
        """A tensor in the checkpoint's run-time dtype, in the memory of its device or another; its
        shape must be the one given."""
        memory = (device or self.device).memory
        if len(shape) == 2 and (matrix := self.fp8(name, *shape)) is not None:
            return floats(matrix, FP8).to(memory, self._dtype)
        return self._stored(name, *shape).to(memory, self._dtype)

    def fp8(self, name: str, rows: int, inputs: int) -> Quantised | None:
        """A matrix as it is stored in fp8, with a scale for each block; None for another."""
        if name not in self or self._entries[name].dtype != "F8_E4M3":
            return None
        values = self._stored(name, rows, inputs).view(torch.uint8)
        if (values & 0x7F == 0x7F).any():
            raise CheckpointError(f"{name} holds NaN")
        blocks = -(-rows // BLOCK), -(-inputs // BLOCK)
        scales = self._stored(name + _FP8_SCALES, *blocks).float()
        return Quantised(values, of_blocks(scales, rows))

    @property
    def has_fp8_experts(self) -> bool:
        """Whether any expert is stored in fp8, by its name."""
        return any(".experts." in e.name and e.dtype == "F8_E4M3" for e in self._entries.values())

    def _stored(self, name: str, *shape: int) -> Tensor:
        """A tensor as it is stored."""
        entry, stored = self._entry(name, *shape)
        data = torch.empty(entry.num_bytes, dtype=torch.uint8)
        self._read(entry, data.numpy().data)
        return data.view(stored).view(shape)

    def _entry(self, name: str, *shape: int) -> tuple[_Entry, torch.dtype]:
        """A tensor's place and its type as stored."""
        if name not in self._entries:
            raise CheckpointError(f"{self.model_dir} lacks the tensor {name}")
        entry = self._entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{name} has the shape {entry.shape}, expected {shape}")
        stored = _DTYPES.get(entry.dtype)
        if stored is None:
            raise CheckpointError(f"{name} is of type {entry.dtype}, not {', '.join(_DTYPES)}")
        if entry.num_bytes != math.prod(shape) * stored.itemsize:
            raise CheckpointError(f"{name} has {entry.num_bytes} bytes, which is not its shape's")
        return entry, stored

    def extent(self, name: str, *shape: int) -> Extent:
        """Where a tensor lies, for who reads it later. It must be stored in the run-time dtype."""
        entry, stored = self._entry(name, *shape)
        if stored != self._dtype:
            mend = f"it stays on disk, so that it must be stored as {self._dtype}"
            raise CheckpointError(f"{name} is of type {entry.dtype}: {mend}")
        return Extent(
            name, entry.file.fd, entry.begin, entry.num_bytes, lambda: self._hashes[entry]
        )

    def digest(self) -> bytes:
        """SHA-256 over the sorted (tensor name, dtype, shape, xxh3_128 of its bytes): 32 bytes.

        The same for any sharding and any directory name. Reads what nobody has asked for. Raises
        CheckpointError if a file was written since it was opened.
        """
        buffer = memoryview(bytearray(_READ_BYTES))
        lines = []
        for entry in (entry for file in self._files for entry in file.entries):
            if entry not in self._hashes:
                self._read(entry, buffer)
            told = [entry.name, entry.dtype, entry.shape, self._hashes[entry]]
            lines.append(json.dumps(told).encode() + b"\n")
        for file in self._files:
            file.check_unchanged()
        return hashlib.sha256(b"".join(sorted(lines))).digest()

    def recall(self, kept: Path) -> None:
        """Take the hashes that `keep` kept there, if the files are those that were read then: by
        their stamps, which nobody can set back, and by the bytes of some tensors, drawn anew each
        time. A tensor that is loaded later and has another hash is a CheckpointError."""
        hashes = digests.load(kept, [file.stamp for file in self._files])
        if hashes is None or hashes.keys() != self._entries.keys():
            return
        self._hashes = {entry: hashes[name] for name, entry in self._entries.items()}
        self._recalled = kept
        try:
            self._read_some()
        except CheckpointError as error:
            log.warning("%s has changed, and its stamp has not: %s", self.model_dir, error)
            self._hashes, self._recalled = {}, None

    def keep(self, kept: Path) -> None:
        """The hashes of all tensors, after `digest`; nothing of files that may have changed."""
        if self._recalled == kept:
            return
        if all(file.settled and file.stamp == file.stamp_now() for file in self._files):
            hashes = {name: self._hashes[entry] for name, entry in self._entries.items()}
            digests.save(kept, [file.stamp for file in self._files], hashes)

    def _read_some(self) -> None:
        buffer, left = memoryview(bytearray(_READ_BYTES)), _SAMPLE_BYTES
        entries = [entry for entry in self._entries.values() if entry.num_bytes > 0]
        random.SystemRandom().shuffle(entries)
        for entry in entries:
            self._read(entry, buffer)
            left -= entry.num_bytes
            if left <= 0:
                return

    def _read(self, entry: _Entry, into: memoryview) -> None:
        """Read a tensor and note its hash. `into` has its size, or is filled again and again."""
        hashed = xxhash.xxh3_128()
        for begin in range(0, entry.num_bytes, _READ_BYTES):
            place = begin % len(into)
            part = into[place : place + min(_READ_BYTES, entry.num_bytes - begin)]
            entry.file.read(part, entry.begin + begin)
            hashed.update(part)
        if self._hashes.setdefault(entry, hashed.hexdigest()) != hashed.hexdigest():
            if self._recalled is not None:
                digests.drop(self._recalled)
            raise entry.file.changed()


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


class _File:
    """An open safetensors file: u64 length, then a JSON header with offsets behind it, then bytes.

    `stack` closes it.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} can't be opened: {error.strerror}") from error
        stack.callback(os.close, self.fd)
        self._first = self._facts()
        self.stamp = self.stamp_now()
        self.settled = self.stamp.settled  # before anything was read
        self.entries = self._read_header(self._first[0])

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` on."""
        while into:
            try:
                got = os.preadv(self.fd, [into], offset)
            except OSError as error:
                raise CheckpointError(f"{self._path} can't be read: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(f"{self._path} is shorter than its header says")
            into, offset = into[got:], offset + got

    def stamp_now(self) -> Stamp:
        return Stamp.of(self._path, self.fd)

    def check_unchanged(self) -> None:
        if self._facts() != self._first:
            raise self.changed()

    def changed(self) -> CheckpointError:
        return CheckpointError(f"{self._path} was written while it was being read: start again")

    def _facts(self) -> tuple[int, int]:
        facts = os.fstat(self.fd)
        return facts.st_size, facts.st_mtime_ns

    def _read_header(self, file_bytes: int) -> list[_Entry]:
        try:
            length = bytearray(min(8, file_bytes))
            self.read(memoryview(length), 0)
            start = 8 + int.from_bytes(length, "little")
            if start > min(file_bytes, _HEADER_BYTES_MAX):
                raise ValueError(f"it would end at byte {start} of {file_bytes}")
            text = bytearray(start - 8)
            self.read(memoryview(text), 8)
            header = json.loads(text)
            header.pop("__metadata__", None)
            entries = [_entry(self, name, about, start) for name, about in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path} has no readable safetensors header: {error}"
            ) from error
        if any(not start <= e.begin <= e.end <= file_bytes for e in entries):
            raise CheckpointError(f"{self._path} is shorter than its header says")
        return entries


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: its bytes are those from `begin` to before `end`."""

    file: _File
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def _entry(file: _File, name: str, about: dict[str, object], start: int) -> _Entry:
    """Raises ValueError, KeyError or TypeError for what is not one."""
    shape, dtype, offsets = about["shape"], about["dtype"], about["data_offsets"]
    if not isinstance(dtype, str):
        raise TypeError(f"{name} has the dtype {dtype!r}")
    begin, end = _sizes(offsets)
    return _Entry(file, name, dtype, tuple(_sizes(shape)), start + begin, start + end)


def _sizes(values: object) -> Sequence[int]:
    if not isinstance(values, list) or any(type(n) is not int or n < 0 for n in values):
        raise TypeError(f"{values!r} is no list of sizes")
    return values
