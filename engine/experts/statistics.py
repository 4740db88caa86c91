"""How often each expert of each layer was chosen: counted at every step, kept over restarts.

Not responsible for what follows from it (placement, dynamic), nor for when it is saved (serve).
Files: ours as JSON or safetensors; and those of SGLang's and KTransformers' recorders, a torch file
with `logical_count` [buffer, layers, experts], read without running anything that it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from engine.kernels import count_choices
from kvc2.errors import InvalidConfig

Counts = NDArray[np.float64]  # [layers, experts], choices of each expert; layers without: zeros

SCHEMA = "kvc2-experts/1"
COUNT_MAX = 2.0**53  # beyond it a float64 can't add one


class Statistics:
    """Counts of one model's experts. One thread records; any may read `counts` meanwhile, and sees
    a step half counted at worst."""

    def __init__(self, layers: int, experts: int) -> None:
        self._counts: Counts = np.zeros((layers, experts))
        self._of_layer = list(self._counts)  # views: to make one costs as much as to count

    @property
    def counts(self) -> Counts:
        """A copy of what was counted so far."""
        return self._counts.copy()

    def record(self, layer: int, expert_ids: Tensor) -> None:
        """One more for each choice in int64 [T, k] on the CPU. Raises ValueError for an id that is
        none."""
        count_choices(expert_ids, self._of_layer[layer])

    def add(self, counts: Counts) -> None:
        """What an earlier run counted."""
        self._counts += counts


class LateCounts:
    """What the layers of a step on a device chose, counted when the step has ended: to read it in
    between, the host would wait for the device once a layer. One thread calls.

    `chosen`: int64 [layers, tokens, k] on the device, for the largest step; `layers`: those that
    have experts.
    """

    def __init__(self, statistics: Statistics, chosen: Tensor, layers: Sequence[int]) -> None:
        self._statistics = statistics
        self._chosen = chosen
        self._layers = layers

    def record(self, layer: int, expert_ids: Tensor) -> None:
        """Keeps int64 [T, k] until the step's end; no wait, and the same memory in each step."""
        self._chosen[layer, : len(expert_ids)].copy_(expert_ids)

    def count(self, tokens: int) -> None:
        """Waits for the device, and counts the choices of the step's first rows: what is behind
        them is padding."""
        chosen = self._chosen[:, :tokens].cpu()
        for layer in self._layers:
            self._statistics.record(layer, chosen[layer])


def save(path: Path, counts: Counts, model: str, measured: Mapping[str, Any] | None = None) -> None:
    """Whole or not at all: written beside `path` and renamed. `model`: whose experts these are;
    `measured`: what else was seen of their traffic (budget). Raises OSError."""
    beside = _beside(path)
    try:
        if path.suffix == ".safetensors":
            whole = {"counts": counts.astype(np.int64)}
            about = {"schema": SCHEMA, "model": model, "measured": json.dumps(measured or {})}
            save_file(whole, beside, metadata=about)
        else:
            told = {"schema": SCHEMA, "model": model, "measured": measured or {}}
            told["counts"] = counts.astype(np.int64).tolist()
            beside.write_text(json.dumps(told) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def load(key: str, path: Path, layers: int, experts: int) -> Counts:
    """The counts in a file of any of the kinds above. Raises InvalidConfig for `key`: what is no
    such file, or counts experts of another shape."""
    return _read(key, path, layers, experts)[0]


def measured(path: Path) -> dict[str, Any]:
    """What was saved beside the counts in a file that `load` has taken; {} for nothing."""
    if path.suffix == ".pt":
        return {}
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            found = json.loads((file.metadata() or {}).get("measured", "{}"))
    else:
        found = json.loads(path.read_text(encoding="utf-8")).get("measured", {})
    return found if isinstance(found, dict) else {}


def resume(key: str, path: Path, layers: int, experts: int, model: str) -> Counts:
    """What an earlier run saved there for the same model; zeros where there is no file yet. Raises
    InvalidConfig for `key`: also where none could be saved, which the end of a run would be too
    late to find."""
    try:
        _beside(path).touch()
        _beside(path).unlink()
    except OSError as error:
        mend = f"a file that can be written: {error.strerror}"
        raise InvalidConfig(key, str(path), mend) from error
    if not path.exists():
        return np.zeros((layers, experts))
    counts, owner = _read(key, path, layers, experts)
    if owner != model:
        mend = "it counts another model's experts; name another file, or remove this one"
        raise InvalidConfig(key, str(path), mend)
    return counts


def _read(key: str, path: Path, layers: int, experts: int) -> tuple[Counts, str]:
    """The counts, and whose they are: "" where the file doesn't say."""
    kinds = {".json": _read_json, ".safetensors": _read_safetensors, ".pt": _read_torch}
    if path.suffix not in kinds:
        raise InvalidConfig(key, str(path), f"a file that ends with {', '.join(kinds)}")
    try:
        found, model = kinds[path.suffix](path)
    except OSError as error:
        raise InvalidConfig(key, str(path), f"a readable file: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InvalidConfig(key, str(path), f"counts of experts: {error}") from error
    return _checked(key, path, found, (layers, experts)), model


def _checked(key: str, path: Path, found: NDArray[Any], shape: tuple[int, int]) -> Counts:
    """[layers, experts], or that for each buffer, which are summed up."""
    if found.ndim not in (2, 3) or found.shape[-2:] != shape:
        mend = f"counts of the shape [{shape[0]} layers, {shape[1]} experts]; it has {found.shape}"
        raise InvalidConfig(key, str(path), mend)
    numbers = found if found.dtype.kind in "uif" else np.full(shape, np.nan)
    counts: Counts = numbers.astype(np.float64).reshape(-1, *shape).sum(0)
    if not np.all((counts >= 0) & (counts <= COUNT_MAX)):  # false for what is no number, too
        raise InvalidConfig(key, str(path), "counts from 0 to 2^53")
    return counts


def _read_json(path: Path) -> tuple[NDArray[Any], str]:
    told = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(told, Mapping) or told.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    return np.array(told["counts"]), str(told["model"])


def _read_safetensors(path: Path) -> tuple[NDArray[Any], str]:
    with path.open("rb"):  # safetensors' own error for a missing file has no strerror
        pass
    with safe_open(path, "np") as file:
        about = file.metadata() or {}
        if about.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return file.get_tensor("counts"), about["model"]


def _read_torch(path: Path) -> tuple[NDArray[Any], str]:
    try:
        told = torch.load(path, map_location="cpu", weights_only=True)
        return told["logical_count"].detach().to(torch.float64).numpy(), ""
    except OSError:
        raise
    except Exception as error:  # whatever a malformed or hostile file makes torch raise
        raise ValueError("it holds no plain tensor `logical_count`") from error
