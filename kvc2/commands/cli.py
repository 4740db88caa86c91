"""The command line: `kvc2 serve` (serve.py) runs the daemon, the others talk to one.

Exit codes: 0 done, 1 failed, 2 bad usage. Imports are lazy, so that `--help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvc2 import config, errors, flags
from kvc2.commands import reach
from kvc2.commands.exits import BAD_USAGE, FAILED, exit_codes
from kvc2.commands.reach import Reach
from kvc2.commands.serve import EPILOG, serve
from kvc2.config import EvictionPolicy
from kvc2.host.paths import user_path

if TYPE_CHECKING:
    from kvc2.client import Asked, Flushed

AS_ASKED = ("no_disk", "not_admitted")  # how the daemon was asked to run: no failure
TTL_MAX = (1 << 32) - 1  # seconds

app = typer.Typer(
    name="kvc2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A prefix cache for large models: GPU, CPU memory and disk, one tree.",
)


class Tier(StrEnum):
    gpu = "gpu"
    cpu = "cpu"
    disk = "disk"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
PromptTokens = Annotated[
    Path | None,
    typer.Option(
        help="A prompt: a JSON list of token ids, ids and spaces, or with "
        "images an object: tokens, and extras of first_token, num_tokens, digest (hexadecimal)."
    ),
]
PromptText = Annotated[Path | None, typer.Option(help="A prompt as text; needs --tokenizer.")]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="A model's folder with tokenizer.json; shows text, too.")
]
Namespace = Annotated[
    str, typer.Option(help="Of the prompt; 64 hex digits.", show_default="the only one")
]
Deadline = Annotated[float, typer.Option(help="Give up after this many seconds.", min=0.001)]


app.command(epilog=EPILOG)(serve)


@app.command(epilog="Example: kvc2 stats --json | jq .tiers")
@flags.takes(Reach)
def stats(as_json: Json = False, **at: Any) -> None:
    """Show tiers, sessions and counters of a running daemon."""
    from kvc2.commands.stats import show

    with exit_codes(), reach.admin(at) as admin:
        found = admin.stats()
        if as_json:
            print(json.dumps(asdict(found), indent=2))
        else:
            show(found)


@app.command(epilog="Example: kvc2 flush --deadline-s 60")
@flags.takes(Reach)
def flush(deadline_s: Deadline = 30.0, as_json: Json = False, **at: Any) -> None:
    """Wait until all committed blocks are on disk; exit code 1 if some are not."""
    with exit_codes(), reach.admin(at) as admin:
        _report_flushed(admin.flush(deadline_s), as_json)


@app.command(epilog="Example: kvc2 evict --tier cpu")
@flags.takes(Reach)
def evict(
    tier: Annotated[Tier, typer.Option(help="Which tier's copies to drop.")],
    blocks: Annotated[int, typer.Option(help="How many; 0: all that can be.", min=0)] = 0,
    as_json: Json = False,
    **at: Any,
) -> None:
    """Drop unpinned blocks from one tier; they stay in the others."""
    with exit_codes(), reach.admin(at) as admin:
        found = admin.evict(tier.value, blocks)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            print(f"evicted {found.evicted_blocks} blocks, {found.last_copies} of them last copies")


@app.command(epilog="Example: kvc2 invalidate --weights-digest 5f1d...e0")
@flags.takes(Reach)
def invalidate(
    weights_digest: Annotated[
        str,
        typer.Option(
            help="Of every namespace with these weights; 64 hex digits, or an engine's text."
        ),
    ] = "",
    namespace: Annotated[str, typer.Option(help="Of this namespace; 64 hex digits.")] = "",
    as_json: Json = False,
    **at: Any,
) -> None:
    """Drop all blocks of changed weights, in every tier and for good; give one of the two."""
    with exit_codes(), reach.admin(at) as admin:
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
    policy: Annotated[EvictionPolicy, typer.Option(help="What evicts.")] = "hazard",
    plot: Annotated[
        Path | None, typer.Option(help="Write hit rate against capacity as PNG (needs matplotlib).")
    ] = None,
    as_json: Json = False,
) -> None:
    """How big a cache a trace of requests needs: token hit rate by capacity, beside the best."""
    from kvc2.commands import sizing, traces

    with exit_codes():
        shares = sizing.parse_shares(capacity)
        if plot is not None:
            plot = user_path("plot", plot)
            sizing.check_plot(plot)
        read = traces.read(user_path("trace", trace))
        sizes = sizing.measure(read, shares, policy, quiet=as_json)
        if plot is not None:
            sizing.draw(read, sizes, policy, plot)
        if as_json:
            print(json.dumps([asdict(each) for each in sizes]))
        else:
            sizing.print_table(read, sizes, policy)


@app.command(
    epilog="Example: kvc2 explain chatcmpl-5f1d, or kvc2 explain --text prompt.txt --tokenizer "
    "/models/qwen3. A request is known by its id while it is among the last 1024; neither it nor "
    "the dead outlive the daemon. Needs the unix socket, TLS or a bearer token: it tells tokens of "
    "other prompts."
)
@flags.takes(Reach)
def explain(
    request_id: Annotated[
        str, typer.Argument(help="A request's id, as the engine's answer has it.")
    ] = "",
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    namespace: Namespace = "",
    as_json: Json = False,
    **at: Any,
) -> None:
    """Tell which blocks of a request or prompt hit in which tier, and why the next one did not."""
    from kvc2.commands import prompts

    with exit_codes(), reach.admin(at) as admin:
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


@app.command(
    epilog="Example: kvc2 check /nvme/kvc2 --repair. No daemon may serve DIR: kvc2 scrub verifies "
    "what a running one has. Exit codes: 0 sound, or it is now, 1 damaged, 2 bad usage or in use."
)
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A disk.path.")],
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete records of damaged blocks and of what hangs below them, orphaned slab "
            "files; move a catalogue aside that can't be read.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify a disk tier offline: catalogue, slab files, checksums of every block."""
    from kvc2.commands import check

    with exit_codes():
        try:
            sound = check.run(folder, mends=repair, as_json=as_json)
        except (errors.Served, OSError) as error:
            print(f"kvc2: {error}", file=sys.stderr)
            raise typer.Exit(BAD_USAGE) from error
        if not sound:
            raise typer.Exit(FAILED)


@app.command(
    epilog="Example: kvc2 scrub --mb-per-s 200. The pass goes on in the daemon if this command "
    "ends first; disk.scrub_mb_per_s has the daemon begin one each day. Exit code 1: bad blocks."
)
@flags.takes(Reach)
def scrub(
    mb_per_s: Annotated[
        int, typer.Option(help="10^6 bytes a second; 0: 100. Also of a pass under way.", min=0)
    ] = 0,
    stop: Annotated[bool, typer.Option("--stop", help="End the pass under way instead.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only tell how it goes.")] = False,
    as_json: Json = False,
    **at: Any,
) -> None:
    """Verify what a running daemon has on disk, in the background; bad blocks are dropped."""
    from kvc2.commands import check

    with exit_codes(), reach.admin(at) as admin:
        if stop or status:
            found = admin.scrub(stop=stop)
        else:
            found = check.follow(admin, mb_per_s, quiet=as_json)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            check.print_pass(found)
        if found.bad_blocks:
            raise typer.Exit(FAILED)


@app.command(epilog="Example: kvc2 quota agents --tier cpu --gb 20")
@flags.takes(Reach)
def quota(
    tenant: Annotated[str, typer.Argument(help="One that the configuration declares.")],
    tier: Annotated[Tier, typer.Option(help="Of gpu (all engines' pools), cpu or disk.")],
    gb: Annotated[float, typer.Option(help="10^9 bytes; 0: no limit.", min=0)] = 0.0,
    blocks: Annotated[int, typer.Option(help="Blocks; 0: no limit.", min=0)] = 0,
    as_json: Json = False,
    **at: Any,
) -> None:
    """Set what a tenant may take of a tier, until the daemon ends; its own coldest blocks go."""
    with exit_codes(), reach.admin(at) as admin:
        max_bytes = round(gb * config.GB)
        found = admin.set_quota(tenant, tier.value, max_bytes=max_bytes, max_blocks=blocks)
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            print(f"{tenant} takes {found.bytes / config.GB:.3f} GB of {tier.value} now")


@app.command(
    epilog="Example: kvc2 pin --text system.txt --tokenizer /models/qwen3 --hard. A pin ends with "
    "unpin, after --ttl, with an invalidate or with the daemon. Needs the unix socket, TLS or a "
    "bearer token."
)
@flags.takes(Reach)
def pin(
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    tier: Annotated[Tier, typer.Option(help="Where: cpu or disk.")] = Tier.cpu,
    hard: Annotated[
        bool, typer.Option("--hard", help="Never evicted, instead of evicted last.")
    ] = False,
    ttl: Annotated[
        int,
        typer.Option(
            help="Seconds until the pin ends by itself; 0: it doesn't.", min=0, max=TTL_MAX
        ),
    ] = 0,
    namespace: Namespace = "",
    as_json: Json = False,
    **at: Any,
) -> None:
    """Keep a prompt's full blocks in a tier, whether they are there now or come later."""
    with exit_codes(), reach.admin(at) as admin:
        prompt = _prompt(tokens, text, tokenizer)
        name = _bytes("namespace", namespace)
        found = admin.pin(prompt, tier=tier.value, hard=hard, ttl_s=ttl, namespace=name)
        if as_json:
            told = asdict(found)
            del told["pinned"]  # of keys
            print(json.dumps(told))
        else:
            kind = "hard" if hard else "soft"
            print(
                f"{found.blocks} blocks are pinned {kind} in {tier.value}, "
                f"{found.resident_blocks} of them are there; {found.pinned_blocks} with all pins"
            )


@app.command(epilog="Example: kvc2 unpin --text system.txt --tokenizer /models/qwen3")
@flags.takes(Reach)
def unpin(
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    tier: Annotated[Tier, typer.Option(help="Where: cpu or disk.")] = Tier.cpu,
    namespace: Namespace = "",
    **at: Any,
) -> None:
    """End the pin of exactly these blocks; exit code 1 when there was none."""
    with exit_codes(), reach.admin(at) as admin:
        prompt = _prompt(tokens, text, tokenizer)
        blocks = admin.unpin(prompt, tier=tier.value, namespace=_bytes("namespace", namespace))
        if not blocks:
            print("kvc2: no pin of exactly these blocks", file=sys.stderr)
            raise typer.Exit(FAILED)
        print(f"{blocks} blocks are not pinned by this any more")


@app.command(
    epilog="Example: kvc2 prefetch --text system.txt --tokenizer /models/qwen3 --deadline-s 5. "
    "Needs the unix socket, TLS or a bearer token."
)
@flags.takes(Reach)
def prefetch(
    tokens: PromptTokens = None,
    text: PromptText = None,
    tokenizer: TokenizerFolder = None,
    namespace: Namespace = "",
    deadline_s: Annotated[
        float, typer.Option(help="Wait so many seconds; 0: not at all.", min=0.0)
    ] = 0.0,
    as_json: Json = False,
    **at: Any,
) -> None:
    """Bring a prompt's cached prefix from the disk to the cpu tier, before it is asked for."""
    with exit_codes(), reach.admin(at) as admin:
        prompt = _prompt(tokens, text, tokenizer)
        name = _bytes("namespace", namespace)
        found = admin.prefetch(prompt, namespace=name, deadline_s=deadline_s)
        if as_json:
            print(json.dumps(asdict(found)))
            return
        print(
            f"{found.tiers.cpu} of {len(prompt.tokens)} tokens are in cpu, {found.tiers.disk} on "
            f"disk, {found.coming_tokens} of these on their way"
        )


@app.command(epilog="Example: kvc2 drain --deadline-s 120")
@flags.takes(Reach)
def drain(deadline_s: Deadline = 30.0, as_json: Json = False, **at: Any) -> None:
    """Flush and stop a running daemon; exit code 1 if some blocks are not on disk."""
    with exit_codes(), reach.admin(at) as admin:
        _report_flushed(admin.drain(deadline_s), as_json)


def _prompt(tokens: Path | None, text: Path | None, tokenizer: Path | None) -> Asked:
    from kvc2.commands import prompts

    words = None if tokenizer is None else prompts.open_tokenizer(tokenizer)
    return prompts.read(tokens, text, words)


def _report_flushed(found: Flushed, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        left = ", ".join(f"{count} {why}" for why, count in found.not_durable_blocks.items())
        print(f"{found.durable_blocks} blocks are durable; not: {left or 'none'}")
    if any(count for why, count in found.not_durable_blocks.items() if why not in AS_ASKED):
        raise typer.Exit(FAILED)


def main() -> None:
    # gRPC writes a line for each handshake that fails, which is whoever's choice that connects
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app()
