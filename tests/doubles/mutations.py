"""Messages of the wire, and what becomes of them in a bad cable or a bad client: from one seed."""

from __future__ import annotations

import random
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from kvc2 import _core
from kvc2.server.wiring import SERVICES
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.engines import identity, layout
from tests.doubles.wires import grants, hello, pages, u32

PAYLOAD_BYTES = layout().payload_bytes
NUMBERS = (0, 1, 2, 15, 16, 17, 63, 64, 127, 128, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)
TEXTS = ("", "gpu", "cpu", "tape", "x" * 300, "\0", "\u2028é", "default")


def valid(head: pb.SessionRef, namespace_id: int) -> dict[str, list[Message]]:
    """Calls that a session could make, by their path. None ends the daemon or drops what others
    have: evictions leave what is leased, and no digest or tenant is theirs."""
    tokens, session = u32(*range(40)), {"session": head}
    prefix = {**session, "namespace_id": namespace_id, "tokens": tokens}
    lease = pb.LeaseCommit(request_id=b"r", tokens=u32(*range(16)), pages=pages(u32(1)))
    calls: list[Message] = [
        pb.OpenNamespaceRequest(**session, identity=identity().encode(), salt=b"fuzz", ttl_s=5),
        pb.MatchRequest(**prefix),
        pb.ExplainRequest(**prefix),
        pb.ExplainRequest(**session, request_id=b"r"),
        pb.AcquireRequest(**prefix, request_id=b"r", grants=grants(2), hints=pb.Hints(priority=7)),
        pb.GrantRequest(**session, grants=grants(1)),
        pb.CommitRequest(
            **session, leases=[lease, lease], grants=grants(1), prefill_tokens_per_s=9.0
        ),
        pb.ReleaseRequest(**session, request_ids=[b"r", b"s"], returned=pages(u32(2))),
        pb.PinRequest(**prefix, tier="gpu", hard=True),
        pb.UnpinRequest(**prefix, tier="cpu"),
        pb.PrefetchRequest(**prefix, tier="cpu"),
        pb.InvalidateRequest(**session, namespace_id=namespace_id),
        pb.InvalidateRequest(weights_digest="cd" * 32),
        pb.SetQuotaRequest(tenant="nobody", tier="cpu", max_blocks=1),
        pb.EvictRequest(tier="gpu", blocks=1),
        pb.FlushRequest(deadline_ms=10),
        pb.ScrubRequest(stop=True),
        pb.StatsRequest(),
        pb.AcquireRequest(**prefix, request_id=b"a", place=1),
        pb.ReadRequest(**session, request_id=b"a"),
        written(head, namespace_id)[0],
    ]
    found: dict[str, list[Message]] = {}
    for each in calls:
        name = type(each).__name__.removesuffix("Request")
        found.setdefault(f"{SERVICES[1]}/{name}", []).append(each)
    return found


def written(head: pb.SessionRef, namespace_id: int, seed: int = 0) -> list[Message]:
    """A whole Write of two blocks, the first in two messages: all of them on one stream."""
    commit = pb.LeaseCommit(namespace_id=namespace_id, tokens=u32(*range(seed, seed + 32)))
    first, second = bytes([seed]) * PAYLOAD_BYTES, bytes([seed + 1]) * PAYLOAD_BYTES
    of_first, of_second = _core.xxh3_128(first), _core.xxh3_128(second)
    return [
        pb.WriteRequest(session=head, commit=commit),
        pb.WriteRequest(block=0, payload=first[:100]),
        pb.WriteRequest(block=0, offset=100, payload=first[100:], checksum=of_first),
        pb.WriteRequest(block=1, payload=second, checksum=of_second),
    ]


def first_messages() -> list[Message]:
    """With which an Attach stream could begin."""
    return [hello(), hello(kept_pages=u32(1, 2)), pb.AttachRequest(heartbeat=pb.Heartbeat())]


class Mutator:
    """The same mutations from the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def message(self, kinds: list[Message], *, keep: str = "session") -> bytes:
        """One of these messages: as it is, with other values in it, with other bytes, or no message
        at all. The field `keep` mostly stays, so that the call comes past the session's check."""
        drawn = self.random.choice(kinds)
        mutated = type(drawn)()
        mutated.CopyFrom(drawn)
        for _ in range(self.random.choice((0, 1, 1, 2))):
            self._change_field(mutated, keep)
        data = mutated.SerializeToString()
        if self.random.random() < 0.5:
            data = self._change_bytes(data)
        return data

    def noise(self, most: int = 64) -> bytes:
        return self.random.randbytes(self.random.randrange(most))

    def _change_field(self, message: Message, keep: str) -> None:
        fields = [each for each in message.DESCRIPTOR.fields if each.name != keep]
        if not fields:
            return
        field = self.random.choice(fields)
        if field.is_repeated:
            repeated: Any = getattr(message, field.name)
            if field.type != FieldDescriptor.TYPE_MESSAGE:
                repeated.extend([self._value(field)] * self.random.choice((1, 2, 1100)))
            elif len(repeated):
                self._change_field(self.random.choice(repeated), keep)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            self._change_field(getattr(message, field.name), keep)
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        pick = self.random.choice
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return pick((False, True))
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return pick((0.0, -1.0, 1e300, float("nan"), float("inf")))
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_STRING:
                return pick(TEXTS)
            case FieldDescriptor.CPPTYPE_STRING:
                return pick((self.noise(), bytes(1000), struct.pack("<I", pick(NUMBERS)), b"r"))
        return pick(NUMBERS)

    def _change_bytes(self, data: bytes) -> bytes:
        changed = bytearray(data)
        at = self.random.randrange(len(changed) + 1)
        match self.random.randrange(5):
            case 0:
                changed[at:] = b""
            case 1:
                changed[at:at] = self.noise()
            case 2:
                changed[at : at + self.random.randrange(1, 9)] = b""
            case 3:
                changed += changed[at:]
            case _:
                for _ in range(min(len(changed), self.random.randrange(1, 4))):
                    changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)
