"""vLLM's scheduler and ranks, as far as its connector sees them, with KV whose bytes tell which
prompt they were computed from."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvc2.client import Client, PoolMemory, SessionOptions
from kvc2.integrations.vllm.identity import Namespaces, fields_of
from kvc2.integrations.vllm.messages import Record, Step, add
from kvc2.integrations.vllm.saves import Saves
from kvc2.integrations.vllm.scheduler import Planning, SchedulerSide
from kvc2.integrations.vllm.visit import Sessions
from kvc2.integrations.vllm.worker import Rank, WorkerSide
from kvc2.layout import Layout, Segment

BLOCK, LAYERS, HEADS, CONTENT = 4, 3, 2, 6
WAIT_S = 20.0


@dataclass
class Request:
    """One of vLLM's, by the names that the connector reads."""

    request_id: str
    all_token_ids: list[int]
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def image(first: int, length: int, identifier: str) -> SimpleNamespace:
    """A feature of a prompt."""
    position = SimpleNamespace(offset=first, length=length)
    return SimpleNamespace(identifier=identifier, mm_position=position)


def kv_of(request: Request, layer: int, head: int, end: int) -> np.ndarray[Any, Any]:
    """[CONTENT] of the token before `end`: it depends on all tokens up to there."""
    media = [(e.identifier, e.mm_position.offset) for e in request.mm_features]
    seen = [each for each in media if each[1] < end]
    said = repr((request.all_token_ids[:end], seen, layer, head, request.lora_request))
    return np.frombuffer(hashlib.sha256(said.encode()).digest()[: 2 * CONTENT], np.int16)


class RankOfVllm:
    """A rank's KV: [blocks, heads, BLOCK, CONTENT] of int16 for each layer, zero at the start."""

    def __init__(self, rank: int, ranks: int, blocks: int, device_copies: bool) -> None:
        self.heads = range(rank * HEADS // ranks, max(1, (rank + 1) * HEADS // ranks))
        shape = (blocks, len(self.heads), BLOCK, CONTENT)
        self.kv = {
            f"model.layers.{layer}.attn": torch.zeros(shape, dtype=torch.int16)
            for layer in reversed(range(LAYERS))  # in no order
        }
        self.side = WorkerSide(Rank.of(rank, ranks, HEADS), torch, device_copies=device_copies)
        self.side.register(self.kv)

    def compute(self, request: Request, block: int, index: int) -> None:
        for layer in range(LAYERS):
            self.kv[f"model.layers.{layer}.attn"][block] = self._expected(request, layer, index)

    def holds(self, request: Request, block: int, index: int) -> bool:
        return all(
            torch.equal(
                self.kv[f"model.layers.{layer}.attn"][block], self._expected(request, layer, index)
            )
            for layer in range(LAYERS)
        )

    def _expected(self, request: Request, layer: int, index: int) -> torch.Tensor:
        ends = range(index * BLOCK + 1, (index + 1) * BLOCK + 1)
        rows = [[kv_of(request, layer, head, end) for end in ends] for head in self.heads]
        return torch.from_numpy(np.array(rows))


class Vllm:
    """`ranks` of one engine over a client of the daemon at `address`. A step computes `chunk`
    tokens; blocks are never reused."""

    def __init__(
        self,
        address: str,
        *,
        ranks: int = 1,
        staging: int = 64,
        chunk: int = 8 * BLOCK,
        asynchronous: bool = False,
        device_copies: bool = False,
        weights: str = "w",
    ) -> None:
        self.ranks = [RankOfVllm(r, ranks, 512, device_copies) for r in range(ranks)]
        self.chunk = chunk
        caches = self.ranks[0].side.caches
        assert caches is not None
        record = Record(caches.block_bytes, min(ranks, HEADS))
        self.sessions = Sessions(staging)
        size = record.num_bytes
        self.client = Client(
            address,
            pool=PoolMemory(staging * size),
            layout=Layout((Segment(0, 0, size, 0, size),), BLOCK),
            engine=self.sessions,
            options=SessionOptions("vllm", arena=True, expiry_s=30.0),
        )
        self.side = SchedulerSide(
            self.client,
            self.sessions,
            Namespaces(weights, fields_of(caches, record, {"heads": HEADS}, BLOCK)),
            Saves(self.client, self.sessions, block_size=BLOCK, ranks=ranks),
            Planning(record, BLOCK, asynchronous),
        )
        self.failed: set[int] = set()
        self._next_block = 0

    def blocks(self, count: int) -> list[int]:
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def ask(self, request: Request, local: int = 0) -> tuple[int, bool]:
        """As vLLM asks until it is answered."""
        while True:
            more, asynchronous = self.side.ask(request, local)
            if more is not None:
                return more, asynchronous

    def run(self, request: Request, local: int = 0, *, own: list[int] | None = None) -> int:
        """Compute a whole prompt: tokens that were loaded. `own`: vLLM's blocks of the first
        `local` tokens. Raises AssertionError where a loaded block isn't what it is to be."""
        more, asynchronous = self.ask(request, local)
        table = (own or []) + self.blocks(-(-request.num_tokens // BLOCK) - local // BLOCK)
        self.side.allocated(request, table, more)
        computed = local + more
        if asynchronous:
            self.wait_loaded(request, self.step([]))
        else:
            self.step([])
        loaded = table[local // BLOCK : computed // BLOCK]
        if self.failed & set(loaded):  # vLLM computes from the first that failed
            first = min(loaded.index(each) for each in self.failed & set(loaded))
            computed, more = local + first * BLOCK, first * BLOCK
            self.failed.clear()
        for index in range(local // BLOCK, computed // BLOCK):
            assert all(rank.holds(request, table[index], index) for rank in self.ranks)
        whole = True
        while computed < request.num_tokens:
            new = min(self.chunk, request.num_tokens - computed)
            row = (request.request_id, table if whole else [], whole, computed, new)
            self.step([row], (request, table))
            computed, whole = computed + new, False
        return more

    def finish(self, request: Request) -> None:
        self.side.finished(request)

    def step(
        self,
        rows: list[tuple[str, list[int], bool, int, int]],
        compute: tuple[Request, list[int]] | None = None,
    ) -> Step:
        """One step of all ranks, each with a plan of its own, as a process would have."""
        step = self.side.build(rows)
        saved: dict[int, int] = {}
        for rank in self.ranks:
            mine = copy.deepcopy(step)
            rank.side.load(mine)
            if compute is not None:
                request, table = compute
                _, _, _, computed, new = rows[0]
                for index in range(computed // BLOCK, (computed + new) // BLOCK):
                    rank.compute(request, table[index], index)
            rank.side.save(mine)
            saved = add(saved, rank.side.saved())
            if not step.asynchronous:
                self.failed |= rank.side.failed()
        self.side.worked(saved)
        return step

    def wait_loaded(self, request: Request, step: Step) -> None:
        """Until every rank has told that its load has ended."""
        for rank in self.ranks:
            while request.request_id not in rank.side.loaded():
                pass
            self.failed |= rank.side.failed()

    def settle(self) -> None:
        """Until all that was asked of the daemon is answered."""
        self.side._saves._ordered.submit(lambda: None).result(WAIT_S)

    def close(self) -> None:
        for rank in self.ranks:
            rank.side.close()
        self.side.close()
