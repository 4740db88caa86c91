"""Who makes a call, and how many of them may wait.

Not here: what a call may carry (checks.py), and what it does (session_calls.py, shared_calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from kvc2 import errors
from kvc2.cache.sessions import Session, SessionTable
from kvc2.config import ServeConfig, listen_address
from kvc2.metrics import Metrics
from kvc2.v1 import cache_pb2

Whose = Literal["owner", "session", "session or owner", "administrator"]
# Whose each rpc is. owner: who may open the unix socket, and so the side socket beside it. session:
# the engine that was told its secret. administrator: whoever reaches the address, which on TCP is
# any local user.
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
    "Invalidate": "administrator",
    "SetQuota": "administrator",
    "Scrub": "administrator",
    "Stats": "administrator",
    "Drain": "administrator",
}
DURABLE_WAITS_MAX = 64  # flushes and durable commits that wait at a time


class Callers:
    """A call is its session's, which its secret proves, or the socket's owner's."""

    def __init__(self, config: ServeConfig, table: SessionTable, metrics: Metrics) -> None:
        self._owner_is_known = listen_address(config.listen).path is not None
        self._metrics = metrics
        self.table = table
        self.waits = UnderWay("durable waits", DURABLE_WAITS_MAX)

    def session(self, head: cache_pb2.SessionRef) -> Session:
        """Raises SessionOver."""
        try:
            return self.table.of_call(head.secret, head.session_epoch)
        except errors.SessionOver:
            self._metrics.fault("fenced_call")
            raise

    def session_or_owner(self, request: Any) -> Session | None:
        """None: the socket's owner asks, of all sessions. Raises Denied on TCP."""
        if request.HasField("session"):
            return self.session(request.session)
        if not self._owner_is_known:
            raise errors.Denied("session", "none", "one: TCP doesn't say who calls")
        return None


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
