"""The namespaces of this run: which space of the index stands for each now, and how they end.

An Invalidate retires a namespace's space and begins its next era: the sessions that have it open go
on under the number that they know, match nothing, and commit anew. The era is in the catalogue, so
that a restart finds what is of this era alone. Not here: whose a namespace is (server/tenants.py).

Names are the callers' choice (salts), so what is known has a limit, and what no session has open is
let go of at it: whatever has no block (left), else the blocks of what was not opened for longest.

One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

from kvc2 import _core, errors
from kvc2.answers import Hints, shorter
from kvc2.moving.mover import Mover
from kvc2.namespace import of_era, weights_digest_of
from kvc2.shares import SharedTable
from kvc2.tiers.disk.catalogue import ERAS_MAX
from kvc2.tiers.disk.recency import SECOND_MAX
from kvc2.tiers.disk.tier import DiskTier

LOOKED_AT = 256  # namespaces, for some that may go; all of them go
ENDED_AT_ONCE = 16  # whose blocks die when none may go: walks them


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
    earlier: bytes | None = None  # of the era before, if that ended in this run

    @property
    def known(self) -> bytes:
        return of_era(self.name, self.era)


class Spaces:
    """Namespaces by the number that sessions know them by; numbers are never used again. Of at most
    `known_max` the index has a space, retired ones too. `held`: numbers that sessions have open."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        disk: DiskTier | None,
        known_max: int,
        now: Callable[[], int],
    ) -> None:
        self._now = now
        self._known: SharedTable[int, bytes, int] = (
            SharedTable()
        )  # by tenant: name of an era, space
        self._known_max = known_max
        self._index = index
        self._mover = mover
        self._disk = disk
        self._next = 0
        self._opened: dict[int, Opened] = {}
        self._numbers: dict[bytes, int] = {}
        self._present: dict[bytes, bytes] = {}  # name by name of the era that counts
        self._eras: dict[bytes, int] = {}  # where there is no disk
        self.held: Callable[[], set[int]] = set
        self.on_gone: list[Callable[[int], None]] = []

    def adopt(self, restored: Mapping[bytes, int]) -> None:
        """What a restart found: spaces by the name of their era. Their tenants show later."""
        assert self._disk is not None
        for known, space in restored.items():
            self._known.put(0, known, space)
        eras = self._disk.catalogue.eras
        self._present |= {of_era(n, eras.get(n, 0)): n for n in self._disk.catalogue.namespaces}

    def open(
        self, name: bytes, page_size: int, identity: bytes, *, ttl_s: int = 0, tenant: int = 0
    ) -> int:
        """The number of a namespace, the same each time. Raises LimitReached."""
        number = self._numbers.get(name)
        if number is not None:
            opened = self._opened[number]
            self._space(name, opened.era, page_size, opened.tenant)  # checks page_size
            if shorter(opened.ttl_s, ttl_s) != opened.ttl_s:
                self._expire(opened.space, ttl_s)
            opened.ttl_s = ttl_s
            return number
        era = self._stored_era(name)
        space = self._space(name, era, page_size, tenant)
        self._index.set_tenant(space, tenant)
        if ttl_s:  # of what a restart brought not all is known when it expires
            self._expire(space, ttl_s)
        number, self._next = self._next, self._next + 1
        opened = Opened(name, page_size, identity, ttl_s, era, space, tenant)
        self._numbers[name], self._opened[number] = number, opened
        self._present[opened.known] = name
        return number

    def _expire(self, space: int, ttl_s: int) -> None:
        """What is there now lives no longer than if it was used now."""
        self._index.expire_by(space, min(self._now() + ttl_s, SECOND_MAX))

    def _space(
        self, name: bytes, era: int, page_size: int, tenant: int, *, beside: bytes = b""
    ) -> int:
        """The index's id, used last now. `beside`: what stays meanwhile. Raises LimitReached."""
        known = of_era(name, era)
        if known not in self._known and len(self._known) >= self._known_max:
            self._make_room(tenant, beside)
        space = self._index.open_namespace(known, page_size)
        self._known.put(tenant, known, space)
        return space

    def _make_room(self, tenant: int, beside: bytes) -> None:
        """For one more of this tenant's. Raises LimitReached when none may go now: then the blocks
        of some end, and these may go soon."""
        held = {self._opened[number].known for number in self.held() if number in self._opened}
        held.add(beside)
        victims = (each for each in self._known.victims(tenant) if each not in held)
        looked_at = list(islice(victims, LOOKED_AT))
        if sum(self._close(each) for each in looked_at):
            return
        ended = 0
        for known in looked_at:
            space = self._known.get(known)
            assert space is not None
            if self._index.has_pins(space):
                self._known.use(known)  # others are looked at next time
            elif ended < ENDED_AT_ONCE:
                ended += 1
                self._index.expire_by(space, self._now() + 1)
        raise errors.LimitReached(
            "limits.max_known_namespaces", self._known_max, "are known and in use; try again soon"
        )

    def _close(self, known: bytes) -> bool:
        """Whether it is gone: nothing is cached under it, or keeps it."""
        space = self._known.get(known)
        assert space is not None
        if not self._index.close_namespace(space):
            return False
        self._known.drop(known)
        name = self._present.pop(known, None)
        number = None if name is None else self._numbers.pop(name, None)
        if number is not None:
            del self._opened[number]
            for tell in self.on_gone:
                tell(number)
        if name is not None and self._disk is not None:
            self._disk.catalogue.forget_namespace(name)
        return True

    @property
    def _stored_eras(self) -> dict[bytes, int]:
        return self._eras if self._disk is None else self._disk.catalogue.eras

    def _stored_era(self, name: bytes) -> int:
        return self._stored_eras.get(name, 0)

    def __contains__(self, number: int) -> bool:
        return number in self._opened

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
        earlier = self._opened[number].earlier
        return None if earlier is None else self._known.get(earlier)

    def of_weights(self, weights_digest: str) -> list[bytes]:
        """Names of the namespaces whose identity has these weights."""
        return [
            name
            for name, (_, identity) in self._named().items()
            if weights_digest_of(identity) == weights_digest
        ]

    def retire(self, names: list[bytes]) -> int:
        """All that is cached under these names is dead from now on; how many blocks that is.
        Raises NotFound for a name that nothing has, and LimitReached: then nothing has changed."""
        named = self._named()
        for name in names:
            if name not in named:
                raise errors.NotFound("namespace", name.hex(), "one that is open or on disk")
        ended = len(self._stored_eras.keys() | set(names))
        if self._disk is not None and ended > ERAS_MAX:
            raise errors.LimitReached("invalidated namespaces", ERAS_MAX, "are remembered at most")
        return sum(self._begin_era(name, named[name][0]) for name in names)

    async def write_eras(self) -> bool:
        """Whether a restart would know the present eras. If not, they are written with the next
        batch, and nothing of theirs before them."""
        if self._disk is None:
            return True
        outcome = await self._mover.on_writer(lambda disk: disk.store())
        return outcome.committed

    def _named(self) -> dict[bytes, tuple[int, bytes]]:
        """Page size and identity by name: what is open, and what the disk has of earlier runs."""
        stored = {} if self._disk is None else self._disk.catalogue.namespaces
        opened = self._opened.values()
        return {**stored, **{each.name: (each.page_size, each.identity) for each in opened}}

    def _begin_era(self, name: bytes, page_size: int) -> int:
        """The blocks of the one that has ended."""
        number = self._numbers.get(name)
        opened = None if number is None else self._opened[number]
        era, tenant = self._stored_era(name), 0 if opened is None else opened.tenant
        space = self._space(name, era, page_size, tenant)
        if opened is not None:
            fresh = self._space(name, era + 1, page_size, tenant, beside=opened.known)
        if self._disk is None:
            self._eras[name] = era + 1
        else:
            self._disk.catalogue.begin_era(name)
        self._present.pop(of_era(name, era), None)
        if opened is not None:
            opened.earlier, opened.space, opened.era = opened.known, fresh, era + 1
            self._index.set_tenant(fresh, tenant)
            self._present[opened.known] = name
        return self._index.retire(space)
