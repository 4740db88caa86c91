"""What the index costs when it is full: each call at a million and at ten million blocks.

The index is filled as requests would: 14 engines' pools over one cpu and one durable pool, several
namespaces, prompts of a shared system prompt and turns of 10 to 40 blocks, each answered twice, so
that the tree branches at every turn; page ids are as shuffled as after a week. Then requests of
2,000 blocks are matched, acquired, inserted, demoted and evicted, in an order that finds no cache
warm, under the daemon's eviction policy, with admission. A wait is what a thread spends in a short
match while another inserts, moves and evicts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import mmap
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from benchmarks import report
from kvc2 import _core
from kvc2.commands import replay

U32 = NDArray[np.uint32]
P = ParamSpec("P")
T = TypeVar("T")

PAGE_SIZE = 16
REQUEST_BLOCKS = 2_000
CHAIN_TOKENS = 32_768
SMALL_BLOCKS = 270_000  # resident, for the match that the field's peers were measured with
SMALL_REQUEST_BLOCKS = 2_048
ENGINES = 14
ENGINE_PAGES = 1 << 15
CPU_PAGES = 1 << 19
NAMESPACES = 8
SYSTEM_PROMPTS = 4  # of each namespace
SYSTEM_BLOCKS = 50
TURN_BLOCKS = (10, 40)
WINDOW = 512  # pages of a transfer
BLOCKS_PER_KEPT = 16_000  # resident for each conversation that is remembered, to be asked for again
OTHER_BLOCKS = 300_000
VOCABULARY = 150_000
CHAIN_CALLS = 20  # in a repeat
WAIT_S = 5.0
LIBC = ctypes.CDLL(None)
LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
TAIL_GOAL = "<= 1000"
GOALS = {
    "match": "<= 200",
    "acquire, hit": "",
    "release, hit": "",
    "acquire, miss": "",
    "promote": "",
    "grant": "",
    "insert": "<= 200",
    "insert, branching": "<= 200",
    "release, miss": "",
    "plan a demotion": "",
    "complete it": "",
    "evict": "",
}


@dataclass
class Samples:
    """Microseconds of single calls, by their name: processor time of the calling thread, since a
    neighbour's turn of 5 ms on a shared core would drown every 99th percentile."""

    of: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def timed(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        begin = time.thread_time_ns()
        result = call(*args, **kwargs)
        self.of[name].append((time.thread_time_ns() - begin) / 1e3)
        return result

    def medians(self, name: str, calls: int) -> list[float]:
        """Of each `calls` samples."""
        times = self.of[name]
        return [statistics.median(times[at : at + calls]) for at in range(0, len(times), calls)]


class Conversations:
    """Prompts that share beginnings; every one grows turn by turn to REQUEST_BLOCKS."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._systems = [self.tokens(SYSTEM_BLOCKS) for _ in range(NAMESPACES * SYSTEM_PROMPTS)]

    def tokens(self, blocks: int) -> U32:
        return self._random.integers(0, VOCABULARY, blocks * PAGE_SIZE, dtype=np.uint32)

    def system(self, namespace: int) -> U32:
        own = self._systems[namespace * SYSTEM_PROMPTS :][:SYSTEM_PROMPTS]
        return own[int(self._random.integers(SYSTEM_PROMPTS))]

    def turns(self) -> Iterator[tuple[int, int]]:
        """(first block, end) of each turn after the system prompt."""
        at = SYSTEM_BLOCKS
        while at < REQUEST_BLOCKS:
            end = min(at + int(self._random.integers(*TURN_BLOCKS)), REQUEST_BLOCKS)
            yield at, end
            at = end

    def shuffled(self, pages: U32) -> U32:
        return self._random.permutation(pages)


@dataclass(frozen=True)
class Kept:
    namespace: int
    engine: int
    tokens: U32


class House:
    """A filled index, and requests to it."""

    def __init__(self, blocks: int, policy: str, seed: int = 1) -> None:
        self.index = _core.Index(policy=policy, admission=True)
        self.blocks = blocks
        self.talk = Conversations(seed)
        self.disk = self._pool(None, durable=True, pages=blocks + blocks // 8 + WINDOW)
        self.cpu = self._pool(self.disk, durable=False, pages=CPU_PAGES)
        self.engines = [
            self._pool(self.cpu, durable=False, pages=ENGINE_PAGES) for _ in range(ENGINES)
        ]
        for number in range(NAMESPACES):
            self.index.open_namespace(bytes([number]) * 32, PAGE_SIZE)
        self.kept: list[Kept] = []

    def _pool(self, below: int | None, *, durable: bool, pages: int) -> int:
        pool = self.index.add_pool(
            page_size=PAGE_SIZE, pages_per_slab=pages, below=below, durable=durable
        )
        self.index.add_slab(pool)
        self.index.give_back(pool, self.talk.shuffled(self.index.grant(pool, pages)))
        return pool

    def fill(self) -> None:
        """Conversations until so many blocks are there; the last are remembered."""
        remembered = self.blocks // BLOCKS_PER_KEPT
        conversation = 0
        while self.index.pool_counts(self.disk).resident < self.blocks:
            namespace, engine = conversation % NAMESPACES, self.engines[conversation % ENGINES]
            self.kept.append(Kept(namespace, engine, self.converse(namespace, engine)))
            del self.kept[:-remembered]
            conversation += 1

    def converse(self, namespace: int, engine: int) -> U32:
        prompt = np.concatenate(
            [self.talk.system(namespace), self.talk.tokens(REQUEST_BLOCKS - SYSTEM_BLOCKS)]
        )
        for begin, end in self.talk.turns():
            beside = self.talk.tokens(end - begin)  # an answer that was asked for again
            for turn in (beside, prompt[begin * PAGE_SIZE : end * PAGE_SIZE]):
                self.request(namespace, engine, np.concatenate([prompt[: begin * PAGE_SIZE], turn]))
        for pool in (engine, self.cpu):
            self.demote(pool, Samples())
        return prompt

    def request(self, namespace: int, engine: int, tokens: U32) -> None:
        blocks = len(tokens) // PAGE_SIZE
        lease = self.index.acquire(namespace, engine, tokens, blocks)
        held = len(lease.pages)
        pages = self.index.grant(engine, blocks - held)
        self.index.commit(lease.id, held, tokens[held * PAGE_SIZE :], pages)
        self.index.release(lease.id)

    def acquire(self, like: Kept, tokens: U32) -> _core.Lease:
        return self.index.acquire(like.namespace, like.engine, tokens, REQUEST_BLOCKS)

    def bring(self, lease: int, blocks: int, samples: Samples) -> int:
        """Load and promote what the lease matched; how many blocks it holds then."""
        while (load := self.index.next_load(lease, WINDOW)) is not None:
            self.index.complete(load.id, len(load.source_pages))  # type: ignore[union-attr]
        while (plan := samples.timed("promote", self.index.promote, lease)) is not None:
            self.index.complete(plan.id, len(plan.source_pages))
        held = len(self.index.lease(lease).pages)
        if held != blocks:
            raise RuntimeError(f"{held} of {blocks} matched blocks came up")
        return held

    def demote(self, pool: int, samples: Samples) -> None:
        plan = samples.timed("plan a demotion", self.index.plan_demote, pool, WINDOW)
        while plan is not None:
            pages = len(plan.source_pages)
            samples.timed("complete it", self.index.complete, plan.id, pages)
            plan = samples.timed("plan a demotion", self.index.plan_demote, pool, WINDOW)

    def kept_bytes(self) -> int:
        return sum(each.tokens.nbytes for each in self.kept)


class Requests:
    """Requests of REQUEST_BLOCKS to a filled house, each call of them timed."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._number = 0
        self._noise = house.talk.tokens(REQUEST_BLOCKS)

    def repeat(self, calls: int) -> Samples:
        samples = Samples()
        for _ in range(calls):
            self._number += 1
            old = self._house.kept[self._number % len(self._house.kept)]
            self._ask_again(old, samples)
            fresh = self._noise ^ np.uint32(self._number << 18)  # other tokens at little cost
            self._insert("insert", old, fresh, samples)
            begin, end = PAGE_SIZE * SYSTEM_BLOCKS, PAGE_SIZE * REQUEST_BLOCKS
            branch = np.concatenate([old.tokens[:begin], fresh[begin:end] + np.uint32(1)])
            self._insert("insert, branching", old, branch, samples)
        return samples

    def _ask_again(self, old: Kept, samples: Samples) -> None:
        index = self._house.index
        found = samples.timed("match", index.match, old.namespace, old.engine, old.tokens)
        if found.blocks != REQUEST_BLOCKS:
            raise RuntimeError(f"matched {found.blocks} of {REQUEST_BLOCKS} blocks")
        lease = samples.timed("acquire, hit", self._house.acquire, old, old.tokens)
        samples.timed("release, hit", index.release, lease.id)

    def _insert(self, name: str, old: Kept, tokens: U32, samples: Samples) -> None:
        """Blocks that nobody knows: committed and demoted; as many of the coldest are evicted."""
        index, engine = self._house.index, old.engine
        lease = samples.timed("acquire, miss", self._house.acquire, old, tokens)
        held = self._house.bring(lease.id, lease.matched, samples)
        pages = samples.timed("grant", index.grant, engine, REQUEST_BLOCKS - held)
        rest = tokens[held * PAGE_SIZE :]
        answers = samples.timed(name, index.commit, lease.id, held, rest, pages)
        if answers.any() or len(answers) != REQUEST_BLOCKS - held:
            raise RuntimeError(f"{len(answers)} blocks committed, answers {set(answers.tolist())}")
        samples.timed("release, miss", index.release, lease.id)
        for pool in (engine, self._house.cpu):
            self._house.demote(pool, samples)
        evicted = samples.timed("evict", index.evict, self._house.disk, REQUEST_BLOCKS)
        if len(evicted.pages) != REQUEST_BLOCKS:
            raise RuntimeError(f"evicted {len(evicted.pages)} of {REQUEST_BLOCKS} pages")


def waits_beside_mover(house: House, moved: House, seconds: float) -> Samples:
    """Short matches in `house` while another thread inserts, moves and evicts in `moved`.

    "worked" is the processor time of the other thread during a match: what it does while it holds
    the lock, and a little between two calls. "passed" is the time on the clock, of which on a
    shared machine the most is somebody else's turn on the processor, of either thread.
    """
    stop = threading.Event()
    failed: list[BaseException] = []

    def move() -> None:
        requests = Requests(moved)
        try:
            while not stop.is_set():
                requests.repeat(1)
        except BaseException as error:
            failed.append(error)

    mover = threading.Thread(target=move)
    waits = Samples()
    kept = itertools.cycle(house.kept[::5])
    mover.start()
    assert mover.ident is not None
    clock = time.pthread_getcpuclockid(mover.ident)
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        worked = time.clock_gettime_ns(clock)
        old = next(kept)
        house.index.match(old.namespace, old.engine, old.tokens[: PAGE_SIZE * SYSTEM_BLOCKS])
        waits.of["worked"].append((time.clock_gettime_ns(clock) - worked) / 1e3)
        waits.of["passed"].append((time.perf_counter() - begin) * 1e6)
        time.sleep(1e-4)  # or it would starve the mover of the lock and of the interpreter
    stop.set()
    mover.join()
    if failed:
        raise failed[0]
    return waits


class DictTree:
    """The peer: a Python dict a block, keyed by the block's tokens."""

    def __init__(self) -> None:
        self.blocks = 0
        self._root: dict[bytes, dict] = {}  # type: ignore[type-arg]

    def insert(self, tokens: U32) -> None:
        at = self._root
        for block in blocks_of(tokens):
            if block not in at:
                at[block] = {}
                self.blocks += 1
            at = at[block]

    def match(self, tokens: U32) -> int:
        at, matched = self._root, 0
        for block in blocks_of(tokens):
            if block not in at:
                break
            at, matched = at[block], matched + 1
        return matched


def blocks_of(tokens: U32) -> Iterator[bytes]:
    data, size = tokens.tobytes(), PAGE_SIZE * 4
    return (data[at : at + size] for at in range(0, len(data), size))


def operation_rows(house: House, name: str, flags: argparse.Namespace) -> list[report.Row]:
    requests = Requests(house)
    requests.repeat(flags.calls // 4)
    repeats = [requests.repeat(flags.calls) for _ in range(flags.repeats)]
    rows = []
    for call, goal in GOALS.items():
        times = [np.asarray(each.of[call]) for each in repeats]
        medians = [float(np.median(each)) for each in times]
        tails = [float(np.percentile(each, 99)) for each in times]
        rows += [
            report.row(f"{call}, {name}", "us", "lower", medians, goal=goal),
            report.row(f"{call}, p99, {name}", "us", "lower", tails, goal=TAIL_GOAL),
        ]
    return rows


def wait_rows(house: House, name: str, flags: argparse.Namespace) -> list[report.Row]:
    other = House(OTHER_BLOCKS, flags.policy)
    other.fill()
    waits, elsewhere = [], []
    for _ in range(flags.repeats):
        waits.append(waits_beside_mover(house, house, WAIT_S / flags.repeats))
        elsewhere.append(waits_beside_mover(house, other, WAIT_S / flags.repeats))
    rows = []
    for time_kind, percent in (
        ("worked", 50),
        ("worked", 99),
        ("worked", 100),
        ("passed", 50),
        ("passed", 99),
    ):
        values, peers = (
            [float(np.percentile(each.of[time_kind], percent)) for each in side]
            for side in (waits, elsewhere)
        )
        rows.append(
            report.row(
                f"wait, {time_kind}, p{percent}, {name}",
                "us",
                "lower",
                values,
                peers={"mover in another index": statistics.median(peers)},
                goal=TAIL_GOAL if time_kind == "worked" else "",
            )
        )
    return rows


def house_rows(blocks: int, flags: argparse.Namespace) -> list[report.Row]:
    name = f"{blocks / 1e6:g} M"
    before = resident_bytes()
    house = House(blocks, flags.policy)
    house.fill()
    gc.collect()
    counts = house.index.counts()
    held = (resident_bytes() - before - house.kept_bytes()) / counts.blocks - 4 * PAGE_SIZE
    print(f"{name}: {counts.blocks} blocks in {counts.nodes} nodes", file=sys.stderr)
    rows = operation_rows(house, name, flags)
    rows += wait_rows(house, name, flags)
    metadata = [counts.metadata_bytes / counts.blocks]
    rows.append(report.row(f"bytes a block, {name}", "B", "lower", metadata, goal="<= 200"))
    rows.append(report.row(f"memory a block, {name}", "B", "lower", [held], goal="<= 200"))
    return rows


def match_rows(flags: argparse.Namespace) -> list[report.Row]:
    """A match of 2,048 blocks beside what a Python tree and a memcmp take for the same tokens."""
    house, tree = House(SMALL_BLOCKS, flags.policy), DictTree()
    house.fill()
    prompts = [Kept(n % NAMESPACES, house.engines[0], house.talk.tokens(SMALL_REQUEST_BLOCKS))
               for n in range(32)]  # fmt: skip
    for each in prompts:
        house.request(each.namespace, each.engine, each.tokens)
        tree.insert(each.tokens)
    while tree.blocks < SMALL_BLOCKS:
        tree.insert(house.talk.tokens(SMALL_REQUEST_BLOCKS))
    copies = [each.tokens.copy() for each in prompts]
    samples = Samples()
    for number in range(flags.repeats * len(prompts)):
        each, copy = prompts[number % len(prompts)], copies[number % len(prompts)]
        data, size = each.tokens.ctypes.data, each.tokens.nbytes
        samples.timed("ours", house.index.match, each.namespace, each.engine, each.tokens)
        samples.timed("tree", tree.match, each.tokens)
        samples.timed("memcmp", LIBC.memcmp, data, copy.ctypes.data, size)
    return [
        report.row(
            "match of 2,048 blocks, 0.27 M",
            "us",
            "lower",
            samples.medians("ours", len(prompts)),
            limit=statistics.median(samples.of["memcmp"]),
            limit_name="memcmp",
            peers={"Python, a dict a block": statistics.median(samples.of["tree"])},
            goal="<= 60",
        )
    ]


def chain_rows(flags: argparse.Namespace) -> list[report.Row]:
    tokens, samples = Conversations(2).tokens(CHAIN_TOKENS // PAGE_SIZE), Samples()
    for _ in range(flags.repeats * CHAIN_CALLS):
        samples.timed("ours", _core.chain_keys, bytes(32), tokens, PAGE_SIZE)
        samples.timed("python", chain_in_python, tokens)
        samples.timed("once", xxhash.xxh3_128_digest, tokens.data)
    return [
        report.row(
            "chain_keys of 32,768 tokens",
            "us",
            "lower",
            samples.medians("ours", CHAIN_CALLS),
            limit=statistics.median(samples.of["once"]),
            limit_name="xxh3 of all at once",
            peers={"Python and xxhash": statistics.median(samples.of["python"])},
            goal="<= 40",
        )
    ]


def chain_in_python(tokens: U32) -> list[bytes]:
    key, keys = bytes(16), []
    for block in blocks_of(tokens):
        key = xxhash.xxh3_128_digest(key + block)
        keys.append(key)
    return keys


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def main() -> int:
    parser = report.parser(__doc__ or "")
    parser.add_argument(
        "--blocks",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1_000_000, 10_000_000],
        metavar="N,N",
        help="resident blocks (1000000,10000000)",
    )
    parser.add_argument(
        "--calls", type=int, default=100, help="of each kind in a repeat (%(default)s)"
    )
    parser.add_argument(
        "--policy", choices=replay.POLICIES, default=replay.POLICIES[0], help="(%(default)s)"
    )
    flags = parser.parse_args()
    sys.setswitchinterval(1e-4)  # a thread back from the core waits no longer for the interpreter
    rows = [row for blocks in flags.blocks for row in house_rows(blocks, flags)]
    rows += [*chain_rows(flags), *match_rows(flags)]
    report.finish("The index, in pages of 16 tokens", rows, flags.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
