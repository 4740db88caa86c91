"""What a certificate's name may do over TLS: each rpc of the descriptors, each kind of caller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from kvc2.config import TenantConfig, TlsConfig
from kvc2.errors import Denied
from kvc2.host.address import Address
from kvc2.host.tls import TlsFiles
from kvc2.server.callers import WHOSE
from kvc2.server.credentials import names_of
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.certificates import HOSTS, CertificateAuthority
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, status_of, u32

CA = CertificateAuthority()
PROMPT = u32(*range(64))
UNKNOWN = bytes(range(32))
# Who has any certificate of the CA may ask whether the daemon serves, and what services there are.
ANYBODY_S = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
ADMINISTRATORS = sorted(rpc for rpc, whose in WHOSE.items() if whose == "administrator")
REQUESTS: dict[str, Any] = {
    "Evict": pb.EvictRequest(tier="cpu", blocks=1),
    "SetQuota": pb.SetQuotaRequest(tenant="a", tier="cpu"),
    "Invalidate": pb.InvalidateRequest(weights_digest="ab" * 32),
}


class Callers:
    """A daemon with two tenants and an administrator, and a certificate for each; `wire` connects
    with one."""

    def __init__(self, folder: Path) -> None:
        files = CA.pair("daemon", HOSTS).files(folder / "tls", CA)
        tls = TlsConfig(files.certificate, files.key, files.ca, administrators=("operator",))
        tenants = tuple(self._tenant(folder, name) for name in ("a", "b"))
        self.config = serve_config(folder, listen="127.0.0.1:0", tls=tls, tenants=tenants)
        self.files = {
            name: CA.pair(name).files(folder / name, CA)
            for name in ("a", "b", "operator", "nobody")
        }
        self.served: ServedDaemon | None = None

    @staticmethod
    def _tenant(folder: Path, name: str) -> TenantConfig:
        secret = folder / f"{name}.secret"
        secret.write_bytes(name.encode() * 32)
        secret.chmod(0o600)
        return TenantConfig(name, secret, certificate_names=(f"spiffe://{name}", name))

    @property
    def address(self) -> str:
        assert self.served is not None
        return f"127.0.0.1:{self.served.daemon.port}"

    def wire(self, name: str, files: TlsFiles | None = None) -> Wire:
        return Wire(self.address, files or self.files[name])

    def name_of(self, tenant: str) -> bytes:
        """The namespace that it has open."""
        assert self.served is not None
        spaces = self.served.daemon.cache.namespaces
        found = self.served.on_loop(
            lambda: [each.name for each in spaces if each.owner.tenant == tenant]
        )
        assert len(found) == 1
        assert isinstance(found[0], bytes)
        return found[0]


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    folder = tmp_path_factory.mktemp("daemon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        found = Callers(folder)
        with ServedDaemon(found.config, cache=None) as found.served:
            yield found


@pytest.fixture
def engine(callers: Callers) -> Iterator[Wire]:
    """A session of tenant a, with a namespace."""
    with callers.wire("a") as wire:
        yield wire.open(tenant="a")


def rpcs() -> dict[str, str]:
    """The service of each rpc that the daemon has."""
    files = (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    services = [each for file in files for each in file.services_by_name.values()]
    return {method.name: each.full_name for each in services for method in each.methods}


def request_of(rpc: str) -> Any:
    found = REQUESTS.get(rpc, getattr(pb, f"{rpc}Request")())
    if WHOSE[rpc] == "session or owner":
        found = getattr(pb, f"{rpc}Request")(namespace=UNKNOWN, tokens=PROMPT)
    return found


def status(wire: Wire, rpc: str, request: Any = None) -> str:
    """With which a call ends; a stream's too: on the wire all kinds of calls are alike."""
    try:
        wire.call(rpc, request or request_of(rpc))
    except grpc.RpcError as error:
        return status_of(error)[0]
    return "OK"


def test_each_rpc_has_a_rule() -> None:
    ruled = {rpc for rpc, service in rpcs().items() if service not in ANYBODY_S}
    assert ruled == WHOSE.keys()


@pytest.mark.parametrize("rpc", sorted(WHOSE.keys() - {"Attach"}))
def test_whom_the_configuration_doesn_t_name_may_call_nothing(callers: Callers, rpc: str) -> None:
    with callers.wire("nobody") as wire:
        assert wire.refusal(rpc, request_of(rpc)) == (
            "PERMISSION_DENIED",
            "certificate = 'nobody': one that tls.administrators or a tenant's "
            "certificate_names has",
        )


def test_whom_the_configuration_doesn_t_name_may_not_attach(callers: Callers) -> None:
    with callers.wire("nobody") as wire, pytest.raises(grpc.RpcError) as caught:
        wire.attach()
    assert status_of(caught.value)[0] == "PERMISSION_DENIED"


@pytest.mark.parametrize("rpc", [*ADMINISTRATORS, "Invalidate"])
def test_a_tenant_is_no_administrator(callers: Callers, rpc: str) -> None:
    with callers.wire("a") as wire:
        assert wire.refusal(rpc, request_of(rpc)) == (
            "PERMISSION_DENIED",
            "certificate = 'a': one of tls.administrators, for this rpc",
        )


@pytest.mark.parametrize("rpc", [*sorted({*ADMINISTRATORS} - {"Drain"}), "Invalidate"])
def test_an_administrator_is_one(callers: Callers, rpc: str) -> None:
    with callers.wire("operator") as wire:
        assert status(wire, rpc) in ("OK", "NOT_FOUND", "INVALID_ARGUMENT")


def test_a_tenant_invalidates_no_namespace_by_name(callers: Callers, engine: Wire) -> None:
    with callers.wire("a") as wire:
        request = pb.InvalidateRequest(namespace=callers.name_of("a"))
        assert status(wire, "Invalidate", request) == "PERMISSION_DENIED"
    own = pb.InvalidateRequest(session=engine.head, namespace_id=engine.namespace_id)
    assert status(engine, "Invalidate", own) == "OK"


@pytest.mark.parametrize("tenant", ["b", "", "default", "unheard of"])
def test_a_tenant_opens_no_other_s_namespace(engine: Wire, tenant: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        engine.open_namespace(tenant=tenant)
    shown = tenant or "default"
    assert status_of(caught.value) == (
        "PERMISSION_DENIED",
        f"tenant = {shown!r}: not open to the certificate of a",
    )


def test_an_administrator_is_the_default_tenant_alone(callers: Callers) -> None:
    with callers.wire("operator") as wire:
        wire.open()
        with pytest.raises(grpc.RpcError, match="not open to the certificate of operator"):
            wire.open_namespace(tenant="a")


@pytest.mark.parametrize("rpc", sorted(each for each in WHOSE if "session" in WHOSE[each]))
@pytest.mark.parametrize("thief", ["b", "operator"])
def test_a_session_s_secret_is_of_no_use_to_another(
    callers: Callers, engine: Wire, rpc: str, thief: str
) -> None:
    values = {"session": engine.head}
    if rpc == "Invalidate":
        values["namespace_id"] = engine.namespace_id
    with callers.wire(thief) as wire:
        assert wire.refusal(rpc, getattr(pb, f"{rpc}Request")(**values)) == (
            "PERMISSION_DENIED",
            f"certificate = {thief!r}: the one that the session began with",
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
    for own in ("a", "operator"):
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
    for name in ("a", "b", "operator"):
        with callers.wire(name) as wire:
            found[name] = status(wire, "Explain", asked)
    assert found == {"a": "OK", "b": "NOT_FOUND", "operator": "OK"}


def test_alternative_names_count_before_the_common_one(callers: Callers, tmp_path: Path) -> None:
    as_tenant = CA.pair("operator", ["spiffe://a"]).files(tmp_path / "tenant", CA)
    with callers.wire("", as_tenant) as wire:
        assert wire.refusal("Stats", pb.StatsRequest())[1].startswith("certificate = 'spiffe://a'")
    as_nobody = CA.pair("operator", ["example.org"]).files(tmp_path / "nobody", CA)
    with callers.wire("", as_nobody) as wire:
        assert status(wire, "Stats") == "PERMISSION_DENIED"
    assert names_of({"x509_common_name": [b"c"], "x509_subject_alternative_name": []}) == ("c",)
    assert names_of({}) == ()


def test_a_refusal_names_no_hundreds_of_names(callers: Callers, tmp_path: Path) -> None:
    names = ["spiffe://a", *(f"host-{number}.example" for number in range(300))]
    files = CA.pair("a", names).files(tmp_path / "many", CA)
    with callers.wire("", files) as wire:
        wire.open(tenant="a")
        with pytest.raises(grpc.RpcError) as caught:
            wire.open_namespace(tenant="b")
    assert "not open to the certificate of spiffe://a, host-0" in status_of(caught.value)[1]
    assert len(status_of(caught.value)[1]) < 200


def test_calls_side_by_side_are_each_their_caller_s(callers: Callers) -> None:
    """One loop runs them all: none sees the credential of another."""
    with callers.wire("a") as tenant, callers.wire("operator") as operator:
        for _ in range(50):
            assert status(operator, "Stats") == "OK"
            assert status(tenant, "Stats") == "PERMISSION_DENIED"


def test_a_client_learns_that_it_was_denied(callers: Callers) -> None:
    from kvc2.client import Admin

    place = Address.of_daemon(callers.address, tls=callers.files["a"])
    with Admin(place) as admin, pytest.raises(Denied, match=r"one of tls\.administrators"):
        admin.stats()
