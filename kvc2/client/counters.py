"""What the bridge tells its engine's metrics.

Not here: the metrics, which are the engine's, under its own names.
"""

from __future__ import annotations

from typing import Literal

Answer = Literal["adopted", "duplicate", "refused"]


class Counters:
    """Counts nothing: an engine overrides what its metrics have. Called on any thread; a method
    must neither block nor raise."""

    def attached(self) -> None:
        """A session with the daemon began."""

    def detached(self, reason: str) -> None:
        """It ended: `dead` or `silent`."""

    def attach_failed(self, reason: str) -> None:
        """A try to attach was in vain: the `reason` of errors.Unreachable, or `refused`."""

    def fault(self, call: str) -> None:
        """A call failed, and the request that it was for runs without it."""

    def committed(self, answer: Answer, blocks: int) -> None:
        """So many blocks of one commit had this answer; maybe none."""

    def salt_let_go(self) -> None:
        """A namespace that was not used for long made room for another one."""


NO_COUNTERS = Counters()
