"""The namespaces of this run: one record for each that was opened, and how namespaces end.

The index knows each era of a namespace as one of its own, by a number. An Invalidate retires that
one and begins the next era: the sessions that have the namespace open keep their id, match nothing,
and commit anew. The era is in the catalogue, so that a restart finds what is of this era alone.

Names are the callers' choice (salts), so what is known has a limit, and what no session has open is
let go of at it: whatever has no block (left), else the blocks of what was not opened for longest.

Not here: who may open a namespace (server/tenants.py), which of them a session has open
(sessions.py). One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from kvc2 import _core, errors
from kvc2.answers import Hints, shorter
from kvc2.config import DEFAULT_TENANT, LimitsConfig
from kvc2.moving.mover import Mover
from kvc2.namespace import of_era, weights_of
from kvc2.shares import SharedTable
from kvc2.tiers.disk.catalogue import ERAS_MAX
from kvc2.tiers.disk.recency import SECOND_MAX
from kvc2.tiers.disk.records import NamespaceEntry
from kvc2.tiers.disk.tier import DiskTier
from kvc2.tiers.pools import LayoutPools
from kvc2.tiers.remote.codec import Shared

LOOKED_AT = 256  # namespaces, for some that may go; all of them go
ENDED_AT_ONCE = 16  # whose blocks die when none may go: walks them


LISTED_MAX = 16  # names in an error, those opened last first


@dataclass(frozen=True)
class Owner:
    """Whose a namespace is. What one of these has is told to nobody else."""

    tenant: str = DEFAULT_TENANT
    salt: bytes = b""
    number: int = 0  # the tenant's in the index; 0: nothing is counted for it
    # as hosts know the namespace that share a store; None: there is no store
    shared: Shared | None = field(default=None, compare=False, repr=False)


@dataclass(eq=False)
class Namespace:
    """All that the daemon knows of a namespace that was opened since the start.

    `id` is what sessions know it by (the wire's is one more); it is never used again. `number` is
    the index's, of the present era. `ttl_s`, unless 0, is the longest that a block of it matches
    after its last use, as it was opened last. `pools` are those of its layout below the engines'
    own, as it was opened last. `gone`: let go of; its name may have another record.
    """

    id: int
    name: bytes  # 32
    entry: NamespaceEntry
    owner: Owner
    era: int
    number: int
    pools: LayoutPools
    ttl_s: int = 0
    earlier: bytes | None = None  # name of the era before, if that ended in this run
    gone: bool = False

    @property
    def page_size(self) -> int:
        return self.entry.page_size

    @property
    def identity(self) -> bytes:
        """Canonical JSON."""
        return self.entry.identity

    @property
    def opaque(self) -> bool:
        """Whether keys name its blocks, not tokens."""
        return self.entry.opaque

    @property
    def known(self) -> bytes:
        """The name that the index and the records on disk have for the present era."""
        return of_era(self.name, self.era)

    def hints(self, said: Hints) -> _core.Hints:
        """As the index takes what a request said."""
        return _core.Hints(
            ttl_s=shorter(said.ttl_s, self.ttl_s),
            expect_return_within_s=said.expect_return_within_s,
            priority=said.priority,
            session_end=said.session_end,
        )


@dataclass(frozen=True)
class Era:
    """One era of a namespace, retired or present, that the index has under `number`."""

    name: bytes
    era: int
    number: int


class Namespaces:
    """`_opened`: the namespaces by name, those opened last at the end. `_eras`: what the index has,
    by tenant and the era's name, at most limits.max_known_namespaces of them; what a restart found
    is there before it is opened. `held` tells which namespaces sessions have open."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        disk: DiskTier | None,
        limits: LimitsConfig,
        *,
        now: Callable[[], int],
        held: Callable[[], Iterable[Namespace]],
    ) -> None:
        self._now = now
        self._known_max = limits.max_known_namespaces
        self._index = index
        self._mover = mover
        self._disk = disk
        self._next_id = 0
        self._opened: OrderedDict[bytes, Namespace] = OrderedDict()
        self._eras: SharedTable[int, bytes, Era] = SharedTable()
        self._ended: dict[bytes, int] = {}  # present era by name, where there is no disk
        self._held = held

    def __iter__(self) -> Iterator[Namespace]:
        """Those that were opened, the last one first."""
        return reversed(self._opened.values())

    def find(self, name: bytes, tenants: Collection[str] | None = None) -> Namespace:
        """The one of this name, without a name the only one, as if there were those of these
        tenants alone (None: of all). Raises NotFound for what nobody has opened since the start."""

        def is_told(each: Namespace) -> bool:
            return tenants is None or each.owner.tenant in tenants

        if name:
            found = self._opened.get(name)
            if found is None or not is_told(found):
                allowed = "one that was opened since the start"
                raise errors.NotFound("namespace", name.hex(), allowed)
            return found
        told = list(islice(filter(is_told, self), LISTED_MAX))
        if len(told) != 1:
            known = ", ".join(each.name.hex() for each in told) or "none is open"
            raise errors.NotFound("namespace", "", f"one of these: {known}")
        return told[0]

    def adopt(self, restored: Mapping[bytes, int]) -> None:
        """What a restart found: the index's numbers by the name of the era. Tenants show later."""
        for name in self._named():
            era = self._present_era(name)
            number = restored.get(of_era(name, era))
            if number is not None:
                self._eras.put(0, of_era(name, era), Era(name, era, number))

    def open(
        self,
        name: bytes,
        pools: LayoutPools,
        entry: NamespaceEntry,
        owner: Owner,
        *,
        ttl_s: int = 0,
    ) -> Namespace:
        """The record of a namespace, the same each time. Raises LimitReached."""
        namespace = self._opened.get(name)
        if namespace is not None:
            namespace.pools = pools
            # checks page_size
            self._number(name, namespace.era, entry, namespace.owner.number)
            if shorter(namespace.ttl_s, ttl_s) != namespace.ttl_s:
                self._expire(namespace.number, ttl_s)
            namespace.ttl_s = ttl_s
            self._opened.move_to_end(name)
            return namespace
        era = self._present_era(name)
        number = self._number(name, era, entry, owner.number)
        self._index.set_tenant(number, owner.number)
        if ttl_s:  # of what a restart brought not all is known when it expires
            self._expire(number, ttl_s)
        opened = Namespace(self._next_id, name, entry, owner, era, number, pools, ttl_s)
        self._next_id += 1
        self._opened[name] = opened
        return opened

    def _expire(self, number: int, ttl_s: int) -> None:
        """What is there now lives no longer than if it was used now."""
        self._index.expire_by(number, min(self._now() + ttl_s, SECOND_MAX))

    def _number(
        self, name: bytes, era: int, entry: NamespaceEntry, tenant: int, *, beside: bytes = b""
    ) -> int:
        """The index's for an era, used last now. `beside`: what stays meanwhile. Raises
        LimitReached."""
        known = of_era(name, era)
        if known not in self._eras and len(self._eras) >= self._known_max:
            self._make_room(tenant, beside)
        number = self._index.open_namespace(known, entry.page_size, opaque=entry.opaque)
        self._eras.put(tenant, known, Era(name, era, number))
        return number

    def _make_room(self, tenant: int, beside: bytes) -> None:
        """For one more of this tenant's. Raises LimitReached when none may go now: then the blocks
        of some end, and these may go soon."""
        held = {each.known for each in self._held()} | {beside}
        victims = (each for each in self._eras.victims(tenant) if each not in held)
        looked_at = list(islice(victims, LOOKED_AT))
        if sum(self._close(each) for each in looked_at):
            return
        ended = 0
        for known in looked_at:
            number = self._eras[known].number
            if self._index.has_pins(number):
                self._eras.use(known)  # others are looked at next time
            elif ended < ENDED_AT_ONCE:
                ended += 1
                self._index.expire_by(number, self._now() + 1)
        raise errors.LimitReached(
            "limits.max_known_namespaces", self._known_max, "are known and in use; try again soon"
        )

    def _close(self, known: bytes) -> bool:
        """Whether the era is gone: nothing is cached under it, or keeps it. With the present era
        the namespace's record goes."""
        era = self._eras[known]
        if not self._index.close_namespace(era.number):
            return False
        self._eras.drop(known)
        if era.era != self._present_era(era.name):
            return True
        if (namespace := self._opened.pop(era.name, None)) is not None:
            namespace.gone = True
        if self._disk is not None:
            self._disk.catalogue.forget_namespace(era.name)
        return True

    @property
    def _present_eras(self) -> dict[bytes, int]:
        return self._ended if self._disk is None else self._disk.catalogue.eras

    def _present_era(self, name: bytes) -> int:
        return self._present_eras.get(name, 0)

    def earlier(self, namespace: Namespace) -> int | None:
        """The index's number for the era before the namespace was invalidated last."""
        era = None if namespace.earlier is None else self._eras.get(namespace.earlier)
        return None if era is None else era.number

    def of_weights(self, weights: str) -> list[bytes]:
        """Names of the namespaces whose identity has these weights; none for an empty text."""
        named = self._named().items() if weights else ()
        return [name for name, each in named if weights_of(each.identity) == weights]

    def retire(self, names: list[bytes]) -> int:
        """All that is cached under these names is dead from now on; how many blocks that is.
        Raises NotFound for a name that nothing has, and LimitReached: then nothing has changed."""
        named = self._named()
        for name in names:
            if name not in named:
                raise errors.NotFound("namespace", name.hex(), "one that is open or on disk")
        ended = len(self._present_eras.keys() | set(names))
        if self._disk is not None and ended > ERAS_MAX:
            raise errors.LimitReached("invalidated namespaces", ERAS_MAX, "are remembered at most")
        return sum(self._begin_era(name, named[name]) for name in names)

    async def write_eras(self) -> bool:
        """Whether a restart would know the present eras. If not, they are written with the next
        batch, and nothing of theirs before them."""
        if self._disk is None:
            return True
        outcome = await self._mover.on_writer(self._disk.finish)
        return outcome.committed

    def _named(self) -> dict[bytes, NamespaceEntry]:
        """By name: what is open, and what the disk has of earlier runs."""
        stored = {} if self._disk is None else self._disk.catalogue.namespaces
        return {**stored, **{each.name: each.entry for each in self}}

    def _begin_era(self, name: bytes, entry: NamespaceEntry) -> int:
        """Retires the present era and starts the next; returns how many blocks died."""
        namespace = self._opened.get(name)
        era, tenant = self._present_era(name), 0 if namespace is None else namespace.owner.number
        number = self._number(name, era, entry, tenant)
        if namespace is not None:
            beside = namespace.known
            fresh = self._number(name, era + 1, entry, tenant, beside=beside)
        if self._disk is None:
            self._ended[name] = era + 1
        else:
            self._disk.catalogue.begin_era(name)
        if namespace is not None:
            namespace.earlier, namespace.number, namespace.era = namespace.known, fresh, era + 1
            self._index.set_tenant(fresh, tenant)
        return self._index.retire(number)
