"""What the naive oracle of the index (models.py) keeps: pools, leases and transfers, as facts."""

import hashlib
import itertools
import math
from dataclasses import dataclass, field

from kvc2._core import Cause

Path = tuple[object, ...]  # (namespace id, tokens of block 0, tokens of block 1, ...)

FREE, PRIVATE, IN_FLIGHT, RESIDENT = "free", "private", "in_flight", "resident"
ADOPTED, DUPLICATE, REFUSED = 0, 1, 2


@dataclass(frozen=True)
class Hints:
    ttl: int = 0
    returns: int = 0
    priority: int = 0
    end: bool = False


NO_HINTS = Hints()


@dataclass(frozen=True)
class Life:
    expires: float = math.inf
    priority: int = 0
    ended: bool = False
    returns: int = 0

    def standing(self, now: int) -> int:
        if self.ended and not self.priority:
            return 1
        return 2 + 2 * self.priority + (self.returns > now)


@dataclass
class PoolModel:
    per_slab: int
    below: int | None
    durable: bool
    tier: int = 0
    closed: bool = False
    state: dict[int, str] = field(default_factory=dict)
    blocks: dict[Path, int] = field(default_factory=dict)  # in flight or resident
    queue: list[int] = field(default_factory=list)
    sent_back: list[int] = field(default_factory=list)  # came down too early: once more, later
    evicted: int = 0
    last_copies: int = 0
    shut: set[int] = field(default_factory=set)  # closed slabs
    refused: set[int] = field(default_factory=set)  # pages that the pool below would not have
    insisted: set[int] = field(default_factory=set)  # pages that no pool refuses
    refusals: int = 0  # blocks that this pool would not have

    def free(self, page: int) -> None:
        self.refused.discard(page)
        self.insisted.discard(page)
        if page // self.per_slab in self.shut:
            del self.state[page]
        else:
            self.state[page] = FREE

    def slab(self, number: int) -> list[int]:
        return [page for page in self.state if page // self.per_slab == number]

    def numbers(self) -> set[int]:
        return {page // self.per_slab for page in self.state} | self.shut

    def present(self, path: Path) -> bool:
        return path in self.blocks

    def resident(self, path: Path) -> bool:
        return path in self.blocks and self.state[self.blocks[path]] == RESIDENT

    def owner(self, page: int) -> Path:
        return next(path for path, at in self.blocks.items() if at == page)

    def free_pages(self) -> list[int]:
        return [page for page, state in self.state.items() if state == FREE]


@dataclass(frozen=True)
class Death:
    """A block's last page went, or a pool would not have it: then, what it was worth, and what the
    one that would have gone for it was."""

    path: Path
    cause: Cause
    pool: int
    when: int
    worths: tuple[float, float] = (0, 0)


@dataclass
class Held:
    path: Path
    page: int
    tier: int | None  # None: committed by the lease
    duplicate: bool = False
    anchored: bool = True  # the block's page in the pool is pinned; False once its transfer failed


@dataclass
class LeaseModel:
    namespace: int
    pool: int
    stamp: int
    path: Path  # of all full blocks of its tokens
    found: list[int]  # tier by matched block
    computing: int
    hints: Hints = Hints()
    first: int = 0  # blocks before it are the caller's own
    held: list[Held] = field(default_factory=list)
    stray: list[Held] = field(default_factory=list)
    known_from: int = 0  # matched blocks before this one can't be found again once lost
    committed: int = 0  # blocks before this one are not being computed
    touches: bool = True  # it is a use of what it found, and computes the rest

    @property
    def end(self) -> int:
        """The block after those held."""
        return self.first + len(self.held)

    def before(self) -> Path:
        """The block (or the namespace) that the next one hangs on."""
        return self.held[-1].path if self.held else self.path[: self.first + 1]

    def computes(self) -> list[Path]:
        if not self.touches:
            return []
        first = max(len(self.found), self.committed)
        return [self.path[: i + 2] for i in range(first, len(self.path) - 1)]


@dataclass
class TransferModel:
    source: int
    target: int
    paths: list[Path]
    source_pages: list[int]
    target_pages: list[int]
    failed: bool = False

    @property
    def is_move(self) -> bool:
        return self.source == self.target


def digests(name: bytes, blocks: list[bytes]) -> list[bytes]:
    """SHA-256 chain of the blocks' tokens from the namespace on."""
    chain = [name]
    for block in blocks:
        chain.append(hashlib.sha256(chain[-1] + block).digest())
    return chain[1:]


class LruModel:
    """What a cache of `capacity` blocks (None: any number) would have hit: each access touches its
    path tail first, and the least recently touched blocks go."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.order: list[Path] = []  # by last touch, newest last

    def access(self, path: list[Path]) -> int:
        """The leading blocks of the path that were there."""
        hits = len(list(itertools.takewhile(self.order.__contains__, path)))
        self.order = [block for block in self.order if block not in path] + path[::-1]
        if self.capacity is not None:
            self.order = self.order[-self.capacity :]
        return hits
