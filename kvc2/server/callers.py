"""Who makes a call, what that may call, and how many of them may wait.

Not here: whose a credential is (credentials.py), what a call may carry (checks.py), and what it
does (session_calls.py, shared_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import grpc

from kvc2 import errors
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import Session, SessionTable
from kvc2.config import ADMINISTRATOR, ServeConfig, listen_address
from kvc2.metrics import Metrics
from kvc2.server.credentials import CALLER, Credential, Credentials
from kvc2.server.rates import Rates
from kvc2.v1 import cache_pb2

Whose = Literal["owner", "session", "session or owner", "session or administrator", "administrator"]
# Whose each rpc is. owner: who may open the unix socket, and so the side socket beside it. session:
# the engine that was told its secret. administrator: whoever reaches the address, which on TCP is
# any local user. Where callers show certificates or tokens: `Callers.gate`.
WHOSE: dict[str, Whose] = {
    "Attach": "owner",
    "OpenNamespace": "session",
    "Match": "session",
    "Acquire": "session",
    "Grant": "session",
    "Commit": "session",
    "Release": "session",
    "Read": "session",
    "Write": "session",
    "Explain": "session or owner",
    "Pin": "session or owner",
    "Unpin": "session or owner",
    "Prefetch": "session or owner",
    "Flush": "administrator",
    "Evict": "administrator",
    "Invalidate": "session or administrator",
    "SetQuota": "administrator",
    "Scrub": "administrator",
    "Stats": "administrator",
    "Drain": "administrator",
}
Context = grpc.aio.ServicerContext[Any, Any]
Gate = Callable[[Context], None]  # raises Denied and Unauthenticated
DURABLE_WAITS_MAX = 64  # flushes and durable commits that wait at a time


class Callers:
    """A call is its session's, which its secret proves, or the socket's owner's.

    Over TLS, and with token_file, each call needs a credential that the configuration knows: a
    session's calls the one that it attached with, an administrator's an administrator's, who is the
    owner too. Who calls for tenants and without a session knows the namespaces of these alone
    (`tenants`)."""

    def __init__(self, config: ServeConfig, table: SessionTable, metrics: Metrics) -> None:
        self._credentials = Credentials.of_config(config, metrics, table.clock)
        self._owner_is_known = listen_address(config.listen).path is not None
        self._metrics = metrics
        self.rates = Rates(config, metrics, table.clock)
        self.table = table
        self.waits = UnderWay("durable waits", DURABLE_WAITS_MAX)

    def session(self, head: cache_pb2.SessionRef) -> Session:
        """Raises SessionOver, and Denied over TLS for another's session."""
        try:
            found = self.table.of_call(head.secret, head.session_epoch)
        except errors.SessionOver:
            self._metrics.fault("fenced_call")
            raise
        caller = CALLER.get()
        if found.credential != caller:
            field = "certificate" if caller is None else caller.field
            raise errors.Denied(field, str(caller), "the one that the session began with")
        return found

    def session_or_owner(self, request: Any) -> Session | None:
        """None: the socket's owner asks, of all sessions, or who has a credential, of what
        `tenants` says. Raises Denied on TCP without one."""
        if request.HasField("session"):
            return self.session(request.session)
        if not self._owner_is_known and self._credentials is None:
            raise errors.Denied("session", "none", "one: TCP doesn't say who calls")
        return None

    def gate(self, rpc: str) -> Gate | None:
        """What each call of this rpc passes first, which makes its credential CALLER; None: nobody
        asks who calls. KeyError for an rpc without a rule."""
        whose, credentials = WHOSE[rpc], self._credentials
        if credentials is None:
            return None

        def admit(context: Context) -> None:
            caller = credentials.of(context)
            if whose == "administrator":
                check_administrator(caller)
            CALLER.set(caller)

        return admit

    def administrator(self) -> None:
        """Raises Denied for another's call, whose credential is known."""
        if (caller := CALLER.get()) is not None:
            check_administrator(caller)

    def take(self, session: Session | None, namespace: Namespace | None = None) -> None:
        """A call in this namespace off its tenant's rate, or one in none off its session's or its
        credential's, where that is of one tenant alone. The owner and an administrator have no
        limit without a session. Raises RateLimited."""
        caller = CALLER.get()
        if session is None and (caller is None or caller.is_administrator):
            return
        if namespace is not None:
            self.rates.take(namespace.owner.tenant)
        elif session is not None and (tenant := session.namespaces.sole_owner) is not None:
            self.rates.take(tenant)
        elif caller is not None and len(caller.tenants) == 1:
            self.rates.take(next(iter(caller.tenants)))

    def tenants(self) -> frozenset[str] | None:
        """Whose namespaces this call may name; None: all."""
        caller = CALLER.get()
        return None if caller is None or caller.is_administrator else caller.tenants


def check_administrator(caller: Credential) -> None:
    """Raises Denied."""
    if not caller.is_administrator:
        whose = "one of tls.administrators" if caller.kind == "certificate" else ADMINISTRATOR
        raise errors.Denied(caller.field, str(caller), f"{whose}, for this rpc")


class UnderWay:
    """Calls that hold something while they wait: so many at a time (`most`) of each caller."""

    def __init__(self, limit: str, most: int) -> None:
        self._limit = limit
        self._most = most
        self._counts: dict[object, int] = {}

    @contextmanager
    def one(self, of: object = None) -> Iterator[None]:
        """Of this caller; None: of all together. Raises LimitReached."""
        before = self._counts.get(of, 0)
        if before >= self._most:
            raise errors.LimitReached(self._limit, self._most, "are under way")
        self._counts[of] = before + 1
        try:
            yield
        finally:
            self._counts[of] -= 1
            if not self._counts[of]:
                del self._counts[of]

    def __len__(self) -> int:
        return sum(self._counts.values())
