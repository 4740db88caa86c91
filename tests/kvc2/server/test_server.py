"""The wire against malformed, oversized and forged input: refused with the field named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import POOL_BYTES, identity
from tests.doubles.fakes import FakeCache
from tests.doubles.wires import SEALS, Wire, granted, grants, hello, memfd, pages, u32


def extra(**changes: Any) -> pb.Media:
    values: dict[str, Any] = {"first_token": 1, "num_tokens": 2, "digest": bytes(32)}
    return pb.Media(**{**values, **changes})


@pytest.fixture(scope="module", params=["fake", "real"])
def served(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[ServedDaemon]:
    cache = FakeCache.opened if request.param == "fake" else None
    with ServedDaemon(serve_config(tmp_path_factory.mktemp("daemon")), cache=cache) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def wire(served: ServedDaemon) -> Iterator[Wire]:
    with Wire(served.address) as opened:
        yield opened.open()


def acquire(wire: Wire, **changes: Any) -> pb.AcquireRequest:
    values: dict[str, Any] = {
        "session": wire.head,
        "namespace_id": wire.namespace_id,
        "request_id": b"r",
        "tokens": u32(*range(40)),
    }
    return pb.AcquireRequest(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"request_id": b""}, "INVALID_ARGUMENT", "request_id"),
        ({"request_id": b"x" * 129}, "INVALID_ARGUMENT", "request_id"),
        ({"tokens": b""}, "INVALID_ARGUMENT", "tokens"),
        ({"tokens": b"12345"}, "INVALID_ARGUMENT", "tokens"),
        ({"tokens": bytes(4 * ((1 << 17) + 1))}, "INVALID_ARGUMENT", "tokens"),
        ({"grants": grants(1 << 31)}, "INVALID_ARGUMENT", "grants[0].pages"),
        ({"grants": [pb.PageCount(component=1)]}, "UNIMPLEMENTED", "grants[0].component"),
        ({"grants": 2 * grants(1)}, "INVALID_ARGUMENT", "grants"),
        ({"deadline_ms": 1 << 31}, "INVALID_ARGUMENT", "deadline_ms"),
        ({"namespace_id": 999}, "NOT_FOUND", "namespace_id"),
        ({"keys": [b"x"]}, "INVALID_ARGUMENT", "keys"),
        ({"extras": 2 * [extra()], "tokens": u32(1)}, "INVALID_ARGUMENT", "extras = '2 of them"),
        ({"extras": [extra(first_token=99)]}, "INVALID_ARGUMENT", "extras[0].first_token = 99"),
        ({"extras": [extra(num_tokens=0)]}, "INVALID_ARGUMENT", "extras[0].num_tokens = 0"),
        ({"extras": [extra(digest=b"x")]}, "INVALID_ARGUMENT", "extras[0].digest = '1 bytes"),
        ({"extras": [extra(first_token=2), extra()]}, "INVALID_ARGUMENT", "extras[1].first_token"),
        ({"session": pb.SessionRef()}, "FAILED_PRECONDITION", "attach again"),
        ({"tokens": bytes(64 << 20)}, "RESOURCE_EXHAUSTED", "message"),
    ],
)
def test_acquire_names_what_it_refuses(
    wire: Wire, changes: dict[str, Any], status: str, field: str
) -> None:
    code, words = wire.refusal("Acquire", acquire(wire, **changes))
    assert (code, field in words) == (status, True), words


def test_other_epochs_and_secrets_are_fenced(wire: Wire) -> None:
    for secret, epoch in (
        (wire.head.secret, wire.head.session_epoch + 1),
        (b"\0" * 16, wire.head.session_epoch),
        (wire.head.secret + b"x", wire.head.session_epoch),
    ):
        head = pb.SessionRef(secret=secret, session_epoch=epoch)
        requests = {
            "OpenNamespace": pb.OpenNamespaceRequest(session=head),
            "Match": pb.MatchRequest(session=head),
            "Acquire": pb.AcquireRequest(session=head),
            "Grant": pb.GrantRequest(session=head),
            "Commit": pb.CommitRequest(session=head),
            "Release": pb.ReleaseRequest(session=head),
        }
        for rpc, request in requests.items():
            assert wire.refusal(rpc, request)[0] == "FAILED_PRECONDITION", rpc


def lease_commit(**changes: Any) -> pb.LeaseCommit:
    values: dict[str, Any] = {"request_id": b"c", "tokens": u32(*range(16)), "pages": pages(u32(1))}
    return pb.LeaseCommit(**{**values, **changes})


@pytest.mark.parametrize(
    ("rpc", "values", "status", "field"),
    [
        ("OpenNamespace", {"identity": b"{}"}, "INVALID_ARGUMENT", "identity."),
        ("OpenNamespace", {"identity": bytes(70_000)}, "INVALID_ARGUMENT", "identity"),
        ("OpenNamespace", {"tenant": "t" * 65}, "INVALID_ARGUMENT", "tenant"),
        (
            "OpenNamespace",
            {"identity": identity().encode(), "tenant": "nobody"},
            "NOT_FOUND",
            "tenant",
        ),
        (
            "OpenNamespace",
            {"identity": identity().encode(), "salt": bytes(257)},
            "INVALID_ARGUMENT",
            "salt",
        ),
        (
            "OpenNamespace",
            {"identity": identity(layers=3).encode()},
            "INVALID_ARGUMENT",
            "identity.layers",
        ),
        ("Match", {"namespace_id": 999, "tokens": u32(1)}, "NOT_FOUND", "namespace_id"),
        ("Match", {"namespace_id": 1, "tokens": b"123"}, "INVALID_ARGUMENT", "tokens"),
        ("Grant", {"grants": grants(1 << 20)}, "INVALID_ARGUMENT", "grants[0].pages"),
        (
            "Commit",
            {"leases": [lease_commit(request_id=b"?")]},
            "NOT_FOUND",
            "leases[0].request_id",
        ),
        ("Commit", {"leases": [lease_commit(request_id=b"")]}, "INVALID_ARGUMENT", "request_id"),
        (
            "Commit",
            {"leases": [lease_commit(pages=pages(u32(64)))]},
            "INVALID_ARGUMENT",
            "leases[0].pages",
        ),
        (
            "Commit",
            {"leases": [lease_commit(pages=pages(u32(1, 1)), tokens=u32(*range(32)))]},
            "INVALID_ARGUMENT",
            "each page once",
        ),
        (
            "Commit",
            {"leases": [lease_commit(pages=[pb.ComponentPages(component=1, pages=u32(1))])]},
            "UNIMPLEMENTED",
            "leases[0].pages[0].component",
        ),
        (
            "Commit",
            {"leases": [lease_commit(pages=[pb.ComponentPages(offsets=bytes(8))])]},
            "INVALID_ARGUMENT",
            "leases[0].pages[0].offsets",
        ),
        (
            "Commit",
            {"leases": [lease_commit(), lease_commit(tokens=u32(*range(15)))]},
            "INVALID_ARGUMENT",
            "leases[1].tokens",
        ),
        (
            "Commit",
            {"leases": [lease_commit(first_block=1 << 31)]},
            "INVALID_ARGUMENT",
            "leases[0].first_block",
        ),
        ("Commit", {"leases": [lease_commit()] * 1025}, "INVALID_ARGUMENT", "leases"),
        ("Commit", {"prefill_tokens_per_s": -1.0}, "INVALID_ARGUMENT", "prefill_tokens_per_s"),
        ("Commit", {"prefill_tokens_per_s": math.nan}, "INVALID_ARGUMENT", "prefill_tokens_per_s"),
        ("Commit", {"prefill_tokens_per_s": math.inf}, "INVALID_ARGUMENT", "prefill_tokens_per_s"),
        ("Release", {"request_ids": [b"x"] * 1025}, "INVALID_ARGUMENT", "request_ids"),
        ("Release", {"request_ids": [b"a", b""]}, "INVALID_ARGUMENT", "request_ids[1]"),
        ("Release", {"returned": pages(b"1")}, "INVALID_ARGUMENT", "returned[0].pages"),
        ("Release", {"returned": pages(u32(64))}, "INVALID_ARGUMENT", "returned[0].pages"),
        ("Release", {"returned": pages(u32(60))}, "INVALID_ARGUMENT", "returned"),
    ],
)
def test_calls_of_a_session_name_what_they_refuse(
    wire: Wire, rpc: str, values: dict[str, Any], status: str, field: str
) -> None:
    wire.call("Acquire", acquire(wire, request_id=b"c"))
    request = getattr(pb, f"{rpc}Request")(session=wire.head, **values)
    code, words = wire.refusal(rpc, request)
    assert (code, field in words) == (status, True), words


def test_calls_without_a_session_name_what_they_refuse(wire: Wire) -> None:
    assert wire.refusal("Evict", pb.EvictRequest(tier="tape"))[1].startswith("tier = 'tape'")
    for changes, field in [
        ({}, "weights_digest"),
        ({"weights_digest": "12"}, "weights_digest"),
        ({"namespace": b"12"}, "namespace"),
    ]:
        code, words = wire.refusal("Invalidate", pb.InvalidateRequest(**changes))
        assert (code, words.split()[0].rstrip(":")) == ("INVALID_ARGUMENT", field)
    code, words = wire.refusal("Evict", pb.EvictRequest(tier="gpu", blocks=1 << 32))
    assert (code, "blocks" in words) == ("INVALID_ARGUMENT", True)
    for rpc in ("Flush", "Drain"):
        request = getattr(pb, f"{rpc}Request")(deadline_ms=1 << 31)
        assert "deadline_ms" in wire.refusal(rpc, request)[1]


def test_a_refused_commit_changes_nothing(wire: Wire) -> None:
    wire.call("Acquire", acquire(wire, request_id=b"whole"))
    page = granted(wire.call("Grant", pb.GrantRequest(session=wire.head, grants=grants(1))))
    good = lease_commit(request_id=b"whole", pages=pages(page), tokens=u32(*range(900, 916)))
    bad = lease_commit(request_id=b"nobody")
    request = pb.CommitRequest(session=wire.head, leases=[good, bad])
    assert wire.refusal("Commit", request)[0] == "NOT_FOUND"
    returned = pb.ReleaseRequest(session=wire.head, returned=pages(page))
    wire.call("Release", returned)  # still private, so it can be given back


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"wire_version": 1}, "hello.wire_version = '1': this daemon speaks 2"),
        ({"wire_version": 4, "wire_version_min": 3}, "'3 to 4': this daemon speaks 2"),
        ({"wire_version": 0}, "hello.wire_version"),
        ({"pools": []}, "hello.pools"),
        ({"pools": [pb.Pool(), pb.Pool()]}, "hello.pools"),
        ({"expiry_ms": 30_001}, "hello.expiry_ms"),
        ({"engine_name": "n" * 129}, "hello.engine_name"),
        ({"num_pages": 0}, "hello.pools[0].memory_bytes"),
        ({"num_pages": 1 << 31}, "hello.pools[0].num_pages"),
        ({"num_pages": 65}, "layout.segments"),
        ({"memory_bytes": 0}, "hello.pools[0].memory_bytes"),
        ({"memory_bytes": 1 << 60}, "hello.pools[0].memory_bytes"),
        ({"memory_bytes": POOL_BYTES - 1}, "layout.segments[3]"),
        ({"layout": pb.Layout()}, "layout.page_size"),
        ({"layout": pb.Layout(page_size=16, layout_version=1)}, "layout.segments"),
    ],
)
def test_a_forged_hello_is_refused_by_name(
    served: ServedDaemon, changes: dict[str, Any], field: str
) -> None:
    with Wire(served.address) as wire:
        status, words = wire.stream_refusal(hello(**changes))
    assert (status, field in words) == ("INVALID_ARGUMENT", True), words


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("component", 1),
        ("reach", 4),
        ("part", 1),
        ("parts", 0),
        ("parts", 2),
        ("memory_kind", 2),
    ],
)
def test_reserved_fields_of_a_pool_are_refused_by_name(
    served: ServedDaemon, field: str, value: object
) -> None:
    with Wire(served.address) as wire:
        status, words = wire.stream_refusal(hello(**{field: value}))
    assert (status, f"hello.pools[0].{field}" in words) == ("UNIMPLEMENTED", True), words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_kind": 1}, "the UUID of the device"),
        ({"device": "GPU-0"}, "the UUID of the device"),
        ({"memory_kind": 1, "device": "G" * 65}, "at most 64 bytes"),
        ({"memory_kind": 1, "device": "GPU-0"}, "the daemon found no CUDA device: "),
        ({"memory_kind": 1, "device": "GPU-0", "num_pages": 0, "memory_bytes": 0}, "the UUID"),
    ],
)
def test_memory_of_a_device_that_can_not_be_is_refused_by_name(
    served: ServedDaemon, changes: dict[str, object], words: str
) -> None:
    with Wire(served.address) as wire:
        status, told = wire.stream_refusal(hello(**changes))
    assert (status, "hello.pools[0].device" in told) == ("INVALID_ARGUMENT", True), told
    assert words in told


def test_a_field_of_a_later_version_is_refused_by_its_number(wire: Wire) -> None:
    """It asks for something that would not be done. Also deep in a message."""
    later = b"\xf8\x06\x01"  # field 111, a varint
    head = pb.SessionRef.FromString(wire.head.SerializeToString() + later)
    media = pb.Media.FromString(later)
    for rpc, request in (
        ("Acquire", pb.AcquireRequest.FromString(acquire(wire).SerializeToString() + later)),
        ("Acquire", acquire(wire, session=head)),
        ("Commit", pb.CommitRequest(session=wire.head, leases=[pb.LeaseCommit(extras=[media])])),
    ):
        status, words = wire.refusal(rpc, request)
        assert (status, "field 111" in words) == ("INVALID_ARGUMENT", True), words


def test_explain_of_a_request_takes_no_extras(wire: Wire) -> None:
    extras = [pb.Media(first_token=0, num_tokens=1, digest=bytes(32))]
    request = pb.ExplainRequest(session=wire.head, request_id=b"a", extras=extras)
    status, words = wire.refusal("Explain", request)
    assert (status, "extras" in words) == ("INVALID_ARGUMENT", True), words


def test_an_engine_of_the_version_before_is_told_both_versions(served: ServedDaemon) -> None:
    """Not of the first of its fields that the wire has no more."""
    before = b"\x10\x08\x18\x80\x80\x04\x2a\x00"  # pages, bytes, pages it keeps: fields 2, 3, 5
    said = pb.Hello(engine_name="old", wire_version=1).SerializeToString() + before
    with Wire(served.address) as wire:
        first = pb.AttachRequest(hello=pb.Hello.FromString(said))
        status, words = wire.stream_refusal(first)
    assert (status, words) == (
        "INVALID_ARGUMENT",
        "hello.wire_version = '1': this daemon speaks 2",
    )


def test_a_hello_of_this_version_has_no_other_field(served: ServedDaemon) -> None:
    said = hello().hello.SerializeToString() + b"\xf8\x06\x01"  # field 111, a varint
    with Wire(served.address) as wire:
        first = pb.AttachRequest(hello=pb.Hello.FromString(said))
        status, words = wire.stream_refusal(first)
    assert (status, "field 111" in words) == ("INVALID_ARGUMENT", True), words


def test_a_client_learns_the_version_and_the_limits(served: ServedDaemon) -> None:
    """The version is the highest that both speak; what it may ask for needs no copied constant."""
    with Wire(served.address) as wire:
        attached = wire.attach(hello(wire_version=9, wire_version_min=1, expiry_ms=30_000))
    limits = served.config.limits
    assert (attached.wire_version, attached.expiry_ms) == (2, 30_000)
    assert attached.limits.max_tokens == limits.max_tokens
    assert attached.limits.max_message_bytes == limits.message_bytes
    assert attached.limits.acquire_deadline_ms == served.config.acquire_deadline_ms


def test_the_first_message_must_be_hello(served: ServedDaemon) -> None:
    with Wire(served.address) as wire:
        status, words = wire.stream_refusal(pb.AttachRequest(heartbeat=pb.Heartbeat()))
    assert (status, "hello" in words) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("size", "seals", "words"),
    [
        (POOL_BYTES, 0, "sealed"),
        (POOL_BYTES, SEALS & ~0x2, "sealed"),  # it could still shrink
        (POOL_BYTES - 4096, SEALS, "memory_bytes"),
        (POOL_BYTES, SEALS | 0x10, "writable"),
    ],
)
def test_only_a_sealed_memfd_of_the_declared_size_is_mapped(
    served: ServedDaemon, size: int, seals: int, words: str
) -> None:
    with Wire(served.address) as wire:
        attached = wire.attach()
        answer = wire.side(attached, attached.nonce, [memfd(size, seals)])
    assert answer.startswith(b"error: ")
    assert words in answer.decode()


def test_the_side_socket_takes_one_nonce_once_and_one_descriptor(served: ServedDaemon) -> None:
    with Wire(served.address) as wire:
        attached = wire.attach()
        assert b"nonce" in wire.side(attached, bytes(16), [memfd()])
        assert b"nonce" in wire.side(attached, b"", [])
        assert b"0 descriptors" in wire.side(attached, attached.nonce, [])
        assert b"nonce" in wire.side(attached, attached.nonce, [memfd()])
    with Wire(served.address) as wire:
        attached = wire.attach()
        null = os.open("/dev/null", os.O_RDWR)
        assert b"memfd" in wire.side(attached, attached.nonce, [null])
    with Wire(served.address) as wire:
        attached = wire.attach()
        assert b"2 descriptors" in wire.side(attached, attached.nonce, [memfd(), memfd()])


def test_kept_pages_are_checked_before_the_session_is_ready(served: ServedDaemon) -> None:
    for kept in (u32(64), u32(1, 1), b"1"):
        with Wire(served.address) as wire:
            attached = wire.attach(hello(kept_pages=kept))
            assert b"kept_pages" in wire.side(attached, attached.nonce, [memfd()])
