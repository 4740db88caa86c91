"""Whether a tenant can tell by a call's time that another one has a prefix cached.

A daemon with two tenants, one engine of each, of the same model. The one keeps prompts, so does the
other, the spy; and there are as many prompts that nobody has. The spy asks for all of them, each
kind as often, in an order drawn anew, and times each Match and each Acquire from its own side. How
well a time tells two kinds apart is the area under the curve of true against false alarms: the
chance that one of a kind took longer than one of the other, computed by rank (AUC). 0.5: not at
all, 1: always. It is told folded, as whoever guesses may guess either way, with the 95 % interval
of a bootstrap. That an Acquire of the spy's own prompts is told from one of nobody's shows that its
clock can tell.

Not here: what a caller can tell from answers, which say nothing of others (tests/kvc2/server).
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.processes import Daemon, end_in_order
from benchmarks.rpc import IDENTITY, PAGE_SIZE, BareEngine
from kvc2.client import LeaseCommit

KINDS = ("nobody's", "another tenant's", "its own")
CALLS = ("Match", "Acquire")
TENANTS = ("victim", "spy")
COPIED = "transfer_blocks_total{source=gpu,target=cpu}"
ASKS = 3  # of a try, whose time is the least: what else the machine does only adds to it
PROMPTS = 50  # of each kind
BOOTSTRAPS = 1000
PATIENCE_S = 30.0  # until the cpu tier has copies, so that a pool has pages again
U32 = NDArray[np.uint32]
F64 = NDArray[np.float64]
Ask = Callable[[U32], tuple[float, int]]


def auc(one: F64, other: F64) -> float:
    """The chance that a sample of `other` is above one of `one`; a tie counts half."""
    ordered = np.sort(one)
    below = np.searchsorted(ordered, other, "left") + np.searchsorted(ordered, other, "right")
    return float(below.sum()) / (2 * len(one) * len(other))


def told_apart(one: F64, other: F64) -> float:
    """The same, whichever of the two takes longer: 0.5 to 1."""
    found = auc(one, other)
    return max(found, 1 - found)


def interval(one: F64, other: F64, seed: int) -> tuple[float, float]:
    """In which 95 % of bootstraps of `told_apart` lie."""
    dice = np.random.default_rng(seed)
    found = [
        told_apart(dice.choice(one, len(one)), dice.choice(other, len(other)))
        for _ in range(BOOTSTRAPS)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


class Tenant(BareEngine):
    """An engine of one tenant, and its namespace."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        super().__init__(daemon, name)
        self.namespace = self.client.open_namespace(IDENTITY.encode(), name)
        self._requests = 0

    def keep(self, tokens: U32) -> None:
        """Caches all full blocks of a prompt."""
        blocks, begun = len(tokens) // PAGE_SIZE, time.monotonic()
        while True:
            request_id = self._next()
            lease = self.client.acquire(self.namespace, request_id, tokens, grant_pages=blocks)
            pages = lease.granted_pages
            if len(pages) == blocks:
                break
            self.client.release([request_id], returned=pages)
            if time.monotonic() - begun > PATIENCE_S:
                raise RuntimeError(f"{len(pages)} of {blocks} pages granted")
            time.sleep(0.01)
        commit = LeaseCommit(request_id, 0, tokens[: blocks * PAGE_SIZE], pages)
        (results,) = self.client.commit([commit]).results
        self.client.release([request_id])
        if results.any():
            raise RuntimeError(f"not kept: {set(results)}")

    def match_s(self, tokens: U32) -> tuple[float, int]:
        """Its seconds, and the tokens that it found."""
        begun = time.perf_counter()
        found = self.client.match(self.namespace, tokens)
        return time.perf_counter() - begun, found.matched_tokens

    def acquire_s(self, tokens: U32) -> tuple[float, int]:
        request_id = self._next()
        begun = time.perf_counter()
        found = self.client.acquire(self.namespace, request_id, tokens)
        seconds = time.perf_counter() - begun
        self.client.release([request_id])
        return seconds, found.matched_tokens

    def _next(self) -> bytes:
        self._requests += 1
        return b"request-%d" % self._requests


@contextmanager
def daemon_of(folder: Path) -> Iterator[Daemon]:
    """With both tenants, whose secrets are their own."""
    lines = ["tenants:"]
    for name in TENANTS:
        secret = folder / f"{name}.secret"
        secret.write_bytes(os.urandom(32))
        secret.chmod(0o600)
        lines += [f"  - name: {name}", f"    secret_file: {secret}"]
    (folder / "kvc2.yaml").write_text("\n".join(lines) + "\n")
    config = ("--config", str(folder / "kvc2.yaml"), "--load-policy", "always")
    config += ("--admission", "always")
    daemon = Daemon(folder, cpu_gb=2.0, disk_gb=0, flags=config)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.stop()


def copied(daemon: Daemon) -> float:
    """Blocks that came from the engines' pools to the cpu tier."""
    return daemon.admin.stats().counters.get(COPIED, 0.0)


def probe(
    daemon: Daemon, ask: Ask, prompts: dict[str, Sequence[U32]], tries: int, seed: int
) -> dict[str, F64]:
    """Seconds of so many tries of each kind, in an order drawn by `seed`. RuntimeError where an
    answer tells what it may not, or a prompt of the spy's own is gone."""
    order = [(kind, number % PROMPTS) for kind in KINDS for number in range(tries)]
    random.Random(seed).shuffle(order)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    gc.disable()  # its turns would come with some calls and not with others
    try:
        for kind, number in order:
            tokens = prompts[kind][number]
            there = len(tokens) - PAGE_SIZE if kind == "its own" else 0
            least_s = math.inf
            for _ in range(ASKS):
                daemon.admin.evict("gpu")  # what is kept lies in the cpu tier each time
                seconds, matched = ask(tokens)
                if matched != there:
                    raise RuntimeError(f"{kind}: {matched} of {len(tokens)} tokens matched")
                least_s = min(least_s, seconds)
            times[kind].append(least_s)
    finally:
        gc.enable()
    return {kind: np.array(found) for kind, found in times.items()}


def rows_of(call: str, times: dict[str, F64], seed: int) -> list[report.Row]:
    """Of another tenant's prompts, and of its own, each against nobody's."""
    nobody_s = times["nobody's"]
    return [
        report.Row(
            case=f"{call}: {kind} prompt told from nobody's",
            unit="AUC",
            better=better,
            ours=told_apart(nobody_s, times[kind]),
            spread=interval(nobody_s, times[kind], seed),
            repeats=len(times[kind]),
            load_average=os.getloadavg()[0],
            peers={
                f"{each}, median us": float(np.median(times[each])) * 1e6
                for each in ("nobody's", kind)
            },
            goal=goal,
        )
        for kind, better, goal in (
            (KINDS[1], "lower", "<= 0.55"),
            # a Match makes all keys of a prompt, there or not; to walk what is there is quick
            (KINDS[2], "higher", ">= 0.95" if call == "Acquire" else "(not by its time)"),
        )
    ]


def run(tries: int, tokens: int, seed: int) -> list[report.Row]:
    dice = np.random.default_rng(seed)
    drawn = dice.integers(0, 50_000, (len(KINDS), PROMPTS, tokens), dtype=np.uint32)
    prompts: dict[str, Sequence[U32]] = dict(zip(KINDS, map(list, drawn), strict=True))
    rows = []
    with tempfile.TemporaryDirectory() as name, daemon_of(Path(name)) as daemon:
        victim, spy = (Tenant(daemon, each) for each in TENANTS)
        try:
            for theirs, own in zip(prompts[KINDS[1]], prompts[KINDS[2]], strict=True):
                victim.keep(theirs)
                spy.keep(own)
            blocks = 2 * PROMPTS * (tokens // PAGE_SIZE)
            daemon.wait_until(lambda: copied(daemon) >= blocks, "copies in the cpu tier")
            for call, ask in zip(CALLS, (spy.match_s, spy.acquire_s), strict=True):
                rows += rows_of(call, probe(daemon, ask, prompts, tries, seed), seed)
        finally:
            victim.close()
            spy.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--tries", type=int, default=2000, help="of each kind (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and order (%(default)s)")
    given = parser.parse_args()
    end_in_order()
    rows = run(given.tries, given.tokens, given.seed)
    report.finish("what a call's time tells of another tenant", rows, given.json)


if __name__ == "__main__":
    main()
