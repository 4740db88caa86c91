"""vLLM's KVConnectorBase_V1: its calls, handed to the scheduler's side or to a rank's.

    --kv-transfer-config '{"kv_connector": "Kvc2Connector", "kv_role": "kv_both",
      "kv_connector_module_path": "kvc2.integrations.vllm.connector",
      "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"address": "unix:PATH"}}'

Can be imported without vLLM, and is of no use then. Not here: what is done (scheduler.py,
worker.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvc2 import errors
from kvc2.client import Client, PoolMemory, SessionOptions
from kvc2.foreign_identity import Scalar
from kvc2.integrations.vllm.identity import (
    Namespaces,
    check_version,
    fields_of,
    version_of_vllm,
    weights_of,
)
from kvc2.integrations.vllm.messages import Caches, Record, Step, add
from kvc2.integrations.vllm.saves import Saves
from kvc2.integrations.vllm.scheduler import Planning, SchedulerSide
from kvc2.integrations.vllm.visit import Sessions
from kvc2.integrations.vllm.worker import Rank, WorkerSide
from kvc2.layout import Layout, Segment

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # type: ignore[import-not-found]
        KVConnectorBase_V1,
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
except ImportError:
    KVConnectorHandshakeMetadata = KVConnectorMetadata = KVConnectorWorkerMetadata = object
    KVConnectorRole = KVConnectorTransferResults = None

    class KVConnectorBase_V1:  # type: ignore[no-redef]
        """Nothing."""

    class SupportsHMA:  # type: ignore[no-redef]
        """Nothing."""


STAGING_BYTES_MAX = 1 << 30
EXPIRY_S = 30.0  # a scheduler that gets no CPU keeps its session; a dead one loses it at once
PAGE_SIZE_MAX = 512
SETTINGS = ("address", "staging_gb", "weights", "asynchronous")


@dataclass(frozen=True)
class Settings:
    """kv_connector_extra_config. weights: a text that changes when the weights do, in the place of
    their digest; asynchronous: whether loads run beside the steps; None: on a device."""

    address: str
    staging_gb: float | None = None
    weights: str = ""
    asynchronous: bool | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Settings:
        """Raises InvalidConfig, which names the field."""
        for name in given:
            if name not in SETTINGS:
                known = f"one of {', '.join(SETTINGS)}"
                _refuse(f"kv_connector_extra_config.{name}", given[name], known)
        if not isinstance(given.get("address"), str):
            _refuse("kv_connector_extra_config.address", given.get("address"), "unix:PATH of kvc2")
        staging = given.get("staging_gb")
        if staging is not None and not (isinstance(staging, int | float) and 0 < staging <= 1024):
            _refuse("kv_connector_extra_config.staging_gb", staging, "a number above 0")
        return Settings(**given)


class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    """Of one step, for the ranks; None: there is nothing to do."""

    def __init__(self, step: Step | None) -> None:
        self.step = step


class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """How a rank's KV lies."""

    def __init__(self, caches: Caches) -> None:
        self.caches = caches


class Saved(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Saves that ranks have done."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.counts = counts

    def aggregate(self, other: Saved) -> Saved:
        return Saved(add(self.counts, other.counts))


class Kvc2Connector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Made once in the scheduler's process and once in each rank's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(vllm_config, kv_cache_config)
        self._config = vllm_config
        self._spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        self._ranks = int(parallel.tensor_parallel_size)
        self._heads = int(model.get_total_num_kv_heads())
        self._settings = Settings.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerSide | None = None  # from the handshake on
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.WORKER:
            rank = Rank.of(int(parallel.rank) % self._ranks, self._ranks, self._heads)
            self._worker = WorkerSide(rank, importlib.import_module("torch"))

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is lost is a miss later

    # ---- the scheduler's

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The ranks have told how their KV lies: the session begins."""
        caches = [each.caches for each in metadata.values()]
        if len(set(caches)) != 1:
            raise errors.InvalidConfig("kv caches", f"{caches}", "alike in all ranks")
        self._scheduler = self._begin(caches[0])

    def _begin(self, caches: Caches) -> SchedulerSide:
        record = Record(caches.block_bytes, min(self._ranks, self._heads))
        block_size = int(self._spec.block_size)
        fields = fields_of(caches, record, described(self._config), block_size)
        sessions = Sessions(self._staging_pages(record))
        size = record.num_bytes
        client = Client(
            self._settings.address,
            pool=PoolMemory(sessions.num_pages * size),
            layout=Layout((Segment(0, 0, size, 0, size),), block_size),
            engine=sessions,
            options=SessionOptions(f"vllm {os.getpid()}", arena=True, expiry_s=EXPIRY_S),
        )
        asynchronous = self._settings.asynchronous
        if asynchronous is None:
            asynchronous = self._config.device_config.device_type != "cpu"
        saves = Saves(client, sessions, block_size=block_size, ranks=self._ranks)
        planning = Planning(record, block_size, asynchronous)
        namespaces = Namespaces(self._weights(), fields)
        return SchedulerSide(client, sessions, namespaces, saves, planning)

    def _staging_pages(self, record: Record) -> int:
        """What two steps complete, since the next runs while the last is copied."""
        scheduler = self._config.scheduler_config
        step = scheduler.max_num_batched_tokens // self._spec.block_size + scheduler.max_num_seqs
        given = self._settings.staging_gb
        most = STAGING_BYTES_MAX if given is None else int(given * (1 << 30))
        return int(max(1, min(2 * step, most // record.num_bytes)))

    def _weights(self) -> str:
        if self._settings.weights:
            return self._settings.weights
        model = self._config.model_config
        return weights_of(model.model, model.revision)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None or request.prompt_token_ids is None:
            return 0, False
        if request.skip_reading_prefix_cache:
            return 0, False
        return self._scheduler.ask(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            of_group = blocks.get_block_ids()[0]
            self._scheduler.allocated(request, of_group, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        if self._scheduler is None:
            return Metadata(None)
        return Metadata(self._scheduler.build(_scheduled(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        told = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and told is not None:
            self._scheduler.worked(told.counts)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return self.request_finished(request, block_ids)

    # ---- a rank's

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        self._of_rank().register(kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        caches = self._of_rank().caches
        return None if caches is None else Handshake(caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self._get_connector_metadata().step
        if step is not None:
            self._of_rank().load(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers have come before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any) -> None:
        """Blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        step = self._get_connector_metadata().step
        if step is not None:
            self._of_rank().save(step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        return KVConnectorTransferResults(finished_recving=self._of_rank().loaded())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._of_rank().failed()

    def build_connector_worker_meta(self) -> Saved:
        return Saved(self._of_rank().saved())

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    def _of_rank(self) -> WorkerSide:
        if self._worker is None:
            raise RuntimeError("vLLM asked the scheduler's connector for what a rank's does")
        return self._worker


def check(config: Any, kv_cache_config: Any) -> None:
    """What this connector carries. Raises InvalidConfig with what to say instead."""
    check_version()
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        shown = transfer.kv_load_failure_policy
        _refuse("kv_load_failure_policy", shown, "recompute: a block that doesn't come is computed")
    if parallel.pipeline_parallel_size != 1:
        _refuse("pipeline_parallel_size", parallel.pipeline_parallel_size, "1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            _refuse(name, getattr(parallel, name), "1")
    if getattr(parallel, "nnodes", 1) != 1:
        _refuse("nnodes", parallel.nnodes, "1: ranks share memory with the daemon")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        shown = f"{len(groups)} of them"
        _refuse("kv cache groups", shown, "one: attention over the whole context in every layer")
    size = groups[0].kv_cache_spec.block_size
    if size & (size - 1) or size > PAGE_SIZE_MAX:
        _refuse("--block-size", size, f"a power of two of at most {PAGE_SIZE_MAX}")


def described(config: Any) -> dict[str, Scalar]:
    """What changes a number of the KV, beside the weights and how it lies."""
    model = config.model_config
    hf = model.hf_text_config
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    return {
        "vllm": version_of_vllm(),
        "architecture": str(model.architectures[0]),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "device": str(config.device_config.device_type),
        "rope_theta": str(getattr(hf, "rope_theta", "")),
        "rope": ", ".join(f"{name} {value}" for name, value in sorted(rope.items()))[:256],
        "heads": int(model.get_total_num_kv_heads()),
        "head_size": int(model.get_head_size()),
    }


def _scheduled(output: Any) -> Iterator[tuple[str, list[int], bool, int, int]]:
    """Of each request of a step, as SchedulerSide.build takes it."""
    for new in output.scheduled_new_reqs:
        tokens = output.num_scheduled_tokens[new.req_id]
        yield new.req_id, new.block_ids[0], True, new.num_computed_tokens, tokens
    cached = output.scheduled_cached_reqs
    rows: Iterable[tuple[str, Any, int]] = zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    )
    for request_id, blocks, computed in rows:
        whole = request_id in cached.resumed_req_ids
        tokens = output.num_scheduled_tokens[request_id]
        yield request_id, blocks[0] if blocks else [], whole, computed, tokens


def _refuse(name: str, value: object, allowed: str) -> None:
    raise errors.InvalidConfig(name, value, allowed)
