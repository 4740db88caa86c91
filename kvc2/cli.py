"""The command line: `kvc2 serve` runs the daemon, the others talk to a running one.

Exit codes: 0 done, 1 failed, 2 bad usage. Imports are lazy, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvc2 import config, errors

if TYPE_CHECKING:
    from kvc2.client import Admin, Flushed

FAILED, BAD_USAGE = 1, 2

app = typer.Typer(
    name="kvc2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A prefix cache for large models: GPU, CPU memory and disk, one tree.",
)


class EvictionPolicy(StrEnum):
    hazard = "hazard"
    lru = "lru"
    arc = "arc"
    s3fifo = "s3fifo"


class WritePolicy(StrEnum):
    behind = "behind"
    back = "back"
    through = "through"


class Durability(StrEnum):
    durable = "durable"
    relaxed = "relaxed"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


class Tier(StrEnum):
    gpu = "gpu"
    cpu = "cpu"
    disk = "disk"


Address = Annotated[
    str | None,
    typer.Option(
        help="The daemon's address, unix:PATH or HOST:PORT.", show_default="as `kvc2 serve`'s"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
PromptTokens = Annotated[
    Path | None, typer.Option(help="A prompt: a JSON list of token ids, or ids and spaces.")
]
PromptText = Annotated[Path | None, typer.Option(help="A prompt as text; needs --tokenizer.")]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="A model's folder with tokenizer.json; shows text, too.")
]
Namespace = Annotated[
    str, typer.Option(help="Of the prompt; 64 hex digits.", show_default="the only one")
]
Deadline = Annotated[float, typer.Option(help="Give up after this many seconds.", min=0.001)]


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
    option("unix:PATH, or HOST:PORT of a loopback address.", "$XDG_RUNTIME_DIR/kvc2/kvc2.sock"),
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
    float | None, option("Arena, 10^9 bytes.", "a quarter of available memory")
]
DiskPath = Annotated[
    Path | None, option("Folder of slab files and catalogue; made if missing.", "no disk tier")
]
DiskSizeGb = Annotated[
    float | None, option("What the disk tier may take, 10^9 bytes.", "a quarter of it")
]
DiskDurability = Annotated[
    Durability | None,
    option("durable: each batch is synced; relaxed: a flush syncs, a power cut costs.", "durable"),
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


@app.command(
    epilog="Example: kvc2 serve --cpu-memory-size-gb 500 --disk-path /mnt/kv "
    "--disk-size-gb 2000. Sizes in gb are 10^9 bytes. A key of the file is a flag: "
    "`cpu: {memory_size_gb: 500}`; flags go over the file. Tenants are declared in the file only. "
    "Exit codes: 0 stopped in order, 1 can't start, 2 bad usage."
)
def serve(
    config_file: ConfigFile = None,
    listen: Listen = None,
    metrics_port: MetricsPort = None,
    gpu_only: GpuOnly = None,
    write_policy: WritePolicyFlag = None,
    eviction_policy: EvictionPolicyFlag = None,
    slab_bytes: SlabBytes = None,
    low_watermark: LowWatermark = None,
    high_watermark: HighWatermark = None,
    copy_threads: CopyThreads = None,
    acquire_deadline_ms: AcquireDeadlineMs = None,
    drain_timeout_s: DrainTimeoutS = None,
    log_format: LogFormatFlag = None,
    cpu_memory_size_gb: CpuMemorySizeGb = None,
    disk_path: DiskPath = None,
    disk_size_gb: DiskSizeGb = None,
    disk_durability: DiskDurability = None,
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
    with _exit_codes():
        settings = config.load(config_file, nested(flags))
        _run(settings)


def nested(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as the file nests them: cpu_memory_size_gb is memory_size_gb in the section cpu."""
    values: dict[str, Any] = {}
    for name, value in flags.items():
        value = str(value) if isinstance(value, StrEnum) else value
        section, _, key = name.partition("_")
        if section in config.SECTIONS:
            values.setdefault(section, {})[key] = value
        else:
            values[name] = value
    return values


def _run(settings: config.ServeConfig) -> None:
    import asyncio

    from kvc2 import events
    from kvc2.server import serve as serve_until_stopped

    writer = events.EventWriter(sys.stderr, settings.log_format)
    try:
        asyncio.run(serve_until_stopped(settings))
    finally:
        writer.close()


@app.command(epilog="Example: kvc2 stats --json | jq .tiers")
def stats(address: Address = None, as_json: Json = False) -> None:
    """Show tiers, sessions and counters of a running daemon."""
    from kvc2 import stats_tables

    with _exit_codes(), _admin(address) as admin:
        found = admin.stats()
        if as_json:
            print(json.dumps(asdict(found), indent=2))
        else:
            stats_tables.show(found)


@app.command(epilog="Example: kvc2 flush --deadline-s 60")
def flush(address: Address = None, deadline_s: Deadline = 30.0, as_json: Json = False) -> None:
    """Wait until all committed blocks are on disk; exit code 1 if some are not."""
    with _exit_codes(), _admin(address) as admin:
        _report_flushed(admin.flush(deadline_s), as_json)


@app.command(epilog="Example: kvc2 evict --tier cpu")
def evict(
    tier: Annotated[Tier, typer.Option(help="Which tier's copies to drop.")],
    address: Address = None,
    blocks: Annotated[int, typer.Option(help="How many; 0: all that can be.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Drop unpinned blocks from one tier; they stay in the others."""
    with _exit_codes(), _admin(address) as admin:
        found = admin.evict(tier.value, blocks)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            print(f"evicted {found.evicted_blocks} blocks, {found.last_copies} of them last copies")


@app.command(epilog="Example: kvc2 invalidate --weights-digest 5f1d...e0")
def invalidate(
    weights_digest: Annotated[
        str, typer.Option(help="Of every namespace with these weights; 64 hex digits.")
    ] = "",
    namespace: Annotated[str, typer.Option(help="Of this namespace; 64 hex digits.")] = "",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Drop all blocks of changed weights, in every tier and for good; give one of the two."""
    with _exit_codes(), _admin(address) as admin:
        if bool(weights_digest) == bool(namespace):
            raise errors.InvalidRequest("weights-digest, namespace", None, "one of them")
        found = admin.invalidate(
            weights_digest=weights_digest, namespace=_bytes("namespace", namespace)
        )
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            print(f"{found.blocks} blocks of {found.namespaces} namespaces are gone")
        if not found.durable:
            print("kvc2: not on disk yet: it goes with the next write", file=sys.stderr)
            raise typer.Exit(FAILED)


def _bytes(field: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise errors.InvalidRequest(field, text, "hexadecimal digits") from error


@app.command(epilog="Example: kvc2 replay requests.jsonl --plot hit-rate.png")
def replay(
    trace: Annotated[
        Path, typer.Argument(help="*.kvt.npz, or JSONL of Mooncake's or Qwen-Bailian's fields.")
    ],
    capacity: Annotated[
        str, typer.Option(help="Shares of the trace's distinct blocks, by commas.")
    ] = "0.01,0.02,0.05,0.1,0.25,0.5,1",
    policy: Annotated[EvictionPolicy, typer.Option(help="What evicts.")] = EvictionPolicy.hazard,
    plot: Annotated[
        Path | None, typer.Option(help="Write hit rate against capacity as PNG (needs matplotlib).")
    ] = None,
    as_json: Json = False,
) -> None:
    """How big a cache a trace of requests needs: token hit rate by capacity, beside the best."""
    from kvc2 import sizing, traces

    with _exit_codes():
        shares = sizing.parse_shares(capacity)
        if plot is not None:
            sizing.check_plot(plot)
        read = traces.read(trace)
        sizes = sizing.measure(read, shares, policy.value, quiet=as_json)
        if plot is not None:
            sizing.draw(read, sizes, policy.value, plot)
        if as_json:
            print(json.dumps([asdict(each) for each in sizes]))
        else:
            sizing.print_table(read, sizes, policy.value)


@app.command(
    epilog="Example: kvc2 explain chatcmpl-5f1d, or kvc2 explain --text prompt.txt --tokenizer "
    "/models/qwen3. A request is known by its id while it is among the last 1024; neither it nor "
    "the dead outlive the daemon. Needs the unix socket: the answer tells tokens of other prompts."
)
def explain(
    request_id: Annotated[
        str, typer.Argument(help="A request's id, as the engine's answer has it.")
    ] = "",
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    namespace: Namespace = "",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Tell which blocks of a request or prompt hit in which tier, and why the next one did not."""
    from kvc2 import prompts

    with _exit_codes(), _admin(address) as admin:
        if bool(request_id) + (tokens is not None) + (text is not None) != 1:
            raise errors.InvalidRequest("REQUEST_ID, tokens, text", None, "one of them")
        words = None if tokenizer is None else prompts.open_tokenizer(tokenizer)
        prompt = None if request_id else prompts.read(tokens, text, words)
        found = admin.explain(
            request_id=request_id.encode(),
            tokens=prompt,
            namespace=_bytes("namespace", namespace),
        )
        if as_json:
            print(json.dumps(asdict(found) | {"sibling": found.sibling.tolist()}, indent=2))
            return
        for line in prompts.lines(found, prompt, None if words is None else words.decode):
            print(line)


@app.command(epilog="Example: kvc2 quota agents --tier cpu --gb 20")
def quota(
    tenant: Annotated[str, typer.Argument(help="One that the configuration declares.")],
    tier: Annotated[Tier, typer.Option(help="Of gpu (all engines' pools), cpu or disk.")],
    gb: Annotated[float, typer.Option(help="10^9 bytes; 0: no limit.", min=0)] = 0.0,
    blocks: Annotated[int, typer.Option(help="Blocks; 0: no limit.", min=0)] = 0,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Set what a tenant may take of a tier, until the daemon ends; its own coldest blocks go."""
    with _exit_codes(), _admin(address) as admin:
        max_bytes = round(gb * config.GB)
        found = admin.set_quota(tenant, tier.value, max_bytes=max_bytes, max_blocks=blocks)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            print(f"{tenant} takes {found.bytes / config.GB:.3f} GB of {tier.value} now")


@app.command(
    epilog="Example: kvc2 pin --text system.txt --tokenizer /models/qwen3 --hard. A pin ends with "
    "unpin, with an invalidate or with the daemon. Needs the unix socket."
)
def pin(
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    tier: Annotated[Tier, typer.Option(help="Where: cpu or disk.")] = Tier.cpu,
    hard: Annotated[
        bool, typer.Option("--hard", help="Never evicted, instead of evicted last.")
    ] = False,
    namespace: Namespace = "",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Keep a prompt's full blocks in a tier, whether they are there now or come later."""
    from kvc2 import prompts

    with _exit_codes(), _admin(address) as admin:
        words = None if tokenizer is None else prompts.open_tokenizer(tokenizer)
        prompt = prompts.read(tokens, text, words)
        name = _bytes("namespace", namespace)
        found = admin.pin(prompt, tier=tier.value, hard=hard, namespace=name)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            kind = "hard" if hard else "soft"
            print(
                f"{found.blocks} blocks are pinned {kind} in {tier.value}, "
                f"{found.resident_blocks} of them are there; {found.pinned_blocks} with all pins"
            )


@app.command(epilog="Example: kvc2 unpin --text system.txt --tokenizer /models/qwen3")
def unpin(
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    tier: Annotated[Tier, typer.Option(help="Where: cpu or disk.")] = Tier.cpu,
    namespace: Namespace = "",
    address: Address = None,
) -> None:
    """End the pin of exactly these blocks; exit code 1 when there was none."""
    from kvc2 import prompts

    with _exit_codes(), _admin(address) as admin:
        words = None if tokenizer is None else prompts.open_tokenizer(tokenizer)
        prompt = prompts.read(tokens, text, words)
        blocks = admin.unpin(prompt, tier=tier.value, namespace=_bytes("namespace", namespace))
        if not blocks:
            print("kvc2: no pin of exactly these blocks", file=sys.stderr)
            raise typer.Exit(FAILED)
        print(f"{blocks} blocks are not pinned by this any more")


@app.command(epilog="Example: kvc2 drain --deadline-s 120")
def drain(address: Address = None, deadline_s: Deadline = 30.0, as_json: Json = False) -> None:
    """Flush and stop a running daemon; exit code 1 if some blocks are not on disk."""
    with _exit_codes(), _admin(address) as admin:
        _report_flushed(admin.drain(deadline_s), as_json)


def _admin(address: str | None) -> Admin:
    from kvc2.client import Admin

    return Admin(address or config.default_listen())


def _report_flushed(found: Flushed, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        left = ", ".join(f"{count} {why}" for why, count in found.not_durable_blocks.items())
        print(f"{found.durable_blocks} blocks are durable; not: {left or 'none'}")
    # without a disk nothing can be: that is how the daemon was asked to run, no failure
    if any(count for why, count in found.not_durable_blocks.items() if why != "no_disk"):
        raise typer.Exit(FAILED)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Expected errors as one line on stderr and an exit code; others keep their traceback."""
    try:
        yield
    except (errors.InvalidConfig, errors.InvalidRequest) as error:
        print(f"kvc2: {error}", file=sys.stderr)
        raise typer.Exit(BAD_USAGE) from error
    except errors.Kvc2Error as error:
        print(f"kvc2: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error


def main() -> None:
    app()
