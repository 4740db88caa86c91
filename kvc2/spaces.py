"""The namespaces of this run: which space of the index stands for each now, and how they end.

An Invalidate retires a namespace's space and begins its next era: the sessions that have it open go
on under the number that they know, match nothing, and commit anew. The era is in the catalogue, so
that a restart finds what is of this era alone. Not here: whose a namespace is (server/tenants.py).

One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvc2 import _core, errors
from kvc2.mover import Mover
from kvc2.namespace import of_era, weights_digest_of
from kvc2.results import Hints, shorter
from kvc2.tiers.disk import DiskTier
from kvc2.tiers.recency import SECOND_MAX


@dataclass
class Opened:
    """`space` is the index's id for the namespace's era. `ttl_s`, unless 0, is the longest that a
    block of it matches after its last use, as it was opened last."""

    name: bytes
    page_size: int
    identity: bytes
    ttl_s: int
    era: int
    space: int
    tenant: int = 0  # by its number in the index
    earlier: int | None = None  # of the era before, if that ended in this run


class Spaces:
    """Namespaces by the number that sessions know them by. `known`: the names, each of its era,
    that the index has a space for, retired ones too: at most `known_max`."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        disk: DiskTier | None,
        known_max: int,
        now: Callable[[], int],
    ) -> None:
        self._now = now
        self.known: set[bytes] = set()
        self._known_max = known_max
        self._index = index
        self._mover = mover
        self._disk = disk
        self._opened: list[Opened] = []
        self._numbers: dict[bytes, int] = {}

    def open(
        self, name: bytes, page_size: int, identity: bytes, *, ttl_s: int = 0, tenant: int = 0
    ) -> int:
        """The number of a namespace, the same each time. Raises LimitReached."""
        number = self._numbers.get(name)
        if number is not None:
            opened = self._opened[number]
            self._space(name, opened.era, page_size)  # checks page_size
            if shorter(opened.ttl_s, ttl_s) != opened.ttl_s:
                self._expire(opened.space, ttl_s)
            opened.ttl_s = ttl_s
            return number
        era = self._stored_era(name)
        space = self._space(name, era, page_size)
        self._index.set_tenant(space, tenant)
        if ttl_s:  # of what a restart brought not all is known when it expires
            self._expire(space, ttl_s)
        self._numbers[name] = len(self._opened)
        self._opened.append(Opened(name, page_size, identity, ttl_s, era, space, tenant))
        return self._numbers[name]

    def _expire(self, space: int, ttl_s: int) -> None:
        """What is there now lives no longer than if it was used now."""
        self._index.expire_by(space, min(self._now() + ttl_s, SECOND_MAX))

    def _space(self, name: bytes, era: int, page_size: int) -> int:
        """The index's id. Raises LimitReached: what the index knows stays known."""
        known = of_era(name, era)
        if known not in self.known and len(self.known) >= self._known_max:
            raise errors.LimitReached(
                "limits.max_known_namespaces", self._known_max, "are known, invalidated ones too"
            )
        self.known.add(known)
        return self._index.open_namespace(known, page_size)

    def _stored_era(self, name: bytes) -> int:
        return 0 if self._disk is None else self._disk.catalogue.eras.get(name, 0)

    def __getitem__(self, number: int) -> int:
        """The index's id for the namespace now."""
        return self._opened[number].space

    def hints(self, number: int, said: Hints) -> _core.Hints:
        """As the index takes what a request said."""
        return _core.Hints(
            ttl_s=shorter(said.ttl_s, self._opened[number].ttl_s),
            expect_return_within_s=said.expect_return_within_s,
            priority=said.priority,
            session_end=said.session_end,
        )

    def name(self, number: int) -> bytes:
        return self._opened[number].name

    def number(self, name: bytes) -> int:
        """Raises NotFound for a namespace that nobody has opened since the start."""
        if name not in self._numbers:
            raise errors.NotFound("namespace", name.hex(), "one that was opened since the start")
        return self._numbers[name]

    def page_size(self, number: int) -> int:
        return self._opened[number].page_size

    def identity(self, number: int) -> bytes:
        return self._opened[number].identity

    def earlier(self, number: int) -> int | None:
        """The index's id for the namespace before it was invalidated last."""
        return self._opened[number].earlier

    def of_weights(self, weights_digest: str) -> list[bytes]:
        """Names of the namespaces whose identity has these weights."""
        return [
            name
            for name, (_, identity) in self._known().items()
            if weights_digest_of(identity) == weights_digest
        ]

    def retire(self, names: list[bytes]) -> int:
        """All that is cached under these names is dead from now on; how many blocks that is.
        Raises NotFound for a name that nothing has."""
        known = self._known()
        for name in names:
            if name not in known:
                raise errors.NotFound("namespace", name.hex(), "one that is open or on disk")
        return sum(self._begin_era(name, known[name][0]) for name in names)

    async def write_eras(self) -> bool:
        """Whether a restart would know the present eras. If not, they are written with the next
        batch, and nothing of theirs before them."""
        if self._disk is None:
            return True
        outcome = await self._mover.on_writer(lambda disk: disk.store())
        return outcome.committed

    def _known(self) -> dict[bytes, tuple[int, bytes]]:
        """Page size and identity by name: what is open, and what the disk has of earlier runs."""
        stored = {} if self._disk is None else self._disk.catalogue.namespaces
        return {**stored, **{each.name: (each.page_size, each.identity) for each in self._opened}}

    def _begin_era(self, name: bytes, page_size: int) -> int:
        """The blocks of the one that has ended."""
        number = self._numbers.get(name)
        era = self._stored_era(name) if number is None else self._opened[number].era
        space = self._space(name, era, page_size)
        if number is not None:
            opened = self._opened[number]
            opened.space, opened.era = self._space(name, era + 1, page_size), era + 1
            self._index.set_tenant(opened.space, opened.tenant)
            opened.earlier = space
        if self._disk is not None:
            self._disk.catalogue.begin_era(name)
        return self._index.retire(space)
