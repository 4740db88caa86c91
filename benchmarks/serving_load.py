"""Load for serving.py: users that ask a server over HTTP, and the arithmetic of what they saw.

Prompts are token ids, so that every server sees the same ones. A closed loop has so many users of
whom each asks again when it is answered; an open one has requests that come when they come. Not
here: which servers there are (serving_peers), and what is asked of them (serving).
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.clients import Kept
from benchmarks.processes import ProcessError

Tokens = tuple[int, ...]


class Server(Protocol):
    """What users ask. `more`: fields that its bodies need beside OpenAI's."""

    name: str
    port: int
    more: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """One answer as its user saw it: seconds from the load's begin to when it was asked for, and
    to each of its pieces; tokens as the server counted them."""

    asked: float
    pieces: tuple[float, ...]
    prompt: int
    cached: int
    generated: int

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next; a piece of several tokens counts as one."""
        return [after - before for before, after in itertools.pairwise(self.pieces)]

    @property
    def per_token(self) -> float:
        """Mean seconds a token, behind the first."""
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.generated - 1)


@dataclass(frozen=True)
class Slo:
    """What an answer has to keep to count for goodput, in seconds."""

    ttft: float
    per_token: float

    def kept(self, seen: Seen) -> bool:
        return seen.ttft <= self.ttft and seen.per_token <= self.per_token


@dataclass(frozen=True)
class Figures:
    """Of one load. Milliseconds; rates a second of the load's whole time; `least`: tokens that had
    to be prefilled where nothing is computed twice."""

    ttft_p50: float
    ttft_p99: float
    token_p50: float
    token_p99: float
    output_rate: float
    goodput: float  # answers within the SLO
    requests_rate: float
    prefilled: int
    least: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of them are not above (nearest rank)."""
    ordered = sorted(values)
    rank = int(np.ceil(percent / 100 * len(ordered)))
    return ordered[max(rank, 1) - 1]


def least_prefilled(prompts: Sequence[Tokens], block: int) -> int:
    """Tokens that a cache of full blocks of so many tokens has to compute when it forgets nothing
    and each prompt finds what the earlier ones left; a prompt's last token always is."""
    known: set[Tokens] = set()
    computed = 0
    for prompt in prompts:
        blocks = range(block, len(prompt) + 1, block)
        usable = [end for end in blocks if end < len(prompt)]
        found = 0
        for end in usable:
            if prompt[:end] not in known:
                break
            found = end
        computed += len(prompt) - found
        known.update(prompt[:end] for end in blocks)
    return computed


def figures(seen: Sequence[Seen], least: int, slo: Slo) -> Figures:
    """Of at least one answer. The time is from the first request to the last piece."""
    gaps = [gap for each in seen for gap in each.gaps] or [0.0]
    ttfts = [each.ttft for each in seen]
    whole = max(each.pieces[-1] for each in seen) - min(each.asked for each in seen)
    return Figures(
        ttft_p50=percentile(ttfts, 50) * 1e3,
        ttft_p99=percentile(ttfts, 99) * 1e3,
        token_p50=percentile(gaps, 50) * 1e3,
        token_p99=percentile(gaps, 99) * 1e3,
        output_rate=sum(each.generated for each in seen) / whole,
        goodput=sum(map(slo.kept, seen)) / whole,
        requests_rate=len(seen) / whole,
        prefilled=sum(each.prompt - each.cached for each in seen),
        least=least,
    )


def ask(server: Server, prompt: Tokens, max_tokens: int, clock: Callable[[], float]) -> Seen:
    """One streamed greedy answer of exactly so many tokens. Raises ProcessError for another."""
    body = {
        "model": "m",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    kept = Kept(server.port)
    pieces: list[float] = []
    usage: dict[str, Any] = {}
    asked = clock()
    try:
        response = kept.post("/v1/completions", json.dumps(body | server.more).encode())
        if response.status != 200:
            raise ProcessError(f"{server.name}: {response.status} {response.read()[:300]!r}")
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if event.get("choices"):
                pieces.append(clock())
    finally:
        kept.close()
    if not pieces or usage.get("completion_tokens") != max_tokens:
        raise ProcessError(f"{server.name}: {usage} of {max_tokens} tokens")
    details = usage.get("prompt_tokens_details") or {}
    cached = int(details.get("cached_tokens") or 0)
    return Seen(asked, tuple(pieces), usage["prompt_tokens"], cached, max_tokens)


def clock_from_now() -> Callable[[], float]:
    begin = time.perf_counter()
    return lambda: time.perf_counter() - begin


def closed_loop(
    server: Server, talks: Sequence[Sequence[Tokens]], max_tokens: int, least: int, slo: Slo
) -> Figures:
    """A user for each of the talks, which asks its prompts one after the other."""
    clock = clock_from_now()

    def user(prompts: Sequence[Tokens]) -> list[Seen]:
        return [ask(server, prompt, max_tokens, clock) for prompt in prompts]

    with ThreadPoolExecutor(len(talks)) as pool:
        found = list(pool.map(user, talks))
    return figures([seen for each in found for seen in each], least, slo)


@dataclass(frozen=True)
class Arrivals:
    """Prompts, and the seconds from the begin at which each comes."""

    prompts: Sequence[Tokens]
    at: Sequence[float]


def open_loop(server: Server, load: Arrivals, max_tokens: int, least: int, slo: Slo) -> Figures:
    """Each request comes at its time, whatever became of the others. Its time counts from when it
    came."""
    clock = clock_from_now()
    waker = threading.Event()  # never set: a wait that ends by its time alone

    def request(prompt: Tokens, at: float) -> Seen:
        waker.wait(max(0.0, at - clock()))
        return ask(server, prompt, max_tokens, clock)

    with ThreadPoolExecutor(len(load.prompts)) as pool:
        found = list(pool.map(request, load.prompts, load.at))
    return figures(found, least, slo)


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """When so many requests come, `rate` of them a second on the mean, the first at once."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]
