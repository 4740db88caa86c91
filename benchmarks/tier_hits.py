"""What each tier brings of real traces, and what it moves: hits and bytes by tier.

Example: python -m benchmarks.tier_hits --traces DIR --splits 0.02,0.1,0.5 --json FILE
The real index is driven with a gpu pool over a cpu pool over a durable one; its plans are carried
out at once, without bytes, in the daemon's batches: what the daemon does, had it time between two
requests. A split is a share of the trace's distinct blocks: gpu, cpu, disk. A hit counts in the
tier it was found in, if it came to the gpu pool. Bytes are blocks times a page of --token-bytes a
token. A figure is exact: one repeat has no spread.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import report
from benchmarks.hit_rate import files
from kvc2 import _core
from kvc2.commands import replay, traces
from kvc2.moving.batches import UNDER_WAY_MAX, batch_pages

TOKEN_BYTES = 131_072  # of a dense 8 B model: 32 layers, 8 KV heads of 128, bf16
TIERS = ("gpu", "cpu", "disk")
MOVES = ("promoted", "loaded", "demoted", "written")
BATCH = 256  # pages, of a transfer
LOW, HIGH = 0.01, 0.02  # watermarks, as the daemon's


@dataclass(frozen=True)
class Found:
    """Of all input tokens: the share found in each tier; blocks moved, by way; by tier, blocks that
    it refused, those of them that were watched, and those that were asked for again and missed."""

    hits: dict[str, float]
    moved: dict[str, int]
    refused: dict[str, tuple[int, int, int]]

    @property
    def total(self) -> float:
        return sum(self.hits.values())


class Tiers:
    """The index with a pool a tier, and whoever carries its plans out."""

    def __init__(
        self,
        capacities: tuple[int, int, int],
        policy: str,
        *,
        page_bytes: int,
        second_access: bool = False,
        admission: bool = True,
    ) -> None:
        self.index = _core.Index(policy=policy, admission=admission)
        self.moved: Counter[str] = Counter()
        below: int | None = None
        pools = []
        for tier in (2, 1, 0):
            below = self.index.add_pool(
                page_size=1,
                pages_per_slab=capacities[tier],
                below=below,
                durable=tier == 2,
                second_access=second_access and tier == 2,
                tier=tier,
            )
            self.index.add_slab(below)
            pools.append(below)
        self.disk, self.cpu, self.gpu = pools
        self.space = self.index.open_namespace(replay.NAMESPACE, 1)
        self._batch = min(BATCH, batch_pages(*capacities[1:], page_bytes))

    def ask(self, blocks: traces.U32) -> tuple[int, ...]:
        """A request; blocks that hit, by tier."""
        lease = self.index.acquire(self.space, self.gpu, blocks, len(blocks))
        self._bring(lease.id)
        view = self.index.lease(lease.id)
        self.index.shorten(lease.id, len(view.pages))
        first = len(view.pages)
        pages = self.index.grant(self.gpu, len(blocks) - first)
        if len(pages):
            self.index.commit(lease.id, first, blocks[first : first + len(pages)], pages)
        self.index.release(lease.id)
        self._copy_behind()
        return view.tiers

    def refusals(self) -> dict[str, tuple[int, int, int]]:
        """Of the tiers that may refuse."""
        pools = {"cpu": (1, self.cpu), "disk": (2, self.disk)}
        return {
            name: (self.index.pool_counts(pool).refused, *self.index.regret(tier))
            for name, (tier, pool) in pools.items()
        }

    def _bring(self, lease: int) -> None:
        while True:
            self._carry("promoted", lambda: self.index.promote(lease))
            load = self.index.next_load(lease, BATCH)
            if not isinstance(load, _core.Transfer):
                return
            self._end("loaded", load)

    def _copy_behind(self) -> None:
        self._carry("demoted", lambda: self.index.plan_demote(self.gpu, BATCH))
        self._keep_free(self.gpu)
        self._make_room()
        self._carry("written", self._store)
        self._keep_free(self.cpu)

    def _store(self) -> _core.Transfer | None:
        ahead = UNDER_WAY_MAX * self._batch
        plan = self.index.plan_demote(self.cpu, self._batch, ahead=ahead)
        self._make_room()
        return plan

    def _make_room(self) -> None:
        """Two batches of the durable pool are kept free ahead."""
        free = self.index.pool_counts(self.disk).free
        kept = UNDER_WAY_MAX * self._batch
        if free < kept:
            self.index.evict(self.disk, kept - free)

    def _keep_free(self, pool: int) -> None:
        counts = self.index.pool_counts(pool)
        if counts.free < LOW * counts.pages:
            self.index.keep_free(pool, round(HIGH * counts.pages))

    def _carry(self, way: str, plan: Callable[[], _core.Transfer | None]) -> None:
        while (transfer := plan()) is not None:
            self._end(way, transfer)

    def _end(self, way: str, transfer: _core.Transfer) -> None:
        self.index.complete(transfer.id, transfer.target_pages.size)
        self.moved[way] += transfer.target_pages.size


def drive(
    trace: traces.Trace,
    splits: tuple[float, ...],
    policy: str,
    *,
    token_bytes: int = TOKEN_BYTES,
    second_access: bool = False,
    admission: bool = True,
) -> Found:
    gpu, cpu, disk = (max(round(share * trace.blocks), 1) for share in splits)
    tiers = Tiers(
        (gpu, cpu, disk),
        policy,
        page_bytes=trace.block_tokens * token_bytes,
        second_access=second_access,
        admission=admission,
    )
    hits = [0, 0, 0]
    for i in range(len(trace)):
        hits = [a + b for a, b in zip(hits, tiers.ask(trace.request(i)), strict=True)]
    tiers.index.check()
    tokens = max(int(trace.input_tokens.sum()), 1)
    shares = {
        tier: count * trace.block_tokens / tokens for tier, count in zip(TIERS, hits, strict=True)
    }
    moved = {way: tiers.moved[way] for way in MOVES}
    return Found(shares, moved, tiers.refusals())


def measure(trace: traces.Trace, splits: tuple[float, ...], token_bytes: int) -> list[report.Row]:
    driven = partial(drive, trace, splits, token_bytes=token_bytes)
    ours = driven(replay.POLICIES[0])
    peers = {
        "takes all": driven(replay.POLICIES[0], admission=False),
        replay.POLICIES[1]: driven(replay.POLICIES[1]),
        "second_access": driven(replay.POLICIES[0], second_access=True),
    }
    rows = [
        report.row(
            f"{trace.name}: found in {tier}", "%", "higher", [100 * share],
            peers={name: 100 * each.hits[tier] for name, each in peers.items()},
        )
        for tier, share in ours.hits.items()
    ]  # fmt: skip
    room = max(round(sum(splits) * trace.blocks), 1)
    rows.append(
        report.row(
            f"{trace.name}: found",
            "%",
            "higher",
            [100 * ours.total],
            limit=100 * replay.best_hit_rate(trace, room),
            limit_name="belady, one pool as large as all",
            peers={name: 100 * each.total for name, each in peers.items()},
        )
    )
    per_token = trace.block_tokens * token_bytes / max(int(trace.input_tokens.sum()), 1) / 1024
    rows += [
        report.row(
            f"{trace.name}: {way}", "KiB/token", "lower", [blocks * per_token],
            peers={name: each.moved[way] * per_token for name, each in peers.items()},
        )
        for way, blocks in ours.moved.items()
    ]  # fmt: skip
    for tier, (refused, watched, regretted) in ours.refused.items():
        share = 100 * regretted / max(watched, 1)
        rows.append(report.row(f"{trace.name}: {tier} refused", "blocks", "lower", [refused]))
        rows.append(report.row(f"{trace.name}: {tier} regretted", "%", "lower", [share]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True, help="folder of traces")
    parser.add_argument("--splits", default="0.02,0.1,0.5", help="gpu,cpu,disk (%(default)s)")
    parser.add_argument(
        "--token-bytes", type=int, default=TOKEN_BYTES, help="KV of a token (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    splits = tuple(float(each) for each in options.splits.split(","))
    if len(splits) != len(TIERS) or min(splits) <= 0:
        parser.error(f"--splits {options.splits}: three shares above 0, of gpu, cpu and disk")
    rows = []
    for path in files(options.traces):
        rows += measure(traces.read(path), splits, options.token_bytes)
    report.finish(f"Hits by tier at {options.splits}", rows, options.json)


if __name__ == "__main__":
    main()
