"""A configuration out of a YAML file, ours or KTransformers', and of flags over it.

Not here: what a value may be (config.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from kvc2 import errors
from kvc2.config import (
    AttnConfig,
    CpuConfig,
    DiskConfig,
    LimitsConfig,
    ServeConfig,
    TenantConfig,
    config_path,
)

SECTIONS: dict[str, type] = {
    "cpu": CpuConfig,
    "disk": DiskConfig,
    "attn": AttnConfig,
    "limits": LimitsConfig,
}
# Keys of a KTransformers file that mean something here; its other sections are its engine's.
KTRANSFORMERS = {
    "attn": ("page_size", "chunk_size"),
    "kvc2": ("gpu_only", "utilization_percentage", "cpu_memory_size_GB", "disk_path"),
}
Values = dict[str, Any]  # field -> value, or section -> {field -> value}


def load(path: Path | None, flags: Values) -> ServeConfig:
    """The configuration of a file, or of none, with `flags` (nested as the file is) over it."""
    values = read(path) if path is not None else {}
    for key, value in flags.items():
        if isinstance(value, dict):
            values[key] = {**values.get(key, {}), **value}
        else:
            values[key] = value
    return build(values)


def read(path: Path) -> Values:
    """The values of a YAML file, of ours or of KTransformers'. Raises InvalidConfig."""
    try:
        text = config_path("config", path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidConfig("config", str(path), f"a readable file: {error}") from error
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise errors.InvalidConfig("config", str(path), f"YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise errors.InvalidConfig("config", str(path), "a mapping of names to values")
    return from_ktransformers(values) if "kvc2" in values else values


def from_ktransformers(values: Values) -> Values:
    """A KTransformers file's values in our names (design.md 14).

    gpu_only: the gpu tier alone. cpu_memory_size_GB: the arena in 10^9 bytes, of which
    utilization_percentage, a share from 0 to 1, is used. disk_path: slab directory.
    """
    for section, keys in KTRANSFORMERS.items():
        known = _mapping(section, values.get(section) or {})
        for key in known:
            _check_known(f"{section}.{key}", key, keys)
    for section in values:
        close = errors.nearest(section, KTRANSFORMERS)
        if section not in KTRANSFORMERS and close and abs(len(close) - len(section)) <= 1:
            raise errors.InvalidConfig(section, None, f"unknown; did you mean {close}?")
    theirs = values["kvc2"] or {}
    ours: Values = {"attn": dict(values.get("attn") or {})}
    if "gpu_only" in theirs:
        ours["gpu_only"] = theirs["gpu_only"]
    share = _typed("kvc2.utilization_percentage", theirs.get("utilization_percentage", 1.0), float)
    if not 0 < share <= 1:
        raise errors.InvalidConfig("kvc2.utilization_percentage", share, "above 0, at most 1")
    if theirs.get("cpu_memory_size_GB") is not None:
        size = _typed("kvc2.cpu_memory_size_GB", theirs["cpu_memory_size_GB"], float)
        ours["cpu"] = {"memory_size_gb": size * share}
    if theirs.get("disk_path") is not None:
        ours["disk"] = {"path": theirs["disk_path"]}
    return ours


def build(values: Values) -> ServeConfig:
    """ServeConfig of nested values. Raises InvalidConfig: an unknown key comes with the nearest."""
    made: Values = {}
    hints = get_type_hints(ServeConfig)
    for key, value in values.items():
        _check_known(key, key, hints)
        if key in SECTIONS:
            made[key] = _build_section(SECTIONS[key], key, _mapping(key, value or {}))
        elif key == "tenants":
            if not isinstance(value, list):
                raise errors.InvalidConfig(key, value, "a list")
            made[key] = tuple(
                _build_section(TenantConfig, f"tenants[{index}]", _mapping(key, each))
                for index, each in enumerate(value)
            )
        else:
            made[key] = _typed(key, value, hints[key])
    return ServeConfig(**made)


def _build_section(kind: type, section: str, values: Values) -> Any:
    hints = get_type_hints(kind)
    for key in values:
        _check_known(f"{section}.{key}", key, hints)
    for each in dataclasses.fields(kind):
        required = each.default is dataclasses.MISSING and each.name not in values
        if required:
            raise errors.InvalidConfig(f"{section}.{each.name}", None, "missing")
    return kind(**{key: _typed(f"{section}.{key}", values[key], hints[key]) for key in values})


def _check_known(name: str, key: str, known: Iterable[str]) -> None:
    if key not in set(known):
        close = errors.nearest(key, known)
        mend = f"did you mean {close}?" if close else f"known: {', '.join(sorted(known))}"
        raise errors.InvalidConfig(name, None, f"unknown key; {mend}")


def _mapping(key: str, value: object) -> Values:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value):
        raise errors.InvalidConfig(key, value, "a mapping of names to values")
    return value


def _typed(key: str, value: object, kind: Any) -> Any:
    """`value` as its field's type; an int is a float too, nothing else is converted."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise errors.InvalidConfig(key, value, "one of " + ", ".join(get_args(kind)))
    if Path in kinds and isinstance(value, str | Path) and str(value):
        return Path(value)
    if tuple[int, ...] in kinds and isinstance(value, list):
        return tuple(_typed(key, each, int) for each in value)
    plain = [each for each in kinds if each in (bool, int, float, str)]
    if float in plain and type(value) is int:
        return float(value)
    if type(value) in plain:
        return value
    names = " or ".join(
        getattr(each, "__name__", str(each)) for each in kinds if each is not type(None)
    )
    raise errors.InvalidConfig(key, value, f"a value of type {names}")
