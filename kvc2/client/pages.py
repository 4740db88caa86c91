"""Who owns each page of the engine's pool, as the engine knows it. Pure: no I/O, no waiting.

    owner        meaning                                                    leaves by
    FREE         granted to us, or all ours without a daemon; may be filled  take, give_back, offer
    USED         filled or being filled by the requests that hold it        drop, adopt, offer
    DAEMON       the daemon's: resident, free or unknown; leased ones read   granted, end(dead)
    QUARANTINED  a silent daemon may still write it, or believe it its own   end(dead), begin

`holders[page]` counts the block tables it is in: a prefix may be in many. A FREE page is in none.
A USED page has one (after a daemon's death also more: what was shared is then ours). Two marks on
a USED page: `duplicate`, the daemon takes it back at release; `unsure`, a commit of it has no
answer yet.

What a silent daemon could do wrong rules the design: it may thaw, and copy out what it believes to
be a committed block. So a page that it adopted, or may have adopted, is not filled again until its
process is known dead or it has answered a new session. Threads may share a book: one lock inside.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvc2 import _core
from kvc2.answers import U32


class Owner(IntEnum):
    """See the table above."""

    FREE = 0
    USED = 1
    DAEMON = 2
    QUARANTINED = 3


@dataclass(frozen=True)
class PageCounts:
    """free + used + daemon + quarantined == pages. `held`: in at least one block table."""

    free: int
    used: int
    daemon: int
    quarantined: int
    held: int


class PageBook:
    """Accounts for `num_pages` pages. Starts without a daemon: all FREE."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.session = 0  # number of the session under way; 0: none. Rises, is never reused
        self.silent = False  # no session, but a daemon that may still write
        self._lock = threading.RLock()
        self._sessions = 0
        self._owner = np.zeros(num_pages, np.uint8)
        self._holders = np.zeros(num_pages, np.int32)
        self._duplicate = np.zeros(num_pages, bool)
        self._unsure = np.zeros(num_pages, bool)
        self._offered: U32 = np.zeros(0, np.uint32)  # FREE until an attach under way began
        self._free: list[int] = list(range(num_pages - 1, -1, -1))  # a stack, page 0 on top

    # what requests do

    @property
    def free(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """FREE -> USED: `count` pages, or None and no change when there are fewer."""
        with self._lock:
            if count > len(self._free):
                return None
            pages = [self._free.pop() for _ in range(count)]
            self._owner[pages] = Owner.USED
            self._holders[pages] = 1
            return pages

    def lend(self, session: int, pages: U32) -> bool:
        """The daemon leased these pages of its own to a request. False if that session is over."""
        with self._lock:
            if session != self.session:
                return False
            self._holders[pages] += 1
            return True

    def drop(self, pages: Sequence[int]) -> None:
        """A request's block table is gone. Pages that nobody else holds change hands:
        USED -> FREE, USED and duplicate -> DAEMON, USED and unsure -> QUARANTINED."""
        with self._lock:
            index = np.asarray(pages, np.int64)
            self._holders[index] -= 1
            left = index[(self._holders[index] == 0) & (self._owner[index] == Owner.USED)]
            self._set(left[self._duplicate[left]], Owner.DAEMON)
            self._set(left[self._unsure[left]], Owner.QUARANTINED)
            self._set(left[~self._duplicate[left] & ~self._unsure[left]], Owner.FREE)
            self._duplicate[left] = False

    # what the daemon says

    def granted(self, session: int, pages: U32) -> None:
        """DAEMON -> FREE. No change if that session is over: its promises are void."""
        with self._lock:
            if session == self.session:
                self._set(pages, Owner.FREE)

    def give_back(self, keep: int) -> U32:
        """FREE -> DAEMON: what exceeds `keep` free pages; to be sent with the next release."""
        with self._lock:
            if self.session == 0:
                return np.zeros(0, np.uint32)
            excess = np.array(self._free[keep:], np.uint32)
            self._set(excess, Owner.DAEMON)
            return excess

    def committing(self, session: int, pages: Sequence[int]) -> bool:
        """A commit of these USED pages goes out. False if that session is over."""
        with self._lock:
            if session != self.session:
                return False
            self._unsure[list(pages)] = True
            return True

    def committed(self, session: int, pages: Sequence[int], results: Sequence[int]) -> None:
        """The answer: adopted ones become the daemon's, duplicates are marked, refused ones stay.
        Of an old session: no change, the pages stay unsure until `begin` or `end` settles them."""
        with self._lock:
            if session != self.session:
                return
            index = np.asarray(pages, np.int64)
            answers = np.asarray(results, np.int64)
            self._unsure[index] = False
            self._duplicate[index[answers == _core.DUPLICATE]] = True
            self._owner[index[answers == _core.ADOPTED]] = Owner.DAEMON

    # sessions

    def offer(self, spare: int) -> U32:
        """The pages that we keep in the next session: held ones, and up to `spare` FREE ones. The
        other FREE ones become the daemon's at once, so that none is filled while it takes over."""
        with self._lock:
            self._offered = np.array(self._free[spare:], np.uint32)
            self._set(self._offered, Owner.DAEMON)
            kept = np.concatenate([np.flatnonzero(self._holders), np.array(self._free, np.int64)])
            return np.sort(kept).astype(np.uint32)

    def begin(self, granted: U32) -> int:
        """A session begins: what is held is ours and private, the rest the daemon's. Its number."""
        with self._lock:
            self._sessions += 1
            self.session, self.silent = self._sessions, False
            self._clear_marks()
            self._offered = np.zeros(0, np.uint32)
            held = self._holders > 0
            self._owner[held] = Owner.USED
            self._owner[~held & (self._owner != Owner.FREE)] = Owner.DAEMON
            self._set(granted, Owner.FREE)
            return self.session

    def end(self, *, dead: bool, unsettled: Sequence[int] = ()) -> None:
        """The session ended, or could not begin: what was offered is ours again. Dead: every page
        is. Silent: only what was granted is, and `unsettled` ones (a promotion into them may be
        under way) are quarantined."""
        with self._lock:
            self.session, self.silent = 0, not dead
            offered, self._offered = self._offered, np.zeros(0, np.uint32)
            self._set(offered, Owner.FREE)
            if not dead:
                index = np.asarray(unsettled, np.int64)
                self._owner[index[self._owner[index] == Owner.DAEMON]] = Owner.QUARANTINED
                return
            self._clear_marks()
            held = self._holders > 0
            self._owner[held] = Owner.USED
            self._set(np.flatnonzero(~held & (self._owner != Owner.FREE)), Owner.FREE)

    # what it all adds up to

    def capacity(self) -> int:
        """Pages that requests can hold at once, at best, in the state of things."""
        with self._lock:
            if self.silent:
                return len(self._free) + int((self._holders > 0).sum())
            return self.num_pages

    def counts(self) -> PageCounts:
        """Pages by owner. Changes nothing."""
        with self._lock:
            free, used, daemon, quarantined = np.bincount(self._owner, minlength=4).tolist()
            held = int((self._holders > 0).sum())
            return PageCounts(free, used, daemon, quarantined, held)

    def check(self, tables: Sequence[Sequence[int]] | None = None) -> None:
        """Raises AssertionError when the laws above don't hold; `tables`: all block tables there
        are."""
        with self._lock:
            free = np.flatnonzero(self._owner == Owner.FREE)
            assert sorted(self._free) == free.tolist(), "the free list and the owners differ"
            assert not self._holders[free].any(), "a free page is in a block table"
            assert (self._holders >= 0).all(), "a page was dropped more often than held"
            used = self._owner == Owner.USED
            assert (self._holders[used] > 0).all(), "a used page is in no block table"
            counts = self.counts()
            total = counts.free + counts.used + counts.daemon + counts.quarantined
            assert total == self.num_pages, f"{counts} don't add up to {self.num_pages}"
            if tables is not None:
                held = np.zeros(self.num_pages, np.int32)
                for table in tables:
                    np.add.at(held, np.asarray(table, np.int64), 1)
                assert (held == self._holders).all(), "block tables and holders differ"

    def _set(self, pages: U32 | np.ndarray, owner: Owner) -> None:
        """Changes owners, and keeps the free stack in step. Costs the pages, not the pool, unless
        pages leave FREE: then they are a tail of the stack (give_back, offer)."""
        if len(pages) == 0:
            return
        was_free = self._owner[pages] == Owner.FREE
        self._owner[pages] = owner
        if owner is Owner.FREE:
            self._free.extend(int(p) for p in pages[~was_free])
        elif was_free.any():
            del self._free[len(self._free) - len(pages) :]

    def _clear_marks(self) -> None:
        self._duplicate[:] = False
        self._unsure[:] = False
