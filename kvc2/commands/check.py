"""What `kvc2 check` and `kvc2 scrub` print: progress on a terminal, lines elsewhere, a summary.

Not here: what is verified (tiers/check.py, scrub.py), what is mended (tiers/repair.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvc2 import config, errors
from kvc2.client import Admin, Scrubbed
from kvc2.host.paths import user_path
from kvc2.tiers.disk.catalogue import FORMAT_VERSION
from kvc2.tiers.disk.check import DAMAGE, Report, check
from kvc2.tiers.disk.repair import Repaired, repair
from kvc2.tiers.disk.slab_file import raise_file_limit

LINE_S = 1.0  # between two lines where stderr is no terminal
MB = 1_000_000
Tell = Callable[[int, int], None]  # bytes done, of so many


@contextmanager
def progress(doing: str, *, quiet: bool) -> Iterator[Tell]:
    """On stderr; nothing when `quiet`."""
    if not quiet and sys.stderr.isatty():
        columns = (TextColumn(doing), BarColumn(), TaskProgressColumn())
        rate = TextColumn("{task.fields[rate]:.0f} MB/s")
        with Progress(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task, begun = bar.add_task(doing, total=None, rate=0.0), time.monotonic()

            def tell(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, rate=_rate(done, begun))

            yield tell
        return
    yield _silent if quiet else _Lines(doing).tell


class _Lines:
    """At most one line a second."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._begun = self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_S:
            self._last = now
            share, rate = done / max(total, 1), _rate(done, self._begun)
            print(f"{self._doing}: {share:.0%}, {rate:.0f} MB/s", file=sys.stderr, flush=True)


def _silent(done: int, total: int) -> None:
    pass


def _rate(done: int, begun: float) -> float:
    return done / MB / max(time.monotonic() - begun, 1e-6)


def run(path: Path, *, mends: bool, as_json: bool) -> bool:
    """Check, and repair what is found when `mends`; print what was found and done. Whether the
    directory is sound now. Raises InvalidRequest when this is no disk.path, or one that is in use.
    """
    path = user_path("DIR", path)
    if not (path / "catalogue").is_dir() and not (path / "slabs").is_dir():
        raise errors.InvalidRequest("DIR", str(path), "a disk.path that a daemon has served")
    raise_file_limit()
    with progress(f"checking {path}", quiet=as_json) as tell:
        report = check(path, tell)
    mended = again = None
    while mends and not (again or report).sound:
        if mended is not None and not mended.catalogue_aside:
            break
        mended = repair(path, again or report)  # what a rebuild brought may be damaged in turn
        with progress(f"checking {path} again", quiet=as_json) as tell:
            again = check(path, tell)
    if as_json:
        print(json.dumps(_values(report, mended, again), indent=2))
    else:
        _print(report, mended, again)
    return (again or report).sound


def follow(admin: Admin, mb_per_s: int, *, quiet: bool, wait_s: float = 0.25) -> Scrubbed:
    """Begin a pass in the daemon, or give the one under way this rate, and await its end. On Ctrl-C
    it goes on by itself."""
    found = admin.scrub(mb_per_s)
    with progress("verifying", quiet=quiet) as tell:
        while found.running:
            mean = found.verified_bytes / max(found.verified_blocks, 1)
            tell(found.verified_bytes, round(mean * max(found.total_blocks, found.verified_blocks)))
            time.sleep(wait_s)
            found = admin.scrub()
    return found


def print_pass(found: Scrubbed) -> None:
    """One line on a pass."""
    state = "under way" if found.running else "over" if found.seconds else "none yet"
    rate = found.verified_bytes / MB / max(found.seconds, 1e-6)
    print(
        f"{state}: {found.verified_blocks} of {found.total_blocks} blocks verified, "
        f"{found.verified_bytes / config.GB:.3f} GB in {found.seconds:.1f} s, {rate:.0f} MB/s; "
        f"{found.bad_blocks} bad ones dropped"
    )


def _values(report: Report, mended: Repaired | None, again: Report | None) -> dict[str, Any]:
    values = {"sound": report.sound, **asdict(report)}
    del values["bad"]
    values["damage"] = {kind: count for kind, count in report.damage.items() if count}
    values["mb_per_s"] = report.verified_bytes / MB / max(report.seconds, 1e-6)
    values["repaired"] = None if mended is None else asdict(mended)
    values["sound_after_repair"] = None if again is None else again.sound
    return values


def _print(report: Report, mended: Repaired | None, again: Report | None) -> None:
    size, seconds = report.verified_bytes, max(report.seconds, 1e-6)
    print(
        f"{report.path}: {report.records} records, {report.slabs} slabs, {report.layouts} layouts, "
        f"{report.namespaces} namespaces; {report.verified_blocks} blocks, "
        f"{size / config.GB:.3f} GB read in {seconds:.1f} s, {size / MB / seconds:.0f} MB/s"
    )
    if report.format:
        old = report.format != FORMAT_VERSION
        print(f"format {report.format}" + f"; the next start makes it {FORMAT_VERSION}" * old)
    if report.dead_blocks:
        print(f"{report.dead_blocks} blocks of invalidated namespaces: the next start deletes them")
    if report.sound:
        print("sound")
        return
    _print_damage(report)
    if mended is None or again is None:
        print(f"damaged. To mend it: kvc2 check {report.path} --repair")
        return
    if mended.catalogue_aside:
        print(f"rebuilt the catalogue: {mended.rebuilt_records} records; see catalogue.damaged")
    print(
        f"deleted {mended.damaged_records} records of damaged blocks, {mended.hanging_records} "
        f"of what hangs below them, {mended.unknown_records} that this version can't know, "
        f"{mended.orphan_slabs} orphaned slab files"
    )
    print(
        f"sound now: {again.records} records" if again.sound else "still damaged: see a new check"
    )


def _print_damage(report: Report) -> None:
    table = Table("damage", "count", "what it means")
    for kind, meaning in DAMAGE.items():
        if report.damage[kind]:
            table.add_row(kind, str(report.damage[kind]), meaning)
    console = Console(soft_wrap=True)
    console.print(table)
    if report.catalogue_error:
        print(report.catalogue_error)
        print(f"a rebuild would look for {report.rebuildable} blocks")
    for each in report.blocks:
        print(
            f"{each.kind}: block {each.digest}, slab {each.slab}, page {each.page}, "
            f"layout {each.layout[:16]}"
        )
    named = sum(len(pages) for pages in report.bad.values()) - len(report.blocks)
    if named > 0:
        print(f"and {named} more blocks")
