"""When two greedy outputs count as equal in bf16, where rows of a matrix product depend on how many
rows there are, so that a hit may turn a tie round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BF16_MANTISSA_BITS = 7
STEPS_MAX = 2


@dataclass(frozen=True)
class Equality:
    """`how`: "tokens" (the same ids), "tie" (they part where the uncached run's two best logits lie
    within STEPS_MAX bf16 steps) or "differs". `at`: where they part; None if nowhere. `steps`:
    the distance of the two best there, in bf16 steps."""

    how: str
    at: int | None = None
    steps: float = 0.0

    @property
    def equal(self) -> bool:
        return self.how != "differs"

    def __str__(self) -> str:
        if self.at is None:
            return "yes: same tokens"
        return f"{'yes: tie' if self.equal else 'NO:'} at {self.at}, {self.steps:.1f} steps"


def compare(
    tokens: Sequence[int], uncached: Sequence[int], uncached_top: Sequence[tuple[float, float]]
) -> Equality:
    """`tokens` against the output of an engine without a cache and its two best logits a token."""
    parted = [at for at, pair in enumerate(zip(tokens, uncached, strict=False)) if len({*pair}) > 1]
    if not parted and len(tokens) == len(uncached):
        return Equality("tokens")
    at = parted[0] if parted else min(len(tokens), len(uncached))
    if at >= len(uncached_top):  # the uncached run had ended: no logits to excuse more tokens
        return Equality("differs", at, math.inf)
    best, second = uncached_top[at]
    steps = (best - second) / bf16_step(best)
    return Equality("tie" if steps <= STEPS_MAX else "differs", at, steps)


def bf16_step(value: float) -> float:
    """The distance between neighbouring bf16 numbers at `value`."""
    _, exponent = math.frexp(value)  # value = m * 2**exponent with 0.5 <= |m| < 1
    return math.ldexp(1.0, exponent - 1 - BF16_MANTISSA_BITS)
