"""Stand-ins for the scheduler's tests: a model whose KV is checkable, and a daemon in 150 lines.

The model writes into each token's place in the pool a hash of all tokens up to it, made from the
hash that it *reads* through the block table; the next token is that hash modulo the vocabulary. So
a wrong page, a page read too early or one overwritten while it is read all give wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine.batch import Batch
from engine.metrics import EngineMetrics
from engine.pages import PageBook
from engine.prefix import BridgeConfig, Prefix
from engine.request import Caller, Output, Piece, Request, SamplingParams
from engine.scheduler import Scheduler, SchedulerConfig
from kvc2 import errors
from kvc2.client import Acquired, Committed, Hints, LeaseCommit, Matched, Released

VOCABULARY = 97
PAGE_SIZE = 4
MODULUS = (1 << 61) - 1
NOTHING_SAID = Hints()


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
        self._clock = clock
        self.seconds = seconds

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> torch.Tensor:
        self.batches.append(batch)
        if layer_ready is not None:
            layer_ready(0)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory")
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
            values[end - 1] = value
        logits = torch.zeros(len(batch.logits_rows), VOCABULARY)
        for row, index in enumerate(batch.logits_rows.tolist()):
            logits[row, values[index] % VOCABULARY] = 10.0
        return logits


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Inline(Executor):
    """Runs what is submitted at once, or when `run` is called if `held`."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.calls: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((future, lambda: fn(*args, **kwargs)))
        if not self.held:
            self.run()
        return future

    def run(self) -> None:
        while self.calls:
            future, call = self.calls.pop(0)
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
                raise  # nothing that runs here may fail: a fault is a value, or it is a bug


@dataclass
class OpenLease:
    tokens: list[int]
    pinned: list[int]
    blocks: int  # matched or committed
    duplicates: list[int] = field(default_factory=list)


class SmallDaemon:
    """The cache as an engine sees it, with its page laws asserted. One namespace a caller."""

    def __init__(self, pool: np.ndarray, first_grant: int = 4) -> None:
        self.pool = pool
        self.first_grant = first_grant
        self.free: set[int] = set()
        self.private: set[int] = set()
        self.resident: dict[tuple[Any, ...], int] = {}  # (namespace, tokens...) -> page
        self.order: list[tuple[Any, ...]] = []  # least recently used first
        self.lower: dict[tuple[Any, ...], np.ndarray] = {}  # the cpu tier
        self.leases: dict[bytes, OpenLease] = {}
        self.transfers: list[list[tuple[int, np.ndarray]]] = []
        self.prefill_rates: list[float] = []  # told with commits
        self.said: list[tuple[str, bytes, Hints]] = []  # with acquires and releases
        self.arrive = True  # whether promotions complete
        self.fault: errors.Kvc2Error | None = None
        self.refuse = False
        self.prefix: Prefix | None = None
        self.computing_extra = 0

    # sessions

    def attach(self, prefix: Prefix) -> SmallDaemon:
        self.prefix = prefix
        kept = set(prefix.kept_pages().tolist())
        self.free = set(range(len(self.pool))) - kept
        self.private = set(kept)
        prefix.on_attached(self._grant(self.first_grant))
        return self

    def detach(self, reason: str) -> None:
        assert self.prefix is not None
        self.fault = errors.Detached(reason)  # type: ignore[arg-type]
        self.leases.clear()
        self.prefix.on_detached(errors.Detached(reason))  # type: ignore[arg-type]

    def reattach(self) -> None:
        assert self.prefix is not None
        self.fault = None
        self.resident.clear()
        self.order.clear()
        self.transfers.clear()
        self.attach(self.prefix)

    # calls

    def open_namespace(self, identity: bytes, tenant: str = "", salt: bytes = b"") -> Any:
        self._raise()
        return (tenant, salt)

    def acquire(
        self,
        namespace: Any,
        request_id: bytes,
        tokens: Any,
        *,
        grant_pages: int = 0,
        hints: Hints = NOTHING_SAID,
    ) -> Acquired:
        self._raise()
        self.said.append(("acquire", request_id, hints))
        assert request_id not in self.leases
        path = [int(t) for t in tokens]
        most = (len(path) - 1) // PAGE_SIZE
        pages: list[int] = []
        found = {"gpu": 0, "cpu": 0}
        moves: list[tuple[int, np.ndarray]] = []
        lease = OpenLease(path, pages, 0)
        self.leases[request_id] = lease  # pins as it goes
        for block in range(most):
            key = self._key(namespace, path, block)
            if key in self.resident:
                found["gpu"] += PAGE_SIZE
            elif key in self.lower and (page := self._one_page()) is not None:
                self.resident[key] = page
                moves.append((page, self.lower[key]))
                found["cpu"] += PAGE_SIZE
            else:
                break
            pages.append(self.resident[key])
            self._touch(key)
        lease.blocks = len(pages)
        lease.tokens = [namespace, *path]  # type: ignore[list-item]
        if moves:
            self.transfers.append(moves)
        computing = self._computing(request_id, namespace, path, len(pages))
        return Acquired(
            matched_tokens=len(pages) * PAGE_SIZE,
            tiers=SimpleNamespace(**found, disk=0, remote=0),  # type: ignore[arg-type]
            prefix_pages=np.array(pages, np.uint32),
            transfer=len(self.transfers) if self.transfers else 0,
            granted_pages=self._grant(grant_pages),
            computing_tokens=computing,
        )

    def commit(
        self,
        commits: Sequence[LeaseCommit],
        *,
        grant_pages: int = 0,
        prefill_tokens_per_s: float = 0.0,
    ) -> Committed:
        self._raise()
        self.prefill_rates.append(prefill_tokens_per_s)
        results = []
        for part in commits:
            lease = self.leases[part.request_id]
            assert part.first_block == lease.blocks, "a commit doesn't continue its lease"
            results.append(np.array(self._commit(lease, part), np.uint8))
        return Committed(results=results, granted=self._grant(grant_pages), durable=False)

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: Any,
        grant_pages: int = 0,
        hints: Sequence[Hints] = (),
    ) -> Released:
        self._raise()
        assert len(hints) in (0, len(request_ids))
        told = hints or [NOTHING_SAID] * len(request_ids)
        self.said += [("release", *each) for each in zip(request_ids, told, strict=True)]
        for request_id in request_ids:
            lease = self.leases.pop(request_id, None)
            if lease is not None:
                self._move(lease.duplicates, self.private, self.free)
        self._move([int(p) for p in returned], self.private, self.free)
        return Released(granted=self._grant(grant_pages))

    def grant(self, pages: int) -> Any:
        self._raise()
        return self._grant(pages)

    def match(self, namespace: Any, tokens: Any) -> Matched:
        self._raise()
        path = [int(t) for t in tokens]
        blocks = 0
        while blocks < (len(path) - 1) // PAGE_SIZE:
            if self._key(namespace, path, blocks) not in self.resident:
                break
            blocks += 1
        tiers: Any = SimpleNamespace()
        return Matched(matched_tokens=blocks * PAGE_SIZE, tiers=tiers)

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool:
        if not self.arrive:
            return False
        for moves in self.transfers[:transfer]:
            for page, values in moves:
                self.pool[page] = values
            moves.clear()
        return True

    def close(self) -> None:
        pass

    # what it owns

    def demote_and_evict(self) -> None:
        """All that nobody pins goes to the cpu tier."""
        self.wait_layer(len(self.transfers), 0, 0.0)
        for key in list(self.order):
            self._evict(key)

    def check(self) -> None:
        owned = [*self.free, *self.private, *self.resident.values()]
        assert len(owned) == len(set(owned)) == len(self.pool), "a page has no owner, or two"

    def _key(self, namespace: Any, path: list[int], block: int) -> tuple[Any, ...]:
        return (namespace, *path[: (block + 1) * PAGE_SIZE])

    def _commit(self, lease: OpenLease, part: LeaseCommit) -> list[int]:
        answers = []
        tokens = part.tokens.tolist()
        namespace, *path = lease.tokens
        for index, page in enumerate(part.pages.tolist()):
            assert page in self.private, f"page {page} is not the engine's"
            begin = (part.first_block + index) * PAGE_SIZE
            path[begin:] = tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            key = self._key(namespace, path, part.first_block + index)
            if self.refuse:
                answers.append(2)
                continue
            if key in self.resident:
                lease.duplicates.append(page)
                answers.append(1)
            else:
                self._move([page], self.private, set())
                self.resident[key] = page
                lease.pinned.append(page)
                answers.append(0)
            self._touch(key)
        lease.tokens = [namespace, *path]
        lease.blocks += len(answers)
        return answers

    def _computing(self, request_id: bytes, namespace: Any, path: list[int], matched: int) -> int:
        blocks = 0
        for other_id, other in self.leases.items():
            space, *tokens = other.tokens
            if other_id == request_id or space != namespace:
                continue
            same = 0
            while same < min(len(tokens), len(path)) and tokens[same] == path[same]:
                same += 1
            blocks = max(blocks, same // PAGE_SIZE - matched)
        return (
            min(blocks, (len(path) - 1) // PAGE_SIZE - matched) * PAGE_SIZE + self.computing_extra
        )

    def _grant(self, count: int) -> Any:
        pages = []
        while len(pages) < count and (page := self._one_page()) is not None:
            pages.append(page)
            self.private.add(page)
        return np.array(pages, np.uint32)

    def _one_page(self) -> int | None:
        for key in list(self.order):
            if self.free:
                break
            self._evict(key)
        return self.free.pop() if self.free else None

    def _evict(self, key: tuple[Any, ...]) -> None:
        pinned = {page for lease in self.leases.values() for page in lease.pinned}
        pinned |= {page for moves in self.transfers for page, _ in moves}
        page = self.resident[key]
        if page not in pinned:
            self.lower[key] = self.pool[page].copy()
            del self.resident[key]
            self.order.remove(key)
            self.free.add(page)

    def _touch(self, key: tuple[Any, ...]) -> None:
        if key in self.order:
            self.order.remove(key)
        self.order.append(key)

    @staticmethod
    def _move(pages: Sequence[int], source: set[int], target: set[int]) -> None:
        for page in pages:
            source.remove(page)
            target.add(page)

    def _raise(self) -> None:
        if self.fault is not None:
            raise self.fault


class NoText:
    """Text of no tokens; `stop_at` meets a stop string at that token."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def push(self, token_id: int) -> Piece:
        return Piece("", stopped=token_id == self.stop_at)

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
    prefix: Prefix
    model: HashModel
    daemon: SmallDaemon | None
    clock: Clock
    operations: Inline
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
        self.scheduler.check()
        if self.daemon is not None and self.prefix.book.session and not self.operations.calls:
            self.daemon.check()


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
    operations, acquires = Inline(), Inline()
    prefix = Prefix(
        PageBook(num_pages),
        BridgeConfig(
            page_size=PAGE_SIZE,
            layers=1,
            low_water=low_water,
            high_water=8,
            load_timeout_s=0.3,
            grant_timeout_s=0.0,
        ),
        operations=operations,
        acquires=acquires,
        metrics=metrics,
    )
    small = SmallDaemon(model.pool) if daemon else None
    if small is not None:
        prefix.connect(small.attach)
    scheduler = Scheduler(
        config or SchedulerConfig(chunk_size=8, token_budget=16, max_running=4),
        prefix=prefix,
        compute=model,
        metrics=metrics,
        clock=clock,
    )
    return House(scheduler, prefix, model, small, clock, operations, acquires)
