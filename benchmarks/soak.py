"""Everything at once, for as long as is wanted: does an answer go wrong, does something leak?

A daemon and two engines serve users that vanish, stall and send garbage (soak_users.py), while the
daemon and an engine are killed and frozen, tiers evicted and bytes flipped on disk, in five equal
parts that each have the same faults. Every answer is compared with that of an engine without a
cache. After each part the users rest and what is held is counted; one engine is never killed, so
that what it keeps would be seen.

Exit code 1: an answer was wrong or none came, a process ended by itself, leases or pages stayed
taken, memory, descriptors or threads grew, or the last fifth had under 0.9 of the first's tokens a
second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.processes import Daemon, Engine, Process, ProcessError, end_in_order
from benchmarks.soak_users import Told, Users, truth
from engine import demo_model
from kvc2.errors import Kvc2Error

PARTS = 5
FROZEN_S = (0.5, 4.5)  # a session ends after 3 s of silence
FLIPS = 64  # bytes of the disk's slabs in one act
IDLE_S = 60.0  # until nothing is held any more
SLOWEST = 0.9  # of the first part's tokens a second
GROWTH = {"descriptors": 4, "threads": 8}  # pools of threads, connections that idle
DAEMON = ("--load-policy", "always", "--disk-scrub-mb-per-s", "0")
ACTS = (
    *("evict_gpu", "freeze_second", "flip", "evict_cpu", "freeze_daemon", "kill_second"),
    *("freeze_first", "evict_disk", "kill_daemon", "flip"),
)


@dataclass(frozen=True)
class Options:
    """`flags`: of the engines. Sizes so small that tiers are always full."""

    users: int
    prompts: int
    cpu_gb: float
    disk_gb: float
    memory_mib: float
    seed: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """What a process holds while nobody asks. `memory_mib`: of its own, without shared pages."""

    name: str
    pid: int
    memory_mib: float
    descriptors: int
    threads: int


def held(process: Process) -> Held:
    pid = process.child.pid
    status = Path(f"/proc/{pid}/status").read_text()
    kib, threads = (int(status.partition(f"{n}:")[2].split()[0]) for n in ("RssAnon", "Threads"))
    return Held(process.name, pid, kib / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads)


def growth(before: Held, after: Held, memory_mib: float) -> list[str]:
    """What the same process holds more of than it may."""
    limits = GROWTH | {"memory_mib": memory_mib}
    grown = []
    for name, most in limits.items():
        first, last = getattr(before, name), getattr(after, name)
        if last - first > most:
            grown.append(f"{after.name}: {name} {first:.0f} -> {last:.0f}, at most {most:g} more")
    return grown


class Fleet:
    """The processes. Acts are for one thread; `serving` for any."""

    def __init__(self, model: Path, folder: Path, options: Options) -> None:
        self._model, self._folder, self._options = model, folder, options
        self._chance = random.Random(options.seed)
        self.faults: Counter[str] = Counter()  # that daemons counted, and lived through
        self.daemon = self._start_daemon()
        self._engines = [self._start_engine(name) for name in ("first", "second")]
        self._served = list(self._engines)

    def serving(self) -> Sequence[Engine]:
        return self._served

    def all(self) -> list[Process]:
        return [self.daemon, *self._engines]

    def close(self) -> None:
        for each in self.all():
            each.thaw()
            each.stop()

    def _start_daemon(self) -> Daemon:
        options = self._options
        daemon = Daemon(
            self._folder,
            cpu_gb=options.cpu_gb,
            disk_gb=options.disk_gb,
            flags=[*DAEMON, "--slab-bytes", str(1 << 20)],
        )
        daemon.wait_ready()
        return daemon

    def _start_engine(self, name: str) -> Engine:
        address, flags = self.daemon.address, self._options.flags
        engine = Engine(name, self._model, self._folder, kvc2=address, flags=flags)
        engine.wait_ready()
        assert engine.served  # asked for now, so that nobody waits for it when it is frozen
        return engine

    # acts

    def act(self, what: str) -> None:
        """Raises ProcessError where a process does not come back."""
        getattr(self, what)()

    def kill_daemon(self) -> None:
        self.remember_faults()
        self.daemon.kill()
        self.daemon.admin.close()
        self.daemon = self._start_daemon()

    def kill_second(self) -> None:
        self._served = self._engines[:1]
        self._engines[1].kill()
        self._engines[1] = self._start_engine("second")
        self._served = list(self._engines)

    def freeze_daemon(self) -> None:
        self._freeze(self.daemon)

    def freeze_first(self) -> None:
        self._freeze(self._engines[0])

    def freeze_second(self) -> None:
        self._freeze(self._engines[1])

    def _freeze(self, process: Process) -> None:
        process.freeze()
        time.sleep(self._chance.uniform(*FROZEN_S))
        process.thaw()

    def evict_gpu(self) -> None:
        self.daemon.evict("gpu")

    def evict_cpu(self) -> None:
        self.daemon.evict("gpu", "cpu")

    def evict_disk(self) -> None:
        self.daemon.admin.evict("disk", self._chance.randrange(1, 200))

    def flip(self) -> None:
        """Bytes of stored blocks change under the daemon, which then has to load them."""
        slabs = sorted((self._folder / "disk" / "slabs").rglob("*.slab"))
        for _ in range(FLIPS if slabs else 0):
            with contextlib.suppress(OSError), self._chance.choice(slabs).open("r+b") as slab:
                place = self._chance.randrange(slab.seek(0, os.SEEK_END))
                slab.seek(place)
                (value,) = slab.read(1)
                slab.seek(place)
                slab.write(bytes([value ^ (1 << self._chance.randrange(8))]))
        self.evict_cpu()

    # what is held

    def remember_faults(self) -> None:
        """Those of a daemon that is about to end."""
        with contextlib.suppress(Kvc2Error):
            counters = self.daemon.admin.stats().counters
            self.faults += Counter({n: int(v) for n, v in counters.items() if "fault" in n and v})

    def taken(self) -> list[str]:
        """Leases, and pages that someone has or that are on their way."""
        stats, found = self.daemon.admin.stats(), []
        if len(stats.sessions) != len(self._engines):
            found.append(f"{len(stats.sessions)} sessions")
        if stats.leases:
            found.append(f"{stats.leases} leases")
        for tier in stats.tiers:
            if tier.in_flight_pages or tier.pinned_pages:
                found.append(f"{tier.tier}: {tier.in_flight_pages} in flight, {tier.pinned_pages}")
        for engine in self._engines:
            metrics = engine.metrics()
            for owner in ("used", "quarantined"):
                if metrics[f'kvc2_engine_pages{{owner="{owner}"}}']:
                    found.append(f"{engine.name}: pages {owner}")
        return found

    def idle(self) -> list[str]:
        """Waits until nothing is taken; what still is then."""
        deadline = time.monotonic() + IDLE_S
        while (found := self.taken()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def ended(self) -> list[str]:
        """Processes that ended by themselves."""
        gone = [each for each in self.all() if each.child.poll() is not None]
        return [f"{each.name} ended by itself:\n{each.tail()}" for each in gone]


@dataclass
class Soak:
    """The parts, one after the other, and what was found."""

    fleet: Fleet
    users: Users
    told: Told
    memory_mib: float
    rates: list[float] = field(default_factory=list)  # tokens a second of right answers, by part
    held: list[list[Held]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def part(self, seconds: float, say: Callable[[str], None]) -> None:
        """The same faults in each, spread over its time."""
        began, before = time.monotonic(), self.told.tokens
        self.users.resume()
        for number, act in enumerate(ACTS):
            wait_s = began + seconds * (number + 0.5) / len(ACTS) - time.monotonic()
            time.sleep(max(0.0, wait_s))
            self.fleet.act(act)
            self.told.count(f"act: {act}")
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        self.rates.append((self.told.tokens - before) / (time.monotonic() - began))
        self.users.pause()
        self.failures += self.fleet.ended()
        self.failures += [f"still taken: {each}" for each in self.fleet.idle()]
        self.held.append([held(each) for each in self.fleet.all()])
        wrong = f", {len(self.told.wrong)} WRONG" if self.told.wrong else ""
        say(f"part {len(self.rates)} of {PARTS}: {self.rates[-1]:.0f} tokens/s{wrong}")

    def judge(self, slowest: float) -> list[str]:
        """All that must not be. Memory is compared from the first part's end on: what is lazily
        made is made then."""
        found = [*self.told.wrong, *self.failures]
        for last in self.held[-1]:
            first = next((e for part in self.held for e in part if e.pid == last.pid), last)
            found += growth(first, last, self.memory_mib)
        if self.rates[-1] < slowest * self.rates[0]:
            found.append(f"{self.rates[-1]:.0f} tokens/s at the end, {self.rates[0]:.0f} at first")
        return found


def show(soak: Soak, found: list[str]) -> None:
    console = Console(width=110)
    counts = Table("what", "times", title="what was asked, and done")
    for what, times in sorted(soak.told.counts.items()):
        counts.add_row(what, str(times))
    for fault, times in sorted(soak.fleet.faults.items()):
        counts.add_row(f"daemon: {fault}", str(times))
    console.print(counts)
    table = Table("part", "tokens/s", "process", "memory, MiB", "descriptors", "threads")
    for number, (rate, part) in enumerate(zip(soak.rates, soak.held, strict=True), 1):
        for each in part:
            figures = (f"{each.memory_mib:.0f}", str(each.descriptors), str(each.threads))
            table.add_row(str(number), f"{rate:.0f}", f"{each.name} ({each.pid})", *figures)
    console.print(table)
    for failure in found:
        console.print(f"FAILED: {failure}", markup=False)
    console.print("no wrong answer, no leak" if not found else f"{len(found)} failures")


def as_json(soak: Soak, found: list[str], minutes: float) -> dict[str, Any]:
    return {
        "minutes": minutes,
        "counts": dict(soak.told.counts),
        "daemon_faults": dict(soak.fleet.faults),
        "tokens_per_s": soak.rates,
        "held": [[asdict(each) for each in part] for part in soak.held],
        "failures": found,
        "load_average": os.getloadavg()[0],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=60.0, help="of all parts (%(default)s)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON too")
    made.add_argument("--model", type=Path, help="a directory; the embedded model's by default")
    made.add_argument("--users", type=int, default=8, help="at once (%(default)s)")
    made.add_argument("--prompts", type=int, default=48, help="of two turns each (%(default)s)")
    made.add_argument("--cpu-gb", type=float, default=0.25, help="of the arena (%(default)s)")
    made.add_argument("--disk-gb", type=float, default=1.0, help="of the disk tier (%(default)s)")
    made.add_argument(
        "--num-pages", type=int, default=192, help="of each engine's pool (%(default)s)"
    )
    made.add_argument("--threads", type=int, default=1, help="of each engine (%(default)s)")
    made.add_argument(
        "--memory-mib",
        type=float,
        default=64.0,
        help="by which a process may grow from the first part on, MiB (%(default)s)",
    )
    made.add_argument(
        "--slowest", type=float, default=SLOWEST, help="share of the first part (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    return made


def run(model: Path, folder: Path, options: Options, minutes: float, stack: ExitStack) -> Soak:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    alone = Engine("alone", model, folder, flags=options.flags)
    stack.callback(alone.stop)
    alone.wait_ready()
    wanted = truth(alone, options.prompts, options.seed)
    alone.stop()
    say(f"{len(wanted)} answers to compare with")
    fleet = Fleet(model, folder, options)
    stack.callback(fleet.close)
    told = Told()
    users = Users(fleet.serving, wanted, told, options.seed)
    stack.callback(users.stop)
    soak = Soak(fleet, users, told, options.memory_mib)
    users.start(options.users)
    for _ in range(PARTS):
        soak.part(60 * minutes / PARTS, say)
    fleet.remember_faults()
    return soak


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    flags = ("--num-pages", str(given.num_pages), "--threads", str(given.threads))
    options = Options(
        users=given.users,
        prompts=given.prompts,
        cpu_gb=given.cpu_gb,
        disk_gb=given.disk_gb,
        memory_mib=given.memory_mib,
        seed=given.seed,
        flags=(*flags, "--max-running", "8", "--chunk-size", "128"),
    )
    model = given.model
    if model is None:
        with demo_model.console_progress() as progress:
            model = demo_model.build(demo_model.default_directory(), progress=progress)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            soak = run(model, Path(folder), options, given.minutes, stack)
        except ProcessError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        found = soak.judge(given.slowest)
        show(soak, found)
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(soak, found, given.minutes), indent=2)
            given.json.write_text(text + "\n", encoding="utf-8")
    return int(bool(found))


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
