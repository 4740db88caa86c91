"""What KV of our engine depends on, and its canonical encoding, version 2.

A field at its default is not written: a new field, whose default means "as before", changes no
identity that is stored. What a version knows of an encoding is in `Identity` alone. Not here:
identities of other engines and of version 1 (foreign_identity.py, earlier_identity.py), and what is
made of them (namespace.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from typing import Any

from kvc2 import errors
from kvc2.layout import LAYOUT_VERSION, check_page_size

SCHEMA = "kvc2/2"
# KV that depends on the total length can't be cached by prefix
DYNAMIC_ROPES = {"dynamic", "longrope", "su"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._-]{0,63}")
# (layers, their kind), from the first layer on; neighbours differ; () where all have the default
Runs = tuple[tuple[int, str], ...]
DEFAULT_KINDS = {"attention": "full", "state": "kv", "experts": "dense"}


@dataclass(frozen=True)
class Identity:
    """Everything that KV depends on: engines share it only if this is equal.

    Raises InvalidRequest.

    weights_digest: 64 hex digits, SHA-256 over sorted (tensor name, dtype, shape, xxh3_128 of its
    bytes). dtypes: (weight class, dtype as computed) sorted by class. kv_dtype, kv_heads,
    head_size: of what attention layers cache.

    attention, state, experts: by layer, as `by_layer` makes them, what attends (full, window:128,
    latent, linear, none), what is cached for it (kv, latent, recurrent, none), and whether a layer
    has experts (dense, moe). formats_digest: how weights are stored where that is not as they are
    computed, of `formats_digest`. numerics: the class of kernels whose bits these are, our engine's
    by engine/kernels.py; empty: an earlier engine's on AVX-512. adapter_digest: 64 hex digits, of a
    LoRA; empty: none.

    deferral: so many of a token's experts, the last of its routing, are added one layer later.
    experts_per_token: as computed, whatever the model's file says. normalize_top_k: 1 where the
    chosen experts' weights are scaled to sum to 1. rms_norm_eps: in every norm. attention_bias: 1
    where queries, keys and values have one. rope_scaling: (key, value) sorted by key, `rope_type`
    among them. sinks: tokens that windows always see.
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
    deferral: int = 0
    experts_per_token: int = 0
    normalize_top_k: int = 0
    rms_norm_eps: float = 0.0
    attention_bias: int = 0
    kv_scales_digest: str = ""
    sinks: int = 0
    layout_version: int = LAYOUT_VERSION
    adapter_digest: str = ""
    attention: Runs = ()
    state: Runs = ()
    experts: Runs = ()
    formats_digest: str = ""
    numerics: str = ""

    def __post_init__(self) -> None:
        check_digest("identity.weights_digest", self.weights_digest, needed=True)
        for name in ("adapter_digest", "kv_scales_digest", "formats_digest"):
            check_digest(f"identity.{name}", getattr(self, name))
        check_page_size("identity.page_size", self.page_size)
        for name in ("rope_theta", "rms_norm_eps"):
            if not math.isfinite(getattr(self, name)):
                raise errors.InvalidRequest(f"identity.{name}", getattr(self, name), "finite")
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
        for name, default in DEFAULT_KINDS.items():
            check_runs(f"identity.{name}", getattr(self, name), self.layers, default)
        if self.numerics:
            check_kind("identity.numerics", self.numerics)
        if self.layout_version != LAYOUT_VERSION:
            raise errors.InvalidRequest("identity.layout_version", self.layout_version, "1")
        self._check_rope()

    def _check_rope(self) -> None:
        scaling = dict(self.rope_scaling)
        kind = scaling.get("rope_type", scaling.get("type", ""))
        if kind in DYNAMIC_ROPES:
            raise errors.InvalidRequest(
                "identity.rope_scaling", kind, "KV must not depend on the total length"
            )

    def encode(self) -> bytes:
        """Canonical JSON. Equal identities, equal bytes."""
        given = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.default is MISSING or getattr(self, each.name) != each.default
        }
        return canonical({"schema": SCHEMA, **given})


def of_values(values: Mapping[str, object]) -> Identity:
    """The identity of a decoded JSON object, its schema left out. Raises InvalidRequest for a field
    that is missing, unknown, of another type, or at its default."""
    known = {each.name: each for each in fields(Identity)}
    for name in sorted(values.keys() - known.keys()):
        near = errors.nearest(name, known)
        what = f"unknown to this daemon, which reads {SCHEMA}; nearest: {near}"
        raise errors.InvalidRequest(f"identity.{name}", values[name], what)
    typed: dict[str, Any] = {}
    for name, field in known.items():
        if name in values:
            typed[name] = typed_value(f"identity.{name}", values[name], str(field.type))
            if field.default is not MISSING and typed[name] == field.default:
                raise errors.InvalidRequest(
                    f"identity.{name}", values[name], "not written where it is the default"
                )
        elif field.default is MISSING:
            raise errors.InvalidRequest(f"identity.{name}", None, "missing")
    return Identity(**typed)


# ---- by layer ----


def by_layer(kinds: Iterable[str], default: str) -> Runs:
    """The runs of equal kinds, one for each layer from the first on; () where all are `default`."""
    runs = tuple((len(list(same)), kind) for kind, same in groupby(kinds))
    return () if all(kind == default for _, kind in runs) else runs


def kinds_of(runs: Runs, layers: int, default: str) -> list[str]:
    """The kind of each layer."""
    if not runs:
        return [default] * layers
    return [kind for count, kind in runs for _ in range(count)]


def check_runs(field: str, runs: Runs, layers: int, default: str) -> None:
    """Raises InvalidRequest unless they are as `by_layer` makes them for so many layers."""
    if not runs:
        return
    for _, kind in runs:
        check_kind(field, kind)
    if sum(count for count, _ in runs) != layers:  # before they are written out one by one
        raise errors.InvalidRequest(field, runs, f"runs of {layers} layers in all, or none")
    if any(count < 1 for count, _ in runs) or runs != by_layer(
        kinds_of(runs, layers, default), default
    ):
        raise errors.InvalidRequest(
            field, runs, f"(layers, kind) runs, neighbours differ; none where all are {default}"
        )


def check_kind(field: str, text: str) -> None:
    """Raises InvalidRequest unless it is one word."""
    if not KIND.fullmatch(text):
        raise errors.InvalidRequest(field, text, "1 to 64 of A-Z a-z 0-9 : . _ -")


# ---- weight formats ----


def formats_digest(
    formats: Mapping[str, str | Sequence[str]], computed: Mapping[str, str] | None = None
) -> str:
    """64 hex digits for how weights are stored: of each tensor class one format, or one for each
    layer (bfloat16, fp8_e4m3-block128x128, int4-group128, mxfp4, gguf-q4_k: any word). A class that
    is stored as it is `computed` (dtype by class) doesn't count; empty where none counts.

    {"experts": "int4-group128"} and the same format for each of its layers are the same."""
    told: dict[str, object] = {}
    for name, given in formats.items():
        kinds = [given] if isinstance(given, str) else list(given)
        for kind in (name, *kinds):
            check_kind("formats", kind)
        runs = by_layer(kinds, "")
        if len(runs) > 1:
            told[name] = runs
        elif runs and runs[0][1] != (computed or {}).get(name):
            told[name] = runs[0][1]
    return hashlib.sha256(canonical(told)).hexdigest() if told else ""


# ---- encodings ----


def canonical(values: Mapping[str, object]) -> bytes:
    """JSON with sorted keys, without spaces, in ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_digest(field: str, text: str, *, needed: bool = False) -> None:
    """Raises InvalidRequest unless it is 64 hexadecimal digits, or empty where none is needed."""
    if not text and not needed:
        return
    if len(text) != 64 or any(letter not in "0123456789abcdef" for letter in text):
        raise errors.InvalidRequest(field, text, "64 hexadecimal digits, lower case")


def typed_value(field: str, value: object, kind: str) -> object:
    """`value` of a JSON object as the type of that name; lists become tuples. Raises
    InvalidRequest."""
    match kind:
        case "str" if isinstance(value, str):
            return value
        case "int" if _is_count(value):
            return value
        case "float" if type(value) is float:
            return value
        case "tuple[int, ...]" if isinstance(value, list):
            if all(map(_is_count, value)):
                return tuple(value)
        case "tuple[tuple[str, str], ...]" if isinstance(value, list):
            if all(_is_pair(each) and isinstance(each[0], str) for each in value):
                return tuple((each[0], each[1]) for each in value)
        case "Runs" if isinstance(value, list):
            if all(_is_pair(each) and _is_count(each[0]) for each in value):
                return tuple((each[0], each[1]) for each in value)
    raise errors.InvalidRequest(field, value, kind)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _is_pair(value: object) -> bool:
    """Of anything and a text."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
