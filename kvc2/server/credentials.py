"""Who calls: what the configuration says of a certificate's names, or of a bearer token.

That the certificate is one of tls.client_ca, and has not expired, gRPC has seen before (tls.py).
Not here: what who may call (callers.py), which namespaces a tenant may open (tenants.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc

from kvc2 import errors, events
from kvc2.config import ADMINISTRATOR, DEFAULT_TENANT, ServeConfig
from kvc2.keyring import KeyringFile, KeyringSource
from kvc2.metrics import Metrics

TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")  # RFC 6750's, of a length that isn't guessed
TOKENS_MAX = 1000  # each call compares its own with all of them
HEADER = "authorization"
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Credential:
    """`names`: the certificate's, or whose the token is; never the token. `tenants`: those that it
    speaks for. An administrator speaks for the default tenant too, as the owner of a unix socket
    does."""

    names: tuple[str, ...]
    tenants: frozenset[str]
    is_administrator: bool
    kind: Literal["certificate", "bearer token"] = "certificate"

    def __str__(self) -> str:
        """For a message: a certificate may have hundreds of names."""
        text = ", ".join(self.names)
        return text if len(text) <= errors.VALUE_TEXT_MAX else text[: errors.VALUE_TEXT_MAX] + "..."

    @property
    def field(self) -> str:
        """What an error names."""
        return "certificate" if self.kind == "certificate" else "owner of the bearer token"


# of the call under way; None: nobody asks who calls
CALLER: ContextVar[Credential | None] = ContextVar("kvc2_caller", default=None)


class Credentials:
    """All that the configuration knows. Raises InvalidConfig for a token file that can't be
    used."""

    def __init__(
        self, config: ServeConfig, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asks_certificates = config.tls.client_ca is not None
        self._administrators = frozenset(config.tls.administrators)
        self._tenants = {each.name: frozenset(each.certificate_names) for each in config.tenants}
        self._tokens: KeyringFile | None = None
        if config.token_file is not None:
            owners = {DEFAULT_TENANT, ADMINISTRATOR, *self._tenants}
            source = token_source(config.token_file, frozenset(owners), metrics)
            self._tokens = KeyringFile(source, clock)

    @classmethod
    def of_config(
        cls, config: ServeConfig, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> Credentials | None:
        """None: nobody asks who calls."""
        if config.tls.files is None and config.token_file is None:
            return None
        return cls(config, metrics, clock)

    def of(self, context: Context) -> Credential:
        """Of one call: its token's where it shows one, else its certificate's. Raises
        Unauthenticated, and Denied for a certificate that the configuration doesn't name."""
        if self._tokens is None:
            return self.of_names(names_of(context.auth_context()))
        shown = [value for name, value in context.invocation_metadata() or () if name == HEADER]
        if shown or not self._asks_certificates:
            return self._of_token(self._tokens, shown)
        return self.of_names(names_of(context.auth_context()))

    def _of_token(self, tokens: KeyringFile, shown: list[str | bytes]) -> Credential:
        """Nothing here is said of what was shown: it may be a token all the same."""
        if not shown:
            raise errors.Unauthenticated(HEADER, None, "Bearer TOKEN, which each call needs here")
        kind, _, token = str(shown[0]).partition(" ")
        owner = tokens.owner(token.strip())
        if len(shown) > 1 or kind.lower() != "bearer" or owner is None:
            raise errors.Unauthenticated(HEADER, None, "Bearer TOKEN, once, one of token_file")
        administrator = owner == ADMINISTRATOR
        tenants = frozenset({DEFAULT_TENANT if administrator else owner})
        return Credential((owner,), tenants, administrator, "bearer token")

    def of_names(self, names: tuple[str, ...]) -> Credential:
        """Of a certificate's. Raises Denied for whom the configuration doesn't name."""
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
    then a CA that checks those alone has checked what counts. `facts`: as gRPC tells them of a
    connection's other end."""
    told = facts.get("x509_subject_alternative_name") or facts.get("x509_common_name") or []
    return tuple(each.decode(errors="replace") for each in told)


def token_source(path: Path, owners: frozenset[str], metrics: Metrics) -> KeyringSource:
    """The file of bearer tokens, each of one of these owners."""

    def check(found: Mapping[str, str]) -> None:
        """An entry is told by its number: its token, or what stands in its owner's place, may be
        a secret."""

        def refused(allowed: str) -> errors.InvalidConfig:
            return errors.InvalidConfig("token_file", str(path), allowed)

        if len(found) > TOKENS_MAX:
            raise refused(f"at most {TOKENS_MAX} tokens: it holds {len(found)}")
        for number, (token, owner) in enumerate(found.items(), 1):
            if TOKEN.fullmatch(token) is None:
                raise refused(
                    "tokens of 16 to 512 of A-Z a-z 0-9 - . _ ~ + / and = at the end: entry "
                    f"{number} has another"
                )
            if owner not in owners:
                raise refused(
                    f"owners that are a tenant of the configuration, {DEFAULT_TENANT} or "
                    f"{ADMINISTRATOR}: entry {number} has another"
                )

    def told(news: int | errors.InvalidConfig) -> None:
        if isinstance(news, int):
            events.event("token_file_read", tokens=news)
            return
        metrics.fault("token_file_refused")
        events.warning("token_file_refused", reason=str(news))

    return KeyringSource("token_file", path, private=True, check=check, told=told)
