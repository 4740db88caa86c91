"""Stand-ins for the scheduler's tests: a model whose KV is checkable, a scheduler on a clock.

The model writes into each token's place in the pool a hash of all tokens up to it, made from the
hash that it *reads* through the block table; the next token is that hash modulo the vocabulary. So
a wrong page, a page read too early or one overwritten while it is read all give wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.batch import Batch
from engine.metrics import EngineMetrics
from engine.prefix import Bridge, BridgeConfig, BridgeCounters, PageBook
from engine.request import Caller, Output, Piece, Request, SamplingParams
from engine.scheduler import Scheduler, SchedulerConfig, check
from tests.doubles.bridges import Inline
from tests.doubles.small_daemon import PAGE_SIZE, SmallDaemon

VOCABULARY = 97
MODULUS = (1 << 61) - 1


def chain(value: int, token: int) -> int:
    return (value * 1_000_003 + token + 1) % MODULUS


def expected_tokens(prompt: Sequence[int], count: int, end: int | None = None) -> list[int]:
    """What the model answers, computed without pages; `end` stops it."""
    value = 0
    for token in prompt:
        value = chain(value, token)
    tokens: list[int] = []
    while len(tokens) < count and (not tokens or tokens[-1] != end):
        tokens.append(value % VOCABULARY)
        value = chain(value, tokens[-1])
    return tokens


class HashModel:
    """engine.runner.Runner's place. `seconds` is what a token costs on the `clock`."""

    def __init__(self, num_pages: int, clock: Clock | None = None, seconds: float = 0.0) -> None:
        self.pool = np.full((num_pages, PAGE_SIZE), -1, np.int64)
        self.batches: list[Batch] = []
        self.fail_next = False
        self.poison: frozenset[int] = frozenset()  # tokens that no step survives
        self._clock = clock
        self.seconds = seconds

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> torch.Tensor:
        self.batches.append(batch)
        if layer_ready is not None:
            layer_ready(0)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory")
        if not self.poison.isdisjoint(batch.token_ids.tolist()):
            raise IndexError("index out of range in self")
        if self._clock is not None:
            self._clock.now += self.seconds * len(batch.token_ids)
        ends = torch.cumsum(batch.query_lens, 0).tolist()
        values: dict[int, int] = {}
        for row, end in enumerate(ends):
            count, context = int(batch.query_lens[row]), int(batch.context_lens[row])
            table = batch.block_tables[row].tolist()
            start = context - count
            value = 0
            if start:
                value = int(self.pool[table[(start - 1) // PAGE_SIZE], (start - 1) % PAGE_SIZE])
            for index in range(count):
                value = chain(value, int(batch.token_ids[end - count + index]))
                place = start + index
                self.pool[table[place // PAGE_SIZE], place % PAGE_SIZE] = value
                values[end - count + index] = value
        logits = torch.zeros(len(batch.logits_rows), VOCABULARY)
        for row, index in enumerate(batch.logits_rows.tolist()):
            logits[row, values[index] % VOCABULARY] = 10.0
        return logits


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class NoText:
    """Text of no tokens; `stop_at` meets a stop string at that token."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def push(self, token_id: int) -> Piece:
        return Piece("", "stop" if token_id == self.stop_at else None)

    def flush(self) -> str:
        return ""


@dataclass
class Asked:
    """A request and what came back."""

    request: Request
    outputs: list[Output]

    @property
    def tokens(self) -> list[int]:
        return [o.token_id for o in self.outputs if o.token_id is not None]

    @property
    def finish(self) -> str | None:
        return self.outputs[-1].finish if self.outputs else None

    @property
    def stats(self) -> Any:
        return self.outputs[-1].stats


@dataclass
class House:
    """A scheduler on a hash model, with or without a daemon, on a clock that only tests move."""

    scheduler: Scheduler
    bridge: Bridge
    model: HashModel
    daemon: SmallDaemon | None
    clock: Clock
    ordered: Inline
    acquires: Inline
    asked: list[Asked] = field(default_factory=list)

    def ask(self, prompt: Sequence[int], max_tokens: int = 4, **fields: Any) -> Asked:
        outputs: list[Output] = []
        request = Request(
            request_id=f"r{len(self.asked)}",
            tokens=np.array(prompt, np.uint32),
            max_tokens=max_tokens,
            sampling=fields.pop("sampling", SamplingParams(temperature=0)),
            text=fields.pop("text", NoText()),
            deliver=outputs.append,
            caller=fields.pop("caller", Caller()),
            **fields,
        )
        self.asked.append(Asked(request, outputs))
        self.scheduler.add(request)
        return self.asked[-1]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()
            self.check()

    def run(self, most: int = 2000) -> None:
        """Until all is answered."""
        for _ in range(most):
            self.step()
            self.clock.now += 0.01
            if self.scheduler.idle:
                return
        raise AssertionError("requests are stuck")

    def check(self) -> None:
        check(self.scheduler)
        if self.daemon is not None and self.bridge.book.session and not self.ordered.calls:
            self.daemon.pages.check()


def build(
    num_pages: int = 32,
    *,
    daemon: bool = True,
    low_water: int = 2,
    seconds: float = 0.0,
    config: SchedulerConfig | None = None,
) -> House:
    clock, metrics = Clock(), EngineMetrics()
    model = HashModel(num_pages, clock, seconds)
    ordered, acquires = Inline(), Inline()
    bridge = Bridge(
        PageBook(num_pages),
        BridgeConfig(
            page_size=PAGE_SIZE,
            low_water=low_water,
            high_water=8,
            load_timeout_s=0.3,
            grant_timeout_s=0.0,
        ),
        counters=BridgeCounters(metrics),
    )
    small = SmallDaemon(model.pool) if daemon else None
    if small is not None:
        bridge.connect(small.attach, ordered=ordered, acquires=acquires)
    scheduler = Scheduler(
        config or SchedulerConfig(chunk_size=8, token_budget=16, max_running=4),
        bridge=bridge,
        compute=model,
        metrics=metrics,
        clock=clock,
    )
    return House(scheduler, bridge, model, small, clock, ordered, acquires)
