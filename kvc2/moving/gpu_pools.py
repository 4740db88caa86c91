"""A session's state, and the session's pool in the gpu tier.

    joining       -> ready    [SessionTable.join: the pool is mapped]
    joining       -> closed   [SessionTable.end: the session never had a pool]
    ready         -> broken   [GpuPool.fail: a promotion failed half-way]
    ready, broken -> silent   [SessionTable.end, or Cache.close_session when the daemon stops]
    silent        -> at_rest  [GpuPool.settle: the engine can't write to the pages any more]
    silent        -> closed   [Cache.close_session: the pages were not to be trusted]
    at_rest       -> closed   [Cache.close_session: what no other tier held was copied]

    joining  the engine has said hello; no call of it is served yet
    ready    calls are served, pages are promoted and demoted
    broken   calls are served, but no page is promoted; the session's end has been asked for
    silent   fenced off: no call is served. The engine may still write to the pages, so that nothing
             is read of them; what was being read counts only once the pages are at rest
    at_rest  fenced off; the pages don't change any more and may be read
    closed   the daemon uses no memory of the session

Not here: leases, secrets, heartbeats (cache/sessions.py), what moves (mover.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvc2 import _core
from kvc2.tiers.base import U8, U32, U64
from kvc2.tiers.gpu import GpuExecutor
from kvc2.tiers.pools import LayoutPools

SessionState = Literal["joining", "ready", "broken", "silent", "at_rest", "closed"]
TRANSITIONS: dict[SessionState, tuple[SessionState, ...]] = {
    "joining": ("ready", "closed"),
    "ready": ("broken", "silent"),
    "broken": ("silent",),
    "silent": ("at_rest", "closed"),
    "at_rest": ("closed",),
    "closed": (),
}


class SessionLife:
    """The state of one session: the session, its pool and who moves its pages share this object.
    What is in `on_over` is called once, when the session is fenced off."""

    def __init__(self) -> None:
        self._state: SessionState = "joining"
        self.on_over: set[Callable[[], None]] = set()

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def over(self) -> bool:
        """Whether the session is fenced off."""
        return self._state in ("silent", "at_rest", "closed")

    def become(self, state: SessionState) -> None:
        """Raises RuntimeError for what the table of transitions doesn't have."""
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a session that is {self._state} can't become {state}")
        was_over, self._state = self.over, state
        if self.over and not was_over:
            for each in list(self.on_over):
                each()


@dataclass(eq=False)
class GpuPool:
    """A session's pool: its executor, the thread that fills it, and its transfers by number.

    `pending` maps the index's transfer ids to this session's sequence numbers until they are done.
    `give_up` asks for the session's end. `demoting` is held while a batch reads the pool's memory.
    """

    id: int  # the index's
    pools: LayoutPools  # below it, unless there are the engines' pools alone
    store: GpuExecutor
    queue: ThreadPoolExecutor
    life: SessionLife
    give_up: Callable[[], None] = lambda: None
    sequence: int = 0
    pending: dict[int, int] = field(default_factory=dict)
    demoting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _at_rest: asyncio.Future[bool] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def read(self, pages: U32, offsets: U64) -> U8:
        """Copy pages into the arena. [n] of BLOCK_OK or BLOCK_BAD_PAYLOAD. Blocks; they count only
        if the pool `holds` them afterwards."""
        came = self.store.read(pages, offsets)
        return np.where(came == 0, _core.BLOCK_BAD_PAYLOAD, _core.BLOCK_OK).astype(np.uint8)

    def fail(self) -> None:
        """A promotion failed half-way: no later progress may be told, and the engine can't wait
        for what never comes. So the session ends; its engine attaches again."""
        if self.life.state == "ready":
            self.life.become("broken")
        self.queue.shutdown(wait=False, cancel_futures=True)
        self.give_up()

    async def settle(self, at_rest: Callable[[], Awaitable[bool]]) -> bool:
        """Find out, once, whether the pages of a silent session can't change any more."""
        rests = False
        try:
            if rests := await at_rest():
                self.life.become("at_rest")
        finally:
            self._at_rest.set_result(rests)
        return rests

    async def holds(self) -> bool:
        """Whether a copy that was read just now is good: not if the session has ended meanwhile
        and its engine may have written to the pages while they were read."""
        return not self.life.over or await asyncio.shield(self._at_rest)
