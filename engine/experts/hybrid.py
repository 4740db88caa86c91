"""The experts of a model over two executors: hot ones on the device, cold ones in host memory.

            router (device)
               |  expert ids [T, k]
        +------+-------+
      hot ids        cold ids           an executor gets all rows, and -1 for what isn't its own
        |              |
      device          cpu               at the same time, each with threads of its own
        |              |
        +--> outputs <-+                float32 [T, k, hidden], one row a choice
               |
        sum over k, weighed             once, in the order of the routing

Where both executors have the same numerics, where an expert lies changes no bit: a choice's output
depends on its token and its expert, and the sum doesn't know who computed what. Where they differ
(a GPU, an int4 copy on the CPU) each sums its own choices, so that no more than rows cross the bus,
and the two sums are added: a token's output then depends on who holds its experts.

Between two steps, and only there, experts that have been copied meanwhile take the places of
others. A step never waits for a copy. Not responsible for which experts move (dynamic), nor for
how a router chooses.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.experts.dynamic import DynamicPlacement, Exchange
from engine.experts.placement import Mask
from engine.experts.router import Routing
from engine.experts.statistics import Counts, Statistics
from engine.kernels import Choices
from kvc2.host.priority import step_back

log = logging.getLogger(__name__)

SPARE_PLACES = 4  # on the device beyond the hot experts: a copy fills one while steps run
Place = tuple[int, int]  # an expert: (layer, id)


class Executor(Protocol):
    """Who computes the experts that it holds."""

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        """Fills outputs [T, k, hidden] where expert_ids [T, k] of x [T, hidden] isn't -1."""


@dataclass(frozen=True)
class Weights:
    """Experts in one memory, one after the other: gate_up [n, 2 * size, hidden], gate first; down
    [n, hidden, size]."""

    gate_up: Tensor
    down: Tensor

    @property
    def count(self) -> int:
        """n, of which some may be free places."""
        return len(self.gate_up)

    def weights(self, count: int) -> Weights:
        """Room for as many of the same shape."""
        return Weights(*(x.new_empty(count, *x.shape[1:]) for x in (self.gate_up, self.down)))

    @property
    def expert_bytes(self) -> int:
        """Of one."""
        elements = self.gate_up.shape[1:].numel() + self.down.shape[1:].numel()
        return elements * self.gate_up.dtype.itemsize

    def copy(self, place: int, source: Weights, index: int) -> None:
        """The expert `index` of `source` to `place` of this one."""
        self.gate_up[place].copy_(source.gate_up[index])
        self.down[place].copy_(source.down[index])


class Kernels(Protocol):
    """What computes choices of experts: kernels.Choices, or several of them (nodes)."""

    def compute(
        self, x: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, outputs: Tensor
    ) -> None:
        """See kernels.Choices."""


class Source(Executor, Protocol):
    """An executor that has all experts of `layers`, or can get them. `numerics`: its class of bits,
    as kernels.numerics has it, where executors may differ."""

    numerics: str

    @property
    def layers(self) -> Mapping[int, Any]: ...

    def copy(self, expert: Place, target: Weights, place: int) -> None:
        """To the device's memory, beside steps. What it raises is a copy that failed."""

    def state(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Stream(Executor, Protocol):
    """An executor on the device of experts that come for one step (prefill), if it has so many
    tokens."""

    from_tokens: int

    def begin(self, cold: Iterable[Place]) -> None: ...

    def host_took(self, tokens: int, seconds: float) -> None: ...

    def state(self, cold: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


class HostExecutor:
    """All experts of all layers, each layer's in one piece."""

    def __init__(self, layers: Mapping[int, Weights], kernels: Kernels, numerics: str = "") -> None:
        self.layers = layers
        self.numerics = numerics
        self._kernels = kernels

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        weights = self.layers[layer]
        self._kernels.compute(x, expert_ids, weights.gate_up, weights.down, outputs)

    def copy(self, expert: Place, target: Weights, place: int) -> None:
        """May run beside steps: nobody writes to a host's weights."""
        layer, index = expert
        target.copy(place, self.layers[layer], index)

    def state(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class DeviceExecutor:
    """Places for experts of any layer. What lies where changes between steps only."""

    def __init__(
        self, weights: Weights, shape: tuple[int, int], kernels: Kernels, numerics: str = ""
    ) -> None:
        self.weights = weights
        self.numerics = numerics
        self.free = list(range(weights.count))
        # [layers, experts + 1]: the last is of the id -1, which is nobody's
        self._place_of = torch.full((shape[0], shape[1] + 1), -1, dtype=torch.int64)
        self._kernels = kernels

    def holds(self, layer: int, expert_ids: Tensor) -> Tensor:
        """Where each of them lies, -1: not here."""
        return self._place_of[layer][expert_ids]

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        """`expert_ids` are places here, as `holds` tells them."""
        self._kernels.compute(x, expert_ids, self.weights.gate_up, self.weights.down, outputs)

    def put(self, expert: Place, place: int) -> None:
        """The expert has been copied to this place, which was taken off `free`."""
        self._place_of[expert] = place

    def drop(self, expert: Place) -> None:
        self.free.append(int(self._place_of[expert]))
        self._place_of[expert] = -1


@dataclass(frozen=True)
class Arrival:
    """A copy that has ended, well or not."""

    exchange: Exchange
    place: int
    error: Exception | None


class Copier:
    """One thread that fills places of the device while steps run."""

    def __init__(self, copy: Callable[[Place, int], None]) -> None:
        self._copy = copy
        self._wanted: queue.SimpleQueue[tuple[Exchange, int] | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvc2-experts", daemon=True)
        self._thread.start()

    def begin(self, exchange: Exchange, place: int) -> None:
        self._wanted.put((exchange, place))

    def arrived(self) -> list[Arrival]:
        """Those since the last call; never waits."""
        return [self._arrived.get() for _ in range(self._arrived.qsize())]

    def close(self) -> None:
        self._wanted.put(None)
        self._thread.join()

    def _run(self) -> None:
        step_back()  # a copy that takes a core's turn would hold up a step
        while (wanted := self._wanted.get()) is not None:
            exchange, place = wanted
            error = None
            try:
                self._copy(exchange.hot, place)
            except Exception as failed:
                error = failed
            self._arrived.put(Arrival(exchange, place, error))


class Moves:
    """Carries out what a policy wants: experts are copied to spare places of the device while steps
    run, and taken in between them."""

    def __init__(self, policy: DynamicPlacement, host: Source, device: DeviceExecutor) -> None:
        self.exchanges = self.failed_copies = 0
        self._policy = policy
        self._device = device
        self._copier = Copier(lambda expert, place: host.copy(expert, device.weights, place))

    @property
    def hot(self) -> Mask:
        """A copy."""
        return self._policy.hot.copy()

    def turn(self, step: Counts, tokens: int, now: float) -> bool:
        """Takes in what has come, and begins what the policy makes of a step's choices. Whether
        anything moved. Waits for nothing."""
        before = self.exchanges
        for each in self._copier.arrived():
            self._take_in(each)
        self._policy.observe(step, tokens)
        for exchange in self._policy.plan(now, len(self._device.free)):
            self._copier.begin(exchange, self._device.free.pop())
        return self.exchanges > before

    def close(self) -> None:
        self._copier.close()

    def _take_in(self, arrival: Arrival) -> None:
        exchange = arrival.exchange
        if arrival.error is not None:
            log.warning("expert %s was not copied: %s", exchange.hot, arrival.error)
            self._device.free.append(arrival.place)
            self.failed_copies += 1
            self._policy.failed(exchange)
            return
        self._device.drop(exchange.cold)
        self._device.put(exchange.hot, arrival.place)
        self._policy.done(exchange)
        self.exchanges += 1


@dataclass
class Spent:
    """What executors took for their choices."""

    device_activations: int = 0
    device_s: float = 0.0
    host_activations: int = 0
    host_s: float = 0.0


@dataclass(frozen=True)
class Split:
    """A layer's choices [T, k]: the device's places, -1 for what is cold; ids of what is cold, -1
    for what is hot; and room for all of their outputs [T, k, hidden], the host's and the device's,
    which are one where their numerics are equal."""

    places: Tensor
    cold: Tensor
    outputs: Tensor
    on_device: Tensor

    @property
    def any_hot(self) -> bool:
        return int(self.places.max()) >= 0

    @property
    def any_cold(self) -> bool:
        return int(self.cold.max()) >= 0


@dataclass(frozen=True)
class Begun:
    """Outputs [T, k, hidden] that executors still compute, as Split has them, and how they will be
    weighed."""

    outputs: Tensor
    on_device: Tensor
    weights: Tensor
    dtype: torch.dtype
    under_way: tuple[Future[None], ...]

    def wait(self) -> None:
        """Until all are there. Raises what one of them did, when none writes any more."""
        wait(self.under_way)
        for each in self.under_way:
            each.result()

    def columns(self, begin: int, end: int | None) -> Begun:
        """Of those that are there, these choices."""
        outputs, weights = (e[:, begin:end].contiguous() for e in (self.outputs, self.weights))
        on_device = outputs
        if self.on_device is not self.outputs:
            on_device = self.on_device[:, begin:end].contiguous()
        return Begun(outputs, on_device, weights.clone(), self.dtype, ())


class PlacedExperts:
    """All layers' experts of one model. One thread computes; `close` after the last step.

    `chosen`: experts a token. `statistics`: whoever calls `compute` records there before it.
    """

    def __init__(
        self,
        host: Source,
        device: DeviceExecutor,
        sums: Choices,
        *,
        statistics: Statistics,
        chosen: int,
    ) -> None:
        self._chosen = chosen
        self._host = host
        self._device = device
        self._sums = sums
        self._statistics = statistics
        self._seen: Counts = statistics.counts  # what the last step had counted
        self._moves: Moves | None = None
        self._beside = ThreadPoolExecutor(1, "kvc2-device")
        self._apart = ThreadPoolExecutor(1, "kvc2-cold")  # its thread is made at the first use
        self._stream: Stream | None = None
        self.spent = Spent()
        self.layers = sorted(host.layers)
        self.hot: Mask = np.zeros(self._seen.shape, bool)
        self.served: Counts = np.zeros(self._seen.shape)  # activations that the device served

    def fill(self, hot: Mask) -> None:
        """Copies these experts to the device. Before the first step."""
        for layer, index in np.argwhere(hot):
            place = self._device.free.pop()
            self._host.copy((int(layer), int(index)), self._device.weights, place)
            self._device.put((int(layer), int(index)), place)
        self.hot = hot.copy()

    @property
    def host(self) -> Source:
        """Who has those that are cold, and all others too."""
        return self._host

    @property
    def numerics(self) -> str:
        """Of both executors, where they differ: then the sum depends on the placement. Else ""."""
        device, host = self._device.numerics, self._host.numerics
        return f"{device}:{host}" if device != host else ""

    def follow(self, policy: DynamicPlacement) -> None:
        """From now on experts move as it says."""
        self._moves = Moves(policy, self._host, self._device)

    def stream(self, stream: Stream) -> None:
        """From now on the cold experts of large steps are copied to the device."""
        self._stream = stream

    def streams(self, x: Tensor) -> bool:
        """Whether a step of these rows is one of those."""
        return self._stream is not None and len(x) >= self._stream.from_tokens

    def compute(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """[T, hidden] -> [T, hidden], the weighed sum over each token's experts, those with the id
        -1 left out."""
        if self.streams(x):
            return self.end(self.begin(layer, x, routing))
        split = self._split(layer, x, routing)
        beside = self._begin_hot(layer, x, split)
        try:
            if split.any_cold:
                self._compute_cold(layer, x, split)
        finally:
            if beside is not None:  # it writes to `outputs`, whatever became of the cold ones
                beside.result()
        return self.end(Begun(split.outputs, split.on_device, routing.weights, x.dtype, ()))

    def begin(self, layer: int, x: Tensor, routing: Routing) -> Begun:
        """The same, of which nothing is waited for. What is begun is computed in its order; whoever
        begins what a step computes begins all of it, and what is streamed once a layer."""
        split = self._split(layer, x, routing)
        under_way = [self._begin_hot(layer, x, split)]
        if split.any_cold:
            if self._stream is not None and self.streams(x):
                cold = split.cold, split.on_device
                under_way.append(self._beside.submit(self._stream.compute, layer, x, *cold))
            else:
                under_way.append(self._apart.submit(self._compute_cold, layer, x, split))
        begun = tuple(each for each in under_way if each is not None)
        return Begun(split.outputs, split.on_device, routing.weights, x.dtype, begun)

    def end(self, begun: Begun) -> Tensor:
        """Waits for it: [T, hidden]."""
        begun.wait()
        out = self._sums.sum(begun.outputs, begun.weights, begun.dtype)
        if begun.on_device is begun.outputs:
            return out
        return out + self._sums.sum(begun.on_device, begun.weights, begun.dtype)

    def between_steps(self, now: float) -> None:
        """Takes in what has been copied, and begins what the policy wants. Waits for nothing."""
        counts = self._statistics.counts
        step, self._seen = counts - self._seen, counts
        self.served += step * self.hot
        if self._moves is not None and self._moves.turn(step, self._tokens(step), now):
            self.hot = self._moves.hot

    def state(self) -> dict[str, Any]:
        """By layer: its hot experts, and the part of its activations that the device served."""
        seen = self._statistics.counts.sum(1)
        served = self.served.sum(1)
        layers = [
            {
                "layer": layer,
                "hot": np.flatnonzero(self.hot[layer]).tolist(),
                "device_share": round(float(served[layer] / seen[layer]), 4) if seen[layer] else 0,
            }
            for layer in self.layers
        ]
        told: dict[str, Any] = {
            "by_layer": layers,
            "hot": int(self.hot.sum()),
            "device_share": round(float(served.sum() / max(seen.sum(), 1.0)), 4),
            "exchanges": 0 if self._moves is None else self._moves.exchanges,
            "failed_copies": 0 if self._moves is None else self._moves.failed_copies,
            "expert_bytes": self._device.weights.expert_bytes,
        }
        told |= self._host.state()
        if self._stream is not None:
            cold = float((~self.hot[self.layers]).sum()) / len(self.layers)
            told["prefill"] = self._stream.state(cold)
        return told

    def close(self) -> None:
        self._beside.shutdown()
        self._apart.shutdown()
        if self._moves is not None:
            self._moves.close()
        if self._stream is not None:
            self._stream.close()
        self._host.close()

    def _split(self, layer: int, x: Tensor, routing: Routing) -> Split:
        if self._stream is not None and layer == self.layers[0]:
            self._begin_stream(self._stream, x)
        ids = routing.expert_ids
        places = self._device.holds(layer, ids)
        outputs = torch.empty(*ids.shape, x.shape[1])
        on_device = outputs
        if self.numerics:
            outputs, on_device = torch.zeros_like(outputs), torch.zeros_like(outputs)
        elif int(ids.min()) < 0:
            outputs[ids < 0] = 0
        return Split(places, ids.masked_fill(places >= 0, -1), outputs, on_device)

    def _compute_cold(self, layer: int, x: Tensor, split: Split) -> None:
        began = time.perf_counter()
        self._host.compute(layer, x, split.cold, split.outputs)
        took = time.perf_counter() - began
        self.spent.host_s += took
        self.spent.host_activations += int((split.cold >= 0).sum())
        if self._stream is not None:
            self._stream.host_took(len(x), took)

    def _begin_stream(self, stream: Stream, x: Tensor) -> None:
        """A step begins, which needs its cold experts on the device or doesn't."""
        cold: list[Place] = []
        if self.streams(x):
            cold = [(at, int(e)) for at in self.layers for e in np.flatnonzero(~self.hot[at])]
        stream.begin(cold)

    def _begin_hot(self, layer: int, x: Tensor, split: Split) -> Future[None] | None:
        if not split.any_hot:
            return None
        return self._beside.submit(self._compute_hot, layer, x, split)

    def _compute_hot(self, layer: int, x: Tensor, split: Split) -> None:
        began = time.perf_counter()
        self._device.compute(layer, x, split.places, split.on_device)
        self.spent.device_s += time.perf_counter() - began
        self.spent.device_activations += int((split.places >= 0).sum())

    def _tokens(self, step: Counts) -> int:
        """Of a step: each chooses as many experts in each layer that has any."""
        layers = np.flatnonzero(step.any(1))
        return round(float(step[layers[0]].sum()) / self._chosen) if layers.size else 0
