"""`kvc2 replay`: how big a cache a trace needs, as a table and a plot.

Not responsible for reading traces (traces.py) or driving the index (replay.py).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvc2 import errors
from kvc2.commands import replay
from kvc2.commands.traces import Trace


@dataclass(frozen=True)
class Size:
    """Rates are shares of all input tokens."""

    share: float
    blocks: int
    tokens: int
    hit_rate: float
    best: float


def parse_shares(text: str) -> list[float]:
    """Raises InvalidConfig unless it is shares in (0, 1], by commas."""
    try:
        shares = [float(each) for each in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise errors.InvalidConfig("capacity", text, "shares above 0 and up to 1, by commas")
    return sorted(set(shares))


def measure(trace: Trace, shares: list[float], policy: str, *, quiet: bool) -> list[Size]:
    """Replays the trace at each size. Unless `quiet`, stderr has a progress bar, or a line for each
    size where it is no terminal."""
    sizes: list[Size] = []
    terminal = sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), disable=quiet or not terminal)
    with bar:
        task = bar.add_task("replaying", total=len(shares) * len(trace))
        for share in shares:
            blocks = max(round(share * trace.blocks), 1)
            rate = replay.hit_rate(
                trace, blocks, policy, progress=lambda done: bar.advance(task, done)
            )
            best = replay.best_hit_rate(trace, blocks)
            sizes.append(Size(share, blocks, blocks * trace.block_tokens, rate, best))
            if not quiet and not terminal:
                done = f"{len(sizes)} of {len(shares)} sizes"
                print(f"replayed {trace.name}, {done}: {blocks} blocks", file=sys.stderr)
    return sizes


def print_table(trace: Trace, sizes: list[Size], policy: str) -> None:
    made = Table(
        title=f"{trace.name}: {len(trace)} requests, {int(trace.input_tokens.sum())} tokens"
    )
    for name in ("share of all blocks", "blocks", "tokens", f"hit rate, {policy}", "best possible"):
        made.add_column(name, justify="right")
    for each in sizes:
        made.add_row(
            f"{each.share:.1%}",
            f"{each.blocks}",
            f"{each.tokens}",
            f"{each.hit_rate:.1%}",
            f"{each.best:.1%}",
        )
    Console().print(made)
    print("Bytes: tokens times the bytes of KV that a token takes in your model.")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        allowed = "a path only where matplotlib is installed: pip install 'kvc2[plot]'"
        raise errors.InvalidConfig("plot", "PNG", allowed) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(path: Path) -> None:
    """Raises InvalidConfig if the plot could not be drawn: before minutes of replaying."""
    _pyplot()
    if not path.parent.is_dir():
        raise errors.InvalidConfig("plot", str(path), "a file in a folder that exists")


def draw(trace: Trace, sizes: list[Size], policy: str, path: Path) -> None:
    figure, axes = _pyplot().subplots()
    tokens = [each.tokens for each in sizes]
    axes.plot(tokens, [100 * each.hit_rate for each in sizes], marker="o", label=policy)
    axes.plot(tokens, [100 * each.best for each in sizes], "--", label="best possible (Belady)")
    axes.set(xscale="log", xlabel="capacity, tokens", ylabel="tokens hit, %", title=trace.name)
    axes.legend()
    figure.savefig(path)
