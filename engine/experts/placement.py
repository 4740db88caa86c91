"""Which experts lie on the device when serving begins, and how many.

A placement is a mask [layers, experts]: true is hot, on the device; false is cold, in the host's
memory. Not responsible for moving experts later (dynamic), nor for their bytes (hybrid).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.experts.statistics import Counts
from engine.settings import PlacementStrategy

Mask = NDArray[np.bool_]  # [layers, experts]

# A layer keeps at least this part of its even share of the device: an estimate that is wrong about
# a layer then can't send all of its tokens to the host.
LAYER_SHARE_MIN = 0.25


@dataclass(frozen=True)
class Room:
    """What there is to place: `experts` in each layer that has any, `hot` in all on the device."""

    moe_layers: Sequence[bool]  # per layer of the model: it has experts
    experts: int
    hot: int

    def __post_init__(self) -> None:
        if not 0 <= self.hot <= self.total:
            raise ValueError(f"{self.hot} hot experts of {self.total}")

    @property
    def total(self) -> int:
        return sum(self.moe_layers) * self.experts

    @property
    def rows(self) -> NDArray[np.intp]:
        """The layers that have experts."""
        return np.flatnonzero(self.moe_layers)

    @property
    def layer_min(self) -> int:
        """How many experts of each layer are hot whatever is known of them."""
        return int(LAYER_SHARE_MIN * self.hot / max(1, len(self.rows)))


def hot_experts(moe_layers: int, experts: int, per_layer: int | None, ratio: float | None) -> int:
    """How many experts the device holds, by --num-gpu-experts or --gpu-experts-ratio."""
    if ratio is not None:
        return round(ratio * moe_layers * experts)
    return moe_layers * experts if per_layer is None else moe_layers * min(per_layer, experts)


def place(strategy: PlacementStrategy, room: Room, counts: Counts, seed: int) -> Mask:
    """The placement with exactly `room.hot` hot experts; the same for the same arguments.

    uniform: as many of each layer (the first layers have one more), those with the lowest ids.
    front-loading: the first layers whole. random: any, by `seed`. frequency: the most chosen of
    all layers, at least `room.layer_min` of each; among equals the first.
    """
    hot = np.zeros((len(room.moe_layers), room.experts), bool)
    if strategy == "frequency":
        return best(counts, room)
    if strategy == "uniform":
        each, more = divmod(room.hot, max(1, len(room.rows)))
        for index, row in enumerate(room.rows):
            hot[row, : each + (index < more)] = True
        return hot
    chosen: NDArray[np.intp] = np.arange(room.hot)
    if strategy == "random":
        chosen = np.random.default_rng(seed).permutation(room.total)[: room.hot]
    hot[room.rows[chosen // room.experts], chosen % room.experts] = True
    return hot


def best(scores: Counts, room: Room) -> Mask:
    """The `room.hot` experts with the highest scores, at least `room.layer_min` of each layer;
    among equals the lower layer, then the lower id."""
    hot = np.zeros(scores.shape, bool)
    rows = room.rows
    if room.hot == 0:
        return hot
    found = scores[rows]
    first = np.argsort(-found, axis=1, kind="stable")[:, : room.layer_min]
    kept = np.zeros(found.shape, bool)
    np.put_along_axis(kept, first, True, axis=1)
    others = np.where(kept, -np.inf, found).reshape(-1)
    more = np.argsort(-others, kind="stable")[: room.hot - first.size]
    kept.reshape(-1)[more] = True
    hot[rows] = kept
    return hot


def share(hot: Mask, counts: Counts) -> float:
    """The part of these activations that the device serves; 0 without any."""
    total = float(counts.sum())
    return float(counts[hot].sum()) / total if total else 0.0
