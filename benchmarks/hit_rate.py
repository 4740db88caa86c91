"""What each eviction policy brings of real traces: token hit rate by trace, policy and capacity.

Example: python -m benchmarks.hit_rate --traces DIR --capacity 0.01,0.05,0.1,0.25,0.5 --json FILE
A capacity is a share of the trace's distinct blocks. The real index is driven, without bytes: one
pool in which clients store copies, and which may refuse them (--admission of the daemon), beside
the same without refusals. The limit is Belady's with bypass, which knows the future. A figure is
exact under a seed; the spread is over --seeds of `hazard`, which the others don't have.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks import report
from kvc2.commands import replay, traces

OURS = replay.POLICIES[0]
ENDINGS = (".kvt.npz", ".jsonl", ".jsonl.zst")


def files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
    if not found:
        raise SystemExit(f"--traces {folder}: no file that ends with {', '.join(ENDINGS)}")
    return found


def measure(trace: traces.Trace, share: float, policies: list[str], seeds: int) -> report.Row:
    capacity = max(round(share * trace.blocks), 1)
    ours: list[float] = []
    takes_all: list[float] = []
    for seed in range(seeds):
        for found, admission in ((ours, True), (takes_all, False)):
            rate = replay.hit_rate(trace, capacity, OURS, seed=seed, admission=admission)
            found.append(100 * rate)
    rates = {f"{OURS}, takes all": statistics.median(takes_all)}
    rates |= {each: 100 * replay.hit_rate(trace, capacity, each) for each in policies}
    return report.row(
        f"hit rate {trace.name} {share:.0%}",
        "%",
        "higher",
        ours,
        limit=100 * replay.best_hit_rate(trace, capacity),
        limit_name="belady with bypass",
        peers=rates,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True, help="folder of traces")
    parser.add_argument("--capacity", default="0.01,0.05,0.1,0.25,0.5", help="shares, by commas")
    parser.add_argument(
        "--policies", default=",".join(replay.POLICIES[1:]), help="peers, by commas"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of hazard (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    unknown = set(options.policies.split(",")) - set(replay.POLICIES)
    if unknown:
        parser.error(f"--policies {','.join(sorted(unknown))}: of {', '.join(replay.POLICIES)}")
    policies = [each for each in options.policies.split(",") if each != OURS]
    rows = []
    for path in files(options.traces):
        trace = traces.read(path)
        shares = map(float, options.capacity.split(","))
        rows += [measure(trace, share, policies, options.seeds) for share in shares]
    report.finish("Hit rates", rows, options.json)


if __name__ == "__main__":
    main()
