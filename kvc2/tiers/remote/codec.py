"""Blocks as a remote store has them: what they are called, and what makes their bytes believed.

    name   kvc2:1:LAYOUT:DIGEST      LAYOUT 16, DIGEST 64 hexadecimal digits
    value  header (4096) | payload | MAC (32)

Header and payload are those of a page in the arena: whole blocks, all heads and layers, so that an
engine of any tensor-parallel shape with this layout reads them. Generations mean nothing here: 0.

A store is nobody's friend: whoever can write to it may have put there anything, and an old value of
another block too. So a value counts only if

  1. it has just the bytes that one of this layout has,
  2. its MAC, HMAC-SHA256 over header and payload, is that of the namespace's key, which only hosts
     with the secret file have (namespaces of others have other keys),
  3. its header is sound and names this very block: namespace and era, digest of the whole prefix,
     parent, tokens or opaque key, extras, layout (csrc/block/header.h),
  4. its payload has the checksum that the header says.

Until all four hold no byte of it leaves this file. Not here: how it is fetched (link.py).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.layout import HEADER_BYTES
from kvc2.tiers.base import U8, U32, U64, PageShape, part_of

FORMAT = b"kvc2:1"
MAC_BYTES = 32
EXTERNAL_KEY_MAX = 64
ALIGNMENT = 4096


@dataclass(frozen=True)
class Shared:
    """A namespace as hosts know it that share a store: its 32 bytes, and the key of its MACs."""

    name: bytes
    key: bytes = field(repr=False)


def shared_key(secret: bytes, tenant_secret: bytes) -> bytes:
    """32 bytes: of what hosts with this secret share for a tenant with that secret (empty: the
    default one, whose own secret no other host has)."""
    return hmac.digest(secret, b"kvc2.remote.tenant\0" + tenant_secret, "sha256")


def mac_key(key: bytes, name: bytes) -> bytes:
    """32 bytes: of the MACs of one namespace."""
    return hmac.digest(key, b"kvc2.remote.mac\0" + name, "sha256")


class Verdict(Enum):
    """What a value was found to be."""

    GOOD = "good"
    SIZE = "size"
    MAC = "mac"
    OTHER = "other"  # a header of another block, or none
    PAYLOAD = "payload"


def value_bytes(shape: PageShape) -> int:
    return HEADER_BYTES + shape.payload_bytes + MAC_BYTES


@dataclass(frozen=True)
class Chain:
    """Blocks of a namespace's era, as the store knows them: the leading ones of a prompt, or those
    of opaque keys, of which each is a chain for itself. digests and parents [n, 32], keys [n, 16],
    tokens [n, page_size], extras [n, 32]; external_bytes [n] and external_keys [n, 64] as in
    `_core.Records`."""

    name: bytes
    digests: U8
    parents: U8
    keys: U8
    tokens: U32
    extras: U8
    external_bytes: U8
    external_keys: U8

    @staticmethod
    def of(
        name: bytes, tokens: U32, page_size: int, extras: _core.PromptExtras | None, rows: U8
    ) -> Chain:
        """`rows`: what `extras` have, by block; takes 1 us a block."""
        count = tokens.size // page_size
        digests = _core.chain_digests(name, tokens, page_size, extras)
        return Chain(
            name,
            digests,
            np.concatenate([_row(name), digests])[:count],
            _core.chain_keys(name, tokens, page_size, extras),
            tokens[: count * page_size].reshape(count, page_size),
            rows,
            np.zeros(count, np.uint8),
            np.zeros((count, EXTERNAL_KEY_MAX), np.uint8),
        )

    @staticmethod
    def of_keys(name: bytes, keys: Sequence[bytes], page_size: int) -> Chain:
        """Takes 4 us a key."""
        padded = [key.ljust(EXTERNAL_KEY_MAX, b"\0") for key in keys]
        lengths = np.array([len(key) for key in keys], np.uint8)
        words = [
            len(key).to_bytes(4, "little") + row for key, row in zip(keys, padded, strict=True)
        ]
        root = _core.xxh3_128(name)
        return Chain(
            name,
            _rows([hashlib.sha256(name + each).digest() for each in words], 32),
            np.repeat(_row(name), len(keys), axis=0),
            _rows([_core.xxh3_128(root + each) for each in words], 16),
            np.zeros((len(keys), page_size), np.uint32),
            np.zeros((len(keys), 32), np.uint8),
            lengths,
            _rows(padded, EXTERNAL_KEY_MAX),
        )

    def chosen(self, rows: NDArray[np.int64]) -> Chain:
        """These blocks [n]."""
        return Chain(
            self.name,
            self.digests[rows],
            self.parents[rows],
            self.keys[rows],
            self.tokens[rows],
            self.extras[rows],
            self.external_bytes[rows],
            self.external_keys[rows],
        )

    def names(self, shape: PageShape, first: int, end: int) -> list[bytes]:
        """Of blocks [first, end)."""
        return [self.name_of(shape, each) for each in range(first, end)]

    def name_of(self, shape: PageShape, block: int) -> bytes:
        stem = FORMAT + b":" + shape.layout_digest[:8].hex().encode() + b":"
        digest: bytes = self.digests[block].tobytes()
        return stem + digest.hex().encode()

    def records(self, blocks: NDArray[np.int64]) -> _core.Records:
        """Of these blocks [n]."""
        return _core.Records(
            namespaces=np.repeat(_row(self.name), blocks.size, axis=0),
            digests=self.digests[blocks],
            parents=self.parents[blocks],
            keys=self.keys[blocks],
            tokens=self.tokens[blocks],
            generations=np.zeros(blocks.size, np.uint64),
            external_bytes=self.external_bytes[blocks],
            external_keys=self.external_keys[blocks],
            extras=self.extras[blocks],
        )


def _row(name: bytes) -> U8:
    """[1, 32]."""
    return np.frombuffer(name, np.uint8).reshape(1, 32)


def _rows(each: Sequence[bytes], width: int) -> U8:
    """[n, width]."""
    return np.frombuffer(b"".join(each), np.uint8).reshape(len(each), width)


class Sealer:
    """Values of one namespace's blocks in pages of one layout. Any thread may use it."""

    def __init__(self, key: bytes, shape: PageShape) -> None:
        self._key = key
        self._shape = shape

    def seal(self, arena: U8, payloads: U64, records: _core.Records) -> list[memoryview]:
        """Values of the blocks [n] whose payloads begin at these offsets of the arena."""
        size = self._shape.payload_bytes
        stride = -(-value_bytes(self._shape) // ALIGNMENT) * ALIGNMENT
        memory = np.empty(payloads.size * stride, np.uint8)
        starts = np.arange(payloads.size, dtype=np.uint64) * np.uint64(stride)
        for start, payload in zip(starts.tolist(), payloads.tolist(), strict=True):
            begin = start + HEADER_BYTES
            memory[begin : begin + size] = arena[payload : payload + size]
        _core.encode_headers(memory.data, starts, records, self._shape.layout_digest, size)
        values = []
        for start in starts.tolist():
            value = memory[start : start + value_bytes(self._shape)]
            value[-MAC_BYTES:] = np.frombuffer(self._mac(value[:-MAC_BYTES].data), np.uint8)
            values.append(value.data)
        return values

    def open(
        self, values: Sequence[bytes], records: _core.Records, arena: U8, payloads: U64
    ) -> list[Verdict]:
        """Judge the values of blocks [n], each for itself, and copy the payloads of those that are
        good to these offsets of the arena."""
        size, verdicts = self._shape.payload_bytes, []
        for i, (value, to) in enumerate(zip(values, payloads.tolist(), strict=True)):
            verdicts.append(self._judge(value, part_of(records, slice(i, i + 1))))
            if verdicts[-1] is not Verdict.GOOD:
                continue
            payload = np.frombuffer(value, np.uint8, size, HEADER_BYTES)
            arena[to : to + size] = payload
        return verdicts

    def _judge(self, value: bytes, record: _core.Records) -> Verdict:
        if len(value) != value_bytes(self._shape):
            return Verdict.SIZE
        view = memoryview(value)
        if not hmac.compare_digest(self._mac(view[:-MAC_BYTES]), view[-MAC_BYTES:]):
            return Verdict.MAC
        (state,) = _core.verify_blocks(
            view,
            np.zeros(1, np.uint64),
            record,
            self._shape.layout_digest,
            self._shape.payload_bytes,
        )
        if state == _core.BLOCK_OK:
            return Verdict.GOOD
        return Verdict.PAYLOAD if state == _core.BLOCK_BAD_PAYLOAD else Verdict.OTHER

    def _mac(self, covered: memoryview) -> bytes:
        made = hmac.new(self._key, digestmod=hashlib.sha256)
        made.update(covered)  # lets other threads run
        return made.digest()
