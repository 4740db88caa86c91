"""What a credential may do: each rpc of the descriptors, each kind of caller, however it shows who
it is. Not here: tokens that are wrong or changed (test_tokens.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvc2.errors import Denied, Unauthenticated
from kvc2.host.address import Address
from kvc2.server.callers import WHOSE
from kvc2.server.credentials import names_of
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.callers import (
    CA,
    NOBODY,
    OPERATOR,
    PROMPT,
    UNKNOWN,
    Callers,
    request_of,
    rpcs,
    served_callers,
    status,
)
from tests.doubles.certificates import replace
from tests.doubles.wires import Wire, status_of

# Whoever gets a connection may ask whether the daemon serves, and what services there are.
ANYBODY_S = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
ADMINISTRATORS = sorted(rpc for rpc, whose in WHOSE.items() if whose == "administrator")


@pytest.fixture(scope="module", params=["certificates", "tokens over TLS", "tokens in clear"])
def callers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callers]:
    folder = tmp_path_factory.mktemp("daemon")
    with served_callers(folder, request.param) as found:
        yield found


@pytest.fixture
def engine(callers: Callers) -> Iterator[Wire]:
    """A session of tenant a, with a namespace."""
    with callers.wire("a") as wire:
        yield wire.open(tenant="a")


def refusal_of_nobody(callers: Callers) -> tuple[str, str]:
    if callers.by_token:
        told = "authorization: Bearer TOKEN, once, one of token_file"
        return "UNAUTHENTICATED", told
    return (
        "PERMISSION_DENIED",
        "certificate = 'nobody': one that tls.administrators or a tenant's certificate_names has",
    )


def test_each_rpc_has_a_rule() -> None:
    ruled = {rpc for rpc, service in rpcs().items() if service not in ANYBODY_S}
    assert ruled == WHOSE.keys()


@pytest.mark.parametrize("rpc", sorted(WHOSE.keys() - {"Attach"}))
def test_whom_the_configuration_doesn_t_name_may_call_nothing(callers: Callers, rpc: str) -> None:
    with callers.wire(NOBODY) as wire:
        assert wire.refusal(rpc, request_of(rpc)) == refusal_of_nobody(callers)


def test_whom_the_configuration_doesn_t_name_may_not_attach(callers: Callers) -> None:
    with callers.wire(NOBODY) as wire, pytest.raises(grpc.RpcError) as caught:
        wire.attach()
    assert status_of(caught.value) == refusal_of_nobody(callers)


@pytest.mark.parametrize("rpc", [*ADMINISTRATORS, "Invalidate"])
def test_a_tenant_is_no_administrator(callers: Callers, rpc: str) -> None:
    whose = "administrator" if callers.by_token else "one of tls.administrators"
    with callers.wire("a") as wire:
        assert wire.refusal(rpc, request_of(rpc)) == (
            "PERMISSION_DENIED",
            f"{callers.told('a')}: {whose}, for this rpc",
        )


@pytest.mark.parametrize("rpc", [*sorted({*ADMINISTRATORS} - {"Drain"}), "Invalidate"])
def test_an_administrator_is_one(callers: Callers, rpc: str) -> None:
    with callers.wire(OPERATOR) as wire:
        assert status(wire, rpc) in ("OK", "NOT_FOUND", "INVALID_ARGUMENT")


def test_a_tenant_invalidates_no_namespace_by_name(callers: Callers, engine: Wire) -> None:
    with callers.wire("a") as wire:
        request = pb.InvalidateRequest(namespace=callers.name_of("a"))
        assert status(wire, "Invalidate", request) == "PERMISSION_DENIED"
    own = pb.InvalidateRequest(session=engine.head, namespace_id=engine.namespace_id)
    assert status(engine, "Invalidate", own) == "OK"


@pytest.mark.parametrize("tenant", ["b", "", "default", "unheard of"])
def test_a_tenant_opens_no_other_s_namespace(callers: Callers, engine: Wire, tenant: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        engine.open_namespace(tenant=tenant)
    shown = tenant or "default"
    kind = "bearer token" if callers.by_token else "certificate"
    assert status_of(caught.value) == (
        "PERMISSION_DENIED",
        f"tenant = {shown!r}: not open to the {kind} of a",
    )


def test_an_administrator_is_the_default_tenant_alone(callers: Callers) -> None:
    with callers.wire(OPERATOR) as wire:
        wire.open()
        with pytest.raises(grpc.RpcError, match=r"not open to the .* of (operator|administrator)"):
            wire.open_namespace(tenant="a")


@pytest.mark.parametrize("rpc", sorted(each for each in WHOSE if "session" in WHOSE[each]))
@pytest.mark.parametrize("thief", ["b", OPERATOR])
def test_a_session_s_secret_is_of_no_use_to_another(
    callers: Callers, engine: Wire, rpc: str, thief: str
) -> None:
    values = {"session": engine.head}
    if rpc == "Invalidate":
        values["namespace_id"] = engine.namespace_id
    with callers.wire(thief) as wire:
        assert wire.refusal(rpc, getattr(pb, f"{rpc}Request")(**values)) == (
            "PERMISSION_DENIED",
            f"{callers.told(thief)}: the one that the session began with",
        )


@pytest.mark.parametrize("rpc", ["Explain", "Pin", "Unpin", "Prefetch"])
def test_another_tenant_s_namespace_is_as_one_that_is_not_there(
    callers: Callers, engine: Wire, rpc: str
) -> None:
    name, kind = callers.name_of("a"), getattr(pb, f"{rpc}Request")
    with callers.wire("b") as wire:
        told = wire.refusal(rpc, kind(namespace=name, tokens=PROMPT))
        unheard = wire.refusal(rpc, kind(namespace=UNKNOWN, tokens=PROMPT))
        assert told == (unheard[0], unheard[1].replace(UNKNOWN.hex(), name.hex()))
        assert told[0] == "NOT_FOUND"
        unnamed = wire.refusal(rpc, kind(tokens=PROMPT))
        assert unnamed == ("NOT_FOUND", "namespace = '': one of these: none is open")
    for own in ("a", OPERATOR):
        with callers.wire(own) as wire:
            assert status(wire, rpc, kind(namespace=name, tokens=PROMPT)) == "OK"
    with callers.wire("a") as wire:
        assert status(wire, rpc, kind(tokens=PROMPT)) == "OK"


def test_a_request_is_explained_to_its_tenant_alone(callers: Callers, engine: Wire) -> None:
    engine.call(
        "Acquire",
        pb.AcquireRequest(
            session=engine.head,
            namespace_id=engine.namespace_id,
            request_id=b"mine",
            tokens=PROMPT,
        ),
    )
    asked = pb.ExplainRequest(request_id=b"mine")
    found = {}
    for name in ("a", "b", OPERATOR):
        with callers.wire(name) as wire:
            found[name] = status(wire, "Explain", asked)
    assert found == {"a": "OK", "b": "NOT_FOUND", OPERATOR: "OK"}


def test_calls_side_by_side_are_each_their_caller_s(callers: Callers) -> None:
    """One loop runs them all: none sees the credential of another."""
    with callers.wire("a") as tenant, callers.wire(OPERATOR) as operator:
        for _ in range(50):
            assert status(operator, "Stats") == "OK"
            assert status(tenant, "Stats") == "PERMISSION_DENIED"


def test_a_client_learns_that_it_was_denied(callers: Callers, tmp_path: Path) -> None:
    from kvc2.client import Admin

    token = tmp_path / "token"
    replace(token, callers.tokens["a"].encode() + b"\n")
    given = {"token_file": token} if callers.by_token else {}
    place = Address.of_daemon(callers.address, tls=callers.files("a"), **given)
    with Admin(place) as admin, pytest.raises(Denied, match=r"administrators?, for this rpc"):
        admin.stats()
    if callers.by_token:
        replace(token, b"somebody-s-token")  # seen by the next call of the same connection
        with Admin(place) as admin:
            for expected, shown in ((Unauthenticated, "no-such-token"), (Denied, "a")):
                replace(token, callers.tokens.get(shown, shown).encode())
                with pytest.raises(expected):
                    admin.stats()


# Certificates alone


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    folder = tmp_path_factory.mktemp("daemon")
    with served_callers(folder, "certificates") as found:
        yield found


def test_alternative_names_count_before_the_common_one(
    by_certificate: Callers, tmp_path: Path
) -> None:
    as_tenant = CA.pair(OPERATOR, ["spiffe://a"]).files(tmp_path / "tenant", CA)
    with Wire(by_certificate.address, as_tenant) as wire:
        assert wire.refusal("Stats", pb.StatsRequest())[1].startswith("certificate = 'spiffe://a'")
    as_nobody = CA.pair(OPERATOR, ["example.org"]).files(tmp_path / "nobody", CA)
    with Wire(by_certificate.address, as_nobody) as wire:
        assert status(wire, "Stats") == "PERMISSION_DENIED"
    assert names_of({"x509_common_name": [b"c"], "x509_subject_alternative_name": []}) == ("c",)
    assert names_of({}) == ()


def test_a_refusal_names_no_hundreds_of_names(by_certificate: Callers, tmp_path: Path) -> None:
    names = ["spiffe://a", *(f"host-{number}.example" for number in range(300))]
    files = CA.pair("a", names).files(tmp_path / "many", CA)
    with Wire(by_certificate.address, files) as wire:
        wire.open(tenant="a")
        with pytest.raises(grpc.RpcError) as caught:
            wire.open_namespace(tenant="b")
    assert "not open to the certificate of spiffe://a, host-0" in status_of(caught.value)[1]
    assert len(status_of(caught.value)[1]) < 200
