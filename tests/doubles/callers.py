"""A daemon on TCP with two tenants and an administrator, and how each of them shows who it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from kvc2.config import ADMINISTRATOR, TenantConfig, TlsConfig
from kvc2.host.tls import TlsFiles
from kvc2.server.callers import WHOSE
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.certificates import HOSTS, CertificateAuthority, replace
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, status_of, u32

Shown = Literal["certificates", "tokens over TLS", "tokens in clear"]
CA = CertificateAuthority()
PROMPT = u32(*range(64))
UNKNOWN = bytes(range(32))  # a namespace that there isn't
OPERATOR, NOBODY = "operator", "nobody"
REQUESTS: dict[str, Any] = {
    "Evict": pb.EvictRequest(tier="cpu", blocks=1),
    "SetQuota": pb.SetQuotaRequest(tenant="a", tier="cpu"),
    "Invalidate": pb.InvalidateRequest(weights_digest="ab" * 32),
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Callers:
    """`wire` connects as tenant a or b, as the operator, or as nobody whom the daemon knows."""

    def __init__(self, folder: Path, shown: Shown, **changes: Any) -> None:
        self.by_token = shown != "certificates"
        self.tokens = {name: f"{name}-{'0123456789' * 2}" for name in ("a", "b", OPERATOR)}
        self.token_file = folder / "tokens.yaml"
        self._folder = folder
        tls = TlsConfig()
        if shown != "tokens in clear":
            files = CA.pair("daemon", HOSTS).files(folder / "tls", CA)
            tls = TlsConfig(files.certificate, files.key)
        if self.by_token:
            self.write_tokens(self.tokens)
            changes = {"token_file": self.token_file, **changes}
        else:
            tls = TlsConfig(files.certificate, files.key, files.ca, administrators=(OPERATOR,))
        tenants = tuple(self._tenant(name) for name in ("a", "b"))
        self.config = serve_config(
            folder, **{"listen": "127.0.0.1:0", "tls": tls, "tenants": tenants, **changes}
        )
        self._ca = None if tls.certificate is None else files.ca
        self.clock = Clock()  # for a daemon that shall have one
        self.served: ServedDaemon | None = None

    def _tenant(self, name: str) -> TenantConfig:
        secret = self._folder / f"{name}.secret"
        secret.write_bytes(name.encode() * 32)
        secret.chmod(0o600)
        names = () if self.by_token else (f"spiffe://{name}", name)
        return TenantConfig(name, secret, certificate_names=names)

    def write_tokens(self, tokens: Mapping[str, str]) -> None:
        """Replaces the token file."""
        whose = {OPERATOR: ADMINISTRATOR}
        lines = [f"{token}: {whose.get(name, name)}\n" for name, token in tokens.items()]
        replace(self.token_file, "".join(lines).encode())

    @property
    def address(self) -> str:
        assert self.served is not None
        return f"127.0.0.1:{self.served.daemon.port}"

    def files(self, name: str) -> TlsFiles | None:
        """What its TLS begins with; None: it is in clear."""
        if self.by_token:
            return None if self._ca is None else TlsFiles(ca=self._ca)
        return CA.pair(name).files(self._folder / name, CA)

    def wire(self, name: str) -> Wire:
        headers = []
        if self.by_token:
            token = self.tokens.get(name, "nobody-has-this-one")
            headers = [("authorization", f"Bearer {token}")]
        return Wire(self.address, self.files(name), headers)

    def told(self, name: str) -> str:
        """How a refusal names this caller."""
        if not self.by_token:
            return f"certificate = {name!r}"
        return f"owner of the bearer token = {name.replace(OPERATOR, ADMINISTRATOR)!r}"

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


def rpcs() -> dict[str, str]:
    """The service of each rpc that the daemon has."""
    files = (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    services = [each for file in files for each in file.services_by_name.values()]
    return {method.name: each.full_name for each in services for method in each.methods}


def request_of(rpc: str) -> Any:
    """One that fails at nothing but who sends it, or finds nothing."""
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


@contextmanager
def served_callers(folder: Path, shown: Shown, *, on_clock: bool = False) -> Iterator[Callers]:
    """With their daemon, which has no cache; `on_clock`: by their clock, not the host's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        found = Callers(folder, shown)
        clock = found.clock if on_clock else None
        with ServedDaemon(found.config, cache=None, clock=clock) as found.served:
            yield found
