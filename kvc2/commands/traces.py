"""Traces of requests, read from files: what `kvc2 replay` and the benchmarks replay.

Three formats, told apart by the name's ending and the fields: `*.kvt.npz` (a request is the path of
an `anchor` block and `n_new` fresh ones), Mooncake's JSONL (`timestamp` in ms, `input_length`,
`hash_ids`), and that of Qwen-Bailian (`timestamp` in s, `chat_id`, `parent_chat_id` beside them);
JSONL may be compressed (`.jsonl.zst`, if python's `zstandard` is there).
Not responsible for replaying: see replay.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors

U32 = NDArray[np.uint32]
BLOCK_TOKENS = {"mooncake": 512, "bailian": 16}  # of a hash id, as the publishers say


@dataclass(frozen=True)
class Trace:
    """Requests in order of time. Request i asks for `ids[offsets[i]:offsets[i + 1]]`, full blocks
    of `block_tokens` tokens by number, equal where the whole prefix is; numbers are < `blocks`."""

    name: str
    block_tokens: int
    ids: U32
    offsets: NDArray[np.int64]  # [requests + 1]
    input_tokens: NDArray[np.int64]  # [requests], with what is no full block
    blocks: int

    def __len__(self) -> int:
        return len(self.input_tokens)

    def request(self, i: int) -> U32:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def read(path: Path) -> Trace:
    """Raises InvalidConfig if the file is missing or in none of the formats."""
    if not path.is_file():
        raise errors.InvalidConfig("trace", str(path), "a file")
    if path.name.endswith(".npz"):
        return _read_npz(path)
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        return _read_jsonl(path)
    raise errors.InvalidConfig("trace", str(path), "*.kvt.npz, *.jsonl or *.jsonl.zst")


def name_of(path: Path) -> str:
    return path.name.split(".")[0]


def _read_npz(path: Path) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as file:
            anchors, fresh = file["anchor"].astype(np.int64), file["n_new"].astype(np.int64)
            tokens, size = file["input"].astype(np.int64), int(file["block_size"])
    except (KeyError, ValueError, OSError) as error:
        raise errors.InvalidConfig("trace", str(path), f"arrays of a kvt file ({error})") from error
    ends = np.cumsum(fresh)
    owners = np.repeat(np.arange(len(fresh)), fresh)  # the request that made a block
    paths: list[U32] = []
    for i, (anchor, new) in enumerate(zip(anchors.tolist(), fresh.tolist(), strict=True)):
        if anchor >= ends[i] - new:
            raise errors.InvalidConfig("trace", str(path), f"request {i}: an anchor made before it")
        head = np.empty(0, np.uint32)
        if anchor >= 0:
            owner = int(owners[anchor])
            # what is shared is the owner's path up to the anchor, one of its fresh blocks
            head = paths[owner][: len(paths[owner]) - int(ends[owner] - 1 - anchor)]
        paths.append(np.concatenate([head, np.arange(ends[i] - new, ends[i], dtype=np.uint32)]))
    return _trace(path, size, paths, tokens)


def _lines(path: Path) -> Iterator[str]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as file:
            yield from file
        return
    try:
        import zstandard
    except ImportError as error:
        allowed = "a file that is not compressed, or zstandard: pip install 'kvc2[plot]'"
        raise errors.InvalidConfig("trace", str(path), allowed) from error
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as plain:
        yield from io.TextIOWrapper(plain, encoding="utf-8")


def _read_jsonl(path: Path) -> Trace:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["hash_ids"], rows[-1]["input_length"], rows[-1]["timestamp"]
        except (ValueError, KeyError, TypeError) as error:
            allowed = f"JSON with timestamp, input_length and hash_ids in line {number}"
            raise errors.InvalidConfig("trace", str(path), allowed) from error
    rows.sort(key=lambda row: float(row["timestamp"]))
    kind = "bailian" if rows and "parent_chat_id" in rows[0] else "mooncake"
    size = BLOCK_TOKENS[kind]
    number_of: dict[tuple[int, int], int] = {}  # by the block before and the hash id
    paths, tokens = [], []
    for row in rows:
        full = int(row["input_length"]) // size  # the last hash may be of part of a block
        before, blocks = -1, []
        for hash_id in row["hash_ids"][:full]:
            before = number_of.setdefault((before, hash_id), len(number_of))
            blocks.append(before)
        paths.append(np.array(blocks, np.uint32))
        tokens.append(int(row["input_length"]))
    return _trace(path, size, paths, np.array(tokens, np.int64))


def _trace(path: Path, size: int, paths: list[U32], tokens: NDArray[np.int64]) -> Trace:
    offsets = np.zeros(len(paths) + 1, np.int64)
    np.cumsum([len(each) for each in paths], out=offsets[1:])
    ids = np.concatenate(paths) if paths else np.empty(0, np.uint32)
    blocks = int(ids.max()) + 1 if len(ids) else 0
    return Trace(name_of(path), size, ids.astype(np.uint32), offsets, tokens, blocks)
