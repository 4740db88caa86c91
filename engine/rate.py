"""How fast this engine prefills, as its steps show, and how much of that fits beside decodes. Not
responsible for who asks (bridge), nor for whose tokens a step computes (scheduler)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

SMOOTHING = 0.3  # weight of a step of a whole chunk
STEPS = 8  # of each kind that are remembered, so that a step that was disturbed says little
UNMEASURED = 64  # tokens of a chunk beside decodes of which nothing is known
ALONE_EVERY = 64  # of so many steps with decodes and prompts that wait, one has no chunk
LEAST = 8  # a chunk of fewer reads as many weights, and brings the prompt no further


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


@dataclass
class _Took:
    """Seconds of recent steps with about as many decodes: of those alone, and what each prefilled
    token added to them."""

    alone: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    a_token: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    until_alone: int = 0  # steps


class MixedSteps:
    """How many tokens a step with decodes prefills: a power of two, with which it takes at most
    `stretch` times as long as the decodes alone take, as recent steps show; LEAST where fewer would
    be needed, and `most` at most. Steps with 2^i to 2^(i+1) - 1 decodes are one kind. While prompts
    never stop coming no step of a kind is without one, and how long its decodes take alone would
    stay unknown: so its first step prefills none, and one in ALONE_EVERY. `rate` is told of all
    steps, and stands for what no mixed step has shown yet."""

    def __init__(self, stretch: float, most: int, rate: PrefillRate) -> None:
        self.rate = rate
        self._stretch, self._most = stretch, most
        self._kinds: dict[int, _Took] = {}

    def measured(self, decodes: int, prefilled: int, seconds: float) -> None:
        """A step of them."""
        self.rate.measured(prefilled, seconds)
        if not decodes or seconds <= 0:
            return
        kind = self._kinds.setdefault(decodes.bit_length(), _Took())
        if not prefilled:
            kind.alone.append(seconds)
        elif kind.alone:
            kind.a_token.append(max(0.0, seconds - median(kind.alone)) / prefilled)

    def tokens(self, decodes: int) -> int:
        """Beside so many decodes, of prompts that wait; asked once a step."""
        kind = self._kinds.setdefault(decodes.bit_length(), _Took())
        kind.until_alone -= 1
        if kind.until_alone < 0:
            kind.until_alone = ALONE_EVERY - 1
            return 0
        alone = self._nearest(decodes, lambda kind: kind.alone)
        a_token = self._nearest(decodes, lambda kind: kind.a_token)
        if a_token is None and self.rate.tokens_per_s:
            a_token = 1 / self.rate.tokens_per_s
        if alone is None or a_token is None:
            return min(UNMEASURED, self._most)
        fit = (self._stretch - 1) * alone / max(a_token, 1e-9)
        return min(max(LEAST, 1 << int(min(fit, self._most)).bit_length() >> 1), self._most)

    def _nearest(self, decodes: int, of: Callable[[_Took], deque[float]]) -> float | None:
        """The median of the kind that is most like this one, of those that have any."""
        wanted = decodes.bit_length()
        found = [each for each, kind in self._kinds.items() if of(kind)]
        if not found:
            return None
        return median(of(self._kinds[min(found, key=lambda each: (abs(each - wanted), each))]))
