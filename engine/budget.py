"""One budget of device memory, divided between the pages of KV and hot experts by what each saves.

    seconds that n hot experts save  = activations * share(n) * (CPU's - device's seconds of one)
    seconds that KV of m tokens saves = prompt tokens * hit rate(m) * seconds that one takes

Both are of the same traffic: what --expert-statistics keeps over restarts. Memory can't move
between the two while serving (pages are the daemon's too, and mapped by it), so it is divided at
the start; what would be better by now is told, and done by the next start. Not responsible for
which experts are hot (placement), nor for which blocks are cached (the daemon).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig

GB = 1e9
Counts = NDArray[np.float64]  # [layers, experts]
SUMS = ("host_activations", "host_s", "device_activations", "device_s")
OF_READS = ("needed_experts", "missed_experts", "read_wait_s")


@dataclass(frozen=True)
class Measured:
    """What serving showed, added up over restarts. `needed_experts`: that layers needed of those on
    disk, `missed_experts` of them had to be read, and were waited for `read_wait_s`. `hit_rates`:
    (tokens of KV, share of the prompts' tokens that an LRU pool of that size would have had), of
    the last run."""

    host_activations: float = 0.0
    host_s: float = 0.0
    device_activations: float = 0.0
    device_s: float = 0.0
    prompt_tokens: float = 0.0
    prefill_tokens_per_s: float = 0.0
    hit_rates: tuple[tuple[float, float], ...] = ()
    needed_experts: float = 0.0
    missed_experts: float = 0.0
    read_wait_s: float = 0.0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Measured:
        """From a file. Raises ValueError, KeyError or TypeError for what isn't one."""
        rates = tuple((float(size), float(rate)) for size, rate in told.get("hit_rates", ()))
        reads = {name: told.get(name, 0.0) for name in OF_READS}  # an older file has none
        names = asdict(cls()).keys() - {"hit_rates"}
        numbers = {name: float({**told, **reads}[name]) for name in names}
        if not all(math.isfinite(n) and n >= 0 for n in (*numbers.values(), *sum(rates, ()))):
            raise ValueError("numbers that are no measurements")
        return cls(**numbers, hit_rates=rates)

    def plus(self, later: Measured) -> Measured:
        """With what a later run showed."""
        added = {name: getattr(self, name) + getattr(later, name) for name in (*SUMS, *OF_READS)}
        return Measured(
            **added,
            prompt_tokens=self.prompt_tokens + later.prompt_tokens,
            prefill_tokens_per_s=later.prefill_tokens_per_s or self.prefill_tokens_per_s,
            hit_rates=later.hit_rates or self.hit_rates,
        )

    @property
    def activation_s(self) -> float | None:
        """What one on the device saves; None where either place has computed none."""
        if not self.host_activations or not self.device_activations:
            return None
        host = self.host_s / self.host_activations
        return max(0.0, host - self.device_s / self.device_activations)

    @property
    def missing_expert_s(self) -> float | None:
        """What a layer waits for one that isn't in memory; None where none was read."""
        return self.read_wait_s / self.missed_experts if self.missed_experts else None

    def hit_rate(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        sizes, rates = zip((0.0, 0.0), *self.hit_rates, strict=True)
        found: NDArray[np.float64] = np.interp(tokens, sizes, rates)
        return found


@dataclass(frozen=True)
class Sizes:
    """Of a model: bytes of one expert and of a page; `total` experts, and `beside` places for those
    that are on their way to the device."""

    expert_bytes: int
    total: int
    beside: int
    page_bytes: int
    page_size: int


@dataclass(frozen=True)
class Division:
    """Hot experts and pages that fit in a budget, and by what they were chosen: given, measured, or
    half each where nothing was measured yet."""

    hot: int
    pages: int
    by: str

    def told(self, sizes: Sizes) -> dict[str, Any]:
        return {
            "hot": self.hot,
            "experts_gb": round((self.hot + sizes.beside) * sizes.expert_bytes / GB, 3),
            "kv_gb": round(self.pages * sizes.page_bytes / GB, 3),
            "by": self.by,
        }


def shares(counts: Counts) -> NDArray[np.float64]:
    """The part of all activations that the n most chosen experts serve, n from 0 on."""
    ordered = np.sort(counts.reshape(-1))[::-1]
    total = ordered.sum()
    summed = np.cumsum(ordered) / total if total else np.arange(1, ordered.size + 1) / ordered.size
    return np.concatenate(([0.0], summed))


def saved_s(
    counts: Counts, measured: Measured, sizes: Sizes, hot: NDArray[Any], pages: NDArray[Any]
) -> NDArray[np.float64] | None:
    """Seconds that each of these divisions would have saved; None while a value isn't known."""
    activation = measured.activation_s
    if activation is None or not measured.hit_rates or not measured.prefill_tokens_per_s:
        return None
    known = shares(counts)[np.minimum(hot, counts.size)]
    by_experts = counts.sum() * known * activation
    by_hits = measured.hit_rate(pages * float(sizes.page_size)) * measured.prompt_tokens
    both: NDArray[np.float64] = by_experts + by_hits / measured.prefill_tokens_per_s
    return both


def divide(
    total_bytes: float, least_pages: int, sizes: Sizes, counts: Counts, measured: Measured
) -> Division:
    """The division that would have saved most; half each while that isn't known."""
    room = int(total_bytes) - least_pages * sizes.page_bytes
    most = min(sizes.total, max(0, room // sizes.expert_bytes - sizes.beside))
    hot = np.arange(most + 1)
    pages = (int(total_bytes) - (hot + sizes.beside) * sizes.expert_bytes) // sizes.page_bytes
    saved = saved_s(counts, measured, sizes, hot, pages)
    if saved is None:
        at = min(most, int(total_bytes / 2 // sizes.expert_bytes) - sizes.beside)
        return Division(max(0, at), int(pages[max(0, at)]), "half each")
    at = int(np.argmax(saved))
    return Division(at, int(pages[at]), "measured")


def least_pages(config: EngineConfig) -> int:
    """That a step of any kind can be computed."""
    return -(-config.step_tokens // config.page_size) + config.max_running


def decided(
    config: EngineConfig, sizes: Sizes, hot: int | None, counts: Counts, measured: Measured
) -> Division:
    """Pages and hot experts that --gpu-memory-gb holds. What is given of the two stays: `hot`, and
    the settings of the pool. Raises InvalidConfig where it doesn't fit."""
    total = int((config.gpu_memory_gb or 0) * GB)
    least = least_pages(config)
    pages = config.num_pages
    if pages is None and config.kv_memory_gb is not None:
        pages = int(config.kv_memory_gb * GB) // sizes.page_bytes
    if pages is None and hot is None:
        least_bytes = least * sizes.page_bytes + sizes.beside * sizes.expert_bytes
        if total < least_bytes:
            mend = f"at least {least_bytes / GB:.3f}: {least} pages of KV, and experts that move"
            raise InvalidConfig("gpu_memory_gb", config.gpu_memory_gb, mend)
        division = divide(total, least, sizes, counts, measured)
    elif hot is None:
        left = total - (pages or 0) * sizes.page_bytes
        fits = min(sizes.total, left // sizes.expert_bytes - sizes.beside)
        division = Division(fits, pages or 0, "given")
    else:
        left = total - (hot + sizes.beside) * sizes.expert_bytes
        division = Division(hot, left // sizes.page_bytes if pages is None else pages, "given")
    used = division.pages * sizes.page_bytes
    used += (division.hot + sizes.beside) * sizes.expert_bytes
    if division.hot < 0 or division.pages < 2 or used > total:
        mend = f"KV and hot experts, as they are given, need {used / GB:.3f} GB"
        raise InvalidConfig("gpu_memory_gb", config.gpu_memory_gb, mend)
    return division


@dataclass(frozen=True)
class Budget:
    """What was divided, and what would be better by now."""

    gpu_memory_gb: float | None
    least_pages: int
    sizes: Sizes
    division: Division

    def told(self, counts: Counts, measured: Measured) -> dict[str, Any]:
        """For GET /experts: the division, a better one, and what another GB would bring: the share
        of activations, of hits, and the seconds of an hour of this traffic's computing."""
        told: dict[str, Any] = {"now": self.division.told(self.sizes)}
        if self.gpu_memory_gb is not None:
            total = self.gpu_memory_gb * GB
            better = divide(total, self.least_pages, self.sizes, counts, measured)
            told |= {"gpu_memory_gb": self.gpu_memory_gb, "better": better.told(self.sizes)}
        return told | {"another_gb": self._another(counts, measured)}

    def _another(self, counts: Counts, measured: Measured) -> dict[str, Any]:
        hot, pages = self.division.hot, self.division.pages
        more = min(self.sizes.total, hot + int(GB) // self.sizes.expert_bytes)
        known = shares(counts)
        told: dict[str, Any] = {"activations": round(float(known[more] - known[hot]), 4)}
        grown = pages + int(GB) // self.sizes.page_bytes
        if measured.hit_rates:
            rates = measured.hit_rate(np.array([pages, grown]) * float(self.sizes.page_size))
            told["hits"] = round(float(rates[1] - rates[0]), 4)
        now = np.array([hot, more, hot]), np.array([pages, pages, grown])
        saved = saved_s(counts, measured, self.sizes, *now)
        if saved is not None:
            told["experts_s"] = round(float(saved[1] - saved[0]), 3)
            told["kv_s"] = round(float(saved[2] - saved[0]), 3)
        return told
