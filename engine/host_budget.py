"""One budget of host memory, divided between the pages of KV and cold experts that memory holds.

    seconds that n experts in memory save = experts needed * share(n) * seconds of a missing one
    seconds that KV of m tokens saves     = prompt tokens * hit rate(m) * seconds that one takes

As budget.py has it for a device; but here memory moves while serving, since both sides can give
pages of it back to the host. It is re-decided slowly: a better division is gone for only when it
would have saved a tenth more. Pure: not responsible for moving memory (models/host_memory), nor for
the daemon's arena, whose size is its own (kvc2 serve).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.budget import GB, Counts, Measured, shares
from kvc2.errors import InvalidConfig

DECIDE_S = 60.0  # between two decisions
GAIN_MIN = 0.1  # of what is saved now: less is no reason to move


@dataclass(frozen=True)
class HostSizes:
    """Of a model: bytes of a cold expert and of a page, how many experts there are, and the least
    of both that can be computed with."""

    expert_bytes: int
    total: int
    least_experts: int
    page_bytes: int
    page_size: int
    least_pages: int


@dataclass(frozen=True)
class HostDivision:
    """Experts in memory and pages, and by what they were chosen: given, measured, or half each
    where nothing was measured yet."""

    experts: int
    pages: int
    by: str

    def used_bytes(self, sizes: HostSizes) -> int:
        return self.experts * sizes.expert_bytes + self.pages * sizes.page_bytes

    def told(self, sizes: HostSizes) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "experts_gb": round(self.experts * sizes.expert_bytes / GB, 3),
            "kv_gb": round(self.pages * sizes.page_bytes / GB, 3),
            "by": self.by,
        }


def saved_s(
    counts: Counts, measured: Measured, sizes: HostSizes, experts: NDArray[Any], pages: NDArray[Any]
) -> NDArray[np.float64] | None:
    """Seconds that each of these divisions would have saved; None while a value isn't known.
    counts [layers, experts]: of cold experts."""
    missing_s = measured.missing_expert_s
    if missing_s is None or not measured.hit_rates or not measured.prefill_tokens_per_s:
        return None
    by_experts = measured.needed_experts * missing_s
    by_experts = by_experts * shares(counts)[np.minimum(experts, counts.size)]
    by_hits = measured.hit_rate(pages * float(sizes.page_size)) * measured.prompt_tokens
    both: NDArray[np.float64] = by_experts + by_hits / measured.prefill_tokens_per_s
    return both


def most_pages(total_bytes: int, sizes: HostSizes) -> int:
    """Beside the fewest experts. Raises InvalidConfig where the least of both doesn't fit."""
    left = total_bytes - sizes.least_experts * sizes.expert_bytes
    if left < sizes.least_pages * sizes.page_bytes:
        least = HostDivision(sizes.least_experts, sizes.least_pages, "").used_bytes(sizes)
        mend = (
            f"at least {least / GB:.4g}: {sizes.least_experts} experts, {sizes.least_pages} pages"
        )
        raise InvalidConfig("host_memory_gb", total_bytes / GB, mend)
    return left // sizes.page_bytes


def divide(total_bytes: int, sizes: HostSizes, counts: Counts, measured: Measured) -> HostDivision:
    """The division that would have saved most; half each while that isn't known. Raises
    InvalidConfig where the least of both doesn't fit."""
    most_pages(total_bytes, sizes)
    room = (total_bytes - sizes.least_pages * sizes.page_bytes) // sizes.expert_bytes
    most = max(sizes.least_experts, min(sizes.total, room))
    experts = np.arange(sizes.least_experts, most + 1)
    pages = (total_bytes - experts * sizes.expert_bytes) // sizes.page_bytes
    saved = saved_s(counts, measured, sizes, experts, pages)
    if saved is None:
        half = total_bytes // 2 // sizes.expert_bytes - sizes.least_experts
        at, by = int(np.clip(half, 0, len(experts) - 1)), "half each"
    else:
        at, by = int(np.argmax(saved)), "measured"
    return HostDivision(int(experts[at]), int(pages[at]), by)


def given(
    total_bytes: int, sizes: HostSizes, pages: int | None, experts: int | None
) -> HostDivision:
    """What the user fixes of both stays, and the other has the rest. Raises InvalidConfig where it
    doesn't fit."""
    if experts is None:
        left = total_bytes - (pages or 0) * sizes.page_bytes
        experts = min(sizes.total, left // sizes.expert_bytes)
    if pages is None:
        pages = (total_bytes - experts * sizes.expert_bytes) // sizes.page_bytes
    made = HostDivision(experts, pages, "given")
    fits = experts >= sizes.least_experts and pages >= 2
    if not fits or made.used_bytes(sizes) > total_bytes:
        needed = HostDivision(max(experts, sizes.least_experts), max(pages, 2), "")
        mend = f"KV and experts, as they are given, need {needed.used_bytes(sizes) / GB:.4g} GB"
        raise InvalidConfig("host_memory_gb", total_bytes / GB, mend)
    return made


class Redivision:
    """Which division is gone for, as serving shows what both sides save. A fixed one never
    changes."""

    def __init__(
        self, total_bytes: int, sizes: HostSizes, division: HostDivision, now: float
    ) -> None:
        self.total_bytes = total_bytes
        self.sizes = sizes
        self.goal = division
        self._decided_at = now

    @property
    def fixed(self) -> bool:
        return self.goal.by == "given"

    def due(self, now: float) -> bool:
        return not self.fixed and now - self._decided_at >= DECIDE_S

    def decide(self, now: float, counts: Counts, measured: Measured) -> None:
        """Once in DECIDE_S, where something was measured."""
        if not self.due(now):
            return
        self._decided_at = now
        better = divide(self.total_bytes, self.sizes, counts, measured)
        if self._pays(better, counts, measured):
            self.goal = better

    def _pays(self, better: HostDivision, counts: Counts, measured: Measured) -> bool:
        experts = np.array([self.goal.experts, better.experts])
        pages = np.array([self.goal.pages, better.pages])
        saved = saved_s(counts, measured, self.sizes, experts, pages)
        return saved is not None and bool(
            saved[1] > saved[0] and saved[1] >= (1 + GAIN_MIN) * saved[0]
        )

    def told(self, now: HostDivision, counts: Counts, measured: Measured) -> dict[str, Any]:
        """For GET /experts: the division, what is gone for, and what another GB would bring."""
        told = {
            "host_memory_gb": self.total_bytes / GB,
            "now": now.told(self.sizes),
            "goal": self.goal.told(self.sizes),
        }
        more = min(self.sizes.total, now.experts + int(GB) // self.sizes.expert_bytes)
        grown = now.pages + int(GB) // self.sizes.page_bytes
        known = shares(counts)
        another = {"needed": round(float(known[more] - known[now.experts]), 4)}
        if measured.hit_rates:
            size = float(self.sizes.page_size)
            rates = measured.hit_rate(np.array([now.pages, grown]) * size)
            another["hits"] = round(float(rates[1] - rates[0]), 4)
        experts, pages = (
            np.array([now.experts, more, now.experts]),
            np.array([now.pages, now.pages, grown]),
        )
        saved = saved_s(counts, measured, self.sizes, experts, pages)
        if saved is not None:
            another["experts_s"] = round(float(saved[1] - saved[0]), 3)
            another["kv_s"] = round(float(saved[2] - saved[0]), 3)
        return told | {"another_gb": another}
