"""What a daemon repeats goes on after a turn that failed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from kvc2.metrics import Metrics
from kvc2.periodic import periodically
from tests.doubles.daemons import ServedDaemon, serve_config

WAIT_S = 20.0


def faults(metrics: Metrics) -> float:
    found = metrics.registry.get_sample_value("kvc2_faults_total", {"kind": "internal_error"})
    assert found is not None
    return found


@pytest.mark.parametrize("waits", [False, True])
def test_a_turn_that_fails_is_counted_and_the_next_one_comes(waits: bool) -> None:
    metrics, turns = Metrics(), 0

    async def run() -> None:
        done = asyncio.Event()

        def work() -> Any:
            nonlocal turns
            turns += 1
            if turns == 3:
                done.set()
            if waits:
                return asyncio.wait_for(asyncio.Event().wait(), 0.0)  # fails when it is awaited
            raise RuntimeError("a bug")

        task = asyncio.create_task(periodically(0.0, work, metrics))
        async with asyncio.timeout(WAIT_S):
            await done.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert turns >= 3
    assert faults(metrics) >= 2


def test_frozen_engines_are_looked_for_also_after_a_look_has_failed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    looked = threading.Event()
    with ServedDaemon(serve_config(tmp_path)) as served:
        table = served.daemon.attachments.table
        expired, failures = table.expired, []

        def failing() -> Any:
            if not failures:
                failures.append(1)
                raise KeyError("a bug")
            looked.set()
            return expired()

        served.on_loop(lambda: setattr(table, "expired", failing))
        assert looked.wait(WAIT_S)
        assert served.on_loop(lambda: faults(served.daemon.metrics)) == 1
