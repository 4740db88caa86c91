"""vLLM's own TieringOffloadingManager, its tier of CPU memory and its factory of tiers, over our
tier, for test_vllm_tier.py, in an environment that has vLLM. Its workers run on GPUs alone: here
rows of its memory are filled and read in their place.

    python vllm_tier.py ADDRESS CHUNK_BYTES SEED

It reads a word from each line of its input, and answers it with a line of JSON: `store` the chunks
of SEED, or `load` them as a new request does; `forget` what the CPU's tier has.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

CHUNKS, STORED = 64, 32
WAIT_S = 60


def config(chunk_bytes: int) -> OffloadingConfig:
    """As vLLM makes it of a model with one group, on one worker."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layer",), 0),),
        worker_kv_bytes_per_block=chunk_bytes,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": CHUNKS * chunk_bytes},
        engine_id=uuid.uuid4().hex,
        model=OffloadingModelConfig("tiny", "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )


class Offloading:
    """A scheduler's side, whose steps are taken here."""

    def __init__(self, address: str, chunk_bytes: int, seed: int) -> None:
        spec = TieringOffloadingSpec(config(chunk_bytes))
        region = SharedOffloadRegion(spec.config.engine_id, CHUNKS, None, chunk_bytes, chunk_bytes)
        primary = CPUPrimaryTierOffloadingManager(CHUNKS, region)
        view = primary.get_kv_memoryview()
        named = {"type": "Kvc2Tier", "module_path": "kvc2.integrations.vllm.tier"}
        tier = _made({**named, "address": address, "weights": "tiny"}, view, spec)
        self._rows = np.frombuffer(view, np.uint8).reshape(CHUNKS, chunk_bytes)
        self._manager = TieringOffloadingManager(primary, [tier])
        self._requests = 0
        self._keys = [
            make_offload_key(hashlib.sha256(f"{seed} {each}".encode()).digest(), 0)
            for each in range(STORED)
        ]
        self._chunks = np.random.default_rng(seed).integers(0, 256, (STORED, chunk_bytes), np.uint8)

    def store(self) -> dict[str, int]:
        """`whole`: 1 where every chunk went on to our tier."""
        request = self._request()
        room = self._manager.prepare_store(self._keys, request)
        self._rows[room.store_spec.chunk_ids] = self._chunks
        ends: list[Any] = []
        tier = self._manager.secondary_tiers[0]
        told = tier.get_finished_jobs
        tier.get_finished_jobs = lambda: [ends.append(each) or each for each in told()]
        self._manager.complete_store(self._keys, request)
        self._manager.on_request_finished(request)
        self._step_until(lambda: not self._manager.has_pending_work())
        del tier.get_finished_jobs
        return {"whole": int(bool(ends) and all(each.success for each in ends))}

    def load(self) -> dict[str, int]:
        """Chunks that were found, and of them those that are as they were stored."""
        request, found = self._request(), {}

        def known() -> bool:
            for key in self._keys:
                found[key] = self._manager.lookup(key, request)
            return {*found.values()} <= {LookupResult.HIT, LookupResult.MISS}

        self._step_until(known)
        hits = [key for key, each in found.items() if each is LookupResult.HIT]
        equal = 0
        if hits:
            spec = self._manager.prepare_load(hits, request)
            expected = self._chunks[[self._keys.index(key) for key in hits]]
            equal = int((self._rows[spec.chunk_ids] == expected).all(axis=1).sum())
            self._manager.complete_load(hits, request)
        self._manager.on_request_finished(request)
        return {"found": len(hits), "equal": equal}

    def forget(self) -> dict[str, int]:
        self._manager.reset_cache()
        self._rows[:] = 0
        return {}

    def close(self) -> None:
        del self._rows
        self._manager.shutdown()

    def _request(self) -> ReqContext:
        self._requests += 1
        request = ReqContext(req_id=str(self._requests))
        self._manager.on_new_request(request)
        return request

    def _step_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < end
            self._manager.on_schedule_end(ScheduleEndContext((), ()))
            time.sleep(0.001)


def _made(named: dict[str, Any], view: memoryview, spec: TieringOffloadingSpec) -> Any:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    return SecondaryTierFactory.create_secondary_tier(named, view, spec)


def main() -> None:
    address, chunk_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr
    offloading = Offloading(address, chunk_bytes, seed)
    for line in sys.stdin:
        print(json.dumps(getattr(offloading, line.strip())()), file=answers, flush=True)
    offloading.close()


main()
