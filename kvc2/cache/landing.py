"""What comes from the remote store becomes blocks of the cpu tier: pages for it, and commits.

Not here: how values come and are judged (arrivals.py), which are asked for (fetches.py,
key_fetches.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core
from kvc2.answers import NO_HINTS, NO_PAGES, U32, Asked, Hints
from kvc2.cache.extras import prompt_extras
from kvc2.cache.namespaces import Namespace
from kvc2.metrics import RemoteMetrics
from kvc2.moving.changes import Waiters
from kvc2.tiers.pools import LayoutPools, Pools
from kvc2.tiers.remote.codec import Chain
from kvc2.tiers.remote.link import Link

Made = TypeVar("Made")
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Means:
    """What blocks are fetched and put with. Names and values are made and judged on `threads`."""

    index: _core.Index
    pools: Pools
    link: Link
    metrics: RemoteMetrics
    threads: ThreadPoolExecutor

    async def on_threads(self, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


@dataclass(frozen=True)
class Prompt:
    """Whose blocks come, where to, and what the request says of them. Or some opaque keys, of which
    each names a block."""

    namespace: Namespace
    asked: Asked
    pools: LayoutPools
    hints: Hints = NO_HINTS

    def tokens(self, blocks: int) -> U32:
        """Of the first so many."""
        end = blocks * self.namespace.page_size
        return np.ascontiguousarray(self.asked.tokens[:end], np.uint32)

    @property
    def extras(self) -> _core.PromptExtras | None:
        return prompt_extras(self.asked.extras, self.namespace.page_size)


@dataclass(eq=False)
class Fetch:
    """Blocks [first, end) of a prompt on their way into the cpu tier; or those of all its keys.

    | state  | to   | when [function]                                                            |
    |--------|------|----------------------------------------------------------------------------|
    | coming | over | all of them came, or were lost, bad, without room, or the store doesn't     |
    |        |      | answer; of a prompt, also when one of them was [Arrivals]                   |

    `came` of them are there: of a prompt, the leading ones. `leases` of the index pin them until it
    is over and the last of its holders, requests that wait or are about to lease them, has let
    go."""

    prompt: Prompt
    chain: Chain
    first: int
    end: int
    number: int  # the namespace's, in the index, when it began
    came: int = 0
    over: bool = False
    holders: int = 0
    leases: list[int] = field(default_factory=list)
    changed: Waiters = field(default_factory=Waiters)

    @property
    def num_bytes(self) -> int:
        return (self.end - self.first) * self.prompt.pools.shape.page_bytes

    @property
    def of_keys(self) -> bool:
        """Each of its blocks is for itself."""
        return self.prompt.namespace.opaque

    @cached_property
    def _digests(self) -> frozenset[bytes]:
        return frozenset(self.chain.digests[each].tobytes() for each in range(self.first, self.end))

    def brings(self, block: int, digest: bytes) -> bool:
        """Whether it is the block of this digest, at this place of its prompt."""
        return self.first <= block < self.end and self.chain.digests[block].tobytes() == digest

    def brings_key(self, digest: bytes) -> bool:
        return self.of_keys and digest in self._digests

    @property
    def valid(self) -> bool:
        """Whether the namespace is what it was."""
        namespace = self.prompt.namespace
        return not namespace.gone and namespace.number == self.number


class Landing:
    """All on the event loop. `wake`: there is something to copy to the disk."""

    def __init__(self, means: Means, *, wake: Callable[[], None]) -> None:
        self._index, self._pools = means.index, means.pools
        self._wake = wake

    def grant(self, fetch: Fetch, count: int) -> U32:
        """Private pages, at most so many."""
        if not count or not fetch.valid:
            return NO_PAGES
        self._pools.make_room(fetch.prompt.pools, count)
        return self._index.grant(fetch.prompt.pools.cpu.id, count, fetch.number)

    def give_back(self, fetch: Fetch, pages: U32) -> None:
        if pages.size:
            self._index.give_back(fetch.prompt.pools.cpu.id, np.ascontiguousarray(pages))

    def commit(self, fetch: Fetch, rows: Rows, pages: U32) -> int:
        """The pages hold these blocks of the fetch, of a prompt those that follow what came. How
        many of them are blocks of the cpu tier now, and pinned; fewer where what they hang on has
        gone, or the namespace was invalidated."""
        if not fetch.valid or not pages.size:
            self.give_back(fetch, pages)
            return 0
        came = self._keys(fetch, rows, pages) if fetch.of_keys else self._prefix(fetch, pages)
        self._wake()
        return came

    def _prefix(self, fetch: Fetch, pages: U32) -> int:
        prompt, first = fetch.prompt, fetch.first + fetch.came
        size, end = prompt.namespace.page_size, first + pages.size
        tokens, extras = prompt.tokens(end), prompt.extras
        lease = self._index.acquire(
            fetch.number,
            prompt.pools.cpu.id,
            tokens,
            end,
            prompt.namespace.hints(prompt.hints),
            skip_blocks=first,
            touches=False,
            extras=extras,
        )
        fetch.leases.append(lease.id)
        if lease.first_block < first:
            self.give_back(fetch, pages)
            return 0
        held = lease.pages.size  # that others have brought meanwhile
        self.give_back(fetch, pages[:held])
        rest, at = pages[held:], first + held
        if not rest.size:
            return held
        results = self._index.commit(lease.id, at, tokens[at * size :], rest, extras)
        kept = np.isin(results, (_core.ADOPTED, _core.DUPLICATE))
        self.give_back(fetch, rest[~kept])
        return held + int(kept.sum())

    def _keys(self, fetch: Fetch, rows: Rows, pages: U32) -> int:
        prompt, cpu = fetch.prompt, fetch.prompt.pools.cpu.id
        if not fetch.leases:
            hints = prompt.namespace.hints(prompt.hints)
            none = self._index.acquire_keys(fetch.number, cpu, [], hints, touches=False)
            fetch.leases.append(none.id)
        keys = [prompt.asked.keys[each] for each in rows.tolist()]
        (lease,) = fetch.leases
        results = self._index.commit_keys(
            fetch.number, cpu, keys, np.ascontiguousarray(pages), lease=lease
        )
        self.give_back(fetch, pages[results != _core.ADOPTED])
        return int(np.isin(results, (_core.ADOPTED, _core.DUPLICATE)).sum())
