"""Drives vLLM's disk tier; run by disk_peers.py with the python of vLLM's environment.

    python vllm_disk.py FOLDER BLOCK_BYTES BLOCKS REPEATS

Blocks lie in shared memory and go through FileSystemTierManager's jobs, each of 8 MiB: a job is
what one of its threads does, so that with fewer of them most of its threads would have nothing to
do. The last line of output is JSON: {direct, ways: {store, load, again: [[GB/s, CPU s/GB], ...]}}.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

JOB_BYTES = 8 << 20


def spec() -> Any:
    """What the tier asks of an OffloadingSpec: names of a model, one group, no parallelism."""
    parallel = SimpleNamespace(
        tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True
    )
    config = SimpleNamespace(
        groups=[SimpleNamespace(tokens_per_block=16, layer_names=["layer"])],
        parallel=parallel,
        canonical_layout=False,
        kv_cache_layout=None,
        replicated_layout=False,
        model=SimpleNamespace(name="benchmark", dtype="bfloat16"),
        cache=SimpleNamespace(tokens_per_hash=16),
    )
    return SimpleNamespace(config=config, blocks_per_chunk=1, kv_events_config=None)


def carry(tier: FileSystemTierManager, keys: list[Any], per_job: int, *, load: bool) -> None:
    submit = tier.submit_load if load else tier.submit_store
    for number, start in enumerate(range(0, len(keys), per_job)):
        some = keys[start : start + per_job]
        submit(
            TransferJob(
                job_id=number,
                keys=some,
                chunk_ids=np.arange(start, start + len(some)),
                is_promotion=load,
                req_context=ReqContext("benchmark"),
            )
        )
    tier.drain_jobs()
    if not all(each.success for each in tier.get_finished_jobs()):
        raise RuntimeError("a job failed")


def main(folder: str, block_bytes: int, blocks: int, repeats: int) -> None:
    num_bytes = block_bytes * blocks
    memory = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    memory[:] = np.frombuffer(os.urandom(block_bytes), np.uint8)[None].repeat(blocks, 0).ravel()
    tier = FileSystemTierManager(spec(), memory.reshape(blocks, block_bytes).data, "fs", folder)
    ways: dict[str, list[tuple[float, float]]] = {"store": [], "load": [], "again": []}
    per_job = max(1, JOB_BYTES // block_bytes)
    for turn in range(repeats + 1):
        keys = [make_offload_key(os.urandom(32), 0) for _ in range(blocks)]
        for way, samples in ways.items():
            begin, cpu = time.perf_counter(), time.process_time()
            carry(tier, keys, per_job, load=way != "store")
            seconds = time.perf_counter() - begin
            used = (time.process_time() - cpu) / num_bytes * 1e9
            if turn:  # the first one only warms up
                samples.append((num_bytes / seconds / 1e9, used))
        for key in keys:
            os.remove(tier.file_mapper.get_file_name(key))
    direct = tier._use_o_direct
    tier.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"direct": direct, "ways": ways}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(each) for each in sys.argv[2:]))
