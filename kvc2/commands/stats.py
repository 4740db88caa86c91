"""What `kvc2 stats` prints: sizes and counters of a running daemon as tables.

Not here: what is counted (counts.py, metrics.py) and the command itself (cli.py).
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kvc2 import config
from kvc2.client import DaemonStats
from kvc2.metrics import NOT_PUT

DIGEST_SHOWN = 12  # letters of a layout that no engine has now


def show(found: DaemonStats) -> None:
    """Print tiers, sessions, pace, hit rates and faults."""
    console = Console()
    console.print(
        f"kvc2 {found.version}, up {found.uptime_s:.0f} s: {found.blocks} blocks, "
        f"{found.holes} holes, {found.leases} leases, {found.namespaces} namespaces, "
        f"{found.metadata_bytes / 1e6:.1f} MB of metadata"
    )
    pages = Table("tier", "capacity", "pages", "free", "private", "resident", "in flight", "pinned")
    engines = [(f"gpu of {each.engine_name or each.pid}", each.pool) for each in found.sessions]
    for name, each in [*((each.tier, each) for each in found.tiers), *engines]:
        counts = (each.pages, each.free_pages, each.private_pages, each.resident_pages)
        more = (each.in_flight_pages, each.pinned_pages)
        size = f"{each.capacity_bytes / config.GB:.3f} GB"
        pages.add_row(name, size, *(str(count) for count in counts + more))
    console.print(pages)
    _print_slabs(console, found)
    _print_pace(console, found)
    _print_remote(console, found)
    _print_hit_rates(console, found)
    _print_refusals(console, found)
    _print_tenants(console, found)
    faults = Table("fault", "count")
    for name, value in found.counters.items():
        if name.startswith("faults_total{") and value:
            faults.add_row(
                name.removeprefix("faults_total{kind=").removesuffix("}"), f"{value:.0f}"
            )
    if faults.row_count:
        console.print(faults)


def _print_slabs(console: Console, found: DaemonStats) -> None:
    """Which layout has how much of arena and disk; who uses it, or the first letters of its name
    where nobody does now."""
    table = Table("layout", "tier", "slabs", "pages", "resident")
    for each in found.slabs:
        name = ", ".join(each.engines) or each.layout[:DIGEST_SHOWN]
        slabs = f"{each.slabs} x {each.slab_bytes / 1e6:.1f} MB"
        table.add_row(name, each.tier, slabs, str(each.pages), str(each.resident_pages))
    if table.row_count:
        console.print(table)


def _print_hit_rates(console: Console, found: DaemonStats) -> None:
    """What more memory would buy, beside what this much has brought."""
    table = Table("hit rate up to", "real", "x 0.5", "x 1", "x 2", "x 4", "no limit")
    for each in found.tiers:
        rates = found.hit_rates[each.tier]
        if rates.estimated:
            shares = (rates.real, *rates.estimated, found.hit_rate_unlimited)
            table.add_row(each.tier, *(f"{share:.1%}" for share in shares))
    if table.row_count:
        console.print(table)


def _print_refusals(console: Console, found: DaemonStats) -> None:
    """What tiers would not have, and how much of that was asked for again."""
    table = Table("tier", "refused", "asked for again")
    for each in found.tiers:
        counts = [
            found.counters.get(f"refused_{what}_total{{tier={each.tier}}}", 0.0)
            for what in ("blocks", "watched", "regretted")
        ]
        if counts[0]:
            share = f"{counts[2] / counts[1]:.1%}" if counts[1] else "not known"
            table.add_row(each.tier, f"{counts[0]:.0f} blocks", share)
    if table.row_count:
        console.print(table)


def _print_remote(console: Console, found: DaemonStats) -> None:
    """Whether there is a remote store, and what went there and came from there."""
    asked = found.counters.get("remote_up")
    if asked is None:
        return
    ways = ("source=cpu,target=remote", "source=remote,target=cpu")
    put, came = (found.counters.get(f"transfer_blocks_total{{{way}}}", 0.0) for way in ways)
    console.print(
        f"remote store {'is asked' if asked else 'is left alone'}: "
        f"{put:.0f} blocks put, {came:.0f} fetched"
    )
    table = Table("not put", "blocks")
    for why in NOT_PUT:
        if count := found.counters.get(f"remote_not_put_blocks_total{{why={why}}}", 0.0):
            table.add_row(why, f"{count:.0f}")
    if table.row_count:
        console.print(table)


def _print_tenants(console: Console, found: DaemonStats) -> None:
    """What declared tenants take, where they do or have a limit."""
    table = Table("tenant", "tier", "takes", "of", "blocks", "of")
    for each in found.tenants:
        if each.blocks or each.max_bytes or each.max_blocks:
            most = f"{each.max_bytes / config.GB:.3f} GB" if each.max_bytes else "any"
            takes = f"{each.bytes / config.GB:.3f} GB"
            blocks = str(each.max_blocks or "any")
            table.add_row(each.tenant, each.tier, takes, most, str(each.blocks), blocks)
    if table.row_count:
        console.print(table)


def _print_pace(console: Console, found: DaemonStats) -> None:
    """What decides whether a prefix is brought or computed; nothing before it is measured."""
    for tier in ("cpu", "disk", "remote"):
        label = f"{{tier={tier}}}"
        bandwidth = found.counters.get(f"bandwidth_bytes_per_s{label}")
        if bandwidth is not None:
            queue_s = found.counters.get(f"queue_s{label}", 0.0)
            console.print(
                f"from {tier}: {bandwidth / 1e6:.0f} MB/s, {queue_s * 1e3:.1f} ms of queue"
            )
    for each in found.sessions:
        if each.prefill_tokens_per_s:
            name = each.engine_name or each.pid
            console.print(f"{name} prefills {each.prefill_tokens_per_s:.0f} tokens/s")
