"""The wire as written: conventions that a reader relies on."""

from __future__ import annotations

import re

from kvc2.server.wiring import SERVICES, UNARY
from kvc2.v1 import cache_pb2
from tests import ROOT

PROTO = ROOT / "proto" / "kvc2" / "v1" / "cache.proto"


def test_every_rpc_has_a_comment_that_begins_with_its_name() -> None:
    text = PROTO.read_text()
    rpcs = re.findall(r"((?:  //.*\n)+)  rpc (\w+)\(", text)
    assert len(rpcs) == len(re.findall(r"^  rpc ", text, re.MULTILINE))
    assert [name for comment, name in rpcs if not comment.startswith(f"  // {name} ")] == []


def test_every_rpc_is_served() -> None:
    services = cache_pb2.DESCRIPTOR.services_by_name
    assert {f"kvc2.v1.{name}" for name in services} == set(SERVICES)
    assert {each.name for each in services["Cache"].methods} == {*UNARY, "Read", "Write"}
    assert [each.name for each in services["Sessions"].methods] == ["Attach"]


def test_arrays_travel_as_bytes() -> None:
    """[m] 32k tokens: 0.7 ms as bytes, 2.5 ms as repeated uint32."""
    wrong = [
        f"{message.name}.{field.name}"
        for message in cache_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.is_repeated and field.type in (field.TYPE_UINT32, field.TYPE_UINT64)
    ]
    assert wrong == []
