"""What hints add on a trace with sessions and think times: token hit rate by hint and capacity.

Example: python -m benchmarks.hints --trace DIR/agentic_coding_dev.kvt.npz --json FILE
The real index is driven, without bytes, on the trace's clock. A session's last request says
`session_end`. Every other one announces its true wait rounded up to a power of two, which no client
knows so well: an upper bound of what `expect_return_within_s` brings. With an error, the power is
off by up to so many octaves either way, evenly. No request has a priority.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from kvc2 import _core, errors
from kvc2.commands import replay, traces

OCTAVES_MAX = 20  # twelve days: nothing here waits longer


@dataclass(frozen=True)
class Times:
    """Of each request: when it came, and how long until the next one of its session (or inf)."""

    at: NDArray[np.float64]
    wait: NDArray[np.float64]


@dataclass(frozen=True)
class Hinting:
    """What the clients say. `error`: octaves that an announced wait is off by; None: none is."""

    name: str
    ends: bool = False
    error: int | None = None


HINTINGS = (
    Hinting("none"),
    Hinting("session_end", ends=True),
    Hinting("return, exact", error=0),
    Hinting("return, +-2 octaves", error=2),
    Hinting("return, +-4 octaves", error=4),
    Hinting("both, exact", ends=True, error=0),
    Hinting("both, +-2 octaves", ends=True, error=2),
)


def times(path: Path) -> Times:
    with np.load(path, allow_pickle=False) as file:
        if not {"t", "session"} <= set(file):
            raise errors.InvalidConfig("trace", str(path), "a kvt file with t and session")
        at, sessions = file["t"].astype(np.float64), file["session"].tolist()
    wait = np.full(len(at), np.inf)
    last: dict[int, int] = {}
    for i, session in enumerate(sessions):
        if session in last:
            wait[last[session]] = at[i] - at[last[session]]
        last[session] = i
    return Times(at, wait)


def said(waits: Times, hinting: Hinting, seed: int) -> list[_core.Hints]:
    over = np.isinf(waits.wait)
    octaves = np.ceil(np.log2(np.clip(waits.wait, 1, 2**OCTAVES_MAX))).astype(int)
    if hinting.error:
        rng = np.random.default_rng(seed)
        octaves += rng.integers(-hinting.error, hinting.error + 1, len(octaves))
    announced = 2 ** np.clip(octaves, 0, OCTAVES_MAX)
    return [
        _core.Hints(
            session_end=bool(end and hinting.ends),
            expect_return_within_s=0 if end or hinting.error is None else int(within),
        )
        for end, within in zip(over, announced, strict=True)
    ]


def hit_rate(
    trace: traces.Trace,
    capacity: int,
    policy: str,
    clock: Times,
    hints: list[_core.Hints],
    seed: int,
) -> float:
    """In %, as replay.hit_rate, on the trace's clock; the hints are said at the release."""
    index = _core.Index(policy=policy, seed=seed)
    pool = index.add_pool(page_size=1, pages_per_slab=capacity, below=None, durable=False)
    index.add_slab(pool)
    space = index.open_namespace(replay.NAMESPACE, 1)
    hits = 0
    for i in range(len(trace)):
        index.advance(int(clock.at[i]) + 1)
        blocks = trace.request(i)
        lease = index.acquire(space, pool, blocks, len(blocks))
        hits += lease.matched
        pages = index.grant(pool, len(blocks) - lease.matched)
        end = lease.matched + len(pages)
        if len(pages):
            index.commit(lease.id, lease.matched, blocks[lease.matched : end], pages)
        index.release(lease.id, hints[i])
    return 100 * hits * trace.block_tokens / max(int(trace.input_tokens.sum()), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True, help="*.kvt.npz with t and session")
    parser.add_argument("--capacity", default="0.01,0.05,0.1", help="shares, by commas")
    parser.add_argument("--seeds", type=int, default=4, help="of the policy and of the errors")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    trace, clock = traces.read(options.trace), times(options.trace)
    rows = []
    for share in map(float, options.capacity.split(",")):
        capacity = max(round(share * trace.blocks), 1)
        limit = 100 * replay.best_hit_rate(trace, capacity)
        for hinting in HINTINGS:
            rates: dict[str, list[float]] = {"hazard": [], "lru": []}
            for seed in range(options.seeds):
                hints = said(clock, hinting, seed)
                for policy, found in rates.items():
                    found.append(hit_rate(trace, capacity, policy, clock, hints, seed))
            rows.append(
                report.row(
                    f"{trace.name} {share:.0%}, {hinting.name}",
                    "%",
                    "higher",
                    rates["hazard"],
                    limit=limit,
                    limit_name="belady with bypass",
                    peers={"lru": statistics.median(rates["lru"])},
                )
            )
    report.finish("What hints add", rows, options.json)


if __name__ == "__main__":
    main()
