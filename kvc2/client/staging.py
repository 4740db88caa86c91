"""The pages that a client fills to be copied: its own in every session, so that none is granted.

Not here: what is copied from them, and when (objects.py).
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import U32

WAIT_S = 5.0  # for a page that another thread fills


class Staging:
    """A client's Engine that keeps all pages of its pool. Threads may share it.

        free -> taken [take]    taken -> free [give_back]
        taken -> unsure [hold: a copy of it has no answer, and may still be under way]
        unsure -> free [the session in which it was asked for is over, and no copy of it counts]

    `era` changes whenever a session has begun, or its daemon has died.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.era = 0
        self._changed = threading.Condition()
        self._free = list(range(num_pages))
        self._unsure: list[int] = []

    def take(self, pages: int) -> U32:
        """So many, or fewer, but at least one. Raises LimitReached when none comes free in
        WAIT_S."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, WAIT_S):
                raise errors.LimitReached("staging", self.num_pages, "pages, all of them in use")
            taken, self._free = self._free[:pages], self._free[pages:]
        return np.array(taken, np.uint32)

    def take_now(self, pages: int) -> U32:
        """So many, or as many as are free, maybe none. Doesn't wait."""
        with self._changed:
            taken, self._free = self._free[:pages], self._free[pages:]
        return np.array(taken, np.uint32)

    def give_back(self, pages: U32) -> None:
        with self._changed:
            self._free += pages.tolist()
            self._changed.notify_all()

    def hold(self, pages: U32, era: int) -> None:
        """They were sent in this era, and nobody knows what became of it."""
        with self._changed:
            if era == self.era:
                self._unsure += pages.tolist()
                return
        self.give_back(pages)

    def _begin_era(self) -> None:
        with self._changed:
            self.era += 1
            self._free += self._unsure
            self._unsure = []
            self._changed.notify_all()

    # ---- what a client asks and tells (keeper.Engine)

    def kept_pages(self) -> NDArray[np.uint32]:
        return np.arange(self.num_pages, dtype=np.uint32)

    def on_attached(self, granted: NDArray[np.uint32]) -> None:
        self._begin_era()

    def on_detached(self, detached: errors.Detached) -> None:
        if detached.reason == "dead":
            self._begin_era()

    def on_attach_failed(self, error: errors.Kvc2Error) -> None:
        """As it was."""
