"""The namespace made of what KV depends on, of a tenant, and of a salt; identities of any schema.

    schema       whose                          written by
    (none)       our engine's, version 1        earlier_identity.py
    kvc2/2       our engine's, version 2        identity.py
    foreign/1    another engine's               foreign_identity.py

Two engines share blocks only when their identities are equal: no path, no name, no tensor-parallel
shape is in one, and everything that changes a number of KV as computed is. The key chains that
start from a namespace are made in csrc/index and csrc/block.

**An upgrade renames nothing.** The name is a function of identity, tenant and salt alone: nobody
asks what is stored. What version 1 could say is named by what version 1 wrote of it, whichever
version an engine speaks; all else by its own encoding. So a field that is not used orphans no
block, engines of both versions share, and different identities never get one name. Version 1 did
not say which kernels computed: what it stored counts as of the class that is the default
(`numerics`), and an engine of another class computes it anew, once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from kvc2 import earlier_identity, errors, foreign_identity
from kvc2 import identity as own_identity
from kvc2.foreign_identity import Foreign
from kvc2.identity import DTYPE_BYTES, Identity, canonical, check_digest
from kvc2.layout import Layout

IDENTITY_BYTES_MAX = 64 << 10
SALT_BYTES_MAX = 256
SECRET_BYTES_MIN = 16
NO_SCHEMA = "kvc2/1"  # what version 1 did not write
READERS: dict[str, Callable[[dict[str, Any]], Identity | Foreign]] = {
    NO_SCHEMA: earlier_identity.of_values,
    own_identity.SCHEMA: own_identity.of_values,
    foreign_identity.SCHEMA: foreign_identity.of_values,
}


def decode(encoded: bytes) -> Identity | Foreign:
    """The identity that `encoded` stands for. Raises InvalidRequest when its schema is unknown, a
    field is missing, unknown or of another type, or the encoding is not the canonical one."""
    return _decode(encoded)[1]


def _decode(encoded: bytes) -> tuple[str, Identity | Foreign]:
    """And its schema."""
    if not 1 <= len(encoded) <= IDENTITY_BYTES_MAX:
        raise errors.InvalidRequest("identity", len(encoded), f"1 to {IDENTITY_BYTES_MAX} bytes")
    try:
        values = json.loads(encoded)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate is no text
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest("identity", encoded, "canonical JSON") from error
    if not isinstance(values, dict):
        raise errors.InvalidRequest("identity", encoded, "a JSON object")
    given = dict(values)
    schema = given.pop("schema", NO_SCHEMA)
    if not isinstance(schema, str) or schema not in READERS:
        allowed = f"one that this daemon reads: {', '.join(READERS)}"
        raise errors.InvalidRequest("identity.schema", schema, allowed)
    found = READERS[schema](given)
    if ("schema" in values and schema == NO_SCHEMA) or canonical(values) != encoded:
        raise errors.InvalidRequest("identity", encoded, "in its canonical encoding")
    return schema, found


def named_by(encoded: bytes) -> bytes:
    """What stands for an identity in its namespace's name. Raises InvalidRequest."""
    schema, found = _decode(encoded)
    if schema == NO_SCHEMA or isinstance(found, Foreign):
        return encoded
    return earlier_identity.encode(found) or encoded


def check_layout(known: Identity | Foreign, layout: Layout) -> None:
    """Raises InvalidRequest when KV of this identity can't lie in pages of this layout. How another
    engine's lies is not known here."""
    if known.page_size != layout.page_size:
        raise errors.InvalidRequest(
            "identity.page_size", known.page_size, f"the session's {layout.page_size}"
        )
    if isinstance(known, Foreign):
        return
    if known.layers != layout.layers:
        raise errors.InvalidRequest(
            "identity.layers", known.layers, f"the session's {layout.layers}"
        )
    wide = known.kv_heads * known.head_size * DTYPE_BYTES[known.kv_dtype]
    plain = not known.state and all(
        kind == "full" or kind.startswith("window:") for _, kind in known.attention
    )
    if plain and layout.segments[0].bytes != wide * layout.page_size:
        raise errors.InvalidRequest(
            "identity.kv_heads, head_size, kv_dtype",
            wide * layout.page_size,
            f"bytes of a segment of the session: {layout.segments[0].bytes}",
        )


def namespace(
    tenant_secret: bytes, identity: bytes, salt: bytes = b"", *, opaque: bool = False
) -> bytes:
    """32 bytes: HMAC-SHA256(tenant secret, length of identity || identity || salt), the identity as
    `named_by` has it. opaque: keys name its blocks, not tokens; it is another one (the length's
    highest bit is set)."""
    if len(salt) > SALT_BYTES_MAX:
        raise errors.InvalidRequest("salt", len(salt), f"at most {SALT_BYTES_MAX} bytes")
    named = named_by(identity)
    message = struct.pack("<Q", len(named) | opaque << 63) + named + salt
    return hmac.digest(tenant_secret, message, "sha256")


def of_era(namespace: bytes, era: int) -> bytes:
    """32 bytes: what stands for the namespace in index, headers and records since its era-th
    Invalidate. Era 0: itself. Another era is another namespace to everything below."""
    if era == 0:
        return namespace
    return hashlib.sha256(namespace + struct.pack("<Q", era)).digest()


def weights_of(identity: bytes) -> str:
    """What an encoded identity calls its weights: a digest, or another engine's text; empty where
    there is none."""
    values = json.loads(identity)
    found = values.get("weights_digest", values.get("weights", ""))
    return found if isinstance(found, str) else ""


def is_weights_digest(text: str) -> bool:
    """Whether it is 64 hexadecimal digits."""
    try:
        check_digest("weights_digest", text, needed=True)
    except errors.InvalidRequest:
        return False
    return True


def fields_of(identity: bytes) -> dict[str, object]:
    """An encoded identity's fields by name, with those at their default, in the terms of the newest
    version; of another engine's, those of its own as fields.NAME. What can't be decoded is told as
    it is."""
    try:
        schema, known = _decode(identity)
    except errors.InvalidRequest:
        found: dict[str, object] = json.loads(identity)
        return found
    if isinstance(known, Identity):
        return asdict(known)
    named = {f"fields.{name}": value for name, value in known.fields.items()}
    return {"schema": schema, "engine": known.engine, "weights": known.weights, **named}
