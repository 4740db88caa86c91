"""What the bridge asks of the daemon's client, and the engine's words for what goes through it.

Not responsible for when a call is made, nor for its faults (prefix).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from engine.request import U32, Explanation
from kvc2 import errors
from kvc2.answers import (
    Acquired,
    Committed,
    Explained,
    Hints,
    LeaseCommit,
    Matched,
    Released,
    TierTokens,
)


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

    def prefetch(self, namespace: Any, tokens: U32) -> Any: ...

    def explain_request(self, request_id: bytes) -> Explained: ...

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool: ...

    def close(self) -> None: ...


def hints_of(said: Hints, *, ended: bool) -> Hints:
    """For the wire. A lease that is given back to be asked for again has not `ended`, and so its
    session has not either."""
    return replace(said, session_end=ended and said.session_end)


def explanation_of(found: Explained, matched_tokens: int) -> Explanation:
    """For the answer: no token, no text, and no word of what other prompts hold. A lease that has
    less than the tiers had is explained by that."""
    tiers = dict.fromkeys(("gpu", "cpu", "disk", "remote"), 0)
    place = [tier for tier, blocks in found.runs for _ in range(blocks)]
    for tier in place:
        tiers[tier] += found.page_size
    held, matched = TierTokens(**tiers), matched_tokens // found.page_size
    if matched < found.hit_blocks:
        tier = place[matched] if matched < len(place) else ""  # beyond the runs that are told
        return Explanation("not_loaded", matched, tier=tier, found=held)
    return Explanation(
        found.why,
        None if found.why == "nothing" else found.hit_blocks,
        found.cause,
        found.tier,
        found.policy,
        found.died_s_ago,
        held,
    )


def ask_why(client: CacheClient, request_id: bytes, matched_tokens: int) -> Explanation:
    """What the daemon remembers of this acquire. Never fails: that it doesn't tell is an answer."""
    try:
        return explanation_of(client.explain_request(request_id), matched_tokens)
    except (errors.Detached, errors.Unreachable):
        return Explanation("no_daemon")
    except errors.Kvc2Error:  # it has forgotten, or another session answers
        return Explanation("unknown")


def told(why: str) -> Future[Explanation]:
    """What needs no asking."""
    done: Future[Explanation] = Future()
    done.set_result(Explanation(why))
    return done
