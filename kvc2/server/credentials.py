"""Who calls over TLS: what the configuration says of a certificate's names.

That the certificate is one of tls.client_ca, and has not expired, gRPC has seen before (tls.py).
Not here: what who may call (callers.py), which namespaces a tenant may open (tenants.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from kvc2 import errors
from kvc2.config import DEFAULT_TENANT, ServeConfig


@dataclass(frozen=True)
class Credential:
    """`names`: the certificate's. `tenants`: those that it speaks for. An administrator speaks for
    the default tenant too, as the owner of a unix socket does."""

    names: tuple[str, ...]
    tenants: frozenset[str]
    is_administrator: bool

    def __str__(self) -> str:
        """For a message: a certificate may have hundreds of names."""
        text = ", ".join(self.names)
        return text if len(text) <= errors.VALUE_TEXT_MAX else text[: errors.VALUE_TEXT_MAX] + "..."


# of the call under way; None: it didn't come over TLS
CALLER: ContextVar[Credential | None] = ContextVar("kvc2_caller", default=None)


class Credentials:
    """All that the configuration knows."""

    def __init__(self, config: ServeConfig) -> None:
        self._administrators = frozenset(config.tls.administrators)
        self._tenants = {each.name: frozenset(each.certificate_names) for each in config.tenants}

    def of(self, facts: Mapping[str, Iterable[bytes]]) -> Credential:
        """Of what gRPC says of a connection's other end. Raises Denied for whom the configuration
        doesn't name."""
        names = names_of(facts)
        administrator = not self._administrators.isdisjoint(names)
        tenants = {tenant for tenant, known in self._tenants.items() if not known.isdisjoint(names)}
        if administrator:
            tenants.add(DEFAULT_TENANT)
        found = Credential(names, frozenset(tenants), administrator)
        if not tenants:
            allowed = "one that tls.administrators or a tenant's certificate_names has"
            raise errors.Denied("certificate", str(found), allowed)
        return found


def names_of(facts: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """A certificate's alternative names; its common name only where it has none of these, since
    then a CA that checks those alone has checked what counts."""
    told = facts.get("x509_subject_alternative_name") or facts.get("x509_common_name") or []
    return tuple(each.decode(errors="replace") for each in told)
