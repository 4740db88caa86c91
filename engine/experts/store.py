"""Experts on disk: memory holds some of them, the others are read when they are needed or soon.

    compute(layer i)   begin reads of what is missing -> begin reads for the next layer (its router
                       on this layer's input guesses them) -> compute what is there, then what came

What was written since serving began is an error, never a wrong token; a read that fails fails the
step that needs it (reads).

Layers come round in a circle, where the least recently used expert is the next to be used: so the
victim is the one whose next use is expected last, `(turns until its layer) + layers * (1 - p) / p`,
where p is how often a step of late used it. Not responsible for the device's experts (hybrid).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.experts.hybrid import Kernels, Place, Weights
from engine.experts.reads import Part, Reader
from engine.extents import Extent
from engine.memory import give_up

log = logging.getLogger(__name__)

FORGETS = 1 / 24  # of how often an expert was used, with each step of its layer
SELDOM = 1e-3  # p of an expert that has not been used for long
# A wrong guess costs a read, and a right one saves the part of a read that goes on beside
# computing: as long as reads are what a step waits for, guesses pay only if nearly all are right.
RIGHT_MIN = 0.75
GUESSES_SEEN = 64.0  # over about so many of them is it known how many are right


@dataclass(frozen=True)
class StoredExperts:
    """A layer's experts, each as its gate, up and down. A store computes them."""

    experts: tuple[tuple[Extent, Extent, Extent], ...]
    size: int
    hidden: int
    dtype: torch.dtype

    def __call__(self, *_: object) -> Tensor:
        raise RuntimeError("these experts are on disk: a store must hold them")

    @property
    def expert_bytes(self) -> int:
        return 3 * self.size * self.hidden * self.dtype.itemsize

    def weights(self, count: int) -> Weights:
        """Room for as many of them."""
        gate_up = torch.empty(count, 2 * self.size, self.hidden, dtype=self.dtype)
        return Weights(gate_up, torch.empty(count, self.hidden, self.size, dtype=self.dtype))

    def parts(self, index: int, target: Weights, place: int) -> list[Part]:
        """What is read of an expert, and where each tensor goes."""
        gate, up, down = self.experts[index]
        gate_up = target.gate_up[place]
        halves = Part(gate, gate_up[: self.size]), Part(up, gate_up[self.size :])
        return [*halves, Part(down, target.down[place])]


class Held:
    """Which experts are in memory, and at which place each."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._at: NDArray[np.int64] = np.full(shape, -1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, expert: Place) -> bool:
        return bool(self._at[expert] >= 0)

    def put(self, expert: Place, place: int) -> None:
        self._at[expert] = place
        self._count += 1

    def pop(self, expert: Place) -> int:
        """Its place, which is nobody's from now on."""
        place = int(self._at[expert])
        self._at[expert] = -1
        self._count -= 1
        return place

    def places(self, layer: int, ids: NDArray[np.int64], of: set[Place]) -> NDArray[np.int64]:
        """[...] places of ids of a layer; -1 for those that aren't `of` these, and for -1."""
        only = np.full(self._at.shape[1] + 1, -1)  # the last is of the id -1
        chosen = [index for _, index in of]
        only[chosen] = self._at[layer, chosen]
        found: NDArray[np.int64] = only[ids]
        return found

    def beside(self, keep: Iterable[Place]) -> NDArray[np.int64]:
        """[n, 2] the others as (layer, id), in order."""
        held = self._at >= 0
        for each in keep:
            held[each] = False
        return np.argwhere(held)


class Turns:
    """When each expert will be used again, as far as that can be told."""

    def __init__(self, layers: Iterable[int], shape: tuple[int, int]) -> None:
        self._position = np.zeros(shape[0])  # of a layer in the circle
        order = sorted(layers)
        self._position[order] = np.arange(len(order))
        self._circle = len(order)
        self._used: NDArray[np.float64] = np.zeros(shape)  # part of the steps of late

    @property
    def soon(self) -> float:
        """An expert that more than every other step uses is used before: a guess must not drive it
        out."""
        return 2.0 * self._circle

    def use(self, layer: int, needed: NDArray[np.int64]) -> None:
        self._used[layer] *= 1 - FORGETS
        self._used[layer, needed] += FORGETS

    def until_use(self, layer: int, experts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Layers from now, which is `layer`'s turn, of experts [n, 2] as (layer, id)."""
        turns = (self._position[experts[:, 0]] - self._position[layer]) % self._circle
        turns[turns == 0] = self._circle  # its own turn is under way
        used = np.clip(self._used[experts[:, 0], experts[:, 1]], SELDOM, 1)
        waits: NDArray[np.float64] = turns + self._circle * (1 - used) / used
        return waits


class Guesses:
    """What the layer after will need, by `guess(layer, x)`, and how often that was right of what
    would have had to be read. `after`: the layer that follows each."""

    def __init__(
        self, after: Mapping[int, int], guess: Callable[[int, Tensor], Tensor] | None
    ) -> None:
        self.guess = guess
        self.right = 1.0  # the part of late that was
        self._after = after
        self._made: set[Place] = set()

    def of(self, layer: int, x: Tensor, held: Callable[[Place], bool]) -> set[Place]:
        """For the layer after this one: what is not held, whether it pays to read it or not."""
        following = self._after[layer]
        if self.guess is None or following == layer:
            return set()
        ids = torch.unique(self.guess(following, x)).tolist()
        self._made = {(following, each) for each in ids if not held((following, each))}
        return self._made

    def learn(self, needed: set[Place]) -> None:
        """What the layer that they were for really needs."""
        for each in self._made:
            self.right += (float(each in needed) - self.right) / GUESSES_SEEN
        self._made = set()

    @property
    def pay(self) -> bool:
        return self.right >= RIGHT_MIN


class ExpertStore:
    """As many experts in memory as `places`, of all layers. An Executor. One thread computes.

    `guess(layer, x)`: ids that the layer will probably need for this input. `most`: as many as it
    may grow to; what isn't used of that takes no memory.
    """

    numerics = ""  # those of any executor with the same kernels

    def __init__(
        self,
        layers: Mapping[int, StoredExperts],
        places: int,
        kernels: Kernels,
        guess: Callable[[int, Tensor], Tensor] | None = None,
        most: int | None = None,
    ) -> None:
        order = sorted(layers)
        self.layers = layers
        extents = (part for each in layers.values() for parts in each.experts for part in parts)
        self.reader = Reader(each.fd for each in extents)
        self.hits = self.misses = self.late = 0  # late: a guess in time, but not read yet
        self._guesses = Guesses(dict(zip(order, [*order[1:], order[0]], strict=True)), guess)
        self._kernels = kernels
        most = most or places
        self._weights = layers[order[0]].weights(most)
        self._free = list(range(places))
        self._unused = list(range(most - 1, places - 1, -1))  # places that have no memory
        self.wait_s = 0.0  # that layers waited for reads
        self._coming: dict[Place, tuple[int, Future[None]]] = {}
        experts = len(layers[order[0]].experts)
        self._turns = Turns(order, (order[-1] + 1, experts))
        self._held = Held((order[-1] + 1, experts))

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        """Those that are there first, while the others are read. Raises ExpertReadError."""
        chosen = np.zeros(len(self.layers[layer].experts) + 1, bool)
        chosen[expert_ids.numpy()] = True
        needed = np.flatnonzero(chosen[:-1])  # the last is of the id -1
        self._turns.use(layer, needed)
        left = {(layer, int(each)) for each in needed}
        self._take_in(self._coming, left=set())
        self._count(left)
        self._guesses.learn(left)
        ahead: set[Place] | None = None
        while left:
            ready = {each for each in left if each in self._held}
            self._begin(layer, left - ready, left)
            if ahead is None:
                ahead = self._ahead(layer, x)
                self._begin(layer, ahead, left | ahead, self._turns.soon)
            if ready:
                self._run(layer, ready, x, expert_ids, outputs)
                left -= ready
            else:
                self._await(left)

    @property
    def places(self) -> int:
        """That have memory."""
        return self._weights.count - len(self._unused)

    def resize(self, places: int) -> None:
        """Between steps: memory for so many, at most as many as were asked for at first. Those that
        have to go are the ones whose next use is expected last; while reads are under way, fewer
        may go (`places` tells). Waits for nothing."""
        while self.places < places:
            self._free.append(self._unused.pop())
        self._take_in(list(self._coming), left=set())
        excess = self.places - places
        if excess > 0:
            self._evict(min(self.layers), excess - len(self._free), set(), 0.0)
            for place in [self._free.pop() for _ in range(min(excess, len(self._free)))]:
                for tensor in (self._weights.gate_up, self._weights.down):
                    give_up(tensor[place])
                self._unused.append(place)

    def copy(self, expert: Place, target: Weights, place: int) -> None:
        """To the device's memory; from any thread. Raises ExpertReadError."""
        self.read(expert, target, place).result()

    def read(self, expert: Place, target: Weights, place: int) -> Future[None]:
        """Begins to read it; see Reader.begin. From any thread."""
        layer, index = expert
        return self.reader.begin(self.layers[layer].parts(index, target, place))

    def state(self) -> dict[str, float]:
        return {
            "memory_experts": len(self._held),
            "memory_places": self.places,
            "memory_hits": self.hits,
            "memory_misses": self.misses,
            "memory_late": self.late,
            "guesses_right": round(self._guesses.right, 3),
            "read_bytes": self.reader.read_bytes,
        }

    def reads(self) -> dict[str, Any]:
        """What layers needed, of that what they had to wait for, and how long; for a budget."""
        missed = self.misses + self.late
        needed = self.hits + missed
        return {
            "needed_experts": needed,
            "missed_experts": missed,
            "read_wait_s": self.wait_s,
        }

    def close(self) -> None:
        self.reader.close()

    def _count(self, needed: set[Place]) -> None:
        there = sum(each in self._held for each in needed)
        coming = sum(each in self._coming for each in needed)
        self.hits += there
        self.late += coming
        self.misses += len(needed) - there - coming

    def _run(
        self, layer: int, ready: set[Place], x: Tensor, expert_ids: Tensor, outputs: Tensor
    ) -> None:
        places = self._held.places(layer, expert_ids.numpy(), ready)
        ids = torch.from_numpy(places)
        self._kernels.compute(x, ids, self._weights.gate_up, self._weights.down, outputs)

    def _ahead(self, layer: int, x: Tensor) -> set[Place]:
        """What is read for the next layer: at most half of memory, so that a guess never drives out
        what is certain; nothing while most guesses are wrong."""
        guessed = self._guesses.of(layer, x, self._there)
        most = (len(self._held) + len(self._free)) // 2
        return set(sorted(guessed)[:most]) if self._guesses.pay else set()

    def _begin(self, layer: int, wanted: set[Place], keep: set[Place], spare: float = 0.0) -> None:
        """Begins to read as many of these as there are places for, without giving up `keep`, nor
        what is expected to be used before `spare`."""
        new = [each for each in sorted(wanted) if not self._there(each)]
        self._evict(layer, len(new) - len(self._free), keep, spare)
        for expert in new[: len(self._free)]:
            place = self._free.pop()
            self._coming[expert] = place, self.read(expert, self._weights, place)

    def _there(self, expert: Place) -> bool:
        """Or on its way."""
        return expert in self._held or expert in self._coming

    def _evict(self, layer: int, count: int, keep: set[Place], spare: float) -> None:
        """Gives up so many experts, those whose next use is expected last, after `spare`."""
        if count <= 0:
            return
        can = self._held.beside(keep)
        waits = self._turns.until_use(layer, can)
        for index in np.argsort(-waits, kind="stable")[:count]:
            if waits[index] < spare:
                break
            self._free.append(self._held.pop((int(can[index, 0]), int(can[index, 1]))))

    def _await(self, left: set[Place]) -> None:
        """Until something has come: of `left`, or else whatever holds the place for it."""
        coming = [each for each in left if each in self._coming] or list(self._coming)
        began = time.perf_counter()
        wait([self._coming[each][1] for each in coming], return_when=FIRST_COMPLETED)
        self.wait_s += time.perf_counter() - began
        self._take_in(coming, left)

    def _take_in(self, coming: Iterable[Place], left: set[Place]) -> None:
        """Those that have come are memory's, and may be given up for others: also a guess that was
        wrong. Raises what a read of `left` did."""
        for expert in [each for each in coming if self._coming[each][1].done()]:
            place, reading = self._coming.pop(expert)
            if reading.exception() is None:
                self._held.put(expert, place)
                continue
            self._free.append(place)
            if expert in left:
                reading.result()
            log.warning("expert %s was guessed and can't be read: %s", expert, reading.exception())
