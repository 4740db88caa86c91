"""A daemon inside the test's process, on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvc2.config import CpuConfig, DiskConfig, LimitsConfig, ServeConfig
from kvc2.server import running
from tests.doubles.fakes import FakeCache


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
    a function there. `cache=None`: the real one, with all of its arena to be had from the start."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        cache: Callable[..., Any] | None = FakeCache.opened,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.address = config.listen
        self._options: dict[str, Any] = {} if cache is None else {"open_cache": cache}
        if clock is not None:
            self._options["clock"] = clock
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        try:
            async with running(self.config, **self._options) as daemon:
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
        if not self._options.get("open_cache"):
            assert self.daemon.cache.arena.wait_populated(30)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.daemon.stopped.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the daemon did not stop"
        if self._failure is not None:
            raise self._failure
