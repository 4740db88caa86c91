"""LMCache's own bench of a second level, over our adapter and over its own on disk.

`lmcache bench l2` stores, looks up and loads 32 blocks a round, and verifies what came. Ours are in
the memory of a daemon, whose disk keeps a checksum of each; its own, fs_native, keeps none: a file
a block, by O_DIRECT, or in the page cache as it is by default. By turns in one run; milliseconds of
a round. LMCache lives in an environment below --venvs, made there by pip if need be.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.connectors import vllm_with_kvc2
from benchmarks.disk_peers import Unavailable
from benchmarks.lmcache_peer import Load, bench, lmcache_over, on_disk, on_kvc2
from benchmarks.processes import Daemon, end_in_order

SIZES = (64 << 10, 1 << 20)
OURS = "kvc2"


def measured(python: Path, folder: Path, load: Load, repeats: int) -> list[report.Row]:
    """Of one size of block, by operation."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    daemon = Daemon(folder, cpu_gb=1.0, disk_gb=2.0)
    try:
        daemon.wait_ready()
        cached = on_disk(folder / "cached") | {"use_odirect": False}
        seconds = {
            OURS: on_kvc2(daemon.address),
            "fs_native, O_DIRECT": on_disk(folder / "direct"),
            "fs_native, page cache": cached,
        }
        for _ in range(repeats):
            for name, second in seconds.items():
                for operation, told in bench(python, second, load, folder).items():
                    if told["total_success"] != load.objects:
                        raise Unavailable(f"{name}: {told}")
                    samples[operation][name].append(told["duration_p50_ms"])
    finally:
        daemon.stop()
    return [row(f"{name.lower()} {load.block_bytes >> 10} KiB", of) for name, of in samples.items()]


def row(case: str, samples: dict[str, list[float]]) -> report.Row:
    peers = {name: statistics.median(of) for name, of in samples.items() if name != OURS}
    return report.row(case, "ms", "lower", samples[OURS], peers=peers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="%(default)s")
    parser.add_argument("--lmcache-python", type=Path, help="of one that has LMCache and this kvc2")
    options = parser.parse_args(arguments)
    end_in_order()
    try:
        python = options.lmcache_python
        if python is None:
            venvs = options.venvs.absolute()
            python = lmcache_over(venvs, vllm_with_kvc2(venvs))
        rows = []
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(python, Path(folder), Load(size), options.repeats)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    report.finish("second levels of LMCache: a round of 32 blocks", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
