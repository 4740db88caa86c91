"""SGLang's own HiCache controller, host pool and storage threads, on memory of the CPU; run by
second_levels.py and tests/peers/test_sglang.py with the python of an environment that has SGLang.
What it imports and doesn't need here, since it has no build for the CPU, is a stand-in.

    python hicache.py STORAGE LAYOUT SEED

STORAGE is the address of a daemon, unix:PATH, or file:FOLDER for SGLang's own files. It reads a
word from each line of its input, and answers it with a line of JSON: `store` the pages of SEED, or
`load` them into memory that was zero; `took`: microseconds that the last of these waited for the
storage; `renew`: from now on it is another SEED.
"""

from __future__ import annotations

import importlib.machinery
import json
import random
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers.utils.import_utils as found

LAYERS, HEADS, HEAD_SIZE, PAGE, POOL_TOKENS = 4, 2, 64, 64, 8192
TOKENS = 2048
WAIT_S = 60


class StandIn(ModuleType):
    """Has whatever is asked for."""

    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def stand_in(name: str) -> None:
    made = StandIn(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)


found.is_torchvision_available()  # before there seems to be one
found.is_torchvision_v2_available()
for each in ("", ".io", ".transforms", ".transforms.functional"):
    stand_in(f"torchvision{each}")

import sglang.srt.managers.cache_controller as controllers  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402


class Tokens(list[int]):
    """As the controller hashes them."""

    extra_key = None
    cache_salt = None


def of_storage(storage: str) -> dict[str, Any]:
    """As HiCacheController takes it."""
    kind, _, folder = storage.partition(":")
    if kind == "file":
        extra: dict[str, Any] = {"file_storage_path": folder}
    else:
        extra = {
            "backend_name": "kvc2",
            "module_path": "kvc2.integrations.sglang_hicache",
            "class_name": "Kvc2HiCache",
            "interface_v1": 1,
            "address": storage,
        }
    backend = "file" if kind == "file" else "dynamic"
    return {"storage_backend": backend, "storage_backend_extra_config": extra}


class HiCache:
    def __init__(self, storage: str, layout: str, seed: int) -> None:
        get_parallel().override_permanently(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_dcp_size=1, attn_dcp_rank=0
        )
        controllers.is_dp_attention_enabled = lambda: False
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        device = MHATokenToKVPool(
            POOL_TOKENS, PAGE, torch.bfloat16, HEADS, HEAD_SIZE, LAYERS, "cpu", False,
            enable_alt_stream=False,
        )  # fmt: skip
        told = device._mha_buffer_info()
        self.host = MHATokenToKVPoolHost(
            told[0] if isinstance(told, tuple) else told, 2.0, 0, PAGE, layout,
            pin_memory=False, device_capacity_tokens=POOL_TOKENS, start_layer=0,
            end_layer=LAYERS - 1,
        )  # fmt: skip
        self.controller = controllers.HiCacheController(
            SimpleNamespace(get_kvcache=lambda: device),
            self.host,
            PAGE,
            torch.distributed.group.WORLD,
            threading.Event(),
            io_backend="direct",
            model_name="tiny",
            prefetch_threshold=PAGE,
            **of_storage(storage),
        )
        self._took_us = 0
        self._fill(seed)

    def _fill(self, seed: int) -> None:
        self._seed = seed
        self.tokens = Tokens(random.Random(seed).choices(range(40_000), k=TOKENS))
        count = TOKENS // PAGE
        shape = self._page(0).shape
        bits = torch.Generator().manual_seed(seed)
        self.pages = torch.randn((count, *shape), generator=bits).to(torch.bfloat16)

    def store(self) -> dict[str, int]:
        slots = self.host.alloc(TOKENS)
        for index, page in enumerate(self.pages):
            self._page(slots[index * PAGE]).copy_(page)
        hashes = self.controller.get_hash_str(self.tokens, None, page_size=PAGE)
        began = time.perf_counter()
        self.controller.write_storage(slots, list(self.tokens), hashes)
        done = self.controller.ack_backup_queue.get(timeout=WAIT_S)
        self._took_us = round((time.perf_counter() - began) * 1e6)
        self._forget(slots)
        return {"stored": done.completed_tokens}

    def load(self) -> dict[str, int]:
        """`equal`: tokens of the pages that came, and are as they were stored."""
        began = time.perf_counter()
        self.controller.prefetch("request", self.tokens, None)
        operation = self.controller.prefetch_hit_queue.get(timeout=WAIT_S)
        hit, loaded, equal = operation.storage_hit_count, 0, 0
        if hit:
            slots = self.controller.alloc_prefetch_host_buffers(operation, hit)
            operation.host_indices = slots
            self.controller.prefetch_buffer.put(operation)
            while True:
                told = self.controller.ack_prefetch_queue.get(timeout=WAIT_S)
                if told.completed_tokens is not None:
                    loaded = told.completed_tokens
                if told.completed_req:
                    break
            self._took_us = round((time.perf_counter() - began) * 1e6)
            same = [
                torch.equal(self._page(slots[index * PAGE]), self.pages[index])
                for index in range(loaded // PAGE)
            ]
            equal = PAGE * sum(same)
            self._forget(slots)
        return {"hit": hit, "loaded": loaded, "equal": equal}

    def took(self) -> dict[str, int]:
        return {"us": self._took_us}

    def renew(self) -> dict[str, int]:
        self._fill(self._seed + 1)
        return {}

    def _page(self, slot: Any) -> torch.Tensor:
        page: torch.Tensor = self.host.get_data_page(slot, flat=False)
        return page

    def _forget(self, slots: torch.Tensor) -> None:
        self.host.free(slots)
        self.host.kv_buffer.zero_()


def main() -> None:
    storage, layout, seed = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr
    hicache = HiCache(storage, layout, int(seed))
    for line in sys.stdin:
        print(json.dumps(getattr(hicache, line.strip())()), file=answers, flush=True)
    hicache.controller.detach_storage_backend()


main()
