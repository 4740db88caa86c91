"""A router's end of KV events, over the wire: what it hears is decoded as vLLM's own types have it.

The fields are those of vllm.distributed.kv_events in vLLM 0.32 (its published schema); the real
ones decode the same bytes in tests/peers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from kvc2.config import REPLAY_ENDING

END = (-1).to_bytes(8, "big", signed=True)
WAIT_MS = 10_000
Hash = bytes | int


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


DECODER = msgspec.msgpack.Decoder(KVEventBatch)


@dataclass
class Replica:
    """What a router knows of one daemon: the blocks of each medium, and which prompt's blocks they
    are: its own digest of the tokens up to a block's end, and of extra keys, to their media."""

    there: dict[str, set[Hash]] = field(default_factory=dict)
    prefixes: dict[Hash, bytes] = field(default_factory=dict)  # hash of a block: our digest
    cleared: int = 0
    orphans: int = 0

    def apply(self, batch: bytes) -> None:
        for event in DECODER.decode(batch).events:
            match event:
                case AllBlocksCleared():
                    self.there.clear()
                    self.cleared += 1
                case BlockRemoved():
                    assert event.medium is not None
                    self.there.setdefault(event.medium, set()).difference_update(event.block_hashes)
                case BlockStored():
                    self.learn(event)

    def learn(self, event: BlockStored) -> None:
        assert event.medium is not None
        self.there.setdefault(event.medium, set()).update(event.block_hashes)
        if not event.token_ids:
            return  # of opaque keys
        size, parent = event.block_size, event.parent_block_hash
        assert len(event.token_ids) == size * len(event.block_hashes)
        self.orphans += parent is not None and parent not in self.prefixes
        before = b"" if parent is None else self.prefixes.get(parent, b"unknown")
        for at, block in enumerate(event.block_hashes):
            keys = event.extra_keys[at] if event.extra_keys else None
            before = chained(before, event.token_ids[at * size : (at + 1) * size], keys)
            self.prefixes[block] = before

    def cached_blocks(self, tokens: list[int], size: int, salt: str | None) -> int:
        """Leading blocks of the prompt that it has, in whatever medium."""
        known = {self.prefixes.get(block) for at in self.there.values() for block in at}
        found, before = 0, b""
        for first in range(0, len(tokens) - size + 1, size):
            keys = (salt,) if salt and first == 0 else None
            before = chained(before, tokens[first : first + size], keys)
            if before not in known:
                break
            found += 1
        return found


def chained(before: bytes, tokens: list[int], keys: tuple[Any, ...] | None) -> bytes:
    said = repr((before, tokens, keys and [list(k) if isinstance(k, list) else k for k in keys]))
    return hashlib.sha256(said.encode()).digest()


class Listener:
    """Subscribed, and caught up by replay, to the daemon whose events are at `path`."""

    def __init__(self, path: Path, topic: str = "") -> None:
        self.replica, self.last, self.gaps = Replica(), -1, 0
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(f"ipc://{path}")
        self._sub.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._asking = self._context.socket(zmq.DEALER)
        self._asking.connect(f"ipc://{path}{REPLAY_ENDING}")

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """What the daemon answers to one request."""
        self._asking.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        while True:
            assert self._asking.poll(WAIT_MS), "no answer to a request for replay"
            empty, _, number, batch = self._asking.recv_multipart()
            assert empty == b""
            if number == END:
                return found
            found.append((int.from_bytes(number, "big"), batch))

    def catch_up(self) -> Replica:
        """What was published by now, from the next number on."""
        for number, batch in self.replay(self.last + 1):
            self.heard(number, batch)
        return self.replica

    def listen(self, timeout_ms: int) -> bool:
        """One published batch, and before it what of the numbers before it was not heard."""
        if not self._sub.poll(timeout_ms):
            return False
        _, number, batch = self._sub.recv_multipart()
        at = int.from_bytes(number, "big")
        if at > self.last + 1:
            self.gaps += 1
            self.catch_up()
        self.heard(at, batch)
        return True

    def heard(self, number: int, batch: bytes) -> None:
        if number > self.last:
            self.replica.apply(batch)
            self.last = number

    def close(self) -> None:
        self._context.destroy(linger=0)
