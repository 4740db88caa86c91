"""Exceptions for misuse and bad configuration: each names the field, its value and what is allowed.

Not here: expected outcomes (a miss, a full tier), which are values in results, and broken
invariants, which end the process in C++. `STATUS` is the only map from these to gRPC.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

VALUE_TEXT_MAX = 80  # a refused value is quoted, but a forged megabyte is not echoed


def quote(value: object) -> str:
    """`value` as a message shows it: at most VALUE_TEXT_MAX characters."""
    if isinstance(value, bytes | bytearray | memoryview):
        head = bytes(value[: VALUE_TEXT_MAX // 4])
        return repr(head) + (f"... ({len(value)} bytes)" if len(value) > len(head) else "")
    text = repr(value)
    return text if len(text) <= VALUE_TEXT_MAX else text[:VALUE_TEXT_MAX] + "..."


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that `name` was probably meant to be, or None."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return close[0] if close else None


class Kvc2Error(Exception):
    """Base of what this package raises on purpose."""


class FieldError(Kvc2Error):
    """A field has a value that is not allowed."""

    def __init__(self, field: str, value: object = None, allowed: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        shown = f"{field} = {quote(value)}" if value is not None else field
        super().__init__(f"{shown}: {allowed}" if allowed else shown)


class InvalidRequest(FieldError):
    """A call carries a value that can't be: the caller's bug, never worth a retry."""


class InvalidConfig(FieldError):
    """A key of the configuration is unknown or its value is not allowed: exit code 2."""


class Reserved(FieldError):
    """A field or rpc that the wire has but this version doesn't serve."""


class NotFound(FieldError):
    """The namespace or lease named by a call is not known to its session."""


class LimitReached(FieldError):
    """A limit of the daemon's configuration is reached; the message names it."""


class RateLimited(LimitReached):
    """A tenant has had its calls, or its bytes, of this moment: `limit` says which, on the daemon's
    side. `retry_s`: when there are some again; 0: it wasn't told."""

    limit: str = ""
    retry_s: float = 0.0


class Denied(FieldError):
    """The caller, by its user id, its certificate or its bearer token, may not do this."""


class Unauthenticated(FieldError):
    """A call shows no bearer token where one is needed, or one that isn't known."""


class SessionOver(Kvc2Error):
    """The session has ended or belongs to another run of the daemon: attach again."""


class Draining(Kvc2Error):
    """The daemon is about to stop and takes nothing new."""


class StartRefused(Kvc2Error):
    """The daemon can't start as configured (a taken socket, a public address): exit code 1."""


class Served(StartRefused):
    """Another process has the disk directory."""


# why there is no daemon at an address, or none that takes us
Absence = Literal[
    "no_socket",  # or no such host
    "nobody_listens",
    "no_permission",  # it is another user's
    "no_answer",
    "not_kvc2",  # somebody else answers
    "not_serving",  # it starts or drains
    "refused",  # it said why
    "failed",
]


class Unreachable(Kvc2Error):
    """No daemon answers at the address, or it did not answer in time."""

    def __init__(self, text: str, reason: Absence = "failed") -> None:
        self.reason: Absence = reason
        super().__init__(text)


class Detached(Kvc2Error):
    """The client has no session now; the engine goes on without hits.

    `reason` is "dead" when the daemon's process is known to be gone (its promises are void and its
    pages are the engine's again) or "silent" when it doesn't answer and may still write into pages
    of a transfer under way: quarantine those.
    """

    def __init__(self, reason: Literal["dead", "silent"], text: str = "") -> None:
        self.reason: Literal["dead", "silent"] = reason
        super().__init__(text or f"detached: the daemon is {reason}")


ERROR_KIND = "kvc2-error"  # metadata key
RETRY_MS = "grpc-retry-pushback-ms"  # another, gRPC's own for when to come back

# exception -> the name of its grpc.StatusCode; what is not listed is INTERNAL and logged
STATUS: dict[type[Kvc2Error], str] = {
    InvalidRequest: "INVALID_ARGUMENT",
    Reserved: "UNIMPLEMENTED",
    NotFound: "NOT_FOUND",
    LimitReached: "RESOURCE_EXHAUSTED",
    RateLimited: "RESOURCE_EXHAUSTED",
    Denied: "PERMISSION_DENIED",
    Unauthenticated: "UNAUTHENTICATED",
    SessionOver: "FAILED_PRECONDITION",
    Draining: "UNAVAILABLE",
}


def status_of(error: BaseException) -> str:
    """The name of the gRPC status that tells a caller about `error`."""
    return STATUS.get(type(error), "INTERNAL") if isinstance(error, Kvc2Error) else "INTERNAL"


def of_kind(kind: str, details: str) -> Kvc2Error | None:
    """The exception of that class name as a client raises it; None if no answer has that name.

    The name travels as trailing metadata ERROR_KIND, since a status can also be the transport's:
    UNAVAILABLE is a draining daemon or none at all.
    """
    for each in STATUS:
        if each.__name__ == kind:
            return each(details)
    return None
