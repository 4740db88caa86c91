"""Brings the rest of a lease's prefix from slower tiers, in prefix order, as far as that is sooner
than computing it, and within a deadline. What it gives up on, the lease is known to compute.

Not here: which blocks those are (csrc/index), how they move (mover.py), what is worth waiting for
(pace.py).
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvc2 import _core, errors
from kvc2.metrics import Metrics
from kvc2.moving import pace
from kvc2.moving.changes import Waiters
from kvc2.moving.gpu_pools import GpuPool
from kvc2.moving.mover import Mover
from kvc2.moving.routes import Transferred
from kvc2.tiers.meter import PROBE_BYTES, Estimate
from kvc2.tiers.pools import LayoutOnDisk, LayoutPools, Pools

LOAD_BYTES = 64 << 20  # of one transfer from disk: 50 ms of reading, in parts on a few threads ...
LOAD_S = 0.25  # ... or this long on a slow one, so that what came by a deadline is there
DEADLINE_SHARE = 0.75  # of an acquire's deadline is planned for; an estimate is no promise
ARENA_SHARE = 4  # at most a quarter of the arena is being loaded at a time
INFORMATIVE_WAIT_S = 0.05  # a caller's deadline that is shorter says nothing of the tier
TIERS = ("gpu", "cpu", "disk")  # of a session's chain, fastest first
HERE = Estimate(math.inf, 0.0)  # of what needs no transfer
Step = asyncio.Future[Transferred] | asyncio.Future[None]


@dataclass(frozen=True)
class Destination:
    """Where a lease pins, and what it brings comes to: the pool of this session, or the arena, in
    the pools of this layout."""

    gpu: GpuPool
    pools: LayoutPools
    in_arena: bool = False

    @property
    def pool(self) -> int:
        """The index's id."""
        return self.pools.cpu.id if self.in_arena else self.gpu.id

    @property
    def tiers(self) -> tuple[str, ...]:
        """Of its chain, the fastest first: nothing of the first is brought."""
        return TIERS[1:] if self.in_arena else TIERS


@dataclass(frozen=True)
class View:
    """Of a lease: blocks that it wants pages of, those that it has, the last transfer of these."""

    matched: int
    held: int
    transfer: int


@dataclass(eq=False)
class Errand:
    """What one acquire waits for: the step under way, and how long that may take.

    The step brings at most `num_bytes`, in a load of its own (`own`) or in another's, and should be
    `expected_s` long (0: not known). All steps together may be `patience_s` longer (None: until the
    caller's deadline)."""

    to: Destination
    lease: int
    prefill_rate: float  # tokens/s; 0: not known
    deadline: float  # of the loop's clock
    step: Step | None = None
    num_bytes: int = 0
    own: bool = False
    held: int = 0  # pages of the lease when the step began
    over: bool = False  # the lease's answer is given: it gets nothing more
    expected_s: float = 0.0
    patience_s: float | None = None
    of_keys: bool = False  # nothing of it can be computed: it is waited for until the deadline


def view_of(index: _core.Index, errand: Errand) -> View:
    """The errand's lease, as it is now."""
    if errand.of_keys:
        keys = index.key_lease(errand.lease)
        found, held = np.count_nonzero(keys.found), keys.pages != _core.NO_PAGE
        return View(int(found), int(np.count_nonzero(held)), keys.transfer)
    lease = index.lease(errand.lease)
    return View(lease.matched - lease.first_block, lease.pages.size, lease.transfer)


class Loader:
    """All on the event loop. always: also what an engine would compute sooner."""

    def __init__(
        self,
        index: _core.Index,
        mover: Mover,
        metrics: Metrics,
        pools: Pools,
        *,
        always: bool = False,
    ) -> None:
        self._always = always
        self._index = index
        self._mover = mover
        self._metrics = metrics
        self.pools = pools
        self._waiters = waiters = Waiters()
        self.changed = waiters.changed  # a transfer has ended, or the arena has grown
        self.until_changed = waiters.until_changed
        pools.on_served = waiters.changed

    async def until_idle(self) -> None:
        """Until no transfer is under way that somebody waits for."""
        while self._mover.waited_for:
            await self.until_changed()

    def begin(
        self,
        to: Destination,
        lease: int,
        prefill_rate: float,
        deadline_s: float,
        *,
        of_keys: bool = False,
    ) -> Errand | None:
        """Promote what memory holds, begin to load what the disk holds, where that is sooner than
        computing at `prefill_rate`. None: it is settled."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        rate = 0.0 if self._always else prefill_rate
        errand = Errand(to, lease, rate, deadline, of_keys=of_keys)
        self._advance(errand)
        errand.over = errand.step is None
        return None if errand.over else errand

    async def settle(self, errand: Errand, released: asyncio.Future[None]) -> None:
        """Load and promote until nothing more can come or is worth it, the deadline, or `released`
        is done. A load that is given up on goes on, and its blocks are in memory when it ends."""
        try:
            await self._settle(errand, released)
        finally:
            errand.over = True

    async def _settle(self, errand: Errand, released: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        while (step := errand.step) is not None:
            begun = loop.time()
            left_s = max(0.0, errand.deadline - begun)
            patience_s = math.inf if errand.patience_s is None else errand.patience_s
            wait_s = min(left_s, errand.expected_s + patience_s)
            waits = [step, released]
            await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if released.done():
                return
            took_s = loop.time() - begun
            if not step.done():
                self._give_up(errand, took_s, at_deadline=wait_s == left_s)
                return
            self._came(errand, took_s)
            self._promote(errand)  # what came is the lease's, whatever is chosen
            # a load of which the lease has nothing would be tried for ever
            self._advance(errand, last=errand.own and self._held(errand) == errand.held)

    # ---- what is worth it ----

    def _advance(self, errand: Errand, *, last: bool = False) -> None:
        """Choose how much to bring, promote what memory holds of it, begin the next load."""
        self._choose(errand)
        self._promote(errand)
        errand.step = None
        if not last:
            self._next_load(errand, self._load_bytes())
        if errand.step is None and errand.to.in_arena:
            self._await_others(errand)

    def _choose(self, errand: Errand) -> None:
        """Shorten the lease where computing is sooner, by what the tiers have shown by now."""
        if errand.of_keys:
            return
        shape, ahead = errand.to.pools.shape, self._index.lease(errand.lease).ahead
        if ahead.size == 0:
            return
        tiers = errand.to.tiers
        now = asyncio.get_running_loop().time()
        offers = [
            pace.Offer(tiers[tier], blocks, self._estimate(tiers[tier]) if tier else HERE)
            for tier, blocks in ahead.tolist()
        ]
        choice = pace.choose(
            offers,
            page_bytes=shape.page_bytes,
            page_size=shape.page_size,
            prefill_rate=errand.prefill_rate,
            deadline_s=DEADLINE_SHARE * max(0.0, errand.deadline - now),
        )
        if errand.patience_s is None:
            errand.patience_s = choice.patience_s
        if choice.blocks < sum(offer.blocks for offer in offers):
            self._probe(errand, offers, choice.blocks)
            self._shorten(errand, choice.blocks, "slower")

    def _estimate(self, tier: str) -> Estimate | None:
        return self._mover.meters[tier].estimate

    def seconds(self, num_bytes: int) -> float:
        """In which so much should come from the disk; 0: not known."""
        estimate = self._estimate("disk")
        found = 0.0 if estimate is None else estimate.seconds(num_bytes)
        return found if math.isfinite(found) else 0.0

    def _probe(self, errand: Errand, offers: list[pace.Offer], chosen: int) -> None:
        """Load a little that nobody waits for, from a disk that seems too slow to wait for."""
        first = 0  # block on disk
        for offer in offers:
            if offer.tier == "disk":
                break
            first += offer.blocks
        else:
            return
        idle = not self._mover.loading_bytes and self._mover.meters["disk"].may_probe()
        if first >= chosen and idle:
            self._next_load(errand, PROBE_BYTES)

    def _shorten(self, errand: Errand, blocks: int, why: str) -> None:
        """Bring `blocks` more than the lease has now; it computes the rest."""
        if errand.of_keys:
            return
        before = self._index.lease(errand.lease)
        self._index.shorten(errand.lease, before.first_block + before.pages.size + blocks)
        lost = before.matched - self._index.lease(errand.lease).matched
        tokens = lost * errand.to.pools.shape.page_size
        self._metrics.recomputed_tokens.labels(why).inc(tokens)

    def _came(self, errand: Errand, took_s: float) -> None:
        late_s = took_s - errand.expected_s
        if errand.patience_s is not None:
            errand.patience_s = max(0.0, errand.patience_s - max(0.0, late_s))
        if errand.own:
            self._mover.meters["disk"].on_time()
            if errand.expected_s:
                self._mover.meters["disk"].late(late_s)

    def _give_up(self, errand: Errand, took_s: float, *, at_deadline: bool) -> None:
        """The engine computes what has not come."""
        if at_deadline:
            self._metrics.fault("acquire_deadline")
        informative_s = INFORMATIVE_WAIT_S if at_deadline else 0.0
        if errand.own and took_s > max(errand.expected_s, informative_s):
            self._mover.overdue("disk", errand.num_bytes, took_s)
        if errand.own and errand.expected_s and errand.step is not None:
            promised = asyncio.get_running_loop().time() - took_s + errand.expected_s
            errand.step.add_done_callback(lambda _: self._late(promised))
        self._shorten(errand, 0, "deadline" if at_deadline else "overdue")

    def _late(self, promised: float) -> None:
        """What was given up on has come."""
        self._mover.meters["disk"].late(asyncio.get_running_loop().time() - promised)

    # ---- what moves ----

    def _held(self, errand: Errand) -> int:
        """Pages that the lease has."""
        return view_of(self._index, errand).held

    def _take(self, errand: Errand) -> None:
        """Promote what a load has brought, while the lease is open and waits for it."""
        if not errand.over:
            with suppress(KeyError, errors.SessionOver):
                self._promote(errand)

    def _promote(self, errand: Errand) -> None:
        """cpu -> gpu as far as pages go; a lease in the arena has its blocks there."""
        gpu = errand.to.gpu
        if gpu.life.state != "ready":
            raise errors.SessionOver(f"the session is {gpu.life.state}: attach again")
        if errand.to.in_arena:
            return
        transfer = self._index.promote(errand.lease)
        if transfer is not None:
            self._mover.promote(gpu, transfer)

    def _await_others(self, errand: Errand) -> None:
        """What the lease holds is there once the loads of others have brought it."""
        transfer = view_of(self._index, errand).transfer
        if transfer:
            errand.step, errand.own, errand.expected_s = self._mover.ended(transfer), False, 0.0

    def _load_bytes(self) -> int:
        """Of one transfer from disk; little from one whose speed isn't known yet."""
        estimate = self._mover.meters["disk"].estimate
        if estimate is None:
            return PROBE_BYTES
        return round(min(LOAD_BYTES, estimate.bandwidth_bytes_per_s * LOAD_S))

    def _next_load(self, errand: Errand, bytes_max: int) -> None:
        """Begin the next load of the lease, or find the one that it waits for: its step."""
        pools = errand.to.pools
        if not isinstance(pools, LayoutOnDisk):
            return
        view = view_of(self._index, errand)
        wanted = view.matched - view.held
        if wanted == 0:
            return
        arena, page_bytes = self.pools.arena, pools.shape.page_bytes
        room = arena.capacity_bytes // ARENA_SHARE - self._mover.loading_bytes
        errand.own, errand.held = False, view.held
        if room < page_bytes and self._mover.loading_bytes:
            errand.step = self.until_changed()
            self._expect(errand, self._mover.loading_bytes)
            return
        pages = min(wanted, max(1, min(bytes_max, room) // page_bytes))
        growing = not arena.populated  # asked first: what comes after it is told by `changed`
        self.pools.make_room(pools, pages)
        if errand.to.in_arena:
            step: _core.Transfer | _core.Wait | None = self._index.promote(errand.lease, pages)
        else:
            step = self._index.next_load(errand.lease, pages)
        if isinstance(step, _core.Wait):
            errand.step = self._mover.ended(step.transfer)
        elif step is not None:
            errand.step = self._mover.load(pools, step, partial(self._take, errand))
            errand.own = True
            pages = step.target_pages.size
        elif self._room_is_coming(pools, growing=growing):
            errand.step = self.until_changed()
        self._expect(errand, pages * page_bytes)

    def _room_is_coming(self, pools: LayoutPools, *, growing: bool) -> bool:
        """For a page that was not to be had."""
        if not pools.cpu.store.slabs():
            return growing or self.pools.is_wanted(pools)
        return growing and not self._index.pool_counts(pools.cpu.id).free

    def _expect(self, errand: Errand, num_bytes: int) -> None:
        estimate = self._mover.meters["disk"].estimate
        errand.num_bytes = num_bytes
        errand.expected_s = 0.0 if estimate is None else estimate.seconds(num_bytes)
