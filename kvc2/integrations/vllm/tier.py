"""vLLM's SecondaryTierManager: a tier below the CPU's of its OffloadingConnector.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 8000000000, "secondary_tiers": [{"type": "Kvc2Tier",
          "module_path": "kvc2.integrations.vllm.tier", "address": "unix:PATH"}]}}'

A chunk is a row of vLLM's memory, in which all ranks' KV lies, under the key that vLLM gives it.
vLLM calls from its scheduler, which must not wait: lookups of a step are asked in one batch at its
end, and jobs run on threads of their own. A fault is a miss, or a job that failed. Can be imported
without vLLM, and is of no use then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from kvc2 import errors
from kvc2.client import open_objects
from kvc2.client.objects import Bools, Buffers
from kvc2.foreign_identity import Foreign, Scalar
from kvc2.host.address import Address
from kvc2.integrations.vllm.identity import check_version, version_of_vllm, weights_of

try:
    from vllm.v1.kv_offload.base import (  # type: ignore[import-not-found]
        LookupResult,
        RequestOffloadingContext,
    )
    from vllm.v1.kv_offload.tiering.base import (  # type: ignore[import-not-found]
        JobResult,
        SecondaryTierManager,
    )
except ImportError:
    LookupResult = RequestOffloadingContext = JobResult = None
    SecondaryTierManager = object

log = logging.getLogger(__name__)

SETTINGS = ("address", "weights")
PATIENCE_S = 5.0  # then what nobody has answered is a miss


class Kvc2Tier(SecondaryTierManager):  # type: ignore[misc]
    """`address`: of the daemon; `weights`: a text that changes when the weights do, in the place of
    their digest, and with the adapters, which vLLM's keys tell apart by name alone."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        """Raises InvalidConfig, which names the field."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        check_version()
        address, weights = _checked(settings)
        config = offloading_spec.config
        num_bytes: int = self.block_size_bytes
        identity = identity_of(config, num_bytes, weights or weights_of(config.model.name))
        self._rows = np.frombuffer(primary_kv_view, np.uint8).reshape(-1, num_bytes)
        self._objects = open_objects(address, identity, num_bytes, engine_name="vllm tier")
        self._objects.wait_attached()
        self._known = Known()
        self._finished: queue.SimpleQueue[tuple[Any, Collection[bytes]]] = queue.SimpleQueue()
        self._under_way: set[Future[None]] = set()
        # a load has a request that waits for it: no store is before it
        names = ("lookups", "loads", "stores")
        threads = {name: ThreadPoolExecutor(1, f"kvc2-{name}") for name in names}
        self._threads = threads

    # ---- what is there

    def on_new_request(self, req_context: Any) -> Any:
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> Any:
        there = self._known.ask(key, req_context.req_id, time.monotonic())
        if there is None:
            return LookupResult.RETRY
        return LookupResult.HIT if there else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        if keys := self._known.to_ask():
            self._threads["lookups"].submit(self._look_up, keys)

    def _look_up(self, keys: list[bytes]) -> None:
        found = self._each(lambda: self._objects.exists([name_of(key) for key in keys]), len(keys))
        self._known.answers.put(list(zip(keys, found.tolist(), strict=True)))

    def on_request_finished(self, req_context: Any) -> None:
        self._known.forget(req_context.req_id)

    # ---- jobs

    def submit_store(self, job_metadata: Any) -> None:
        self._submit("stores", self._objects.put_from, job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        self._submit("loads", self._objects.get_into, job_metadata)

    def _submit(self, way: str, call: Callable[[list[bytes], Buffers], Bools], given: Any) -> None:
        begun, keys = time.monotonic(), list(given.keys)
        rows: Buffers = [self._rows[each] for each in given.chunk_ids]

        def run() -> None:
            done = self._each(lambda: call([name_of(key) for key in keys], rows), len(keys))
            good = [key for key, each in zip(keys, done.tolist(), strict=True) if each]
            took, moved = time.monotonic() - begun, len(good) * self._rows.shape[1]
            told = JobResult(given.job_id, len(good) == len(keys), good or None, took, moved)
            missed = set(keys) - set(good) if given.is_promotion else ()
            self._finished.put((told, missed))

        future = self._threads[way].submit(run)
        self._under_way = {each for each in self._under_way if not each.done()} | {future}

    def _each(self, call: Callable[[], Bools], count: int) -> Bools:
        try:
            return call()
        except Exception:  # whoever waits is told in any case
            log.exception("a call of vLLM's failed")
            return np.zeros(count, np.bool_)

    def get_finished_jobs(self) -> Iterable[Any]:
        """A chunk that did not come is computed by who asked for it, and not asked for again."""
        finished = []
        while not self._finished.empty():
            told, missed = self._finished.get_nowait()
            self._known.miss(missed)
            finished.append(told)
        return finished

    def drain_jobs(self) -> None:
        wait(self._under_way)

    def shutdown(self) -> None:
        """vLLM's memory is its own again."""
        for each in self._threads.values():
            each.shutdown(wait=True, cancel_futures=True)
        self._objects.close()
        self._rows = self._rows[:0].copy()


class Known:
    """Whether keys are there, as long as a request that has asked for them is. All but `answers`,
    [(key, whether)], is the scheduler's thread's."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[list[tuple[bytes, bool]]] = queue.SimpleQueue()
        self._there: dict[bytes, bool] = {}
        self._asked_at: dict[bytes, float] = {}  # those that aren't answered yet
        self._new: list[bytes] = []
        self._askers: dict[bytes, set[str]] = {}
        self._keys: dict[str, set[bytes]] = {}  # by asker

    def ask(self, key: bytes, request: str, now: float) -> bool | None:
        """None: not known yet."""
        self._take_answers()
        self._askers.setdefault(key, set()).add(request)
        self._keys.setdefault(request, set()).add(key)
        if key in self._there:
            return self._there[key]
        if key not in self._asked_at:
            self._asked_at[key] = now
            self._new.append(key)
        return False if now - self._asked_at[key] > PATIENCE_S else None

    def to_ask(self) -> list[bytes]:
        """What nobody has asked the daemon yet."""
        new, self._new = [key for key in self._new if key in self._askers], []
        return new

    def miss(self, keys: Iterable[bytes]) -> None:
        """They are not there, whatever was answered."""
        self._there.update((key, False) for key in keys if key in self._askers)

    def forget(self, request: str) -> None:
        for key in self._keys.pop(request, ()):
            self._askers[key].discard(request)
            if not self._askers[key]:
                del self._askers[key]
                self._there.pop(key, None)
                self._asked_at.pop(key, None)

    def _take_answers(self) -> None:
        while not self.answers.empty():
            for key, there in self.answers.get_nowait():
                if self._asked_at.pop(key, None) is not None:
                    self._there[key] = there


def identity_of(config: Any, num_bytes: int, weights: str) -> bytes:
    """Of vLLM's OffloadingConfig. Where it says that a chunk's bytes are the same in any parallel
    shape, they are found in any."""
    parallel, cache = config.parallel, config.cache
    groups = [[each.tokens_per_block, list(each.layer_names)] for each in config.groups]
    fields: dict[str, Scalar] = {
        "page_size": 1,
        "bytes": num_bytes,
        "vllm": version_of_vllm(),
        "kv_dtype": str(config.model.dtype),
        "groups": hashlib.sha256(json.dumps(groups).encode()).hexdigest(),
        "tokens_per_hash": int(cache.tokens_per_hash),
        "blocks_per_chunk": int(cache.blocks_per_chunk),
        "layout": str(config.kv_cache_layout),
        "canonical": bool(config.canonical_layout),
        "replicated": bool(config.replicated_layout),
    }
    if not (parallel.is_parallelism_agnostic or config.replicated_layout):
        for name in ("tp_size", "pp_size", "pcp_size", "dcp_size"):
            fields[name] = int(getattr(parallel, name))
    return Foreign("vllm tier", weights, fields).encode()


def name_of(key: bytes) -> bytes:
    """32 bytes, of however many vLLM's keys have."""
    return hashlib.sha256(bytes(key)).digest()


def _checked(settings: dict[str, Any]) -> tuple[str, str]:
    for name, value in settings.items():
        if name not in SETTINGS:
            known = f"one of {', '.join(SETTINGS)}"
            raise errors.InvalidConfig(f"secondary_tiers.{name}", value, known)
    address, weights = settings.get("address", ""), settings.get("weights", "")
    Address.of_daemon(address, field="secondary_tiers.address")
    if not isinstance(weights, str):
        raise errors.InvalidConfig("secondary_tiers.weights", weights, "a text")
    return address, weights
