"""How fast this engine prefills, as its steps show. Not responsible for who asks (bridge)."""

from __future__ import annotations

from collections.abc import Callable

SMOOTHING = 0.3  # weight of a step of a whole chunk


class PrefillRate:
    """A mean of recent steps. A short step takes longer a token than whole chunks do, and weighs
    less."""

    def __init__(self, chunk_size: int, tell: Callable[[float], None]) -> None:
        """`tell` gets each new mean."""
        self.tokens_per_s: float | None = None  # nothing was measured yet
        self._chunk_size = chunk_size
        self._tell = tell
        self._weight = 0.0  # of all that was measured

    def measured(self, tokens: int, seconds: float) -> None:
        """A step prefilled so many tokens; none say nothing."""
        if tokens == 0 or seconds <= 0:
            return
        weight = SMOOTHING * min(1.0, tokens / self._chunk_size)
        self._weight += weight * (1 - self._weight)  # 1 when much has been seen
        old = self.tokens_per_s or 0.0
        self.tokens_per_s = old + weight / self._weight * (tokens / seconds - old)
        self._tell(self.tokens_per_s)
