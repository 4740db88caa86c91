"""What the bridge asks of the daemon's client, and the engine's words for what goes through it.

Not responsible for when a call is made, nor for its faults (prefix).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from engine import request
from engine.request import U32
from kvc2.client import Acquired, Committed, Hints, LeaseCommit, Matched, Released


class CacheClient(Protocol):
    """What the bridge uses of kvc2.client.Client; a namespace is whatever open_namespace
    returns."""

    def open_namespace(self, identity: bytes, tenant: str = "", salt: bytes = b"") -> Any: ...

    def acquire(
        self,
        namespace: Any,
        request_id: bytes,
        tokens: U32,
        *,
        grant_pages: int = 0,
        hints: Hints = ...,
    ) -> Acquired: ...

    def commit(
        self,
        commits: Sequence[LeaseCommit],
        *,
        grant_pages: int = 0,
        prefill_tokens_per_s: float = 0.0,
    ) -> Committed: ...

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: U32,
        grant_pages: int = 0,
        hints: Sequence[Hints] = (),
    ) -> Released: ...

    def grant(self, pages: int) -> U32: ...

    def match(self, namespace: Any, tokens: U32) -> Matched: ...

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool: ...

    def close(self) -> None: ...


def hints_of(said: request.Hints, *, ended: bool) -> Hints:
    """For the wire. A lease that is given back to be asked for again has not `ended`, and so its
    session has not either."""
    return replace(Hints(**asdict(said)), session_end=ended and said.session_end)
