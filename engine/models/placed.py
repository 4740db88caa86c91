"""A model whose experts' choices are counted, and whose experts may lie in several places.

Not responsible for computing them (experts/hybrid), nor for which lie where (experts/placement).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine import kernels
from engine.batch import Batch
from engine.budget import GB, Budget, Division, Measured, Sizes, decided, least_pages
from engine.config import ModelConfig
from engine.experts import placement, statistics
from engine.experts.beside import BesideDevice, Pinned
from engine.experts.deferral import DeferredExperts
from engine.experts.dynamic import DynamicPlacement, Pace
from engine.experts.grouped import GroupedExperts, MoeLayer
from engine.experts.hybrid import (
    SPARE_PLACES,
    DeviceExecutor,
    HostExecutor,
    Kernels,
    PlacedExperts,
    Weights,
)
from engine.experts.nodes import Nodes
from engine.experts.placement import Room
from engine.experts.prefill import PrefillStream
from engine.experts.router import Routing
from engine.experts.statistics import Counts, LateCounts, Statistics
from engine.experts.store import ExpertStore, StoredExperts
from engine.host_budget import HostSizes, Redivision, divide, given, most_pages
from engine.kernels import Choices, workbench_of
from engine.models.base import Model
from engine.models.host_memory import HostMemory, Pages
from engine.models.packed import expert_bytes
from engine.settings import EngineConfig, experts_on_disk, pages_ahead
from kvc2.errors import InvalidConfig

PLACES_MIN = 8  # of experts in memory: reads need some while others compute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observed:
    """A layer's experts, whose choices are counted."""

    layer: int
    statistics: Statistics | LateCounts
    experts: Callable[[Tensor, Routing], Tensor]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        self.statistics.record(self.layer, routing.expert_ids)
        return self.experts(x, routing)


@dataclass(frozen=True)
class PlacedLayer:
    """A layer of experts that lie in several places."""

    layer: int
    experts: PlacedExperts | DeferredExperts | BesideDevice

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        return self.experts.compute(self.layer, x, routing)


class Compute(Protocol):
    """engine.runner.Runner, as it is used here."""

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class BesideSteps:
    """A runner on a device, beside which the CPU computes cold experts."""

    compute: Compute
    experts: BesideDevice

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> Tensor:
        with self.experts.step(len(batch.token_ids)):
            return self.compute.step(batch, layer_ready)


@dataclass(frozen=True)
class CountedLate:
    """A runner on a device, whose choices of experts are counted behind each step."""

    compute: Compute
    chosen: LateCounts

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> Tensor:
        logits = self.compute.step(batch, layer_ready)
        self.chosen.count(len(batch.token_ids))
        return logits


@dataclass(frozen=True)
class BetweenSteps:
    """A runner whose experts may move before each step."""

    compute: Compute
    experts: PlacedExperts
    deferred: DeferredExperts | None
    host_memory: Callable[[], HostMemory | None]

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> Tensor:
        if self.deferred is not None:
            self.deferred.drop()
        now = time.monotonic()
        self.experts.between_steps(now)
        if (memory := self.host_memory()) is not None:
            memory.turn(now)
        return self.compute.step(batch, layer_ready)


class PlacedModel:
    """A model, what was chosen of its experts, and where they lie. `experts`: None where all are on
    the device. Raises InvalidConfig for a file of counts that isn't this model's."""

    def __init__(self, config: EngineConfig, model: Model, most_stored: int | None = None) -> None:
        """`most_stored`: experts that memory may be asked to hold later on."""
        c = model.config
        shape = (c.num_layers, c.num_experts)
        self._file = config.expert_statistics
        self._owner = model.weights_digest.hex()
        self.statistics = Statistics(*shape)
        self.experts: PlacedExperts | None = None
        self.budget: Budget | None = None
        self.host_memory: HostMemory | None = None
        self.traffic: Callable[[], Measured] = Measured  # of this run, without the experts' part
        self._earlier = Measured()
        if self._file is not None:
            kept = statistics.resume("expert_statistics", self._file, *shape, self._owner)
            self.statistics.add(kept)
            self._earlier = measured_in(self._file)
        known = self.statistics.counts
        if config.init_expert_location is not None:
            known = statistics.load("init_expert_location", config.init_expert_location, *shape)
        late, split = _deferred(config, c), config.expert_nodes > 1
        self.beside: BesideDevice | None = None
        layers = moe_layers(model)
        if model.device.ordinal is not None:
            if config.places_experts and layers:
                self.beside = place_beside(config, model, layers, known)
        elif config.places_experts or experts_on_disk(config) or late or split:
            self.experts = place_experts(config, c, layers, known, self.statistics, most_stored)
        self._deferred = DeferredExperts(self.experts, late) if self.experts and late else None
        self._late = _late_counts(config, model, self.statistics)
        self.model = _with_experts(model, self._layer)

    def compute(self, runner: Compute) -> Compute:
        """The runner, before whose steps experts move, and behind which choices are counted."""
        if self.beside is not None:
            runner = BesideSteps(runner, self.beside)
        if self._late is not None:
            runner = CountedLate(runner, self._late)
        if self.experts is None:
            return runner
        return BetweenSteps(runner, self.experts, self._deferred, lambda: self.host_memory)

    def share(self, division: Redivision, pages: Pages, num_pages: int) -> None:
        """From now on host memory moves between the experts on disk and the pages of a pool."""
        experts = self.experts
        if experts is None or not isinstance(experts.host, ExpertStore):
            raise RuntimeError("what is shared with KV must be a store's memory")

        def shown() -> tuple[Counts, Measured]:
            return self.statistics.counts * ~experts.hot, self.measured()

        self.host_memory = HostMemory(division, experts.host, pages, num_pages, shown)

    def save(self) -> str | None:
        """Keeps the counts in their file, whose name is returned; None without one. Raises
        OSError."""
        if self._file is None:
            return None
        measured = asdict(self.measured())
        statistics.save(self._file, self.statistics.counts, self._owner, measured)
        return str(self._file)

    def close(self) -> None:
        """After the last step."""
        if self.host_memory is not None:
            self.host_memory.close()
        for each in (self.experts, self.beside):
            if each is not None:
                each.close()
        try:
            self.save()
        except OSError as error:
            log.warning("expert_statistics = %s: not saved: %s", self._file, error)

    def state(self) -> dict[str, Any]:
        """What `GET /experts` tells: where experts lie, and how many activations each place had."""
        counts = self.statistics.counts
        told: dict[str, Any] = {
            "layers": counts.shape[0],
            "experts": counts.shape[1],
            "activations": int(counts.sum()),
            "placed": self.experts is not None or self.beside is not None,
        }
        if self.budget is not None:
            told["budget"] = self.budget.told(counts, self.measured())
        if self.host_memory is not None:
            told["host_budget"] = self.host_memory.told()
        if self.beside is not None:
            told |= self.beside.state(self.statistics)
        return told | (self.experts.state() if self.experts is not None else {})

    @property
    def numerics(self) -> str:
        """Of its experts' executors, where they differ."""
        if self.beside is not None:
            own, cpu = self.model.device.numerics(self.model.config.dtype), kernels.numerics
            return f"{own}:{cpu(self.model.config.dtype)}" if not self.beside.hot.all() else ""
        return "" if self.experts is None else self.experts.numerics

    def measured(self) -> Measured:
        """What the traffic showed, in this run and before."""
        now = self.traffic()
        if self.beside is not None:
            now = replace(now, **asdict(self.beside.spent))
        if self.experts is not None:
            now = replace(now, **asdict(self.experts.spent))
            if isinstance(self.experts.host, ExpertStore):
                now = replace(now, **self.experts.host.reads())
        return self._earlier.plus(now)

    def _layer(self, index: int, moe: MoeLayer) -> Callable[[Tensor, Routing], Tensor]:
        experts = moe.experts
        if self.beside is not None:
            experts = PlacedLayer(index, self.beside)
        elif self.experts is not None:
            experts = PlacedLayer(index, self._deferred or self.experts)
        return Observed(index, self._late or self.statistics, experts)


def _late_counts(config: EngineConfig, model: Model, seen: Statistics) -> LateCounts | None:
    """Where a device computes, which the host must not wait for in each layer."""
    c, layers = model.config, list(moe_layers(model))
    if model.device.ordinal is None or not layers:
        return None
    shape = c.num_layers, config.step_tokens, c.experts_per_token
    return LateCounts(seen, model.device.empty(shape, torch.int64), layers)


def measured_in(path: Path) -> Measured:
    """What an earlier run has saved beside its counts; nothing where there is none that counts."""
    try:
        return Measured.of(statistics.measured(path)) if path.exists() else Measured()
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("expert_statistics = %s: what was measured is left out: %s", path, error)
        return Measured()


def budgeted(
    config: EngineConfig, model: ModelConfig, page_bytes: int
) -> tuple[EngineConfig, Budget]:
    """The settings with --gpu-memory-gb divided, by the counts that are kept; and what tells of it.
    Raises InvalidConfig."""
    c, layers = model, sum(model.moe_layers)
    beside = SPARE_PLACES * config.enable_dynamic_expert_update
    if config.gpu_prefill_token_threshold is not None:
        beside += c.num_experts
    each = expert_bytes(c, config.expert_dtype)
    sizes = Sizes(max(1, each), layers * c.num_experts, beside, page_bytes, config.page_size)
    counts, measured = np.zeros((c.num_layers, c.num_experts)), Measured()
    known = config.expert_statistics
    if known is not None and known.exists():
        counts = statistics.load("expert_statistics", known, *counts.shape)
        measured = measured_in(known)
    hot = None
    if config.fixes_hot_experts or config.gpu_memory_gb is None:
        per_layer, ratio = config.num_gpu_experts, config.gpu_experts_ratio
        hot = placement.hot_experts(layers, c.num_experts, per_layer, ratio)
    if config.gpu_memory_gb is None:
        division = Division(hot or 0, config.num_pages or config.kv_bytes // page_bytes, "given")
    else:
        division = decided(config, sizes, hot, counts, measured)
        ratio = division.hot / max(1, sizes.total)
        config = replace(
            config, num_pages=division.pages, num_gpu_experts=None, gpu_experts_ratio=ratio
        )
    return config, Budget(config.gpu_memory_gb, least_pages(config), sizes, division)


def divided(
    config: EngineConfig, model: ModelConfig, page_bytes: int
) -> tuple[EngineConfig, Redivision | None]:
    """The settings with --host-memory-gb divided, by what is kept of earlier runs: the pool's pages
    are as many as there may ever be. Raises InvalidConfig."""
    if config.host_memory_gb is None:
        return config, None
    total, c = round(config.host_memory_gb * GB), model
    each = 3 * c.expert_size * c.hidden_size * c.dtype.itemsize
    all_experts = sum(c.moe_layers) * c.num_experts
    least = min(all_experts, least_stored(c))
    sizes = HostSizes(
        each, all_experts, least, page_bytes, config.page_size, 4 * pages_ahead(config)
    )
    pages = config.num_pages
    if pages is None and config.kv_memory_gb is not None:
        pages = config.kv_bytes // page_bytes
    experts = None
    if config.expert_memory_gb is not None:
        experts = min(all_experts, round(config.expert_memory_gb * GB) // each)
    if pages is None and experts is None:
        known, counts = config.expert_statistics, np.zeros((c.num_layers, c.num_experts))
        measured = Measured()
        if known is not None and known.exists():
            counts = statistics.load("expert_statistics", known, *counts.shape)
            measured = measured_in(known)
        division, num_pages = divide(total, sizes, counts, measured), most_pages(total, sizes)
    else:
        division = given(total, sizes, pages, experts)
        num_pages = division.pages
    memory_gb = division.experts * each / GB
    config = replace(config, num_pages=num_pages, expert_memory_gb=memory_gb)
    return config, Redivision(total, sizes, division, time.monotonic())


def most_stored(division: Redivision | None) -> int | None:
    """Experts that memory may hold at most, under this division."""
    if division is None or division.fixed:
        return None
    sizes = division.sizes
    room = division.total_bytes - sizes.least_pages * sizes.page_bytes
    return min(sizes.total, room // sizes.expert_bytes)


def least_stored(model: ModelConfig) -> int:
    """Experts in memory without which nothing can be computed."""
    return max(PLACES_MIN, model.experts_per_token)


def _deferred(config: EngineConfig, model: ModelConfig) -> int:
    """Choices of a token that are late. Raises InvalidConfig where none would be left."""
    deferred, chosen = config.max_deferred_experts_per_token, model.experts_per_token
    if deferred >= max(chosen, 1):
        mend = f"0 to {max(chosen - 1, 0)}: a token has {chosen} experts, and one is not late"
        raise InvalidConfig("max_deferred_experts_per_token", deferred, mend)
    return deferred


def place_experts(
    config: EngineConfig,
    model: ModelConfig,
    layers: Mapping[int, MoeLayer],
    counts: Counts,
    seen: Statistics,
    most_stored: int | None = None,
) -> PlacedExperts:
    """The experts of these layers, those of the strategy on the device: what they hold is the
    host's. `counts`: what is known beforehand; `seen`: what the steps choose; `most_stored`: as
    PlacedModel has it. Raises InvalidConfig."""
    per_layer, ratio = config.num_gpu_experts, config.gpu_experts_ratio
    if not config.places_experts:
        per_layer = 0  # what is loaded stays where it is
    hot = placement.hot_experts(len(layers), model.num_experts, per_layer, ratio)
    room = Room([i in layers for i in range(model.num_layers)], model.num_experts, hot)
    moves = config.enable_dynamic_expert_update and 0 < hot < room.total
    threads = _threads(config, room)
    nodes = Nodes(config.expert_nodes) if config.expert_nodes > 1 else None
    host = _host(config, model, layers, _kernels(nodes, threads.host), most_stored)
    if nodes is not None:
        _split(config, host, nodes)
    on_device = _kernels(nodes, threads.device)
    device = DeviceExecutor(
        host.layers[min(layers)].weights(hot + SPARE_PLACES * moves),
        (model.num_layers, model.num_experts),
        on_device,
    )
    experts = PlacedExperts(
        host,
        device,
        Choices(workbench_of(config.cpu_threads)),
        statistics=seen,
        chosen=model.experts_per_token,
    )
    if config.gpu_prefill_token_threshold is not None and hot < room.total:
        places = device.weights.weights(model.num_experts)
        least = config.gpu_prefill_token_threshold
        experts.stream(PrefillStream(host.copy, places, model.num_experts, on_device, least))
    strategy, seed = config.expert_placement_strategy, config.expert_placement_seed
    experts.fill(placement.place(strategy, room, counts, seed))
    if moves:
        pace = Pace(config.expert_copies_per_s)
        experts.follow(DynamicPlacement(room, experts.hot, counts, pace))
    return experts


def place_beside(
    config: EngineConfig, model: Model, layers: Mapping[int, MoeLayer], counts: Counts
) -> BesideDevice:
    """The experts of these layers, which lie in the host's memory: those of the strategy on the
    model's device too. `counts`: what is known beforehand."""
    c, device = model.config, model.device
    per_layer, ratio = config.num_gpu_experts, config.gpu_experts_ratio
    hot = placement.hot_experts(len(layers), c.num_experts, per_layer, ratio)
    room = Room([i in layers for i in range(c.num_layers)], c.num_experts, hot)
    strategy, seed = config.expert_placement_strategy, config.expert_placement_seed
    bench, side = workbench_of(config.cpu_threads), device.side_stream()
    host = HostExecutor(_loaded(layers), Choices(bench))
    of_one = host.layers[min(layers)]
    gate_up, down = (
        device.empty((hot, *each.shape[1:]), each.dtype) for each in (of_one.gate_up, of_one.down)
    )
    return BesideDevice(
        host,
        Weights(gate_up, down),
        placement.place(strategy, room, counts, seed),
        side=side,
        sums=Choices(bench),
        pinned=Pinned(side, (config.step_tokens, c.hidden_size), c.experts_per_token, c.dtype),
    )


def _loaded(layers: Mapping[int, MoeLayer]) -> dict[int, Weights]:
    """Their weights as they were loaded."""
    return {
        index: Weights(moe.experts.gate_up, moe.experts.down)
        for index, moe in layers.items()
        if isinstance(moe.experts, GroupedExperts)
    }


def _kernels(nodes: Nodes | None, threads: int) -> Kernels:
    return Choices(workbench_of(threads)) if nodes is None else nodes.kernels(threads)


def _split(config: EngineConfig, host: HostExecutor | ExpertStore, nodes: Nodes) -> None:
    """The host's weights go to their nodes, a layer at a time: what was loaded is given up."""
    if isinstance(host, ExpertStore):
        mend = "experts on disk are read whole: leave out this or --expert-memory-gb"
        raise InvalidConfig("expert_nodes", config.expert_nodes, mend)
    layers = {}
    for index, whole in host.layers.items():
        try:
            layers[index] = nodes.split(whole)
        except ValueError as error:
            raise InvalidConfig("expert_nodes", config.expert_nodes, str(error)) from error
        for tensor in (whole.gate_up, whole.down):
            tensor.data = tensor.new_empty(0)  # whoever still holds it: see memory.empty
    host.layers = layers


@dataclass(frozen=True)
class Threads:
    """Of the CPU, for either executor."""

    device: int
    host: int


def _threads(config: EngineConfig, room: Room) -> Threads:
    """They share --threads, but who has all experts has all threads."""
    threads = config.cpu_threads
    if room.hot in (0, room.total):
        return Threads(threads, threads)
    device = min(config.device_threads or max(1, threads // 2), threads)
    return Threads(device, max(1, threads - device))


def moe_layers(model: Model) -> dict[int, MoeLayer]:
    """Those that have experts."""
    found = {index: each.feed_forward for index, each in enumerate(model.layers)}
    return {index: moe for index, moe in found.items() if isinstance(moe, MoeLayer)}


def _host(
    config: EngineConfig,
    model: ModelConfig,
    layers: Mapping[int, MoeLayer],
    kernels: Kernels,
    most_stored: int | None,
) -> HostExecutor | ExpertStore:
    """All experts as they were loaded, or as many as --expert-memory-gb holds."""
    stored = {i: moe.experts for i, moe in layers.items() if isinstance(moe.experts, StoredExperts)}
    if not stored:
        return HostExecutor(_loaded(layers), kernels)
    each = stored[min(stored)].expert_bytes
    places = round((config.expert_memory_gb or 0) * 1e9) // each
    least = least_stored(model)
    if places < least:
        mend = f"an expert has {each} bytes, and memory for {least} is the least"
        raise InvalidConfig("expert_memory_gb", config.expert_memory_gb, mend)
    places = min(places, len(stored) * model.num_experts)

    def guess(layer: int, x: Tensor) -> Tensor:
        return layers[layer].router(x).expert_ids

    return ExpertStore(stored, places, kernels, guess, most_stored)


def _with_experts(
    model: Model, made: Callable[[int, MoeLayer], Callable[[Tensor, Routing], Tensor]]
) -> Model:
    layers = []
    for index, layer in enumerate(model.layers):
        moe = layer.feed_forward
        if isinstance(moe, MoeLayer):
            layer = replace(layer, feed_forward=replace(moe, experts=made(index, moe)))
        layers.append(layer)
    return replace(model, layers=tuple(layers))
