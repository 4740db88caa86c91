"""What a model's KV depends on, its canonical encoding, and the namespace made of it.

Two engines share blocks only when their identities encode to the same bytes: no path, no name, no
tensor-parallel shape is in it, and everything that changes a number of KV as computed is. The key
chains that start from a namespace are made in csrc/index and csrc/block.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvc2 import errors
from kvc2.layout import LAYOUT_VERSION, Layout, check_page_size

IDENTITY_BYTES_MAX = 64 << 10
SALT_BYTES_MAX = 256
SECRET_BYTES_MIN = 16
# KV that depends on the total length can't be cached by prefix
DYNAMIC_ROPES = {"dynamic", "longrope", "su"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True)
class Identity:
    """Everything that KV depends on: engines share it only if this is equal.

    Raises InvalidRequest.

    weights_digest: 64 hex digits, SHA-256 over sorted (tensor name, dtype, shape, xxh3_128 of its
    bytes). dtypes: (weight class, dtype as computed) sorted by class. deferral: layers by which
    cold experts are late. experts_per_token: as computed, whatever the model's file says.
    normalize_top_k: 1 where the chosen experts' weights are scaled to sum to 1. moe_layers: of each
    layer 1 if it has experts; empty for a model without any. rms_norm_eps: in every norm.
    attention_bias: 1 where queries, keys and values have one. rope_scaling: (key, value) sorted by
    key, `rope_type` among them. windows: attention window of each layer, 0 for none; empty for none
    anywhere. adapter_digest: 64 hex digits or empty.
    """

    weights_digest: str
    architecture: str
    dtypes: tuple[tuple[str, str], ...]
    kv_dtype: str
    layers: int
    kv_heads: int
    head_size: int
    rope_theta: float
    page_size: int
    rope_scaling: tuple[tuple[str, str], ...] = ()
    expert_quantisation: str = ""
    expert_group_size: int = 0
    deferral: int = 0
    experts_per_token: int = 0
    normalize_top_k: int = 0
    moe_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 0.0
    attention_bias: int = 0
    kv_scales_digest: str = ""
    attention: str = "full"
    windows: tuple[int, ...] = ()
    sinks: int = 0
    layout_version: int = LAYOUT_VERSION
    adapter_digest: str = ""

    def __post_init__(self) -> None:
        _check_digest("identity.weights_digest", self.weights_digest, needed=True)
        _check_digest("identity.adapter_digest", self.adapter_digest, needed=False)
        _check_digest("identity.kv_scales_digest", self.kv_scales_digest, needed=False)
        check_page_size("identity.page_size", self.page_size)
        if not math.isfinite(self.rope_theta):
            raise errors.InvalidRequest("identity.rope_theta", self.rope_theta, "finite")
        if not self.architecture:
            raise errors.InvalidRequest("identity.architecture", "", "not empty")
        if self.kv_dtype not in DTYPE_BYTES:
            raise errors.InvalidRequest(
                "identity.kv_dtype", self.kv_dtype, "one of " + ", ".join(DTYPE_BYTES)
            )
        for name in ("layers", "kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise errors.InvalidRequest(f"identity.{name}", getattr(self, name), "at least 1")
        for name in ("dtypes", "rope_scaling"):
            pairs = getattr(self, name)
            if list(pairs) != sorted(dict(pairs).items()):
                raise errors.InvalidRequest(
                    f"identity.{name}", pairs, "pairs, sorted, no key twice"
                )
        for name in ("windows", "moe_layers"):
            given = len(getattr(self, name))
            if given not in (0, self.layers):
                raise errors.InvalidRequest(f"identity.{name}", given, "one a layer or none")
        if self.layout_version != LAYOUT_VERSION:
            raise errors.InvalidRequest("identity.layout_version", self.layout_version, "1")
        scaling = dict(self.rope_scaling)
        kind = scaling.get("rope_type", scaling.get("type", ""))
        if kind in DYNAMIC_ROPES:
            raise errors.InvalidRequest(
                "identity.rope_scaling", kind, "KV must not depend on the total length"
            )

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII. Equal identities, equal bytes."""
        return _canonical(asdict(self))


def decode(encoded: bytes) -> Identity:
    """The identity that `encoded` stands for. Raises InvalidRequest when a field is missing,
    unknown or of another type, and when the encoding is not the canonical one."""
    if not 1 <= len(encoded) <= IDENTITY_BYTES_MAX:
        raise errors.InvalidRequest("identity", len(encoded), f"1 to {IDENTITY_BYTES_MAX} bytes")
    try:
        values = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest("identity", encoded, "canonical JSON") from error
    if not isinstance(values, dict):
        raise errors.InvalidRequest("identity", encoded, "a JSON object")
    known = {field.name: str(field.type) for field in fields(Identity)}
    for name in sorted(values.keys() ^ known.keys()):
        what = "missing" if name in known else f"unknown; nearest: {errors.nearest(name, known)}"
        raise errors.InvalidRequest(f"identity.{name}", None, what)
    typed: dict[str, Any] = {name: _typed(name, values[name], known[name]) for name in known}
    identity = Identity(**typed)
    if identity.encode() != encoded:
        raise errors.InvalidRequest("identity", encoded, "in its canonical encoding")
    return identity


def check_layout(identity: Identity, layout: Layout) -> None:
    """Raises InvalidRequest when KV of this identity can't lie in pages of this layout."""
    if identity.page_size != layout.page_size:
        raise errors.InvalidRequest(
            "identity.page_size", identity.page_size, f"the session's {layout.page_size}"
        )
    if identity.layers != layout.layers:
        raise errors.InvalidRequest(
            "identity.layers", identity.layers, f"the session's {layout.layers}"
        )
    wide = identity.kv_heads * identity.head_size * DTYPE_BYTES[identity.kv_dtype]
    if identity.attention == "full" and layout.segments[0].bytes != wide * layout.page_size:
        raise errors.InvalidRequest(
            "identity.kv_heads, head_size, kv_dtype",
            wide * layout.page_size,
            f"bytes of a segment of the session: {layout.segments[0].bytes}",
        )


def namespace(tenant_secret: bytes, identity: bytes, salt: bytes = b"") -> bytes:
    """32 bytes: HMAC-SHA256(tenant secret, length of identity || identity || salt)."""
    if len(salt) > SALT_BYTES_MAX:
        raise errors.InvalidRequest("salt", len(salt), f"at most {SALT_BYTES_MAX} bytes")
    message = struct.pack("<Q", len(identity)) + identity + salt
    return hmac.digest(tenant_secret, message, "sha256")


def of_era(namespace: bytes, era: int) -> bytes:
    """32 bytes: what stands for the namespace in index, headers and records since its era-th
    Invalidate. Era 0: itself. Another era is another namespace to everything below."""
    if era == 0:
        return namespace
    return hashlib.sha256(namespace + struct.pack("<Q", era)).digest()


def weights_digest_of(identity: bytes) -> str:
    """The field of an encoded identity; empty where there is none."""
    found = json.loads(identity).get("weights_digest", "")
    return found if isinstance(found, str) else ""


def check_weights_digest(field: str, text: str) -> str:
    """Raises InvalidRequest unless it is 64 hexadecimal digits."""
    _check_digest(field, text, needed=True)
    return text


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_digest(field: str, text: str, *, needed: bool) -> None:
    if not text and not needed:
        return
    if len(text) != 64 or any(letter not in "0123456789abcdef" for letter in text):
        raise errors.InvalidRequest(field, text, "64 hexadecimal digits, lower case")


def _typed(name: str, value: object, kind: str) -> object:
    """`value` as the field's type; JSON's lists become tuples."""
    field = f"identity.{name}"
    match kind:
        case "str" if isinstance(value, str):
            return value
        case "int" if type(value) is int and 0 <= value < 1 << 32:
            return value
        case "float" if type(value) is float:
            return value
        case "tuple[int, ...]" if isinstance(value, list):
            if all(type(each) is int and 0 <= each < 1 << 32 for each in value):
                return tuple(value)
        case "tuple[tuple[str, str], ...]" if isinstance(value, list):
            if all(_is_pair(each) for each in value):
                return tuple((each[0], each[1]) for each in value)
    raise errors.InvalidRequest(field, value, kind)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)
