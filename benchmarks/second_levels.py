"""What other engines keep below their memory: in our daemon, by our adapters, and in their files.

LMCache's own bench of a second level (`lmcache bench l2`) stores, looks up and loads 32 blocks a
round, and verifies what came. SGLang's HiCache controller stores and prefetches 2,048 tokens, 32
pages of 128 KiB, in each of its layouts. Ours are in the memory of a daemon, whose disk keeps a
checksum of each block; their files keep none: LMCache's by O_DIRECT, or in the page cache as they
are by default, SGLang's in the page cache. By turns in one run; milliseconds of a round. Each lives
in an environment below --venvs, made there by pip if need be.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import report
from benchmarks.connectors import vllm_with_kvc2
from benchmarks.disk_peers import SGLANG, Unavailable, environment
from benchmarks.driven import Driven
from benchmarks.lmcache_peer import Load, bench, lmcache_over, on_disk, on_kvc2
from benchmarks.processes import Daemon, end_in_order

SIZES = (64 << 10, 1 << 20)
OURS = "kvc2"
HICACHE = Path(__file__).with_name("hicache.py")
LAYOUTS = ("page_first", "layer_first", "page_first_direct")
TOKENS = 2048  # as the driver has them
LOADED = {"hit": TOKENS, "loaded": TOKENS, "equal": TOKENS}


def sglang_over(venvs: Path, vllm: Path) -> Path:
    """The python of an environment with SGLang over vLLM's. Raises Unavailable."""
    return environment(venvs / "sglang", [], [], SGLANG, over=vllm)


Samples = dict[str, dict[str, list[float]]]  # milliseconds of a case, by who it was


def of_lmcache(python: Path, folder: Path, repeats: int) -> Samples:
    """By operation and size of block."""
    samples: Samples = defaultdict(lambda: defaultdict(list))
    with daemon_in(folder) as daemon:
        for size in SIZES:
            for number in range(repeats):
                files = folder / f"{size} {number}"  # its keys are the same in each run
                cached = on_disk(files / "cached") | {"use_odirect": False}
                seconds = {
                    OURS: on_kvc2(daemon.address),
                    "its files, O_DIRECT": on_disk(files / "direct"),
                    "its files, page cache": cached,
                }
                for name, second in seconds.items():
                    for operation, told in bench(python, second, Load(size), folder).items():
                        if told["total_success"] != told["total_keys"]:
                            raise Unavailable(f"{name}: {told}")
                        case = f"lmcache {operation.lower()} {size >> 10} KiB"
                        samples[case][name].append(told["duration_p50_ms"])
                daemon.flush()
                daemon.evict("cpu", "disk")
                shutil.rmtree(files)
    return samples


def of_hicache(python: Path, folder: Path, repeats: int) -> Samples:
    """By operation and layout."""
    samples: Samples = defaultdict(lambda: defaultdict(list))
    with daemon_in(folder) as daemon:
        for layout in LAYOUTS:
            storages = {OURS: daemon.address, "its files": f"file:{folder / layout}"}
            drivers = {
                name: Driven(python, HICACHE, folder, storage, layout, "1")
                for name, storage in storages.items()
            }
            try:
                for _ in range(repeats + 1):
                    for name, driver in drivers.items():
                        for operation, milliseconds in stored_and_loaded(driver).items():
                            samples[f"hicache {operation} {layout}"][name].append(milliseconds)
            finally:
                for driver in drivers.values():
                    driver.kill()
    return {  # without the first, which makes what is made once
        case: {name: values[1:] for name, values in of.items()} for case, of in samples.items()
    }


def stored_and_loaded(driver: Driven) -> dict[str, float]:
    """Milliseconds of each, of pages that are new. Raises Unavailable where they don't come."""
    driver.ask("renew")
    times = {}
    for operation, whole in (("store", {"stored": TOKENS}), ("load", LOADED)):
        told = driver.ask(operation)
        if told != whole:
            raise Unavailable(f"{operation}: {told}")
        times[operation] = driver.ask("took")["us"] / 1e3
    return times


@contextmanager
def daemon_in(folder: Path) -> Iterator[Daemon]:
    daemon = Daemon(folder, cpu_gb=2.0, disk_gb=4.0)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.stop()


def row(case: str, samples: dict[str, list[float]]) -> report.Row:
    peers = {name: statistics.median(of) for name, of in samples.items() if name != OURS}
    return report.row(case, "ms", "lower", samples[OURS], peers=peers)


def main() -> int:
    parser = report.parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="%(default)s")
    parser.add_argument("--lmcache-python", type=Path, help="of one that has LMCache and this kvc2")
    parser.add_argument("--sglang-python", type=Path, help="of one that has SGLang and this kvc2")
    options = parser.parse_args()
    end_in_order()
    venvs, rows = options.venvs.absolute(), []
    ways = (
        (of_lmcache, options.lmcache_python, lmcache_over),
        (of_hicache, options.sglang_python, sglang_over),
    )
    try:
        for measure, given, made in ways:
            python = given or made(venvs, vllm_with_kvc2(venvs))
            with tempfile.TemporaryDirectory() as folder:
                samples = measure(python, Path(folder), options.repeats)
            rows += [row(case, of) for case, of in samples.items()]
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    report.finish("below other engines' memory", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
