"""How soon a daemon serves again what its disk holds, after SIGTERM and after kill -9.

Example: python -m benchmarks.restart --blocks 100000 --json build/bench/restart.json
A start is over when the daemon answers; then the first and the last prompt that were stored must
match whole. Beside it a start on an empty disk, in turn. The blocks are small (8 KiB a page): a
restart reads records, no slabs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.processes import Daemon
from benchmarks.rpc import BLOCKS, PAGE_SIZE, TOKENS, BareEngine

ARENA_GB = 0.25
FLUSH_EVERY = 4  # prompts


def prompt(number: int) -> NDArray[np.uint32]:
    return np.random.default_rng(number).integers(0, 50_000, TOKENS, dtype=np.uint32)


def matched_blocks(session: BareEngine, number: int) -> int:
    found = session.client.match(session.namespace, prompt(number))
    return found.matched_tokens // PAGE_SIZE


def fill(folder: Path, blocks: int, disk_gb: float) -> int:
    """Store at least `blocks` on disk; how many prompts that is."""
    daemon = Daemon(folder, cpu_gb=ARENA_GB, disk_gb=disk_gb)
    prompts = -(-blocks // BLOCKS)
    try:
        daemon.wait_ready()
        session = BareEngine(daemon, "restart")
        for number in range(prompts):
            session.store(b"%d" % number, prompt(number))
            if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                daemon.flush()
                print(f"{(number + 1) * BLOCKS} of {blocks} blocks", file=sys.stderr)
        daemon.flush()
        session.close()
    finally:
        daemon.stop()
    return prompts


def start_s(folder: Path, disk_gb: float, *, prompts: int, kill: bool) -> float:
    """Seconds until the daemon answers. RuntimeError unless the first and the last prompt of those
    that were stored match then."""
    begin = time.perf_counter()
    daemon = Daemon(folder, cpu_gb=ARENA_GB, disk_gb=disk_gb)
    try:
        daemon.wait_ready()
        seconds = time.perf_counter() - begin
        session = BareEngine(daemon, "restart")
        for number in {0, prompts - 1} if prompts else ():
            found = matched_blocks(session, number)
            if found != BLOCKS - 1:
                raise RuntimeError(f"prompt {number} matches {found} of {BLOCKS - 1} blocks")
        session.close()
    finally:
        daemon.kill() if kill else daemon.stop()
    return seconds


def main() -> int:
    flags = report.parser(__doc__ or "")
    flags.add_argument("--blocks", type=int, default=100_000, help="on disk (%(default)s)")
    options = flags.parse_args()
    disk_gb = max(1.0, options.blocks * 12e3 / 1e9)
    starts: dict[bool, list[float]] = {True: [], False: []}
    empty = []
    with tempfile.TemporaryDirectory(prefix="kvc2-restart-") as name:
        full, fresh = Path(name) / "full", Path(name) / "fresh"
        full.mkdir()
        prompts = fill(full, options.blocks, disk_gb)
        for number in range(options.repeats):
            for kill in (True, False):  # how the start before it had ended: the other way
                starts[not kill].append(start_s(full, disk_gb, prompts=prompts, kill=kill))
            place = fresh / str(number)
            place.mkdir(parents=True)
            empty.append(start_s(place, disk_gb, prompts=0, kill=False))
    rows = [
        report.row(
            f"start with {prompts * BLOCKS} blocks, after {'kill -9' if killed else 'SIGTERM'}",
            "s",
            "lower",
            samples,
            limit=float(np.median(empty)),
            limit_name="an empty disk",
            goal="< 1",
        )
        for killed, samples in starts.items()
    ]
    report.finish("Ready after a restart", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
