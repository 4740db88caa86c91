"""`kvc2 serve`: its flags, and how they go over the file."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvc2 import errors, events, machine
from kvc2.config import GB, ServeConfig
from kvc2.config_file import SECTIONS, load
from kvc2.exits import exit_codes


class EvictionPolicy(StrEnum):
    hazard = "hazard"
    lru = "lru"
    arc = "arc"
    s3fifo = "s3fifo"


class WritePolicy(StrEnum):
    behind = "behind"
    back = "back"
    through = "through"


class LoadPolicy(StrEnum):
    faster = "faster"
    always = "always"


class Durability(StrEnum):
    durable = "durable"
    relaxed = "relaxed"


class Admission(StrEnum):
    always = "always"
    second_access = "second_access"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


def option(text: str, default: str) -> Any:
    """A flag of `serve`; None when not given, so that it can overlay the file."""
    return typer.Option(help=text, show_default=default)


# the flags of `serve`
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of these keys, or one of KTransformers'."),
]
Listen = Annotated[
    str | None,
    option(
        "unix:PATH (~ is a home), or HOST:PORT of a loopback address.",
        "$XDG_RUNTIME_DIR/kvc2/kvc2.sock",
    ),
]
MetricsPort = Annotated[
    int | None, option("Port of Prometheus' /metrics on 127.0.0.1; 0: any.", "off")
]
GpuOnly = Annotated[
    bool | None,
    typer.Option("--gpu-only/--no-gpu-only", help="No arena and no disk.", show_default="no"),
]
WritePolicyFlag = Annotated[
    WritePolicy | None,
    option("When a committed block is copied to slower tiers.", "behind"),
]
LoadPolicyFlag = Annotated[
    LoadPolicy | None,
    option("Whether what an engine would compute sooner is loaded all the same.", "faster"),
]
EvictionPolicyFlag = Annotated[
    EvictionPolicy | None,
    option("Which blocks every tier drops first.", "hazard"),
]
SlabBytes = Annotated[int | None, option("Bytes of a slab, a multiple of 4096.", "67108864")]
LowWatermark = Annotated[
    float | None,
    option("Share of a gpu or cpu pool; with less free, spare copies are dropped ahead.", "0.01"),
]
HighWatermark = Annotated[
    float | None, option("Share of a pool that is free when that stops.", "0.02")
]
CopyThreads = Annotated[
    int | None, option("Threads that copy pages; 0: one a core, at most 4.", "0")
]
AcquireDeadlineMs = Annotated[
    int | None, option("How long an acquire waits for slower tiers, ms.", "2000")
]
DrainTimeoutS = Annotated[float | None, option("How long SIGTERM may flush, seconds.", "30")]
LogFormatFlag = Annotated[LogFormat | None, option("Of the lines on stderr.", "text")]
CpuMemorySizeGb = Annotated[
    float | None,
    option("Arena, 10^9 bytes; at most what there is.", "a quarter of available memory"),
]
CpuNuma = Annotated[
    str | None,
    option("Nodes of the arena, such as 0,2; the daemon runs there too. Or local.", "interleave"),
]
DiskPath = Annotated[
    Path | None, option("Folder of slab files and catalogue; made if missing.", "no disk tier")
]
DiskSizeGb = Annotated[
    float | None,
    option("What the disk tier may take, 10^9 bytes; at most what there is.", "a quarter of it"),
]
DiskDurability = Annotated[
    Durability | None,
    option("durable: each batch is synced; relaxed: a flush syncs, a power cut costs.", "durable"),
]
DiskAdmission = Annotated[
    Admission | None,
    option("second_access: a block goes to disk once a second request has used it.", "always"),
]
DiskScrubMbPerS = Annotated[
    int | None,
    option("Verify the disk once a day at this rate, 10^6 bytes/s; 0: when asked.", "0"),
]
AttnPageSize = Annotated[
    int | None, option("Refuse engines with another page size, tokens.", "any")
]
AttnChunkSize = Annotated[
    int | None, option("The engine's prefill chunk, tokens; only checked.", "any")
]
LimitsMaxSessions = Annotated[int | None, option("Engines at a time.", "64")]
LimitsMaxNamespaces = Annotated[int | None, option("Namespaces a session opens.", "1024")]
LimitsMaxKnownNamespaces = Annotated[
    int | None, option("Namespaces of all sessions since the start, and on disk.", "65536")
]
LimitsMaxLayouts = Annotated[int | None, option("Page layouts, counted likewise.", "64")]
LimitsMaxDeadBlocks = Annotated[
    int | None, option("Dead blocks that explain remembers; 32 bytes each.", "65536")
]
LimitsMaxLeases = Annotated[int | None, option("Open leases of a session.", "4096")]
LimitsMaxLeasesPerCall = Annotated[int | None, option("Leases in one commit or release.", "1024")]
LimitsMaxTokens = Annotated[int | None, option("Tokens of a prompt.", "1048576")]
LimitsMaxPoolPages = Annotated[int | None, option("Pages of an engine's pool.", "16777216")]
LimitsMaxGrantPages = Annotated[int | None, option("Pages of one grant.", "65536")]
LimitsHardPinPercent = Annotated[
    int | None, option("Of a tier, that pins may keep from eviction.", "25")
]


def serve(
    config_file: ConfigFile = None,
    listen: Listen = None,
    metrics_port: MetricsPort = None,
    gpu_only: GpuOnly = None,
    write_policy: WritePolicyFlag = None,
    load_policy: LoadPolicyFlag = None,
    eviction_policy: EvictionPolicyFlag = None,
    slab_bytes: SlabBytes = None,
    low_watermark: LowWatermark = None,
    high_watermark: HighWatermark = None,
    copy_threads: CopyThreads = None,
    acquire_deadline_ms: AcquireDeadlineMs = None,
    drain_timeout_s: DrainTimeoutS = None,
    log_format: LogFormatFlag = None,
    cpu_memory_size_gb: CpuMemorySizeGb = None,
    cpu_numa: CpuNuma = None,
    disk_path: DiskPath = None,
    disk_size_gb: DiskSizeGb = None,
    disk_durability: DiskDurability = None,
    disk_admission: DiskAdmission = None,
    disk_scrub_mb_per_s: DiskScrubMbPerS = None,
    attn_page_size: AttnPageSize = None,
    attn_chunk_size: AttnChunkSize = None,
    limits_max_sessions: LimitsMaxSessions = None,
    limits_max_namespaces: LimitsMaxNamespaces = None,
    limits_max_known_namespaces: LimitsMaxKnownNamespaces = None,
    limits_max_layouts: LimitsMaxLayouts = None,
    limits_max_dead_blocks: LimitsMaxDeadBlocks = None,
    limits_max_leases: LimitsMaxLeases = None,
    limits_max_leases_per_call: LimitsMaxLeasesPerCall = None,
    limits_max_tokens: LimitsMaxTokens = None,
    limits_max_pool_pages: LimitsMaxPoolPages = None,
    limits_max_grant_pages: LimitsMaxGrantPages = None,
    limits_hard_pin_percent: LimitsHardPinPercent = None,
) -> None:
    """Run the cache daemon until SIGTERM, which drains: it flushes to the disk and exits 0."""
    flags = {key: value for key, value in locals().items() if value is not None}
    flags.pop("config_file", None)
    with exit_codes():
        settings = load(config_file, nested(flags))
        _run(settings)


def nested(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as the file nests them: cpu_memory_size_gb is memory_size_gb in the section cpu."""
    values: dict[str, Any] = {}
    for name, value in flags.items():
        value = str(value) if isinstance(value, StrEnum) else value
        section, _, key = name.partition("_")
        if section in SECTIONS:
            values.setdefault(section, {})[key] = value
        else:
            values[name] = value
    return values


def _run(settings: ServeConfig) -> None:
    import asyncio

    from kvc2 import numa
    from kvc2.server import serve as serve_until_stopped

    writer = events.EventWriter(sys.stderr, settings.log_format)
    numa.run_beside(settings.cpu.numa)  # all threads are started below
    try:
        _check_room(settings)
        asyncio.run(serve_until_stopped(settings))
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
