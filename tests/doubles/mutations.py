"""Messages of the wire, and what becomes of them in a bad cable or a bad client: from one seed."""

from __future__ import annotations

import random
import struct
from dataclasses import astuple, dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from kvc2 import _core
from kvc2.layout import Layout, Segment
from kvc2.server.wiring import SERVICES
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.engines import identity, layout
from tests.doubles.wires import grants, hello, pages, u32

PAYLOAD_BYTES = layout().payload_bytes
NUMBERS = (0, 1, 2, 15, 16, 17, 63, 64, 127, 128, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)
TIERS = ("gpu", "cpu", "disk")
TEXTS = ("", "gpu", "cpu", "tape", "x" * 300, "\0", "\u2028é", "default")


@dataclass(frozen=True)
class Spaces:
    """Ids of namespaces that the session has open: of tokens and of opaque keys, and the same of
    another layout than its pool's."""

    tokens: int
    keys: int
    other_tokens: int
    other_keys: int


FOREIGN = b'{"engine":"other","fields":{"page_size":4},"schema":"foreign/1","weights":"w"}'
SMALL = Layout((Segment(0, 0, 512, 0, 1024), Segment(0, 1, 512, 512, 1024)), 4)
KEYS = [b"k", b"\0", b"x" * 64]
EXTRAS = [pb.Media(first_token=1, num_tokens=9, digest=bytes(range(32)))]


def opened(head: pb.SessionRef) -> list[pb.OpenNamespaceRequest]:
    """Those that open what `Spaces` has, in its order."""
    own = {"session": head, "identity": identity().encode(), "salt": b"fuzz"}
    other = {**own, "identity": FOREIGN, "layout": SMALL.to_proto()}
    return [
        pb.OpenNamespaceRequest(**each, key_mode=mode, ttl_s=5 * mode)
        for each in (own, other)
        for mode in (0, 1)
    ]


def valid(head: pb.SessionRef, spaces: Spaces) -> dict[str, list[Message]]:
    """Calls that a session could make, by their path. None ends the daemon or drops what others
    have: evictions leave what is leased, and no digest or tenant is theirs."""
    calls = [
        *opened(head),
        *_asking(head, spaces),
        *_leasing(head, spaces),
        *_committing(head, spaces),
        *_administering(head, spaces),
    ]
    found: dict[str, list[Message]] = {}
    for each in calls:
        name = type(each).__name__.removesuffix("Request")
        found.setdefault(f"{SERVICES[1]}/{name}", []).append(each)
    return found


def _meant(head: pb.SessionRef, spaces: Spaces) -> list[dict[str, Any]]:
    """Fields of calls that mean blocks, by tokens and by keys."""
    of_tokens = [spaces.tokens, spaces.other_tokens]
    of_keys = [spaces.keys, spaces.other_keys]
    tokens = {"session": head, "tokens": u32(*range(40))}
    return [
        *({**tokens, "namespace_id": each} for each in of_tokens),
        *({"session": head, "keys": KEYS, "namespace_id": each} for each in of_keys),
    ]


def _asking(head: pb.SessionRef, spaces: Spaces) -> list[Message]:
    """What changes no block."""
    meant = _meant(head, spaces)
    prefix, keyed = meant[0], {"session": head, "namespace_id": spaces.keys}
    return [
        *(pb.MatchRequest(**each) for each in meant),
        pb.MatchRequest(**prefix, extras=EXTRAS),
        pb.ExplainRequest(**prefix),
        pb.ExplainRequest(**prefix, extras=EXTRAS),
        pb.ExplainRequest(**meant[1]),
        pb.ExplainRequest(**keyed, key=b"k"),
        pb.ExplainRequest(session=head, request_id=b"r"),
        pb.ExplainRequest(tokens=prefix["tokens"]),
        pb.ExplainRequest(key=b"k", namespace=bytes(32)),
        *(pb.PinRequest(**each, tier=tier, hard=True, ttl_s=1) for each in meant for tier in TIERS),
        pb.PinRequest(**prefix, extras=EXTRAS),
        pb.PinRequest(tokens=prefix["tokens"], namespace=bytes(32)),
        *(pb.UnpinRequest(**each, tier=tier) for each in meant for tier in TIERS),
        pb.UnpinRequest(**prefix, extras=EXTRAS),
        *(pb.PrefetchRequest(**each, tier=tier, deadline_ms=1) for each in meant for tier in TIERS),
        pb.PrefetchRequest(**prefix, extras=EXTRAS),
    ]


def _leasing(head: pb.SessionRef, spaces: Spaces) -> list[Message]:
    """Leases in the pool and in the arena, polled, and their ends."""
    session = {"session": head}
    prefix, other, keyed, other_keyed = _meant(head, spaces)
    arena, polled = {"place": 1, "deadline_ms": 50}, {"place": 1, "at_once": True}
    said = pb.Hints(session_end=True, expect_return_within_s=3, priority=7, ttl_s=9)
    return [
        pb.AcquireRequest(**prefix, request_id=b"r", grants=grants(2), hints=said),
        pb.AcquireRequest(**prefix, request_id=b"r", at_once=True, poll=1),
        pb.AcquireRequest(**prefix, request_id=b"a", skip_blocks=1, grants=grants(1), **arena),
        *(
            pb.AcquireRequest(**prefix, request_id=b"p", poll=number, **polled)
            for number in (0, 1, 2)
        ),
        pb.AcquireRequest(**other, request_id=b"o", **arena),
        pb.AcquireRequest(**prefix, request_id=b"x", extras=EXTRAS, **arena),
        pb.AcquireRequest(**keyed, request_id=b"k", hints=said, **arena),
        *(pb.AcquireRequest(**keyed, request_id=b"q", poll=number, **polled) for number in (0, 1)),
        pb.AcquireRequest(**other_keyed, request_id=b"l", **arena),
        pb.GrantRequest(**session, grants=grants(1)),
        pb.ReleaseRequest(
            **session, request_ids=[b"r", b"a"], hints=[said, said], returned=pages(u32(2))
        ),
        pb.ReleaseRequest(**session, request_ids=[b"p", b"q", b"k", b"l"], grants=grants(1)),
        pb.ReadRequest(**session, request_id=b"a", first_block=1, blocks=1),
        pb.ReadRequest(**session, request_id=b"k"),
    ]


def _committing(head: pb.SessionRef, spaces: Spaces) -> list[Message]:
    """Blocks in the pool, and copies: of leases, of prompts, of keys."""
    session, block = {"session": head}, u32(*range(16))
    pool = pb.LeaseCommit(request_id=b"r", tokens=block, pages=pages(u32(1)))
    leased = pb.LeaseCommit(request_id=b"a", first_block=1, tokens=block, pages=pages(u32(1)))
    prompt = pb.LeaseCommit(
        namespace_id=spaces.tokens, tokens=u32(*range(32)), pages=pages(u32(1, 2))
    )
    keyed = pb.LeaseCommit(namespace_id=spaces.keys, keys=KEYS, pages=pages(u32(1, 2, 3)))
    in_lease = pb.LeaseCommit(request_id=b"k", keys=KEYS[:1], pages=pages(u32(1)))
    other = pb.LeaseCommit(namespace_id=spaces.other_keys, keys=KEYS[:1], pages=pages(u32(1)))
    imaged = pb.LeaseCommit(
        namespace_id=spaces.tokens, tokens=u32(*range(32)), pages=pages(u32(1, 2)), extras=EXTRAS
    )
    rate = {"prefill_tokens_per_s": 9.0, "grants": grants(1)}
    return [
        pb.CommitRequest(**session, leases=[pool, pool], **rate),
        pb.CommitRequest(**session, leases=[leased, prompt], copied=True, **rate),
        pb.CommitRequest(**session, leases=[prompt, keyed], copied=True, durable=True),
        pb.CommitRequest(**session, leases=[in_lease], copied=True),
        pb.CommitRequest(**session, leases=[other], copied=True),
        pb.CommitRequest(**session, leases=[imaged], copied=True),
        *written(head, spaces.tokens),
        pb.WriteRequest(**session, commit=pb.LeaseCommit(namespace_id=spaces.keys, keys=KEYS[:1])),
    ]


def _administering(head: pb.SessionRef, spaces: Spaces) -> list[Message]:
    session = {"session": head}
    return [
        *(pb.InvalidateRequest(**session, namespace_id=each) for each in astuple(spaces)),
        pb.InvalidateRequest(weights_digest="cd" * 32),
        pb.SetQuotaRequest(tenant="nobody", tier="cpu", max_blocks=1),
        *(pb.EvictRequest(tier=tier, blocks=1) for tier in TIERS),
        pb.FlushRequest(deadline_ms=10),
        pb.ScrubRequest(stop=True),
        pb.StatsRequest(),
    ]


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
    return [
        hello(),
        hello(kept_pages=u32(1, 2)),
        hello(arena=True, expiry_ms=30_000, wire_version_min=1, wire_version=9),
        hello(arena=True, num_pages=0, memory_bytes=0),
        pb.AttachRequest(heartbeat=pb.Heartbeat()),
        pb.AttachRequest(detach=pb.Detach()),
    ]


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
