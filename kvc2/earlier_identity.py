"""Identities of version 1, which wrote every field and had no schema: read, and written again.

The same model has the same namespace as before. So an identity that version 1 could say is named
by what version 1 wrote of it (namespace.py), and this encoding stays as it is for good.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvc2 import errors
from kvc2.identity import (
    DEFAULT_KINDS,
    Identity,
    Runs,
    by_layer,
    canonical,
    formats_digest,
    kinds_of,
    typed_value,
)

# Those of Identity that mean what they meant, and the others.
KEPT = {
    "weights_digest": "str",
    "architecture": "str",
    "dtypes": "tuple[tuple[str, str], ...]",
    "kv_dtype": "str",
    "layers": "int",
    "kv_heads": "int",
    "head_size": "int",
    "rope_theta": "float",
    "page_size": "int",
    "rope_scaling": "tuple[tuple[str, str], ...]",
    "deferral": "int",
    "experts_per_token": "int",
    "normalize_top_k": "int",
    "rms_norm_eps": "float",
    "attention_bias": "int",
    "kv_scales_digest": "str",
    "sinks": "int",
    "layout_version": "int",
    "adapter_digest": "str",
}
OTHERS = {
    "expert_quantisation": "str",
    "expert_group_size": "int",
    "moe_layers": "tuple[int, ...]",
    "attention": "str",
    "windows": "tuple[int, ...]",
}
WINDOW = re.compile(r"window:([1-9]\d{0,9})")
WINDOW_MAX = (1 << 32) - 1


def of_values(values: Mapping[str, object]) -> Identity:
    """What a decoded JSON object of version 1 says. Raises InvalidRequest for a field that is
    missing, unknown or of another type."""
    known = KEPT | OTHERS
    for name in sorted(values.keys() ^ known.keys()):
        near = errors.nearest(name, known)
        what = f"unknown to version 1 of identities, which has no schema; nearest: {near}"
        allowed = "missing" if name in known else what
        raise errors.InvalidRequest(f"identity.{name}", values.get(name), allowed)
    typed: dict[str, Any] = {
        name: typed_value(f"identity.{name}", values[name], kind) for name, kind in known.items()
    }
    layers = typed["layers"]
    for name in ("windows", "moe_layers"):
        given = len(typed[name])
        if given not in (0, layers):
            raise errors.InvalidRequest(f"identity.{name}", given, "one a layer or none")
    return Identity(
        **{name: typed[name] for name in KEPT},
        attention=_attention(typed["attention"], typed["windows"], layers),
        experts=by_layer(("moe" if each else "dense" for each in typed["moe_layers"]), "dense"),
        formats_digest=_formats(typed["expert_quantisation"], typed["expert_group_size"]),
    )


def encode(identity: Identity) -> bytes | None:
    """What version 1 wrote of it; None where that could not say all of it."""
    values = asdict(identity)
    told = attention, windows, moe = _of_attention(identity), _windows(identity), _moe(identity)
    if None in told or values["state"] or values["formats_digest"] or values["numerics"]:
        return None
    others = {"expert_quantisation": "", "expert_group_size": 0}
    others |= {"attention": attention, "windows": windows, "moe_layers": moe}
    return canonical({**{name: values[name] for name in KEPT}, **others})


def _attention(kind: str, windows: tuple[int, ...], layers: int) -> Runs:
    of_window = "window" if kind == "full" else f"{kind}:window"
    kinds = [f"{of_window}:{size}" if size else kind for size in windows or (0,) * layers]
    return by_layer(kinds, DEFAULT_KINDS["attention"])


def _formats(quantisation: str, group_size: int) -> str:
    if not quantisation and not group_size:
        return ""
    return formats_digest({"experts": f"{quantisation or 'none'}-group{group_size}"})


def _of_attention(identity: Identity) -> str | None:
    """The kind that all layers have beside their windows."""
    if len(identity.attention) == 1 and not _window(identity.attention[0][1]):
        return identity.attention[0][1]
    plain = all(kind == "full" or _window(kind) for _, kind in identity.attention)
    return "full" if plain else None


def _windows(identity: Identity) -> tuple[int, ...]:
    """() where no layer has one."""
    kinds = kinds_of(identity.attention, identity.layers, DEFAULT_KINDS["attention"])
    windows = tuple(map(_window, kinds))
    return windows if any(windows) else ()


def _window(kind: str) -> int:
    """Its tokens; 0: it has none that version 1 could say."""
    found = WINDOW.fullmatch(kind)
    size = int(found[1]) if found else 0
    return size if size <= WINDOW_MAX else 0


def _moe(identity: Identity) -> tuple[int, ...] | None:
    """() of a model without experts: our engine said for each layer that it has none where the
    configuration has experts nevertheless."""
    kinds = kinds_of(identity.experts, identity.layers, DEFAULT_KINDS["experts"])
    if not set(kinds) <= {"dense", "moe"}:
        return None
    flags = tuple(int(kind == "moe") for kind in kinds)
    return flags if any(flags) or identity.experts_per_token else ()
