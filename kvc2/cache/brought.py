"""Which blocks of a request came from the remote store. A plain value."""

from __future__ import annotations

from typing import NamedTuple


class Brought(NamedTuple):
    """Blocks [first, end) of a prompt came from the remote store, for this request."""

    first: int
    end: int

    def of(self, blocks: int) -> int:
        """How many of so many leading blocks."""
        return max(0, min(blocks, self.end) - self.first)


NOT_BROUGHT = Brought(0, 0)
