"""When the next batch of a copy that nobody waits for may begin.

Not here: what such a batch holds (demotion.py, disk_writer.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvc2 import _core
from kvc2.moving.mover import Mover

PATIENCE_S = 0.5  # copies that nobody waits for yield this long before each batch, not for ever
RETRY_S = 1.0  # after copying failed, or the disk refused
PRESSURE = 4  # write_policy back: copy when less than 1 / PRESSURE of a pool is free


class Turns:
    """Copies that nobody waits for yield to promotions and loads, which somebody waits for.

    | state      | to         | when [function]                                               |
    |------------|------------|---------------------------------------------------------------|
    | quiet      | waited for | a promotion or a load begins [Mover]                          |
    | waited for | quiet      | the last of them ends [told]                                  |
    | either     | urgent     | somebody waits until all is copied: nothing yields [urgently] |
    | urgent     | either     | nobody does any more [urgently]                               |

    `wake` makes demotion and the disk's writer look for work."""

    def __init__(
        self, index: _core.Index, mover: Mover, policy: str, wake: Callable[[], None]
    ) -> None:
        self._index = index
        self._mover = mover
        self._policy = policy
        self._urgent = 0
        self._quiet = asyncio.Event()
        self.wake = wake

    def told(self) -> None:
        """A transfer may have ended."""
        if not self._mover.waited_for:
            self._quiet.set()

    @contextmanager
    def urgently(self) -> Iterator[None]:
        """Meanwhile nothing yields, and write_policy back copies all."""
        self._urgent += 1
        self._quiet.set()
        try:
            yield
        finally:
            self._urgent -= 1

    @property
    def patience_s(self) -> float:
        """How long a batch yields to what somebody waits for."""
        return 0.0 if self._urgent or self._policy == "through" else PATIENCE_S

    async def quiet(self) -> None:
        """Wait while somebody waits for a transfer, for `patience_s` at most."""
        if self._mover.waited_for and self.patience_s:
            self._quiet.clear()
            with suppress(TimeoutError):
                # not wait_for: on Python 3.11 it loses a cancellation that comes with its end
                async with asyncio.timeout(self.patience_s):
                    await self._quiet.wait()

    def wanted(self, pool: int) -> bool:
        """write_policy back copies only what is about to be evicted, or for a flush."""
        if self._policy != "back" or self._urgent:
            return True
        counts = self._index.pool_counts(pool)
        return counts.free < counts.pages // PRESSURE


class Retry:
    """What becomes of one kind of batch after a failure.

    | state  | to     | when [function]                                             |
    |--------|--------|-------------------------------------------------------------|
    | good   | failed | a batch failed; RETRY_S from now `wake` is called [ended]   |
    | failed | due    | RETRY_S have passed, or somebody can't wait [at_once]        |
    | due    | good   | a batch was copied [ended]                                  |
    | due    | failed | it failed again [ended]                                     |
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._due_at: float | None = None  # of the loop's clock; None: good

    @property
    def failing(self) -> bool:
        """Whether the last batch has failed: it will be tried again."""
        return self._due_at is not None

    @property
    def must_wait(self) -> bool:
        return self._due_at is not None and asyncio.get_running_loop().time() < self._due_at

    def ended(self, *, good: bool) -> None:
        self._due_at = None if good else asyncio.get_running_loop().time() + RETRY_S
        if not good:
            self.wake_later()

    def at_once(self) -> None:
        if self._due_at is not None:
            self._due_at = 0.0

    def wake_later(self) -> None:
        asyncio.get_running_loop().call_later(RETRY_S, self._wake)
