"""A table that many owners fill, and whose entry is let go of when it is full.

One owner's many entries cost the others none of theirs: who has most gives up what it used longest
ago. Not here: how full is full, and which entries are in use (the caller's).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SharedTable(Generic[Owner, Key, Value]):
    """Entries by key, each of one owner. Not for several threads at once."""

    def __init__(self) -> None:
        self._owners: dict[Key, Owner] = {}
        self._entries: dict[Owner, OrderedDict[Key, Value]] = {}

    def get(self, key: Key) -> Value | None:
        """Its value, without using it. None: it is not there."""
        return self[key] if key in self._owners else None

    def __getitem__(self, key: Key) -> Value:
        """The same. KeyError: it is not there."""
        return self._entries[self._owners[key]][key]

    def values(self) -> Iterator[Value]:
        return (self[key] for key in self._owners)

    def use(self, key: Key) -> Value | None:
        """The same; it is the one that its owner used last now."""
        if key in self._owners:
            self._entries[self._owners[key]].move_to_end(key)
        return self.get(key)

    def put(self, owner: Owner, key: Key, value: Value) -> None:
        """A new entry, or a new value of one."""
        self.drop(key)
        self._owners[key] = owner
        self._entries.setdefault(owner, OrderedDict())[key] = value

    def drop(self, key: Key) -> None:
        """Does nothing when it is not there."""
        if key in self._owners:
            owner = self._owners.pop(key)
            entries = self._entries[owner]
            del entries[key]
            if not entries:
                del self._entries[owner]

    @property
    def sole_owner(self) -> Owner | None:
        """Of all entries; None: there are several owners, or no entries."""
        return next(iter(self._entries)) if len(self._entries) == 1 else None

    def victims(self, owner: Owner) -> Iterator[Key]:
        """What may go for a new entry of this owner, first what should: of those who have more
        entries than it, and then its own, each owner's longest unused ones first."""
        own = self._entries.get(owner, OrderedDict())
        larger = [each for each in self._entries.values() if len(each) > len(own)]
        for entries in [*sorted(larger, key=len, reverse=True), own]:
            yield from list(entries)

    def __contains__(self, key: object) -> bool:
        return key in self._owners

    def __iter__(self) -> Iterator[Key]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)
