"""Bytes that are no message: refused by name in every rpc, counted, never the daemon's failure."""

from __future__ import annotations

import grpc
import pytest

from kvc2.client import Admin
from kvc2.server.wiring import RPCS, SERVICES
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, hello, status_of
from tests.kvc2.server.test_server import acquire

GARBAGE = b"\xff\xff\xffgarbage"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def raw_status(channel: grpc.Channel, path: str, *messages: bytes) -> tuple[str, str]:
    """With what a call of these bytes ends."""
    stub = channel.stream_stream(f"/{path}", None, None)  # on the wire all kinds of calls are alike
    call = stub(iter(messages), timeout=10)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return status_of(error)
    return "OK", ""


@pytest.mark.parametrize(
    "path",
    [f"{SERVICES[1]}/{name}" for name in RPCS]
    + [f"{SERVICES[0]}/Attach"]
    + [f"{HEALTH}/{name}" for name in ("Check", "List", "Watch")]
    + [REFLECTION],
)
def test_bytes_that_are_no_message_are_refused_by_name_in_every_rpc(
    served: ServedDaemon, path: str
) -> None:
    with grpc.insecure_channel(served.address) as channel:
        status, words = raw_status(channel, path, GARBAGE)
    assert (status, "= '10 bytes': no such message" in words) == ("INVALID_ARGUMENT", True), words
    with Admin(served.address) as admin:
        counters = admin.stats().counters
    assert counters["faults_total{kind=refused_request}"] > 0
    assert counters["faults_total{kind=internal_error}"] == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    with ServedDaemon(serve_config(tmp_path_factory.mktemp("daemon")), cache=None) as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("message", "words"),
    [(GARBAGE, "AttachRequest"), (hello().SerializeToString(), "heartbeat or detach")],
)
def test_a_stream_that_is_misused_is_told_so(
    served: ServedDaemon, message: bytes, words: str
) -> None:
    with grpc.insecure_channel(served.address) as channel:
        path = f"{SERVICES[0]}/Attach"
        status, said = raw_status(channel, path, hello().SerializeToString(), message)
    assert (status, words in said) == ("INVALID_ARGUMENT", True), said


def test_the_words_of_a_refusal_quote_no_secret(served: ServedDaemon) -> None:
    with Wire(served.address) as wire, grpc.insecure_channel(served.address) as channel:
        request = acquire(wire.open()).SerializeToString()
        _, words = raw_status(channel, f"{SERVICES[1]}/Acquire", request + b"\xff")
        assert repr(wire.head.secret)[2:-1] not in words
