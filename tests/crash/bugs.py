"""Bugs of the disk's path, each as an edit of one file. planted.py plants them one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """`edits`: texts that are once in the file, and what they become. `tests`: one of these fails
    then, the quick ones first; none: those of the disk's path."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[tuple[str, ...], ...] = ()


def bug(name: str, file: str, before: str, after: str) -> Bug:
    return Bug(name, file, ((before, after),))


WRITER, DISK_SLABS = "kvc2/moving/disk_writer.py", "kvc2/moving/disk_slabs.py"
BACKGROUND, MOVER = "kvc2/moving/background.py", "kvc2/moving/mover.py"
ROUTES = "kvc2/moving/routes.py"
ASSEMBLE = "kvc2/cache/assemble.py"
DISK, SLAB, CATALOGUE = (
    "kvc2/tiers/disk/tier.py",
    "kvc2/tiers/disk/slab_file.py",
    "kvc2/tiers/disk/catalogue.py",
)
RECORDS = "kvc2/tiers/disk/records.py"
POOL, BATCH, BATCHES = (
    "kvc2/tiers/disk/pool.py",
    "kvc2/tiers/disk/batch.py",
    "kvc2/moving/batches.py",
)
BESIDE, REBUILD = "kvc2/tiers/disk/beside.py", "kvc2/tiers/disk/rebuild.py"
VERIFIED = "        status[came == 0] = READ_FAILED\n"
COMMITTED = "            self.catalogue.commit(change)\n            return Outcome(written, True)\n"
SYNCED = "                self._writers.sync(batch.pool.slabs, batch.pages)\n"


def believe(state: str) -> str:
    return VERIFIED + f"        status[status == _core.{state}] = _core.BLOCK_OK\n"


WHAT_IS_READ = (
    bug("skip the payload's checksum", POOL, VERIFIED, believe("BLOCK_BAD_PAYLOAD")),
    bug("forget the generation", POOL, VERIFIED, believe("BLOCK_STALE")),
    bug("serve a block of another namespace", POOL, VERIFIED, believe("BLOCK_OTHER")),
    bug("believe a broken header", POOL, VERIFIED, believe("BLOCK_BAD_HEADER")),
    bug("believe what was not read", POOL, VERIFIED, ""),
    bug(
        "a bad block is not counted",
        MOVER,
        "            self._metrics.fault(FAULT_OF_STATUS[int(kind)], int(count))\n",
        "            pass\n",
    ),
    bug(
        "a bad block keeps its record",
        MOVER,
        "        pools.disk.store.drop(lost.pages)\n",
        "",
    ),
    bug(
        "all of a load came",
        MOVER,
        "        loaded = self._end(self._routes.load, pools, [transfer], loaded)\n",
        "        whole = replace(loaded, status=np.full_like(loaded.status, _core.BLOCK_OK))\n"
        "        self._end(self._routes.load, pools, [transfer], whole)\n",
    ),
)
ORDER = (
    bug("drop fdatasync", SLAB, "        os.fdatasync(fd)\n", "        return\n"),
    bug(
        "acknowledge before the sync",
        DISK,
        SYNCED,
        SYNCED.replace("sync(", "_writers.submit(self._writers.sync, "),
    ),
    bug(
        "acknowledge before the commit",
        DISK,
        COMMITTED,
        COMMITTED.replace(
            "self.catalogue.commit(", "self._writers._syncers.submit(self.catalogue.commit, "
        ),
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
                    "            for pool in self.pools.values() if added is not None else ():\n"
                    "                if pool.number == added[0]:\n"
                    "                    self._writers.sync(pool.slabs, added[1])\n"
                    "            return",
                ),
            ),
        ),
    ),
    bug(
        "a batch that failed is acknowledged",
        DISK,
        "            return None\n        number, records = batch",
        "            checksums = np.zeros((batch.pages.size, 16), np.uint8)\n"
        "        number, records = batch",
    ),
    bug("LMDB does not sync", CATALOGUE, "            sync=True,\n", "            sync=False,\n"),
    bug(
        "LMDB does not sync its meta page",
        CATALOGUE,
        "            metasync=True,\n",
        "            metasync=False,\n",
    ),
    bug("move without a sync", POOL, "        slabs.sync(targets)\n", ""),
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
        POOL,
        "            return not (self._deletes or self._moves or taken)\n",
        "            return True\n",
    ),
    bug(
        "forget the deletes of a batch",
        CATALOGUE,
        "                    _delete(txn, self._blocks, keys_of(number, pages))\n",
        "                    pass\n",
    ),
    bug(
        "forget the deletes of a commit that failed",
        POOL,
        "                self._deletes[:0] = taken.deletes.get(self.number, [])\n",
        "",
    ),
    bug(
        "a moved block's record stays where it was",
        MOVER,
        "            disk.moved(left, targets[np.isin(sources, left)])\n",
        "            pass\n",
    ),
    bug(
        "generations begin again at each start",
        ASSEMBLE,
        "        first_generation=(starts << 32) + 1,\n",
        "        first_generation=1,\n",
    ),
    bug(
        "an invalidated namespace comes back",
        CATALOGUE,
        "            self.eras[name] = self._new_eras[name] = era\n"
        "            self.revision += 1\n",
        "            self.eras[name] = era\n",
    ),
)
OVERLAP = (
    bug(
        "commit a batch before the one before it",
        ROUTES,
        '        self.writer = ThreadPoolExecutor(1, "kvc2-disk", initializer=step_back)\n',
        '        self.writer = ThreadPoolExecutor(2, "kvc2-disk", initializer=step_back)\n',
    ),
    bug(
        "a batch is acknowledged with the next one's commit to come",
        MOVER,
        "            outcome = pools.files.finish(pool, writing)\n",
        "            if writing is None:\n"
        "                outcome = pools.files.finish(pool, writing)\n"
        "            else:\n"
        "                self._routes.writer.submit(pools.files.finish, pool, writing)\n"
        "                writing.written()\n"
        "                outcome = Outcome(True, True)\n",
    ),
    bug(
        "reuse while the batch before has the delete",
        POOL,
        "            return not (self._deletes or self._moves or taken)\n",
        "            return not (self._deletes or self._moves)\n",
    ),
    bug(
        "reuse before a batch under way takes the delete",
        WRITER,
        "        if self._batches.full or (self._batches and not disk.settled):\n",
        "        if not self._batches.full and self._batches and not disk.settled:\n"
        "            transfers = self._plan(pools, pages_per_batch(self._index, pools))\n"
        "            if transfers:\n"
        "                self._batches.begin(self._commit(pools, transfers))\n"
        "        if self._batches.full or (self._batches and not disk.settled):\n",
    ),
    Bug(
        "the sync of the next batch counts for this one",
        DISK,
        (
            (SYNCED, "                if self._last is writing:\n    " + SYNCED),
            (
                "        return self._writers.begin(batch, before)\n",
                "        self._last = self._writers.begin(batch, before)\n"
                "        return self._last\n",
            ),
        ),
    ),
    bug(
        "a sync before its writes have ended",
        DISK,
        "            checksums = writing.written()\n",
        "            if not self._relaxed:\n    "
        + SYNCED
        + "            checksums = writing.written()\n"
        "            number, records = batch.pool.number, batch.records\n"
        "            return encode(number, batch.pages, records, records.generations, checksums)\n",
    ),
    bug(
        "a batch counts without the one before it",
        DISK,
        "            if before is not None and not before.durable:\n                return None\n",
        "",
    ),
    bug(
        "pages are free while a part is written",
        BATCH,
        "        wait(self.parts)\n",
        "",
    ),
    bug(
        "three batches at a time",
        BATCHES,
        "        return len(self._tasks) >= UNDER_WAY_MAX\n",
        "        return len(self._tasks) > UNDER_WAY_MAX\n",
    ),
    bug(
        "a stop leaves a batch under way",
        WRITER,
        "            await self._batches.all_ended()\n",
        "            pass\n",
    ),
    bug(
        "patience runs out behind another batch",
        BATCH,
        "        self._patient_until: float | None = None  # from its first part on\n",
        "        self._patient_until: float | None = time.monotonic() + batch.patience_s\n",
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
        "            page_sizes[of_era(name, names.eras.get(name, 0))] = entry.page_size\n",
        "            page_sizes[name] = entry.page_size\n            catalogue.eras.clear()\n",
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
        "kvc2/tiers/disk/live.py",
        "                self._files.sync(self._fd)\n",
        "",
    ),
    bug(
        "what can't be written of them stays",
        "kvc2/tiers/disk/live.py",
        "            self._files.unlink(self.path)\n",
        "",
    ),
    bug("namespaces not synced", "kvc2/tiers/disk/names_file.py", "        files.sync(fd)\n", ""),
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
        DISK_SLABS,
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
        BACKGROUND,
        "                self.writer.slabs.ask_again()  #",
        "                #",
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
        "    if found not in FORMATS:\n",
        "    if found is None:\n",
    ),
)
FORMATS = (
    bug(
        "an earlier format is refused",
        CATALOGUE,
        "FORMATS = (1, FORMAT_VERSION)",
        "FORMATS = (FORMAT_VERSION,)",
    ),
    bug(
        "an earlier format is not taken over",
        CATALOGUE,
        'START.pack(FORMAT_VERSION))\n            txn.put(b"starts",',
        'START.pack(self.format))\n            txn.put(b"starts",',
    ),
    bug(
        "what of a key has no room in the tokens' place is lost",
        RECORDS,
        '        tails["external_bytes"], tails["rest"] = blocks.external_bytes[chosen],',
        '        tails["external_bytes"], _ = blocks.external_bytes[chosen],',
    ),
    bug(
        "extras are forgotten",
        RECORDS,
        " + HAS_EXTRAS * blocks.extras.any(axis=1)\n",
        "\n",
    ),
    bug(
        "what isn't known is read as far as it is",
        RECORDS,
        "        if each not in KNOWN_FLAGS:\n            read[chosen] = False\n",
        "        if each not in KNOWN_FLAGS:\n            pass\n",
    ),
    bug(
        "a record that isn't read stays",
        DISK,
        "        pool.drop(np.concatenate([stored.pages[~held], stored.unread]))\n",
        "        pool.drop(stored.pages[~held])\n",
    ),
)
BUGS = (*WHAT_IS_READ, *ORDER, *REUSE, *OVERLAP, *REBUILDS, *FAILING_DISKS, *FORMATS)
