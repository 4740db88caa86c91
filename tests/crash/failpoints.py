"""Failpoints: moments of the write, promote and start paths, by name, at which a daemon dies.

Each is before or after a function of the daemon, which is wrapped in the process that shall die:
the daemon itself knows nothing of them. `python -m tests.crash.failpoints` makes such daemons: it
reads JSON lines {"argv": [...], "log": path, "failpoint": name or null, "count": n}, forks what is
already imported (a start takes a tenth of a second) and answers each with its pid.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvc2.commands.cli
import kvc2.moving.batches
import kvc2.server
from kvc2.moving.disk_writer import DiskWriter
from kvc2.moving.mover import Mover
from kvc2.tiers.disk import catalogue, names_file
from kvc2.tiers.disk.beside import Beside
from kvc2.tiers.disk.catalogue import Catalogue
from kvc2.tiers.disk.live import LiveTable
from kvc2.tiers.disk.pool import DiskPool
from kvc2.tiers.disk.slab_file import Files, SlabFiles
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.gpu import SharedMemoryPool
from kvc2.tiers.pools import LayoutOnDisk, Pools

BATCH_PAGES = 3  # so small that two batches are under way whenever more than a prompt waits
BEFORE, AFTER = True, False
FAILPOINTS: dict[str, tuple[Any, str, bool]] = {
    # a slab is added
    "slab_growing": (DiskTier, "grow", BEFORE),
    "slab_opened": (Files, "open", AFTER),
    "slab_allocating": (Files, "allocate", BEFORE),
    "slab_allocated": (Files, "allocate", AFTER),
    "slab_names_synced": (SlabFiles, "add", AFTER),
    "slab_grown": (DiskTier, "grow", AFTER),
    # gpu -> cpu
    "demoting": (Mover, "demote", BEFORE),
    "gathered": (SharedMemoryPool, "read", AFTER),
    # cpu -> disk
    "batch_planned": (DiskWriter, "_commit", BEFORE),
    "batch_begun": (DiskTier, "begin", AFTER),
    "headers_encoded": (SlabFiles, "write", BEFORE),
    "run_written": (Files, "write", AFTER),
    "part_written": (SlabFiles, "write", AFTER),
    "syncing": (Files, "sync", BEFORE),
    "synced": (Files, "sync", AFTER),
    "batch_written": (DiskTier, "_write", AFTER),
    "deletes_taken": (DiskPool, "take", AFTER),
    "beside_saving": (Beside, "save", BEFORE),
    "table_begun": (LiveTable, "begin", AFTER),
    "names_written": (names_file, "write", AFTER),
    "beside_saved": (Beside, "save", AFTER),
    "committing": (Catalogue, "commit", BEFORE),
    "committed_not_whole": (Catalogue, "_keep_whole", BEFORE),
    "committed": (Catalogue, "commit", AFTER),
    "settling": (DiskPool, "ended", BEFORE),
    "stored": (DiskTier, "finish", AFTER),
    "ending": (Mover, "_complete", BEFORE),
    "ended": (Mover, "_complete", AFTER),
    # what was evicted
    "dropping": (LayoutOnDisk, "drop_records", BEFORE),
    "dropped": (LayoutOnDisk, "drop_records", AFTER),
    "deleting": (catalogue, "_delete", BEFORE),
    "deleted_not_committed": (catalogue, "_delete", AFTER),
    # a flush, and the end
    "flush_syncing": (DiskTier, "sync", BEFORE),
    "flushed": (DiskTier, "sync", AFTER),
    "recency_saving": (DiskTier, "save_recency", BEFORE),
    "recency_aside": (Path, "rename", BEFORE),
    "recency_saved": (DiskTier, "save_recency", AFTER),
    "closing": (DiskTier, "close", BEFORE),
    # disk -> cpu -> gpu
    "load_planned": (Mover, "load", BEFORE),
    "loading": (DiskPool, "load", BEFORE),
    "run_read": (Files, "read", AFTER),
    "loaded": (DiskPool, "load", AFTER),
    "promotion_planned": (Mover, "promote", BEFORE),
    "promotion_queued": (Mover, "promote", AFTER),
    "promoting": (SharedMemoryPool, "write", BEFORE),
    "promoted": (SharedMemoryPool, "write", AFTER),
    # the start
    "catalogue_beginning": (Catalogue, "_begin", BEFORE),
    "format_checked": (catalogue, "check_format", AFTER),
    "catalogue_begun": (Catalogue, "_begin", AFTER),
    "catalogue_read": (DiskTier, "_open_catalogue", AFTER),
    "pools_opened": (DiskTier, "_open_pools", AFTER),
    "restored": (Pools, "restore", AFTER),
    "namespaces_forgotten": (DiskTier, "forget_namespaces", AFTER),
}
AT_START = tuple(FAILPOINTS)[-7:]
AT_STOP = ("recency_saving", "recency_aside", "recency_saved", "closing")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(function: Callable[..., Any], before: bool, count: int) -> Callable[..., Any]:
    """The function, at whose count-th call the process dies."""
    calls = 0

    def count_down() -> bool:
        nonlocal calls
        calls += 1
        return calls == count

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped_async(*values: Any, **named: Any) -> Any:
            last = count_down()
            if last and before:
                die()
            found = await function(*values, **named)
            if last:
                die()
            return found

        return wrapped_async

    @functools.wraps(function)
    def wrapped(*values: Any, **named: Any) -> Any:
        last = count_down()
        if last and before:
            die()
        found = function(*values, **named)
        if last:
            die()
        return found

    return wrapped


def plant(name: str, count: int) -> None:
    owner, attribute, before = FAILPOINTS[name]
    setattr(owner, attribute, deadly(getattr(owner, attribute), before, count))


def serve(argv: list[str], log: str, failpoint: str | None, count: int) -> None:
    """In the child: a daemon, until it is killed or stopped."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    kvc2.moving.batches.batch_pages = lambda *_: BATCH_PAGES
    if failpoint is not None:
        plant(failpoint, count)
    sys.argv = ["kvc2", *argv]
    kvc2.commands.cli.main()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                serve(**json.loads(line))
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
