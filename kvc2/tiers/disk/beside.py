"""What lies beside the catalogue so that it can be rebuilt: kept at least as far as the catalogue.

It may know less than the catalogue, and never as alive what is dead there: each change is durable
here before the catalogue's transaction, and of one that failed what it would have added is taken
back. Not here: the files themselves (live.py, names_file.py), reading them (rebuild.py).

The writer's thread alone calls what changes something.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from kvc2 import _core
from kvc2.tiers.base import U32, PageShape
from kvc2.tiers.disk import names_file
from kvc2.tiers.disk.catalogue import Catalogue, Change
from kvc2.tiers.disk.live import LiveTable
from kvc2.tiers.disk.records import Stored
from kvc2.tiers.disk.slab_file import Files

LOG = logging.getLogger(__name__)

Added = tuple[int, U32, _core.Records]  # layout number, pages and what they hold from now on


class Beside:
    """Tables of generations by layout number, and the list of namespaces."""

    def __init__(self, path: Path, catalogue: Catalogue, names_bytes: int, files: Files) -> None:
        self._path = path
        self._catalogue = catalogue
        self._names_bytes = names_bytes
        self._files = files
        self._tables: dict[int, LiveTable] = {}
        self._revision = -1  # of the catalogue's namespaces, as they are in the file
        names = names_file.read(path / "namespaces") or names_file.Names()
        for name, era in names.eras.items():
            catalogue.raise_era(name, era)

    def add_layout(self, number: int, shape: PageShape) -> None:
        self._tables[number] = LiveTable(
            self._path / "live", number, shape, self._files, starts=self._catalogue.start_count
        )

    def begin(self, number: int, stored: Stored, num_pages: int) -> bool:
        """What a sound catalogue says of a layout; else as `save`."""
        generations = stored.records["generation"].astype(np.uint64)
        last = int(stored.pages.max(initial=0)) + 1  # its slab may be lost
        return self._tables[number].begin(stored.pages, generations, max(num_pages, last))

    def drop_unknown(self) -> None:
        """Delete tables of layouts that the catalogue has not."""
        known = {table.path for table in self._tables.values()}
        folder = self._path / "live"
        for file in folder.iterdir() if folder.is_dir() else []:
            if file not in known:
                file.unlink()

    def make_room(self, number: int, num_pages: int) -> None:
        """Room for a layout's pages. OSError: there is none."""
        self._tables[number].make_room(num_pages)

    def save(self, change: Change, added: Added | None) -> bool:
        """What a change moves, deletes and adds, durable when this returns, or (False) what would
        say otherwise is gone. OSError: neither."""
        for number, pairs in change.moves.items():
            for sources, targets in pairs:
                self._tables[number].move(sources, targets)
        for number, arrays in change.deletes.items():
            if number in self._tables:  # else nothing describes the layout, and nothing is alive
                self._tables[number].change(np.concatenate(arrays), 0)
        if added is not None:
            number, pages, records = added
            self._tables[number].change(pages, records.generations)
        saved = [table.save() for table in list(self._tables.values())]
        return self.save_names() and all(saved)

    def take_back(self, added: Added) -> None:
        """The catalogue did not take it. On disk with the next change."""
        number, pages, _ = added
        self._tables[number].change(pages, 0)

    def save_names(self) -> bool:
        """The list of namespaces, if it is another one now; else as `save`."""
        revision, path = self._catalogue.revision, self._path / "namespaces"
        if revision == self._revision:
            return True
        names = names_file.Names(dict(self._catalogue.namespaces), dict(self._catalogue.eras))
        try:
            names_file.write(path, names, self._names_bytes, self._files)
        except OSError as error:
            LOG.warning("disk: %s: %s; without it nothing can be rebuilt", path, error)
            self._files.unlink(path)
            self._files.sync_folder(self._path)
            return False
        self._revision = revision
        return True

    @property
    def table_bytes(self) -> int:
        """Of all tables together."""
        return sum(table.num_bytes for table in list(self._tables.values()))

    def close(self) -> None:
        for table in self._tables.values():
            table.close()
