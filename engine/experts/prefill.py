"""Prefill on the device: from so many tokens on, cold experts are copied there and computed there.

    copies    layer 0 . . . | layer 1 . . . . . | layer 2 . . .     as far ahead as places allow
    device        attention 0, experts 0 . .| attention 1, experts 1 . .|

A prompt's chunk uses nearly all experts of a layer, each for many tokens: the bus then carries an
expert in less time than the CPU needs to compute it. A step's copies are begun in the order of its
layers when its first layer begins, and wait for places, so that memory is bounded; what a layer
turns out not to need is passed over. Outputs are those of any executor with the same kernels.
Not responsible for when it is used (hybrid).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.experts.hybrid import Kernels, Place, Weights

LARGE = 32  # tokens of a step from which on the CPU's time a token counts for the comparison


@dataclass
class Measured:
    """What copies took, and what the CPU took for cold experts of large steps, by layer."""

    copied: int = 0
    copy_s: float = 0.0
    host_tokens: int = 0
    host_s: float = 0.0

    def pays_from(self, cold: float) -> int | None:
        """The tokens for which the CPU takes as long as `cold` copies, those of a layer: from there
        on it pays, on a device that computes faster than they come. None: not measured yet."""
        if not self.copied or not self.host_s:
            return None
        return round(cold * self.copy_s / self.copied / (self.host_s / self.host_tokens))


class PrefillStream:
    """`weights`: the device's places for what is streamed, beside those of hot experts. `copy` is
    called by a thread of its own. One thread calls the rest."""

    def __init__(
        self,
        copy: Callable[[Place, Weights, int], None],
        weights: Weights,
        experts: int,
        kernels: Kernels,
        from_tokens: int,
    ) -> None:
        self.from_tokens = from_tokens
        self.measured = Measured()
        self._copy = copy
        self._weights = weights
        self._experts = experts
        self._kernels = kernels
        self._changed = threading.Condition()  # over all below
        self._free = list(range(weights.count))
        self._wanted: deque[Place] = deque()
        self._arrived: dict[Place, int | Exception] = {}  # its place, or why it didn't come
        self._step = 0  # what was begun for an earlier one is nobody's
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvc2-prefill", daemon=True)
        self._thread.start()

    def begin(self, cold: Iterable[Place]) -> None:
        """A step will need these, most of them, in this order. Ends the step before."""
        with self._changed:
            self._step += 1
            self._give_back(self._arrived.keys())
            self._wanted = deque(cold)
            self._changed.notify_all()

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        """An Executor's, once a layer of the step, in their order. Raises what a copy raised."""
        left = {(layer, int(each)) for each in np.unique(expert_ids.numpy()) if each >= 0}
        with self._changed:
            self._wanted = deque(e for e in self._wanted if e[0] > layer or e in left)
        while left:
            ready = self._await(layer, left)
            places = torch.full((self._experts + 1,), -1)
            for (_, expert), place in ready.items():
                places[expert] = place
            weights = self._weights
            self._kernels.compute(x, places[expert_ids], weights.gate_up, weights.down, outputs)
            left -= ready.keys()
            with self._changed:
                self._free += ready.values()
                self._changed.notify_all()

    def host_took(self, tokens: int, seconds: float) -> None:
        """What the CPU took for the cold experts of a layer."""
        if tokens >= LARGE:
            self.measured.host_tokens += tokens
            self.measured.host_s += seconds

    def state(self, cold: float) -> dict[str, Any]:
        """How many experts were copied, the milliseconds that one takes on the mean, and from how
        many tokens of a step on it would pay where a layer has so many cold experts."""
        measured = self.measured
        return {
            "from_tokens": self.from_tokens,
            "places": self._weights.count,
            "copied": measured.copied,
            "copy_ms": round(1000 * measured.copy_s / max(measured.copied, 1), 3),
            "pays_from_tokens": measured.pays_from(cold),
        }

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _await(self, layer: int, left: set[Place]) -> dict[Place, int]:
        """What has come of these, at least one; it is the caller's from now on."""
        with self._changed:
            while not (come := left & self._arrived.keys()):
                # what was copied before it was known that nobody needs it
                self._give_back(each for each in self._arrived if each[0] <= layer)
                self._changed.wait()
            ready = {}
            for expert in come:
                place = self._arrived[expert]
                if isinstance(place, Exception):
                    raise place
                ready[expert] = place
            for expert in ready:
                del self._arrived[expert]
            return ready

    def _give_back(self, experts: Iterable[Place]) -> None:
        """Their places are free again."""
        for expert in list(experts):
            place = self._arrived.pop(expert)
            if isinstance(place, int):
                self._free.append(place)
        self._changed.notify_all()

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            expert, place, step = taken
            began, error = time.perf_counter(), None
            try:
                self._copy(expert, self._weights, place)
            except Exception as failed:
                error = failed
            with self._changed:
                self.measured.copied += 1
                self.measured.copy_s += time.perf_counter() - began
                if error is not None or step != self._step:
                    self._free.append(place)
                if step == self._step:
                    self._arrived[expert] = place if error is None else error
                self._changed.notify_all()

    def _next(self) -> tuple[Place, int, int] | None:
        with self._changed:
            while not self._closed and not (self._wanted and self._free):
                self._changed.wait()
            if self._closed:
                return None
            return self._wanted.popleft(), self._free.pop(), self._step
