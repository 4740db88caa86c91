"""Do the tests catch bugs of the disk's path, of leases, of the remote tier, of TLS and tokens, of
limits of rate, of what calls CUDA?
Plants each in a copy of the tree, runs the tests that are about it, and demands that one of them
fails.

    python -m tests.crash.planted [--only WORD ...] [--jobs N]

Exits with 1 when a bug survives. Half a minute to two a bug; the working tree is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvc2 import _core
from tests import ROOT
from tests.crash.bugs import BUGS as DISK_BUGS
from tests.crash.bugs import Bug
from tests.crash.extras_bugs import EXTRAS_BUGS
from tests.crash.extras_bugs import TESTS as EXTRAS_TESTS
from tests.crash.lease_bugs import LEASE_BUGS
from tests.crash.lease_bugs import TESTS as LEASE_TESTS
from tests.crash.rate_bugs import RATE_BUGS
from tests.crash.rate_bugs import TESTS as RATE_TESTS
from tests.crash.remote_bugs import REMOTE_BUGS
from tests.crash.remote_bugs import TESTS as REMOTE_TESTS
from tests.crash.tls_bugs import TESTS as TLS_TESTS
from tests.crash.tls_bugs import TLS_BUGS
from tests.cuda import hostile
from tests.cuda.bugs import CUDA_BUGS
from tests.cuda.bugs import TESTS as CUDA_TESTS

HOUSE = ROOT
FOLDERS = ("kvc2", "tests")
TESTS = (  # the quick ones first
    (
        "tests/kvc2/moving/test_batches.py",
        "tests/kvc2/tiers/test_disk.py",
        "tests/kvc2/tiers/test_records.py",
        "tests/kvc2/tiers/test_earlier_directories.py",
        "tests/kvc2/cache/test_lives.py",
        "tests/kvc2/moving/test_slabs.py",
        "tests/faults",
    ),
    ("tests/crash/test_power_cuts.py",),
    ("tests/crash/test_migration.py", "tests/crash/test_kills.py"),
)
BUGS = (*DISK_BUGS, *LEASE_BUGS, *EXTRAS_BUGS, *REMOTE_BUGS, *TLS_BUGS, *RATE_BUGS, *CUDA_BUGS)
ALL_TESTS = (
    *(*TESTS, *LEASE_TESTS, *EXTRAS_TESTS, *REMOTE_TESTS, *TLS_TESTS, *RATE_TESTS),
    *CUDA_TESTS,
)
LIMIT_S = 600  # a bug that makes a test hang is caught too
# An editable install answers for kvc2 before the path does: not here.
SITE = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "Redirecting" not in type(each).__name__]
"""


def copy_to(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    extension = Path(str(_core.__file__))
    shutil.copy(extension, folder / "kvc2")
    shutil.copy(HOUSE / "pyproject.toml", folder)
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)


def failure(folder: Path, groups: Iterable[Sequence[str]]) -> str | None:
    """What failed first; None when all held."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(folder)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for tests in groups:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return f"more than {LIMIT_S} s"
        if done.returncode:
            lines = done.stdout.splitlines() + done.stderr.splitlines()
            named = [line for line in lines if line.startswith(("FAILED", "ERROR", "Fatal"))]
            why = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
            return " ".join([(named or lines or ["it died"])[-1].partition(" - ")[0], *why[:1]])[
                :200
            ]
    return None


def changed(bug: Bug, text: str) -> str:
    """The file's text with the bug. ValueError when it doesn't fit the tree any more."""
    for before, after in bug.edits:
        if text.count(before) != 1:
            raise ValueError(f"{bug.name}: its text is {text.count(before)} times there")
        text = text.replace(before, after)
    return text


@contextlib.contextmanager
def planted(folder: Path, bug: Bug) -> Iterator[None]:
    file = folder / bug.file
    sound = file.read_text()
    file.write_text(changed(bug, sound))
    try:
        yield
    finally:
        file.write_text(sound)


def caught(folder: Path, bug: Bug) -> bool:
    """Plants it in this copy, tells what failed."""
    start = time.monotonic()
    with planted(folder, bug):
        found = failure(folder, bug.tests or TESTS)
    took_s = time.monotonic() - start
    print(f"{bug.name:44} {took_s:4.0f} s  {found or 'SURVIVES'}", flush=True)
    return found is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="in a bug's file or name"
    )
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time (default 1)")
    asked = parser.parse_args()
    bugs = [bug for bug in BUGS if any(word in f"{bug.file}: {bug.name}" for word in asked.only)]
    os.environ["KVC2_HOSTILE"] = str(hostile.build())  # once, for all copies
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(asked.jobs) as jobs:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(asked.jobs):
            folder = Path(name) / str(number)
            folder.mkdir()
            copy_to(folder)
            folders.put(folder)
        if "" in asked.only and (sound := failure(folder, ALL_TESTS)):
            print(f"without any bug: {sound}")
            return 1

        def one(bug: Bug) -> bool:
            folder = folders.get()
            try:
                return caught(folder, bug)
            finally:
                folders.put(folder)

        survivors = list(jobs.map(one, bugs)).count(False)
        print(f"{len(bugs)} planted, {survivors} survive")
        return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
