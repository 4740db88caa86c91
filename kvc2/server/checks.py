"""What a call may carry: each check names the field, its value and what is allowed.

Everything that crosses the wire passes here before it reaches the cache, which trusts shapes and
ranges but checks ownership (a page of another lease) itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import NO_PAGES, Asked, Hints, Media
from kvc2.cache.namespaces import Namespace
from kvc2.cache.sessions import Session
from kvc2.config import LimitsConfig
from kvc2.namespace import is_weights_digest
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message

KEY_BYTES_MAX = 64
REQUEST_ID_BYTES_MAX = 128
ENGINE_NAME_BYTES_MAX = 128
TENANT_BYTES_MAX = 64
NAMESPACE_BYTES = 32
EXTRA_DIGEST_BYTES = 32
PRIORITY_MAX = 7
DEADLINE_MS_MAX = 3_600_000
EVICT_BLOCKS_MAX = (1 << 32) - 1  # more than any tier has pages
RATE_MAX = 1e9  # tokens/s: no machine prefills faster
TIERS = ("gpu", "cpu", "disk")

OPAQUE = "the namespace knows its blocks by opaque keys"  # which say all that they are made of

M = TypeVar("M", bound=Message)


class Asking(Protocol):
    """A message that says which blocks it means."""

    @property
    def tokens(self) -> bytes: ...

    @property
    def keys(self) -> Sequence[bytes]: ...

    @property
    def extras(self) -> Sequence[cache_pb2.Media]: ...


def message(kind: type[M], data: bytes) -> M:
    """The message of that kind, `known` whole. Raises InvalidRequest."""
    found = parsed(kind, data)
    known(found)
    return found


def parsed(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest, which quotes none of the bytes: there may be a secret among them."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise errors.InvalidRequest(
            name, f"{len(data)} bytes", f"no such message: {error}"
        ) from None


def known(message: Message) -> None:
    """Raises InvalidRequest for a field that this version of the wire doesn't have: what it asks
    for would not be done."""
    if (unknown := unknown_field(message)) is not None:
        raise errors.InvalidRequest(*unknown, "a field that this daemon's version of the wire has")


def unknown_field(message: Message) -> tuple[str, str] | None:
    """Where the message, or one in it, has a field that its kind doesn't know, and that field's
    number."""
    if len(unknown := UnknownFieldSet(message)):
        return message.DESCRIPTOR.full_name, f"field {unknown[0].field_number}"
    for name, repeated in _inner(message.DESCRIPTOR):
        parts = getattr(message, name) if repeated else ()
        if not repeated and message.HasField(name):
            parts = (getattr(message, name),)
        for each in parts:
            if (found := unknown_field(each)) is not None:
                return found
    return None


@functools.cache
def _inner(kind: Descriptor) -> tuple[tuple[str, bool], ...]:
    """Its fields that are messages themselves, and whether there may be several."""
    return tuple(
        (each.name, each.is_repeated)
        for each in kind.fields
        if each.message_type is not None and not each.message_type.GetOptions().map_entry
    )


def array(field: str, data: bytes, most: int) -> NDArray[np.uint32]:
    """A u32 array of at most `most` elements, without a copy. Raises InvalidRequest."""
    if len(data) & 3:
        raise errors.InvalidRequest(field, f"{len(data)} bytes", "a u32 array, 4 bytes an element")
    if len(data) > 4 * most:
        raise errors.InvalidRequest(field, f"{len(data) // 4} elements", f"at most {most}")
    return np.frombuffer(data, dtype="<u4")


def tokens(field: str, data: bytes, limits: LimitsConfig) -> NDArray[np.uint32]:
    found = array(field, data, limits.max_tokens)
    if not len(found):
        raise errors.InvalidRequest(field, "empty", f"1 to {limits.max_tokens} tokens")
    return found


def asked(
    request: Asking,
    namespace: Namespace,
    limits: LimitsConfig,
    field: str = "",
    *,
    first_block: int = 0,
) -> Asked:
    """Tokens with extras, or keys in a namespace of opaque keys. `field`: what stands before their
    names. first_block: of the prompt, with which the tokens begin."""
    if not namespace.opaque:
        if request.keys:
            allowed = "none: the namespace knows its blocks by tokens"
            raise errors.InvalidRequest(f"{field}keys", f"{len(request.keys)} of them", allowed)
        found = tokens(f"{field}tokens", request.tokens, limits)
        first = first_block * namespace.page_size
        beside = extras(f"{field}extras", request.extras, first, first + len(found))
        return Asked(found, extras=beside)
    if request.tokens:
        told = f"{len(request.tokens)} bytes"
        raise errors.InvalidRequest(f"{field}tokens", told, f"none: {OPAQUE}")
    no_extras(f"{field}extras", request.extras)
    if not 1 <= len(request.keys) <= limits.max_keys:
        count = f"{len(request.keys)} of them"
        raise errors.InvalidRequest(f"{field}keys", count, f"1 to at most {limits.max_keys}")
    sizes = list(map(len, request.keys))
    if min(sizes) < 1 or max(sizes) > KEY_BYTES_MAX:
        wrong = next(i for i, size in enumerate(sizes) if not 1 <= size <= KEY_BYTES_MAX)
        key(f"{field}keys[{wrong}]", request.keys[wrong])
    return Asked(keys=tuple(request.keys))


def explained(
    request: cache_pb2.ExplainRequest, namespace: Namespace, limits: LimitsConfig
) -> Asked:
    """As `asked`, of tokens or of one key."""
    what = request.WhichOneof("what") or "tokens"
    if (what == "key") != namespace.opaque:
        told, known = len(getattr(request, what)), "opaque keys" if namespace.opaque else "tokens"
        allowed = f"none: the namespace knows its blocks by {known}"
        raise errors.InvalidRequest(what, f"{told} bytes", allowed)
    if namespace.opaque:
        no_extras("extras", request.extras)
        return Asked(keys=(key("key", request.key),))
    found = tokens("tokens", request.tokens, limits)
    return Asked(found, extras=extras("extras", request.extras, 0, len(found)))


def extras(field: str, given: Sequence[cache_pb2.Media], first: int, end: int) -> tuple[Media, ...]:
    """Of tokens [first, end) of a prompt, at most one a token."""
    if not given:
        return ()
    few(field, len(given), end - first)
    before, allowed = first, f"{first} to {end - 1}, where tokens are given"
    for index, each in enumerate(given):
        name, at = f"{field}[{index}]", each.first_token
        if not first <= at < end:
            raise errors.InvalidRequest(f"{name}.first_token", at, allowed)
        if at < before:
            order = f"{before} or more: in the order in which they begin"
            raise errors.InvalidRequest(f"{name}.first_token", at, order)
        if not each.num_tokens:
            raise errors.InvalidRequest(f"{name}.num_tokens", 0, "at least 1")
        if len(each.digest) != EXTRA_DIGEST_BYTES:
            told = f"{len(each.digest)} bytes"
            raise errors.InvalidRequest(f"{name}.digest", told, f"{EXTRA_DIGEST_BYTES} bytes")
        before = at
    return tuple(Media(each.first_token, each.num_tokens, each.digest) for each in given)


def no_extras(field: str, given: Sequence[cache_pb2.Media], why: str = OPAQUE) -> None:
    if given:
        raise errors.InvalidRequest(field, f"{len(given)} of them", f"none: {why}")


def key(field: str, value: bytes) -> bytes:
    if not 1 <= len(value) <= KEY_BYTES_MAX:
        raise errors.InvalidRequest(field, f"{len(value)} bytes", f"1 to {KEY_BYTES_MAX} bytes")
    return value


def pages(field: str, data: bytes, session: Session) -> NDArray[np.uint32]:
    """Page ids below the session's num_pages, none twice."""
    found = array(field, data, session.num_pages)
    if len(found):
        if int(found.max()) >= session.num_pages:
            raise errors.InvalidRequest(
                field, int(found.max()), f"page ids below {session.num_pages}"
            )
        if len(np.unique(found)) != len(found):
            raise errors.InvalidRequest(field, "a page twice", "each page once")
    return found


def component_pages(
    field: str, given: Sequence[cache_pb2.ComponentPages], session: Session
) -> NDArray[np.uint32]:
    """Pages of the session's pool, of component 0: at most one entry. Raises Reserved for another
    component."""
    few(field, len(given), 1)
    for index, each in enumerate(given):
        reserved(f"{field}[{index}].component", each.component, 0)
        if each.offsets:
            raise errors.InvalidRequest(
                f"{field}[{index}].offsets", f"{len(each.offsets)} bytes", "pages, in a pool"
            )
        return pages(f"{field}[{index}].pages", each.pages, session)
    return NO_PAGES


def grants(given: Sequence[cache_pb2.PageCount], limits: LimitsConfig) -> int:
    """Pages that are wanted of component 0."""
    few("grants", len(given), 1)
    for each in given:
        reserved("grants[0].component", each.component, 0)
        if each.pages > limits.max_grant_pages:
            raise errors.InvalidRequest(
                "grants[0].pages", each.pages, f"at most {limits.max_grant_pages}"
            )
        return each.pages
    return 0


def request_id(field: str, value: bytes) -> bytes:
    if not 1 <= len(value) <= REQUEST_ID_BYTES_MAX:
        raise errors.InvalidRequest(
            field, f"{len(value)} bytes", f"1 to {REQUEST_ID_BYTES_MAX} bytes"
        )
    return value


def evict_blocks(count: int) -> int:
    if count > EVICT_BLOCKS_MAX:
        raise errors.InvalidRequest("blocks", count, f"at most {EVICT_BLOCKS_MAX}")
    return count


def deadline_s(field: str, milliseconds: int, default_s: float) -> float:
    if milliseconds > DEADLINE_MS_MAX:
        raise errors.InvalidRequest(field, milliseconds, f"at most {DEADLINE_MS_MAX}")
    return milliseconds / 1000 if milliseconds else default_s


def rate(field: str, value: float) -> float:
    if not 0 <= value <= RATE_MAX:  # nor NaN
        raise errors.InvalidRequest(field, value, f"0 to {RATE_MAX:g}")
    return value


def text(field: str, value: str, most: int) -> str:
    if len(value.encode()) > most:
        raise errors.InvalidRequest(field, value, f"at most {most} bytes")
    return value


def reserved(field: str, value: object, only: object) -> None:
    if value != only:
        raise errors.Reserved(field, value, f"reserved, must be {only!r}")


def namespace_id(session: Session, wire_id: int) -> Namespace:
    """What the session has open under this id: the wire counts from 1, so that a field that was
    left out is refused. Raises NotFound, also for one that was let go of: the client opens it
    again."""
    namespace = session.namespaces.use(wire_id - 1)
    if namespace is None:
        raise errors.NotFound("namespace_id", wire_id, "opened by this session with OpenNamespace")
    return namespace


def namespace(field: str, value: bytes) -> bytes:
    if len(value) != NAMESPACE_BYTES:
        raise errors.InvalidRequest(field, f"{len(value)} bytes", f"{NAMESPACE_BYTES} bytes")
    return value


def weights(field: str, value: str, *, known: bool) -> None:
    """Raises InvalidRequest for what nothing has and no weights of our engine's could have."""
    if not known and not is_weights_digest(value):
        allowed = "64 hexadecimal digits, or as another engine's identity has its weights"
        raise errors.InvalidRequest(field, value, allowed)


def hints(field: str, given: cache_pb2.Hints) -> Hints:
    if given.priority > PRIORITY_MAX:
        raise errors.InvalidRequest(f"{field}.priority", given.priority, f"0 to {PRIORITY_MAX}")
    return from_message(Hints, given)


def tier(value: str) -> str:
    if value not in TIERS:
        raise errors.InvalidRequest("tier", value, "gpu, cpu or disk")
    return value


def few(field: str, count: int, most: int) -> None:
    if count > most:
        raise errors.InvalidRequest(field, f"{count} of them", f"at most {most}")
