"""A daemon inside the test's process, on an event loop of its own thread; and a tiny engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.client import Client, PoolMemory
from kvc2.config import CpuConfig, DiskConfig, LimitsConfig, ServeConfig
from kvc2.errors import Detached
from kvc2.layout import Layout, layer_major
from kvc2.namespace import Identity
from kvc2.server import Daemon
from tests.fakes import FakeCache

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


def serve_config(folder: Path, **changes: Any) -> ServeConfig:
    """A small daemon that listens in `folder`; disk=True for a disk tier there too."""
    disk = DiskConfig.of_bytes(folder / "disk", 64 << 20) if changes.pop("disk", False) else None
    values: dict[str, Any] = {
        "listen": f"unix:{folder / 'kvc2.sock'}",
        "slab_bytes": 1 << 20,
        "cpu": CpuConfig.of_bytes(8 << 20),
        "disk": disk or DiskConfig(),
        "limits": LimitsConfig(max_tokens=1 << 17),
        "drain_timeout_s": 2.0,
    }
    return ServeConfig(**{**values, **changes})


class ServedDaemon:
    """`with ServedDaemon(config) as served:` its daemon lives on the loop's thread; `on_loop` runs
    a function there. `cache=None`: the real one."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        cache: Callable[..., Any] | None = FakeCache,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.address = config.listen
        self._options: dict[str, Any] = {} if cache is None else {"cache": cache}
        if clock is not None:
            self._options["clock"] = clock
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        try:
            async with Daemon(self.config, **self._options) as daemon:
                self.daemon = daemon
                self.loop = asyncio.get_running_loop()
                self._started.set()
                await daemon.stopped.wait()
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    def on_loop(self, function: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def __enter__(self) -> ServedDaemon:
        self._thread.start()
        assert self._started.wait(30)
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.daemon.stopped.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the daemon did not stop"
        if self._failure is not None:
            raise self._failure


class TinyEngine:
    """A pool and a client; notes what it is told. Keeps `kept` across sessions."""

    def __init__(self, address: str, name: str = "tiny") -> None:
        self.pool = PoolMemory(POOL_BYTES)
        self.kept: list[int] = []
        self.granted: list[list[int]] = []
        self.detached: list[str] = []
        self.changed = threading.Condition()
        self.client = Client(
            address, pool=self.pool, layout=layout(), engine_name=name, engine=self
        )

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

    def wait_detached(self, count: int, timeout_s: float = 10.0) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: len(self.detached) >= count, timeout_s)

    def __enter__(self) -> TinyEngine:
        assert self.client.wait_attached(10), self.client.last_refusal
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.pool.close()
