"""What is worth waiting for: bytes on their way from a slower tier, or the engine's computing.

Pure: what was measured comes in, a choice goes out. Not here: who measures the tiers (mover.py) and
the engine (its scheduler, which reports with each commit), and who acts on the choice (loading.py).

A prompt's matched blocks that the session's pool does not hold lie in runs, each in one tier. The
engine can't begin before its prefix is settled, so that k blocks brought and the rest computed take

    ready(k) = sum over the tiers of the k blocks of (queue + bytes / bandwidth)
             + (tokens of the delta + tokens of the other blocks) / prefill rate

and the best k is at the end of a run, since within one ready() is a straight line, or is what can
be brought before the acquire's deadline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvc2.tiers.meter import Estimate

PATIENCE_SHARE = 8  # of the computing that is saved: the price of a surprise, the estimate in it
OVERRUN_SHARE = 16  # of the same: what an estimate that takes most of that may be overrun by


@dataclass(frozen=True)
class Offer:
    """Consecutive matched blocks in one tier; `estimate` None: not measured yet, taken for free."""

    tier: str
    blocks: int
    estimate: Estimate | None


@dataclass(frozen=True)
class Choice:
    """`blocks`: how many leading ones to bring. `patience_s`: how far bringing them may overrun its
    estimate; None: as far as the caller's own deadline, since the prefill rate isn't known."""

    blocks: int
    patience_s: float | None


def choose(
    offers: Sequence[Offer],
    *,
    page_bytes: int,
    page_size: int,
    prefill_rate: float,
    deadline_s: float = math.inf,
) -> Choice:
    """The k with the least ready(k), the larger of equals, of those that come within the deadline.
    `prefill_rate`: tokens/s; 0: unknown, then all is worth it."""
    every = sum(offer.blocks for offer in offers)
    if prefill_rate <= 0:
        return Choice(every, None)
    best, best_saved, best_spent, best_late_s = 0, 0.0, 0.0, 0.0
    blocks, spent, late_s = 0, 0.0, 0.0
    queued: set[str] = set()
    for offer in offers:
        count = offer.blocks
        if offer.estimate is not None:
            block_s = page_bytes / offer.estimate.bandwidth_bytes_per_s
            spent += 0.0 if offer.tier in queued else offer.estimate.queue_s
            queued.add(offer.tier)
            late_s = max(late_s, offer.estimate.late_s)
            if spent > deadline_s:
                count = 0
            elif spent + count * block_s > deadline_s:
                count = math.floor((deadline_s - spent) / block_s)
            spent += count * block_s
        blocks += count
        saved = blocks * page_size / prefill_rate - spent
        if saved >= best_saved and spent <= deadline_s:
            best, best_saved, best_spent, best_late_s = blocks, saved, spent, late_s
        if count < offer.blocks:
            break
    return Choice(best, patience_s(best * page_size / prefill_rate, best_spent, best_late_s))


def patience_s(computing_s: float, expected_s: float, late_s: float) -> float:
    """How far bringing may overrun what is expected of it, where that saves so much computing.

    In all it may take PATIENCE_SHARE of the computing, so that a fast tier which has become slow
    costs no more than that; where most of that is expected, OVERRUN_SHARE longer. A tier that has
    been late without being slow is waited for longer, but never for longer than computing takes."""
    share = max(computing_s / PATIENCE_SHARE - expected_s, computing_s / OVERRUN_SHARE)
    return max(share, min(late_s, computing_s))
