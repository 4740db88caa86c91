"""What every benchmark here prints and writes: rows, all alike, as a table and as JSON.

Absolute times drift on a shared machine; what counts is one row's `ours` beside its peers and its
limit, measured in the same run. Not responsible for measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

TABLE_COLUMNS = 120  # where the output is no terminal: wide enough for names and figures


@dataclass(frozen=True)
class Absent:
    """A peer that did not run, and why: null in JSON, the reason below the table."""

    reason: str


Value = float | Absent


@dataclass(frozen=True)
class Row:
    """One claim's figure. `ours` is the median of `repeats` samples, `spread` their extremes.

    `limit`: what the machine or the wire allows, probed in the same run. `goal`: the figure to
    reach in words, for the reader of the table; it is not in the JSON.
    """

    case: str
    unit: str
    better: Literal["higher", "lower"]
    ours: float
    spread: tuple[float, float]
    repeats: int
    load_average: float
    limit: float | None = None
    limit_name: str | None = None
    peers: Mapping[str, Value] = field(default_factory=dict)
    goal: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "unit": self.unit,
            "better": self.better,
            "ours": self.ours,
            "limit": self.limit,
            "limit_name": self.limit_name,
            "peers": {
                name: None if isinstance(value, Absent) else value
                for name, value in self.peers.items()
            },
            "spread": list(self.spread),
            "repeats": self.repeats,
            "load_average": self.load_average,
        }


def row(
    case: str,
    unit: str,
    better: Literal["higher", "lower"],
    samples: Sequence[float],
    **fields: Any,
) -> Row:
    """A Row of these samples, with the load average of now. `fields`: Row's optional ones."""
    return Row(
        case=case,
        unit=unit,
        better=better,
        ours=statistics.median(samples),
        spread=(min(samples), max(samples)),
        repeats=len(samples),
        load_average=os.getloadavg()[0],
        **fields,
    )


def beside(
    case: str,
    unit: str,
    better: Literal["higher", "lower"],
    samples: Mapping[str, Sequence[float]],
    ours: str,
) -> Row:
    """A Row of the samples named `ours`; the medians of the others are its peers."""
    peers = {name: statistics.median(of) for name, of in samples.items() if name != ours}
    return row(case, unit, better, samples[ours], peers=peers)


def parser(description: str, *, repeats: int = 5) -> argparse.ArgumentParser:
    """The flags that every benchmark takes: --repeats N and --json FILE."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--repeats", type=_positive, default=repeats, help="measurements of each case (%(default)s)"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    return made


def finish(title: str, rows: Sequence[Row], path: Path | None) -> None:
    """Print the table; write the rows to `path`, if one was given."""
    console = Console() if sys.stdout.isatty() else Console(width=TABLE_COLUMNS)
    console.print(table(title, rows))
    for each in rows:
        for name, value in each.peers.items():
            if isinstance(value, Absent):
                console.print(f"{each.case}: {name} did not run: {value.reason}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([each.as_json() for each in rows], indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def table(title: str, rows: Sequence[Row]) -> Table:
    made = Table(title=title)
    made.add_column("case", no_wrap=True)
    for name in ("ours", "min - max"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("limit", "peers", "goal"):
        made.add_column(name)
    made.add_column("load", justify="right")
    for each in rows:
        limit = "" if each.limit is None else f"{number(each.limit)} {each.limit_name}"
        peers = [
            f"{name}: {'-' if isinstance(value, Absent) else number(value)}"
            for name, value in each.peers.items()
        ]
        made.add_row(
            each.case,
            f"{number(each.ours)} {each.unit}",
            f"{number(each.spread[0])} - {number(each.spread[1])}",
            limit,
            "\n".join(peers),
            each.goal,
            f"{each.load_average:.1f}",
        )
    return made


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value
