"""The daemon or the engine without overlap while a file says so, for overlap.py.

    python -m benchmarks.in_turn daemon FOLDER
    python -m benchmarks.in_turn engine FOLDER serve --model ... (as kvc2-engine)

Without: the engine waits for the last layer of a prefix before it computes the first, and the
daemon loads all of a prefix from disk before it promotes any of it. In both ways the engine writes
down how long each request stood still for its prefix.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvc2.config import CpuConfig, DiskConfig, ServeConfig

GB = 1_000_000_000
WHOLE_BYTES = 1 << 40  # of one load: more than any prefix


def flag(folder: Path) -> Path:
    """There while nothing may overlap."""
    return folder / "in_turn"


async def serve(folder: Path) -> None:
    from kvc2.moving.loading import Loader
    from kvc2.server import running

    windowed = Loader._load_bytes

    def load_bytes(loader: Loader) -> int:
        return WHOLE_BYTES if flag(folder).exists() else windowed(loader)

    Loader._load_bytes = load_bytes  # type: ignore[method-assign]
    config = ServeConfig(
        listen=f"unix:{folder / 'kvc2.sock'}",
        cpu=CpuConfig.of_bytes(1 * GB),
        disk=DiskConfig.of_bytes(folder / "disk", 4 * GB),
    )
    async with running(config) as daemon:
        daemon.stop_on_signals()
        await daemon.stopped.wait()


def still_file(folder: Path) -> Path:
    """Milliseconds that the engine's last request stood still for layers of its prefix; not there
    where none had to come."""
    return folder / "still"


def run_engine(folder: Path) -> None:
    from engine.cli import main
    from engine.runner import Runner

    real = Runner.step

    def step(runner: Any, batch: Any, layer_ready: Callable[[int], None] | None = None) -> Any:
        if layer_ready is None:
            return real(runner, batch)
        last, whole, still_s = runner.model.config.num_layers - 1, flag(folder).exists(), 0.0

        def timed(layer: int) -> None:
            nonlocal still_s
            begun = time.perf_counter()
            layer_ready(last if whole else layer)
            still_s += time.perf_counter() - begun
            if layer == last:
                still_file(folder).write_text(f"{still_s * 1e3}")

        return real(runner, batch, timed)

    Runner.step = step  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]
    if what == "daemon":
        asyncio.run(serve(where))
    else:
        run_engine(where)
