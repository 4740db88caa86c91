"""Payloads of blocks in the messages of Read and Write (kvc2.v1.ReadResponse, WriteRequest), for
either end: a part of one block, or several whole ones.

Not here: whose the blocks are, and what is done with one that came damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import Message
from typing_extensions import Buffer

MESSAGE_BYTES = 1 << 20  # of payload, at most
CHECKSUM_BYTES = 16  # of a block: xxh3_128, canonical


class Part(NamedTuple):
    """Bytes of one block. checksum: empty but for the block's last part."""

    block: int
    offset: int
    payload: memoryview
    checksum: bytes


def blocks_per_message(payload_bytes: int) -> int:
    return max(1, MESSAGE_BYTES // max(1, payload_bytes))


def messages_of(
    kind: type[Any], block: int, payloads: Sequence[Buffer], checksums: Sequence[bytes]
) -> Iterator[bytes]:
    """Blocks from this one on, as many as go into one message; or one block, in as many messages
    as it takes."""
    if len(payloads) > 1:
        yield with_payload(kind(block=block, checksum=b"".join(checksums)), *payloads)
        return
    payload = memoryview(payloads[0])
    for offset in range(0, len(payload), MESSAGE_BYTES):
        part = payload[offset : offset + MESSAGE_BYTES]
        last = offset + len(part) == len(payload)
        yield with_payload(
            kind(block=block, offset=offset, checksum=checksums[0] if last else b""), part
        )


def parts_of(message: Any, payload_bytes: int) -> Iterator[Part]:
    """Of a message: one, or each of several whole blocks."""
    block, payload, checksum = message.block, memoryview(message.payload), message.checksum
    several, rest = divmod(len(payload), payload_bytes)
    if several < 2 or rest or len(checksum) != several * CHECKSUM_BYTES:
        yield Part(block, message.offset, payload, checksum)
        return
    for each in range(several):
        part = payload[each * payload_bytes : (each + 1) * payload_bytes]
        at = each * CHECKSUM_BYTES
        yield Part(block + each, message.offset, part, checksum[at : at + CHECKSUM_BYTES])


def with_payload(message: Message, *payload: Buffer) -> bytes:
    """The message as bytes, whose `payload` is these, one after the other: a message is its fields
    one after the other, so that they are copied once and not three times."""
    number = message.DESCRIPTOR.fields_by_name["payload"].number
    views = [memoryview(each) for each in payload]
    head = message.SerializeToString()
    size = _varint(sum(each.nbytes for each in views))
    return b"".join((head, _varint(number << 3 | 2), size, *views))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
