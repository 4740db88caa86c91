"""What a hit in memory takes while the disk is slow, fails now and then, or both: its p99 against
that on a sound disk in the same run, for hits in the gpu and in the cpu tier.

One session asks for prompts that memory holds: the whole call, and for the cpu tier until the last
layer has arrived. Beside it another session, at a fixed pace, commits new prompts, which go to disk
behind, and asks for old ones, which only the disk has. The disk is slowed and made to fail in the
daemon's process (slow_daemon.py). Sound and faulty disks take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.processes import SlowDaemon
from benchmarks.slow_daemon import Mode
from kvc2.client import Client, Detached, LeaseCommit, PoolMemory, SessionOptions
from kvc2.errors import Kvc2Error
from kvc2.identity import Identity
from kvc2.layout import layer_major

SOUND = "sound"
MODES = {
    SOUND: Mode(),
    "slow": Mode(bytes_per_s=10e6, writes_too=True),
    "failing": Mode(failing=0.01),
    "slow_and_failing": Mode(bytes_per_s=10e6, writes_too=True, failing=0.01),
}
PAGE_SIZE, LAYERS, SEGMENT_BYTES = 16, 2, 8192  # 32 KiB a block
BLOCKS = 32  # of a prompt: 1 MiB
HOT = 6  # prompts in the cpu tier, of which the gpu pool holds two at most
CPU_GB = 0.134  # about a hundred prompts: the older ones lie on disk alone
PACE_S = 0.02  # of the other session
CALLS = 1500  # pairs in a repeat; a sample is the p99 of a kind
TIERS = ("gpu", "cpu")
GOAL = "<= 2"
IDENTITY = Identity(
    weights_digest="ab" * 32,
    architecture="benchmark",
    dtypes=(("attention", "bfloat16"),),
    kv_dtype="bfloat16",
    layers=LAYERS,
    kv_heads=1,
    head_size=SEGMENT_BYTES // PAGE_SIZE // 2,
    rope_theta=1e4,
    page_size=PAGE_SIZE,
)

Samples = dict[str, list[float]]  # "gpu", "cpu" -> seconds


class BareEngine:
    """An engine's session without an engine: its KV is whatever lies in the pool."""

    def __init__(self, daemon: SlowDaemon, name: str, pages: int) -> None:
        layout = layer_major(LAYERS, pages, segment_bytes=SEGMENT_BYTES, page_size=PAGE_SIZE)
        self._pool = PoolMemory(pages * layout.payload_bytes)
        self._client = Client(
            daemon.address,
            pool=self._pool,
            layout=layout,
            engine=self,
            options=SessionOptions(name),
        )
        if not self._client.wait_attached(20):
            raise RuntimeError(f"not attached: {self._client.last_refusal}\n{daemon.tail()}")
        self._namespace = self._client.open_namespace(IDENTITY.encode())
        self._count = 0

    def kept_pages(self) -> NDArray[np.uint32]:
        return np.zeros(0, np.uint32)

    def on_attached(self, granted: NDArray[np.uint32]) -> None:
        pass

    def on_attach_failed(self, error: Kvc2Error) -> None: ...

    def on_detached(self, detached: Detached) -> None:
        print(f"detached: {detached}", file=sys.stderr)

    def close(self) -> None:
        self._client.close()
        self._pool.close()

    def ask(self, tokens: NDArray[np.uint32]) -> tuple[float, str]:
        """A request, whose missing blocks are committed. Seconds until its prefix was there whole,
        and the slowest tier that it came from: "" when memory did not have all of it."""
        self._count += 1
        name, client = b"request-%d" % self._count, self._client
        begin = time.perf_counter()
        found = client.acquire(self._namespace, name, tokens)
        came = not found.transfer or client.wait_layer(found.transfer, LAYERS - 1, 10)
        took_s = time.perf_counter() - begin
        held = found.prefix_pages.size
        if held < BLOCKS:
            granted = client.grant(BLOCKS - held)
            rest = tokens[held * PAGE_SIZE : (held + granted.size) * PAGE_SIZE]
            if rest.size:
                client.commit([LeaseCommit(name, held, rest, granted)])
        client.release([name])
        whole = came and held == BLOCKS and not found.tiers.disk
        return took_s, ("cpu" if found.tiers.cpu else "gpu") if whole else ""


class Beside:
    """The other session: PACE_S apart, a new prompt, then an old one. Until it is closed."""

    def __init__(self, daemon: SlowDaemon) -> None:
        self._session = BareEngine(daemon, "beside", 4 * BLOCKS)
        self._stopped = threading.Event()
        self._random = np.random.default_rng(2)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        asked: list[int] = []
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due = max(due + PACE_S, time.monotonic())
            new = len(asked) < 10 or self._random.random() < 0.5
            seed = len(asked) + 1000 if new else int(self._random.choice(asked))
            try:
                self._session.ask(prompt(seed))
            except Kvc2Error as error:
                print(f"beside: {error}", file=sys.stderr)
            if new:
                asked.append(seed)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._session.close()


def prompt(seed: int) -> NDArray[np.uint32]:
    found = np.random.default_rng(seed).integers(0, 50_000, BLOCKS * PAGE_SIZE + 1)
    return found.astype(np.uint32)


def hits(session: BareEngine) -> Samples:
    """CALLS prompts, each asked for twice: the gpu pool, too small for all, mostly has it only the
    second time. One that memory had lost is no hit; that one in ten is not, is an error."""
    found: Samples = defaultdict(list)
    for number in range(CALLS):
        for _ in range(2):
            took_s, tier = session.ask(prompt(number % HOT))
            found[tier].append(took_s)
    lost = len(found.pop("", []))
    if lost > CALLS // 5 or min(len(found[tier]) for tier in TIERS) < CALLS // 4:
        raise RuntimeError(f"{lost} of {2 * CALLS} requests were not served from memory")
    return found


def p99_ms(seconds: list[float]) -> float:
    return float(np.quantile(seconds, 0.99)) * 1e3


def measure(folder: Path, repeats: int) -> tuple[dict[str, Samples], dict[str, float]]:
    """Milliseconds of p99 by mode and tier, a sample a repeat; the daemon's faults at the end."""
    found: dict[str, Samples] = {name: defaultdict(list) for name in MODES}
    with ExitStack() as stack:
        daemon = SlowDaemon(folder, cpu_gb=CPU_GB)
        stack.callback(daemon.stop)
        daemon.wait_ready()
        session = BareEngine(daemon, "hot", 2 * BLOCKS)
        stack.callback(session.close)
        stack.callback(Beside(daemon).close)
        for number in range(10 * HOT):
            session.ask(prompt(number % HOT))
        hits(session)
        for number in range(repeats):
            for name, mode in MODES.items():
                mode.write(folder)
                for tier, seconds in hits(session).items():
                    found[name][tier].append(p99_ms(seconds))
            print(f"{number + 1} of {repeats} done", file=sys.stderr, flush=True)
        Mode().write(folder)
        counters = daemon.admin.stats().counters
        names = [each for each in counters if each.startswith("faults_total") and counters[each]]
        return found, {each: counters[each] for each in names}


def rows_of(name: str, samples: Samples, sound: Samples) -> list[report.Row]:
    rows = []
    for tier in TIERS:
        pairs = zip(samples[tier], sound[tier], strict=True)
        ratios = [faulty_ms / sound_ms for faulty_ms, sound_ms in pairs]
        peers = {
            f"p99 ms, {name}": statistics.median(samples[tier]),
            f"p99 ms, {SOUND}": statistics.median(sound[tier]),
        }
        case = f"p99_{tier}_hit_disk_{name}"
        rows.append(report.row(case, "x", "lower", ratios, peers=peers, goal=GOAL))
    return rows


def main() -> int:
    flags = report.parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="kvc2-faulty-") as name:
        found, faults = measure(Path(name), flags.repeats)
    rows = [
        row
        for name, samples in found.items()
        if name != SOUND
        for row in rows_of(name, samples, found[SOUND])
    ]
    report.finish("p99 of memory hits beside a bad disk, against a sound one", rows, flags.json)
    print("faults:", ", ".join(f"{name} {count:.0f}" for name, count in faults.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
