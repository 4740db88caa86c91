"""The daemon's end of a remote store: a thread of its own, a deadline on every call, and a breaker.

    event loop of the daemon ──call──► event loop of this thread ──► Store
                             ◄─answer or StoreError, within the deadline

Reading and writing megabytes on a socket keeps a loop busy, so that it has one of its own. While
the breaker is open no call leaves the daemon's loop; pings alone find out when the store is back.
Not here: which kind of store it is (valkey.py), what its bytes are worth (codec.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import TypeVar

from typing_extensions import Buffer

from kvc2 import events
from kvc2.metrics import RemoteMetrics
from kvc2.tiers.remote.breaker import Breaker
from kvc2.tiers.remote.store import Store, StoreError, StoreRefused, StoreUnable

T = TypeVar("T")

CLOSE_S = 1.0


class Link:
    """All methods are called on the daemon's event loop. `make` is called on the thread's.
    deadline_s: of each call. patience_s: what a request waits in all for a store that is silent."""

    def __init__(
        self,
        make: Callable[[], Store],
        metrics: RemoteMetrics,
        *,
        deadline_s: float,
        patience_s: float,
    ) -> None:
        self.patience_s = patience_s
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._breaker = Breaker()
        self._opened = asyncio.Event()
        self._opened.set()
        self._loop = asyncio.new_event_loop()
        self._store = make
        run = self._loop.run_forever
        self._thread = threading.Thread(target=run, name="kvc2-remote", daemon=True)
        self._thread.start()
        self._made: Store | None = None
        self._closed = False
        self._told_away = False
        self.heard_at = 0.0  # when a call was answered last, of time.monotonic
        self._mending = asyncio.create_task(self._mend())

    @property
    def up(self) -> bool:
        """Whether calls go out."""
        return self._breaker.closed

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        """As Store has it, as the next three do. Raises StoreError."""
        return await self._call(lambda store: store.exists(names))

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        return await self._call(lambda store: store.get(names, num_bytes))

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        await self._call(lambda store: store.put(values, ttl_s))

    async def delete(self, names: Sequence[bytes]) -> None:
        await self._call(lambda store: store.delete(names))

    def late(self) -> None:
        """Somebody has waited for a call as long as anybody may: until it is answered, nobody else
        does."""
        self._metrics.all.fault("remote_late")
        self._open("late")

    async def close(self) -> None:
        """What is under way fails, and so does what comes."""
        self._closed = True
        self._mending.cancel()
        with suppress(StoreError):
            await self._on_thread(self._close_store())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    # ---- calls ----

    async def _call(self, make: Callable[[Store], Awaitable[T]]) -> T:
        if self._closed or not self._breaker.closed:
            raise StoreError("the store is left alone")
        try:
            found = await self._on_thread(self._bounded(make))
        except StoreRefused:
            self._metrics.all.fault("remote_refused")
            self._heard()
            raise
        except StoreUnable:
            self._heard()
            raise
        except StoreError as error:
            if not self._closed:
                self._metrics.all.fault("remote_error")
                self._open(str(error))
            raise
        self._heard()
        return found

    def _heard(self) -> None:
        """A call was answered."""
        self.heard_at = time.monotonic()
        self._close_breaker(self._breaker.worked)

    async def _bounded(self, make: Callable[[Store], Awaitable[T]]) -> T:
        """On the thread."""
        if self._made is None:
            self._made = self._store()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await make(self._made)
        except TimeoutError as error:
            raise StoreError(f"no answer within {self._deadline_s:g} s") from error

    async def _close_store(self) -> None:
        """On the thread."""
        mine = asyncio.current_task()
        others = [each for each in asyncio.all_tasks() if each is not mine]
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._made is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._made.close()

    async def _on_thread(self, work: Coroutine[None, None, T]) -> T:
        """A caller that goes away cancels it. What ends with the link is a StoreError."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise StoreError("the link is closed") from None

    # ---- the breaker ----

    def _open(self, why: str) -> None:
        """What fails together with the call that opened it makes no rest longer."""
        self._tell_away(why)
        if self._breaker.closed:
            self._breaker.failed()
        self._metrics.up.set(0)
        self._opened.set()

    def _tell_away(self, why: str) -> None:
        """Once, until it is there again."""
        if not self._told_away:
            events.warning("remote_away", why=why)
        self._told_away = True

    def _close_breaker(self, say: Callable[[], None]) -> None:
        if not self._breaker.closed:
            events.event("remote_there")
        self._told_away = False
        say()
        self._metrics.up.set(1)

    async def _mend(self) -> None:
        """Pings while the breaker is open, each after a rest."""
        while True:
            await self._opened.wait()
            await asyncio.sleep(self._breaker.rest_s)
            if self._breaker.closed:
                self._opened.clear()
                continue
            try:
                async with asyncio.timeout(self.patience_s):
                    await self._on_thread(self._bounded(lambda store: store.ping()))
            except StoreError as error:
                self._ping_failed(str(error))
            except TimeoutError:
                self._ping_failed(f"no answer within {self.patience_s:g} s")
            else:
                self._close_breaker(self._breaker.mended)
                self._opened.clear()

    def _ping_failed(self, why: str) -> None:
        if not self._breaker.closed:  # else a call that was late has worked meanwhile
            self._tell_away(why)
            self._breaker.failed()
