"""What vLLM's scheduler and its ranks tell each other with each step. Picklable, since ranks may be
processes. Not here: who makes them (scheduler.py), and who does them (worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvc2.client import Share


@dataclass(frozen=True)
class Caches:
    """How a rank's KV lies: `block_bytes` [layers] of one block, dense; `axes`: the dimensions of
    a block from the outermost in memory to the innermost, as indices of (block, head, ...)."""

    block_bytes: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str

    @property
    def by_heads(self) -> bool:
        """Whether the blocks of two ranks, one after the other, are a block of all their heads."""
        return len(self.axes) == 4 and self.axes[:2] == (0, 1)


@dataclass(frozen=True)
class Record:
    """A block as kvc2 keeps it: of each layer the `parts` of the ranks side by side, all layers one
    after the other."""

    block_bytes: tuple[int, ...]
    parts: int

    @property
    def num_bytes(self) -> int:
        return sum(self.block_bytes) * self.parts

    def offsets(self, part: int) -> list[int]:
        """Where a part's bytes of each layer begin."""
        begins = np.cumsum([0, *self.block_bytes[:-1]]) * self.parts
        return [int(b) + part * size for b, size in zip(begins, self.block_bytes, strict=True)]


@dataclass(frozen=True)
class Load:
    """Blocks of a request that are in the arena of a session: offsets [n], vLLM's blocks [n]."""

    request_id: str
    session: int
    offsets: NDArray[np.uint64]
    blocks: NDArray[np.uint32]


@dataclass(frozen=True)
class Save:
    """Blocks that this step completes: staging pages [n], vLLM's blocks [n]."""

    number: int
    pages: NDArray[np.uint32]
    blocks: NDArray[np.uint32]


@dataclass
class Step:
    """Of one step, for every rank. `share`: where the staging pages and the arena are opened."""

    share: Share
    record: Record
    asynchronous: bool = False  # loads run beside the step, and end with a later one
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


def add(counts: dict[int, int], others: dict[int, int]) -> dict[int, int]:
    """How many ranks have done each save."""
    return {each: counts.get(each, 0) + others.get(each, 0) for each in counts | others}


def as_pages(numbers: Sequence[int]) -> NDArray[np.uint32]:
    return np.array(numbers, np.uint32)
