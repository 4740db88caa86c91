"""How many tokens of a trace a cache of some size would have brought, and could have at best.

The real index is driven, with a block of the trace as a block of one token, so that no bytes and no
prompts are needed: per request an acquire, a grant for what is missing, a commit and a release.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np

from kvc2 import _core
from kvc2.commands.traces import Trace

POLICIES = ("hazard", "lru", "arc", "s3fifo")
NAMESPACE = bytes(32)
Progress = Callable[[int], None]  # told of requests that are done


def hit_rate(
    trace: Trace,
    capacity: int,
    policy: str,
    *,
    seed: int = 0,
    admission: bool = True,
    progress: Progress | None = None,
) -> float:
    """Share of all input tokens that were in the longest cached prefix, with `capacity` pages of a
    pool that may refuse what a request brings, as the cpu tier may; without admission it takes
    all."""
    index = _core.Index(policy=policy, seed=seed, admission=admission)
    pool = index.add_pool(page_size=1, pages_per_slab=capacity, below=None, durable=False)
    index.add_slab(pool)
    number = index.open_namespace(NAMESPACE, 1)
    hits = 0
    for i in range(len(trace)):
        blocks = trace.request(i)
        lease = index.acquire(number, pool, blocks, len(blocks))
        hits += lease.matched
        pages = index.grant_for(lease.id, lease.matched, len(blocks) - lease.matched)
        if len(pages):
            first = lease.matched
            index.commit(lease.id, first, blocks[first : first + len(pages)], pages)
        index.release(lease.id)
        if progress is not None:
            progress(1)
    return hits * trace.block_tokens / max(int(trace.input_tokens.sum()), 1)


def best_hit_rate(trace: Trace, capacity: int) -> float:
    """Belady's: what is used again last goes first, and may not even come in. A prefix is used
    no later than what follows it, so what goes is always a tail."""
    never = len(trace)
    next_use = np.full(len(trace.ids), never, np.int64)
    last = np.full(trace.blocks, never, np.int64)
    for i in reversed(range(len(trace))):
        at = slice(int(trace.offsets[i]), int(trace.offsets[i + 1]))
        next_use[at] = last[trace.ids[at]]
        last[trace.ids[at]] = i
    resident = np.zeros(trace.blocks, bool)
    held = hits = 0
    # a heap of runs of blocks that are used next at one time: (-use, -depth of its end, its start
    # and its request's in trace.ids)
    runs: list[tuple[int, int, int, int]] = []
    for i in range(len(trace)):
        start, end = int(trace.offsets[i]), int(trace.offsets[i + 1])
        blocks, uses = trace.ids[start:end], next_use[start:end]
        there = resident[blocks]
        hits += int(there.sum())  # a prefix: what follows is never kept longer
        resident[blocks] = uses < never
        held += int((uses < never).sum()) - int(there.sum())
        edges = [0, *(np.flatnonzero(np.diff(uses)) + 1).tolist(), len(blocks)]
        for first, after in itertools.pairwise(edges):
            if first < after and uses[first] < never:
                heapq.heappush(runs, (-int(uses[first]), -after, start + first, start))
        while held > capacity:
            use, depth, first, begin = heapq.heappop(runs)
            after = begin - depth
            gone = min(held - capacity, after - first)
            resident[trace.ids[after - gone : after]] = False
            held -= gone
            if after - gone > first:
                heapq.heappush(runs, (use, depth + gone, first, begin))
    return hits * trace.block_tokens / max(int(trace.input_tokens.sum()), 1)
