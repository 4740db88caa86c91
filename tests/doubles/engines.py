"""An engine without a model: a pool, a client, and a note of what it is told."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.client import Client, PoolMemory, SessionOptions
from kvc2.errors import Detached, Kvc2Error
from kvc2.identity import Identity
from kvc2.layout import Layout, layer_major

PAGE_SIZE = 16
LAYERS = 2
NUM_PAGES = 64
SEGMENT_BYTES = 1 * PAGE_SIZE * 8 * 4  # one KV head of 8, float32
POOL_BYTES = 2 * LAYERS * NUM_PAGES * SEGMENT_BYTES


def layout(page_size: int = PAGE_SIZE) -> Layout:
    return layer_major(LAYERS, NUM_PAGES, segment_bytes=SEGMENT_BYTES, page_size=page_size)


def identity(**changes: Any) -> Identity:
    values: dict[str, Any] = {
        "weights_digest": "ab" * 32,
        "architecture": "MixtralForCausalLM",
        "dtypes": (("attention", "float32"), ("experts", "float32")),
        "kv_dtype": "float32",
        "layers": LAYERS,
        "kv_heads": 1,
        "head_size": 8,
        "rope_theta": 10000.0,
        "page_size": PAGE_SIZE,
    }
    return Identity(**{**values, **changes})


class TinyEngine:
    """A pool and a client; notes what it is told. Keeps `kept` across sessions. `arena`: it reads
    there too."""

    def __init__(self, address: str, name: str = "tiny", *, arena: bool = False) -> None:
        self.pool = PoolMemory(POOL_BYTES)
        self.kept: list[int] = []
        self.granted: list[list[int]] = []
        self.detached: list[str] = []
        self.failures: list[Kvc2Error] = []
        self.changed = threading.Condition()
        options = SessionOptions(name, arena=arena)
        self.client = Client(address, pool=self.pool, layout=layout(), engine=self, options=options)

    def kept_pages(self) -> NDArray[np.uint32]:
        return np.array(self.kept, np.uint32)

    def on_attached(self, granted: NDArray[np.uint32]) -> None:
        with self.changed:
            self.granted.append(granted.tolist())
            self.changed.notify_all()

    def on_detached(self, detached: Detached) -> None:
        with self.changed:
            self.detached.append(detached.reason)
            self.changed.notify_all()

    def on_attach_failed(self, error: Kvc2Error) -> None:
        with self.changed:
            self.failures.append(error)
            self.changed.notify_all()

    def wait_detached(self, count: int, timeout_s: float = 10.0) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: len(self.detached) >= count, timeout_s)

    def __enter__(self) -> TinyEngine:
        assert self.client.wait_attached(10), self.client.last_refusal
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.pool.close()
