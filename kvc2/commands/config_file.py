"""The daemon's configuration out of a YAML file, ours or KTransformers', and of flags over it.

Not here: what a key is and what its value may be (config.py, flags.py).
"""

from __future__ import annotations

from pathlib import Path

from kvc2 import errors, flags
from kvc2.config import ServeConfig
from kvc2.flags import Values

# Keys of a KTransformers file that mean something here; its other sections are its engine's.
KTRANSFORMERS = {
    "attn": ("page_size", "chunk_size"),
    "kvc2": ("gpu_only", "utilization_percentage", "cpu_memory_size_GB", "disk_path"),
}


def load(path: Path | None, over: Values) -> ServeConfig:
    """The configuration of a file, or of none, with `over` (nested as the file is) over it. Raises
    InvalidConfig."""
    values = read(path) if path is not None else {}
    return flags.build(ServeConfig, flags.overlay(values, over))


def read(path: Path) -> Values:
    """The values of a YAML file, of ours or of KTransformers'. Raises InvalidConfig."""
    values = flags.read("config", path)
    return from_ktransformers(values) if "kvc2" in values else values


def from_ktransformers(values: Values) -> Values:
    """A KTransformers file's values in our names.

    gpu_only: the gpu tier alone. cpu_memory_size_GB: the arena in 10^9 bytes, of which
    utilization_percentage, a share from 0 to 1, is used. disk_path: slab directory.
    """
    for section, keys in KTRANSFORMERS.items():
        for key in flags.mapping(section, values.get(section) or {}):
            flags.check_known(f"{section}.{key}", key, keys)
    for section in values:
        close = errors.nearest(section, KTRANSFORMERS)
        if section not in KTRANSFORMERS and close and abs(len(close) - len(section)) <= 1:
            raise errors.InvalidConfig(section, None, f"unknown; did you mean {close}?")
    theirs = values["kvc2"] or {}
    ours: Values = {"attn": dict(values.get("attn") or {})}
    if "gpu_only" in theirs:
        ours["gpu_only"] = theirs["gpu_only"]
    share = theirs.get("utilization_percentage", 1.0)
    share = flags.typed("kvc2.utilization_percentage", share, float)
    if not 0 < share <= 1:
        raise errors.InvalidConfig("kvc2.utilization_percentage", share, "above 0, at most 1")
    if theirs.get("cpu_memory_size_GB") is not None:
        size = flags.typed("kvc2.cpu_memory_size_GB", theirs["cpu_memory_size_GB"], float)
        ours["cpu"] = {"memory_size_gb": size * share}
    if theirs.get("disk_path") is not None:
        ours["disk"] = {"path": theirs["disk_path"]}
    return ours
