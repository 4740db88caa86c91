"""`kvc2 serve`: the options of `ServeConfig`, over a file; and the room that it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvc2 import errors, events, flags
from kvc2.commands import config_file
from kvc2.commands.exits import exit_codes
from kvc2.config import GB, ServeConfig
from kvc2.host import machine

EPILOG = (
    flags.example("kvc2 serve", ServeConfig) + ". Sizes in gb are 10^9 bytes. A key of the file is "
    "a flag: `cpu: {memory_size_gb: 500}`; flags go over the file. Tenants are declared in the "
    "file only. Engines' pools may lie on CUDA devices (pip install 'kvc2[cuda]'): that has run on "
    "a driver for tests, and on no GPU yet. "
    "Exit codes: 0 stopped in order, 1 can't start, 2 bad usage."
)


@flags.takes(ServeConfig)
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these keys, or one of KTransformers'.")
    ] = None,
    **given: Any,
) -> None:
    """Run the cache daemon until SIGTERM, which drains: it flushes to the disk and exits 0."""
    with exit_codes():
        _run(config_file.load(config, flags.nested(ServeConfig, given)))


def _run(settings: ServeConfig) -> None:
    import asyncio

    from kvc2.cuda.nursery import look

    cuda = look()  # it may fork: before there is any thread, gRPC or LMDB

    from kvc2.host import numa
    from kvc2.server import serve as serve_until_stopped

    writer = events.EventWriter(sys.stderr, settings.log_format)
    numa.run_beside(settings.cpu.numa)  # all threads are started below
    try:
        _check_room(settings)
        asyncio.run(serve_until_stopped(settings, cuda))
    finally:
        writer.close()


def _check_room(settings: ServeConfig) -> None:
    """Raises InvalidConfig for a size that can never be had; logs one that can't be had now."""
    if not settings.gpu_only:
        check_fits("cpu.memory_size_gb", settings.cpu.memory_size_gb or 0, machine.memory())
    path = settings.disk.path
    if path is not None:
        try:
            room = machine.disk(path, path / "slabs")  # beside them nothing is large
        except OSError as error:
            allowed = f"a folder that can be made: {error.strerror}"
            raise errors.InvalidConfig("disk.path", str(path), allowed) from error
        check_fits("disk.size_gb", settings.disk.size_gb or 0, room)


def check_fits(key: str, gb: float, room: machine.Room) -> None:
    """Raises InvalidConfig for 10^9 bytes that `room` can never have; logs what it hasn't now."""
    if gb * GB > room.total_bytes:
        raise errors.InvalidConfig(key, gb, f"at most what there is, and {room}")
    if gb * GB > room.available_bytes:
        events.warning("more_than_free", key=key, gb=gb, free_gb=room.available_bytes / GB)
