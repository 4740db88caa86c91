"""Puts an engine together from its settings, and serves until it is told to stop.

Not responsible for any part itself; nor for flags (cli).
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI

from engine import kernels
from engine.attention.base import KvPool, KvShape
from engine.budget import Measured
from engine.config import ModelConfig
from engine.device import CPU, Device, chosen, set_threads
from engine.errors import EngineFailedError
from engine.experts.placement import hot_experts
from engine.graphs import GraphSizes, graph_bytes
from engine.host_budget import Redivision
from engine.http.app import build
from engine.http.connection import ClientLimits
from engine.http.keys import file_keys
from engine.http.loading import refused_meanwhile
from engine.http.outside import with_cors, with_ids
from engine.http.server import Server, fit_descriptors
from engine.http.service import Served
from engine.http.tokenizer import Tokenizer
from engine.identity import SHARED_NUMERICS, identity_of
from engine.memory import huge_bytes, shared_policy
from engine.metrics import EngineMetrics, ExpertMetrics
from engine.models import build_model
from engine.models.base import Model
from engine.models.host_memory import HeldPages
from engine.models.packed import PackedExperts, open_packed
from engine.models.placed import PlacedModel, budgeted, divided, most_stored
from engine.prefix import (
    Bridge,
    BridgeConfig,
    BridgeCounters,
    Daemon,
    EngineMemory,
    Lease,
    PoolMemory,
    PromptReuse,
    layer_major,
    open_bridge,
    pool_memory,
    side_by_side,
)
from engine.request import Bounds
from engine.runner import Runner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.settings import (
    EngineConfig,
    expert_directory,
    experts_on_disk,
    graph_rows,
    pages_ahead,
)
from engine.weights import Checkpoint
from engine.worker import Worker
from kvc2.errors import InvalidConfig
from kvc2.host import machine
from kvc2.keyring import Keyring

log = logging.getLogger(__name__)

# what moves experts, or reads them, or adds them late: for the CPU alone so far
NOT_BESIDE_CUDA = (
    *("enable_dynamic_expert_update", "expert_memory_gb", "expert_nodes", "host_memory_gb"),
    *("gpu_prefill_token_threshold", "max_deferred_experts_per_token"),
)
BACKLOG = 2048  # connections that the kernel holds until they are accepted


@dataclass(frozen=True)
class Engine:
    """A whole engine: `app` starts and stops its worker."""

    app: FastAPI
    bridge: Bridge
    worker: Worker
    metrics: EngineMetrics
    experts: PlacedModel


def _steps(config: EngineConfig) -> SchedulerConfig:
    return SchedulerConfig(
        config.chunk_size,
        config.step_tokens,
        config.max_running,
        config.mixed_chunk_size,
        config.mixed_step_stretch,
    )


def assemble(config: EngineConfig) -> Engine:
    """Load the model, make the pool and connect the parts. Takes as long as reading the weights."""
    device = chosen(config.device, config.attention_split_pages)
    check_device(config, device)
    set_threads(config.cpu_threads)
    if config.cpu_isa != "auto":
        kernels.choose(config.cpu_isa)
    model_config = ModelConfig.load(config.model, config.dtype)
    tokenizer = Tokenizer(
        config.model, parse_special=config.parse_special_tokens, tool_format=config.tool_format
    )
    shape = KvShape.of(model_config, config.page_size)
    config, budget = budgeted(config, model_config, shape.page_bytes)
    config, division = divided(config, model_config, shape.page_bytes)
    num_pages = _num_pages(config, shape)
    pool_bytes = num_pages * shape.page_bytes
    kv_bytes = pool_bytes if division is None else division.goal.pages * shape.page_bytes
    with _opened(config, model_config, device) as checkpoint:
        packed = open_packed(
            model_config, checkpoint, config.expert_dtype, expert_directory(config)
        )
        not_held = _not_held(config, model_config, packed, device)
        weights_bytes = checkpoint.memory_bytes - not_held
        rows = graph_rows(config) if device.ordinal is not None else ()
        check_room(config, kv_bytes, weights_bytes, device.room(), graph_bytes(model_config, rows))
        memory = pool_memory(pool_bytes, device.ordinal)
        before = huge_bytes()
        model = build_model(model_config, checkpoint, packed)
        placed = PlacedModel(config, model, most_stored(division))
        placed.budget = budget
        _tell_huge_pages(huge_bytes() - before, weights_bytes)
    metrics = EngineMetrics()
    padding, prepare = _first_pages(placed, memory, shape, division, rows)
    bridge = _bridge(config, placed, shape, memory, metrics, prepare)
    pool = KvPool(shape, num_pages, device.over(memory), side_by_side=device.side_by_side)
    scheduler = Scheduler(
        _steps(config),
        bridge=bridge,
        compute=placed.compute(Runner(placed.model, pool, GraphSizes(rows, *padding.pages))),
        metrics=metrics,
        clock=time.monotonic,
    )
    max_tokens = (num_pages - len(padding.pages)) * config.page_size
    max_tokens = min(model_config.max_positions, max_tokens)
    worker = Worker(scheduler, config.max_queued, Bounds(model_config.vocab_size, max_tokens))
    placed.traffic = _traffic(config, worker, scheduler)
    if placed.host_memory is not None:
        scheduler.running.spare = placed.host_memory.spare
    metrics.registry.register(ExpertMetrics(placed.state))
    app = build(
        _served(config, model_config, tokenizer),
        worker=worker,
        tokenizer=tokenizer,
        registry=metrics.registry,
        daemon=bridge.health.state,
        experts=placed,
    )
    return Engine(app, bridge, worker, metrics, placed)


def _num_pages(config: EngineConfig, shape: KvShape) -> int:
    """Of the pool. Raises InvalidConfig for too small a one."""
    num_pages = config.num_pages or config.kv_bytes // shape.page_bytes
    if num_pages < 2:
        mend = f"a page needs {shape.page_bytes} bytes, and two are the least"
        raise InvalidConfig("kv_memory_gb", config.kv_bytes / 1e9, mend)
    return num_pages


def _first_pages(
    placed: PlacedModel,
    memory: EngineMemory,
    shape: KvShape,
    division: Redivision | None,
    graph_rows: tuple[int, ...],
) -> tuple[Lease, Callable[[Bridge], None]]:
    """What takes pages for good, before there is a session: what moves host memory, where it is
    divided; and a lease, where decode steps are captured, whose page is for rows that pad them."""
    padding, num_pages = Lease(b"padding"), memory.num_bytes // shape.page_bytes

    def prepare(bridge: Bridge) -> None:
        if graph_rows:
            bridge.grow(padding, shape.page_size)
        if division is not None and isinstance(memory, PoolMemory):
            pages = HeldPages(bridge, memory, shape, num_pages)
            pages.hold_first(num_pages - division.goal.pages)
            placed.share(division, pages, num_pages)

    return padding, prepare


def _traffic(config: EngineConfig, worker: Worker, scheduler: Scheduler) -> Callable[[], Measured]:
    """What the prompts of this run show, from now on."""
    reuse = PromptReuse(config.page_size)
    worker.on_prompt = reuse.note
    return lambda: Measured(
        prompt_tokens=reuse.tokens,
        prefill_tokens_per_s=scheduler.prefill_rate or 0.0,
        hit_rates=reuse.hit_rates(),
    )


def check_device(config: EngineConfig, device: Device) -> None:
    """Raises InvalidConfig for what a CUDA device can't have yet."""
    if device.ordinal is None:
        return
    for field in NOT_BESIDE_CUDA:
        value = getattr(config, field)
        if value != EngineConfig.__dataclass_fields__[field].default:
            raise InvalidConfig(field, value, f"not with --device {config.device}: it is not built")


def _opened(config: EngineConfig, model: ModelConfig, device: Device) -> Checkpoint:
    """The checkpoint; where some experts are cold beside a GPU, all are read to host memory. Raises
    InvalidConfig where that is too small for them."""
    experts_on = device
    if device.ordinal is not None and config.places_experts:
        experts_on, needed = CPU, _experts_bytes(model)
        room = machine.memory()
        if needed > room.total_bytes:
            mend = f"its experts take {needed / 1e9:.3f} GB, and {room}"
            raise InvalidConfig("model", str(config.model), mend)
    on_disk = experts_on_disk(config)
    return Checkpoint(
        config.model, model.dtype, device, experts_on_disk=on_disk, experts_on=experts_on
    )


def _experts_bytes(model: ModelConfig) -> int:
    """Of all layers' experts, as they are computed."""
    elements = 3 * model.expert_size * model.hidden_size
    return sum(model.moe_layers) * model.num_experts * elements * model.dtype.itemsize


def _not_held(
    config: EngineConfig, model: ModelConfig, packed: PackedExperts | None, device: Device
) -> int:
    """Bytes of experts that aren't in the device's memory: beyond --expert-memory-gb, cold ones
    beside a GPU, and what quantising takes off."""
    if packed is not None:
        return packed.saved_bytes(model)
    experts = _experts_bytes(model)
    if device.ordinal is not None and config.places_experts:
        layers = sum(model.moe_layers)
        per_layer, ratio = config.num_gpu_experts, config.gpu_experts_ratio
        hot = hot_experts(layers, model.num_experts, per_layer, ratio)
        return experts - hot * experts // max(1, layers * model.num_experts)
    if config.expert_memory_gb is None:
        return 0
    return max(0, experts - int(config.expert_memory_gb * 1e9))


def _served(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer) -> Served:
    """What the HTTP service is told."""
    end_token_ids = set(model.eos_token_ids)
    if tokenizer.end_token_id is not None:
        end_token_ids.add(tokenizer.end_token_id)
    return Served(
        model=config.model_name,
        end_token_ids=frozenset(end_token_ids),
        tenant=config.tenant,
        keys=file_keys(config.api_keys) if config.api_keys else Keyring({}),
        max_body_bytes=int(config.max_body_mb * 1e6),
        strict_fields=config.strict_fields,
    )


def _tell_huge_pages(granted_bytes: int, weights_bytes: int) -> None:
    told = "%.3f GB of %.3f GB of weights are in huge pages; for the KV pool, which is shared: %s"
    log.info(told, granted_bytes / 1e9, weights_bytes / 1e9, shared_policy())


def check_room(
    config: EngineConfig,
    pool_bytes: int,
    weights_bytes: int,
    room: machine.Room,
    graphs_bytes: int = 0,
) -> None:
    """Raises InvalidConfig for a pool that can never be had beside the weights and graphs; logs one
    that can't be had now."""
    needed = f"the pool takes {pool_bytes / 1e9:.3f} GB, the weights {weights_bytes / 1e9:.3f} GB"
    if graphs_bytes:
        needed += f", graphs {graphs_bytes / 1e9:.3f} GB"
    all_bytes = pool_bytes + weights_bytes + graphs_bytes
    name = "kv_memory_gb" if config.num_pages is None else "num_pages"
    if config.host_memory_gb is not None:
        name = "host_memory_gb"
    if weights_bytes >= room.total_bytes:
        name = "model"
    value = str(config.model) if name == "model" else getattr(config, name)
    if all_bytes > room.total_bytes:
        raise InvalidConfig(name, value, f"{needed}, and {room}")
    if all_bytes > room.available_bytes:
        free = room.available_bytes / 1e9
        log.warning("%s = %s: %s, and only %.3f GB are free now", name, value, needed, free)


def numerics_of(config: EngineConfig, model: Model, experts: str = "") -> str:
    """The class of bits that this engine computes, as its identity has it. `experts`: the classes
    of both executors, where they differ."""
    if config.share_unlike_cpus:
        return SHARED_NUMERICS
    numerics = model.device.numerics(model.config.dtype)
    if config.expert_nodes > 1:
        numerics = f"{numerics}-nodes.{config.expert_nodes}"
    return ":".join(dict.fromkeys([numerics, *experts.split(":")])) if experts else numerics


def _bridge(
    config: EngineConfig,
    placed: PlacedModel,
    shape: KvShape,
    memory: EngineMemory,
    metrics: EngineMetrics,
    prepare: Callable[[Bridge], None],
) -> Bridge:
    """The bridge; `prepare` is called before there is a session."""
    num_pages = memory.num_bytes // shape.page_bytes
    low_water = min(pages_ahead(config), max(1, num_pages // 4))  # most pages cache
    daemon, identity = None, b""
    if config.kvc2 is not None:
        model = placed.model
        lay = side_by_side if model.device.side_by_side else layer_major
        identity = identity_of(
            model.config,
            model.weights_digest,
            config.page_size,
            numerics=numerics_of(config, model, placed.numerics),
            deferral=config.max_deferred_experts_per_token,
            expert_format=model.expert_format,
        ).encode()
        daemon = Daemon(
            config.kvc2,
            memory,
            lay(
                shape.layers,
                num_pages,
                segment_bytes=shape.segment_bytes,
                page_size=config.page_size,
            ),
            f"{config.model_name}:{os.getpid()}",
        )
    settings = BridgeConfig(
        page_size=config.page_size,
        identity=identity,
        low_water=low_water,
        high_water=2 * low_water,
        load_timeout_s=config.load_timeout_s,
    )
    return open_bridge(num_pages, settings, daemon, BridgeCounters(metrics), prepare)


def run(config: EngineConfig) -> None:
    """Serve until SIGINT or SIGTERM. The port is taken before the model is loaded, so that a second
    engine is refused at once; requests get 503 until the line `serving` is printed."""
    listener = _bind(config.host, config.port)
    limits = ClientLimits(
        header_timeout_s=config.header_timeout_s,
        body_timeout_s=config.body_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        write_timeout_s=config.write_timeout_s,
        max_connections=fit_descriptors(config.max_connections),
    )
    with refused_meanwhile(listener, limits):
        engine = assemble(config)
    # What an import leaves is hardly ever garbage (some 7,000 of 270,000 objects, 1 MB). Without
    # this the collector walks all of it, for some 200 ms, whenever a large body has made many new
    # ones.
    gc.freeze()
    gc.enable()  # the command line disables it
    host, port = listener.getsockname()[:2]
    log.info("serving %s at http://%s:%d", config.model_name, host, port)
    print(f"serving {config.model_name} at http://{host}:{port}", flush=True)
    app = with_ids(engine.app, access_log=config.access_log)
    if config.cors_origins:
        app = with_cors(app, config.cors_origins)
    server = Server(app, listener, limits, stop_s=config.drain_timeout_s)
    for each in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal again once it has stopped in order: that is exit code 0 here
        signal.signal(each, lambda *_: None)
    engine.worker.on_failure = functools.partial(setattr, server, "should_exit", True)
    try:
        server.run()
    finally:
        engine.bridge.close()
        engine.experts.close()
    if engine.worker.failed:
        raise EngineFailedError("the scheduler failed (see the log); start the engine again")


def _bind(host: str, port: int) -> socket.socket:
    """A bound port alone is not taken: with SO_REUSEADDR another may bind it until one listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on what is TCP by name: else each answer waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidConfig("port", port, f"can't be bound on {host}: {error}") from error
    return listener
