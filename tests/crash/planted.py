"""Do the tests catch bugs of the disk's path? Plants each in a copy of the tree, one by one, runs
the tests that are about the disk over it, and demands that one fails.

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvc2 import _core

HOUSE = Path(__file__).parent.parent.parent
FOLDERS = ("kvc2", "tests")
TESTS = (  # the quick ones first
    ("tests/test_disk.py", "tests/test_lives.py", "tests/test_slabs.py", "tests/faults"),
    ("tests/crash/test_power_cuts.py",),
    ("tests/crash/test_kills.py",),
)
LIMIT_S = 600  # a bug that makes a test hang is caught too
# An editable install answers for kvc2 before the path does: not here.
SITE = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "Redirecting" not in type(each).__name__]
"""


@dataclass(frozen=True)
class Bug:
    """`edits`: texts that are once in the file, and what they become."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]


def bug(name: str, file: str, before: str, after: str) -> Bug:
    return Bug(name, file, ((before, after),))


BEHIND, MOVER, CACHE = "kvc2/behind.py", "kvc2/mover.py", "kvc2/cache.py"
DISK, SLAB, CATALOGUE = "kvc2/tiers/disk.py", "kvc2/tiers/slab_file.py", "kvc2/tiers/catalogue.py"
BESIDE, REBUILD = "kvc2/tiers/beside.py", "kvc2/tiers/rebuild.py"
VERIFIED = "        status[came == 0] = READ_FAILED\n"
COMMITTED = "            self.catalogue.commit(change)\n            return Outcome(written, True)\n"
SYNCED = "                self._sync(batch.pool.slabs, batch.pages)\n"


def believe(state: str) -> str:
    return VERIFIED + f"        status[status == _core.{state}] = _core.BLOCK_OK\n"


WHAT_IS_READ = (
    bug("skip the payload's checksum", DISK, VERIFIED, believe("BLOCK_BAD_PAYLOAD")),
    bug("forget the generation", DISK, VERIFIED, believe("BLOCK_STALE")),
    bug("serve a block of another namespace", DISK, VERIFIED, believe("BLOCK_OTHER")),
    bug("believe a broken header", DISK, VERIFIED, believe("BLOCK_BAD_HEADER")),
    bug("believe what was not read", DISK, VERIFIED, ""),
    bug(
        "a bad block is not counted",
        MOVER,
        "            self._metrics.fault(FAULT_OF_STATUS[int(kind)], int(count))\n",
        "            pass\n",
    ),
    bug(
        "a bad block keeps its record",
        MOVER,
        "        if lost.pages.size:\n            pools.disk.deletes.append(lost.pages)\n",
        "",
    ),
    bug(
        "all of a load came",
        MOVER,
        '        self._end(transfer, good, pools, ("disk", "cpu"), begun)\n',
        '        self._end(transfer, count, pools, ("disk", "cpu"), begun)\n',
    ),
)
ORDER = (
    bug("drop fdatasync", SLAB, "        os.fdatasync(fd)\n", "        return\n"),
    bug(
        "acknowledge before the sync",
        DISK,
        SYNCED,
        SYNCED.replace("sync(", "sync, ").replace("batch.pool", "self._writers.submit(batch.pool"),
    ),
    bug(
        "acknowledge before the commit",
        DISK,
        COMMITTED,
        COMMITTED.replace("self.catalogue.commit(", "self._writers.submit(self.catalogue.commit, "),
    ),
    Bug(
        "the catalogue before the data",
        DISK,
        (
            (SYNCED, "                pass\n"),
            (
                COMMITTED,
                COMMITTED.replace(
                    "            return",
                    "            if batch is not None:\n"
                    "                self._sync(batch.pool.slabs, batch.pages)\n"
                    "            return",
                ),
            ),
        ),
    ),
    bug(
        "a batch that failed is acknowledged",
        DISK,
        "            return False\n        change",
        "        change",
    ),
    bug("LMDB does not sync", CATALOGUE, "            sync=True,\n", "            sync=False,\n"),
    bug(
        "LMDB does not sync its meta page",
        CATALOGUE,
        "            metasync=True,\n",
        "            metasync=False,\n",
    ),
    bug("move without a sync", DISK, "        slabs.sync(targets)\n", ""),
    bug("names are not synced", DISK, "            self._sync_folders()\n", ""),
    bug(
        "a new slab's name is not synced",
        SLAB,
        "                for folder in (self.folder, self.folder.parent):  # ours may be new too\n"
        "                    self._files.sync_folder(folder)\n",
        "",
    ),
    bug(
        "a deleted slab's name is not synced",
        SLAB,
        '        self._files.unlink(self.folder / f"{number:08d}.slab")\n'
        "        self._files.sync_folder(self.folder)\n",
        '        self._files.unlink(self.folder / f"{number:08d}.slab")\n',
    ),
    bug(
        "a short write is whole",
        SLAB,
        '                raise OSError(errno.EIO, f"{self.folder}: short write of {put} bytes")\n',
        "                return\n",
    ),
)
REUSE = (
    bug(
        "reuse before the delete commits",
        DISK,
        "        return not (self.deletes or self.moves)\n",
        "        return True\n",
    ),
    bug(
        "forget the deletes of a batch",
        CATALOGUE,
        "                    _delete(txn, self._blocks, _keys(number, pages))\n",
        "                    pass\n",
    ),
    bug(
        "forget the deletes of a commit that failed",
        MOVER,
        "            pools.disk.deletes[:0] = deletes\n",
        "            pass\n",
    ),
    bug(
        "a moved block's record stays where it was",
        MOVER,
        "            disk.moves.append((left, targets[np.isin(sources, left)]))\n",
        "            pass\n",
    ),
    bug(
        "generations begin again at each start",
        CACHE,
        "            first_generation=(starts << 32) + 1,\n",
        "            first_generation=1,\n",
    ),
    bug(
        "an invalidated namespace comes back",
        CATALOGUE,
        "            self.eras[name] = self._new_eras[name] = era\n"
        "            self.revision += 1\n",
        "            self.eras[name] = era\n",
    ),
)
REBUILDS = (
    bug(
        "an evicted block is rebuilt",
        BESIDE,
        "                self._tables[number].change(np.concatenate(arrays), 0)\n",
        "                pass\n",
    ),
    bug(
        "a block that moved is not rebuilt",
        BESIDE,
        "                self._tables[number].move(sources, targets)\n",
        "                pass\n",
    ),
    bug(
        "an invalidated namespace is rebuilt",
        REBUILD,
        "            spaces[of_era(name, names.eras.get(name, 0))] = page_size\n",
        "            spaces[name] = page_size\n            catalogue.eras.clear()\n",
    ),
    bug(
        "an Invalidate answers before the list is written",
        BESIDE,
        "        return self.save_names() and all(saved)\n",
        "        return all(saved)\n",
    ),
    bug(
        "a refused batch is rebuilt",
        DISK,
        "            self._beside.take_back(added)\n",
        "            pass\n",
    ),
    bug(
        "generations after the records",
        DISK,
        "            if not self._beside.save(change, added):\n"
        '                self._metrics.fault("disk_write")\n'
        "            self.catalogue.commit(change)\n",
        "            self.catalogue.commit(change)\n            self._beside.save(change, added)\n",
    ),
    bug(
        "generations not synced",
        "kvc2/tiers/live.py",
        "                self._files.sync(self._fd)\n",
        "",
    ),
    bug(
        "what can't be written of them stays",
        "kvc2/tiers/live.py",
        "            self._files.unlink(self.path)\n",
        "",
    ),
    bug("namespaces not synced", "kvc2/tiers/spaces_file.py", "        files.sync(fd)\n", ""),
    bug(
        "a rebuild counts starts anew",
        REBUILD,
        "    catalogue = Catalogue(folder, slack_bytes, starts=starts)\n",
        "    catalogue = Catalogue(folder, slack_bytes)\n",
    ),
    bug(
        "no bound in a rebuild", REBUILD, "        if bound <= size_bytes:\n", "        if bound:\n"
    ),
    bug(
        "an empty file is a catalogue",
        REBUILD,
        "    return data.exists() and data.stat().st_size > 0\n",
        "    return data.exists()\n",
    ),
)
FAILING_DISKS = (
    bug("sync again what failed to sync", SLAB, "                self.retired.add(number)\n", ""),
    bug(
        "write into a retired slab",
        BEHIND,
        "        for number in sorted(disk.slabs.retired - disk.closed):\n",
        "        for number in ():\n",
    ),
    bug(
        "a failed flush is forgotten",
        DISK,
        "            self._unsynced = [*unsynced, *self._unsynced]\n",
        "",
    ),
    bug(
        "a refused slab is not asked for again",
        BEHIND,
        "            self._full_until = 0.0  #",
        "            #",
    ),
    bug(
        "keep a dead reader's pages",
        CATALOGUE,
        "            self._env.reader_check()",
        "            pass",
    ),
    bug(
        "open any catalogue",
        CATALOGUE,
        "        check_file(folder / DATA_FILE)\n",
        "",
    ),
    bug("a full catalogue stays full", DISK, "            self.catalogue.let_go()\n", ""),
    bug(
        "LMDB's locks have a hole",
        CATALOGUE,
        "            _allocate_locks(folder / LOCK_FILE)\n",
        "",
    ),
    bug(
        "a full file system ends the daemon",
        DISK,
        "        except (OSError, lmdb.Error) as error:\n"
        '            self._metrics.fault("disk_full")\n',
        '        except lmdb.Error as error:\n            self._metrics.fault("disk_full")\n',
    ),
    bug(
        "no bound",
        DISK,
        "        return found <= self.size_bytes\n",
        "        return True\n",
    ),
    bug(
        "two daemons",
        DISK,
        "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
    ),
    bug(
        "read any format",
        CATALOGUE,
        "        if version is not None and version != START.pack(FORMAT_VERSION):\n",
        "        if version is None:\n",
    ),
)
BUGS = (*WHAT_IS_READ, *ORDER, *REUSE, *REBUILDS, *FAILING_DISKS)


def copy_to(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    extension = Path(str(_core.__file__))
    shutil.copy(extension, folder / "kvc2")
    shutil.copy(HOUSE / "pyproject.toml", folder)
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)


def failure(folder: Path) -> str | None:
    """What failed first; None when all held."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(folder)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for tests in TESTS:
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
        found = failure(folder)
    took_s = time.monotonic() - start
    print(f"{bug.name:44} {took_s:4.0f} s  {found or 'SURVIVES'}", flush=True)
    return found is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="in a bug's name")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time (default 1)")
    asked = parser.parse_args()
    bugs = [bug for bug in BUGS if any(word in bug.name for word in asked.only)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(asked.jobs) as jobs:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(asked.jobs):
            folder = Path(name) / str(number)
            folder.mkdir()
            copy_to(folder)
            folders.put(folder)
        if "" in asked.only and (sound := failure(folder)):
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
