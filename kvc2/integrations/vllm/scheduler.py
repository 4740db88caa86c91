"""The scheduler's side: one session, whose leases lie in the arena, and copied commits.

A request's way: `ask` opens a lease on a thread, `allocated` plans its load, each `build` plans
the saves of the blocks that the step completes, `worked` commits what the ranks have copied, and
`finished` releases. A fault is a miss. Called by the one thread of vLLM that schedules. Not here:
commits (saves.py), copies (worker.py), and vLLM's own names (connector.py).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvc2 import errors
from kvc2.answers import Asked
from kvc2.client import ArenaTerms, Client
from kvc2.integrations.vllm.identity import Namespaces, media_of
from kvc2.integrations.vllm.messages import Load, Record, Step, as_pages
from kvc2.integrations.vllm.saves import Saves
from kvc2.integrations.vllm.visit import Found, Sessions, Visit

log = logging.getLogger(__name__)

LOOKUP_S = 0.002  # the scheduler waits so long at a time; other requests go on meanwhile
SETTLE_S = 5.0  # an acquire that takes longer is a miss
ACQUIRES_MAX = 8  # lookups under way; each may wait for a disk


@dataclass(frozen=True)
class Planning:
    """What each step's plan says of the blocks, of block_size tokens."""

    record: Record
    block_size: int
    asynchronous: bool = False


class SchedulerSide:
    """Called by the one thread of vLLM that schedules; `saves` is of the same client."""

    def __init__(
        self,
        client: Client,
        sessions: Sessions,
        namespaces: Namespaces,
        saves: Saves,
        planning: Planning,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._sessions = sessions
        self._namespaces = namespaces
        self._saves = saves
        self._planning = planning
        self._size = planning.block_size
        self._clock = clock
        self._visits: dict[str, Visit] = {}
        self._numbers = itertools.count(1)
        self._loads: list[Load] = []
        self._acquires = ThreadPoolExecutor(ACQUIRES_MAX, "kvc2-acquire")

    # ---- what is cached

    def ask(self, request: Any, local: int) -> tuple[int | None, bool]:
        """(tokens beyond `local` that can be loaded, whether beside the steps); None tokens: ask
        again later. May be called again for a request, with another `local`."""
        visit = self._visits.get(request.request_id)
        if visit is not None and visit.blocks:  # it was scheduled before, and preempted
            self._retire(visit)
            visit = None
        if visit is None:
            visit = self._asked(request, local)
        elif visit.found is not None and local // self._size < visit.found.lease.first_block:
            self._retire(visit)  # vLLM has less itself than it had: the lease skipped that
            visit = self._asked(request, local)
        if not self._settled(visit):
            return None, False
        visit.local = local
        more = max(0, visit.cached_blocks(self._sessions.session) * self._size - local)
        return more, self._planning.asynchronous and more > 0

    def _asked(self, request: Any, local: int) -> Visit:
        visit = Visit(
            request,
            b"%s/%d" % (request.request_id.encode()[:40], next(self._numbers)),
            self._namespaces.of(request),
            media_of(request),
            local,
            self._clock(),
        )
        self._visits[request.request_id] = visit
        if self._client.state == "attached":
            tokens = np.array(request.all_token_ids, np.uint32)
            visit.acquiring = self._acquires.submit(
                self._acquire, visit, Asked(tokens, extras=visit.extras)
            )
        return visit

    def _acquire(self, visit: Visit, what: Asked) -> Found:
        session = self._sessions.session
        terms = ArenaTerms(skip_blocks=visit.local // self._size)
        lease = self._client.acquire_in_arena(visit.namespace, visit.lease_id, what, terms)
        if self._sessions.session != session:
            raise errors.Detached("dead", "the session has changed")
        return Found(lease, session)

    def _settled(self, visit: Visit) -> bool:
        """Whether it is known what is cached; a fault, or a long wait, is a miss."""
        if visit.acquiring is None:
            return True
        try:
            visit.found = visit.acquiring.result(LOOKUP_S)
        except FutureTimeout:
            if self._clock() - visit.asked_at < SETTLE_S:
                return False
            log.warning("kvc2: no answer for %.0f s: %r is computed", SETTLE_S, visit.lease_id)
            visit.acquiring.add_done_callback(lambda _: self._saves.release(visit.lease_id))
        except errors.Kvc2Error as error:
            log.warning("kvc2: an acquire failed: %s", error)
        visit.acquiring = None
        return True

    # ---- what is scheduled

    def allocated(self, request: Any, blocks: Iterable[int], external: int) -> None:
        """vLLM's blocks of a request: `external` tokens behind its own are to be loaded."""
        visit = self._visits.get(request.request_id)
        if visit is None or (visit.blocks and not external):
            return
        visit.blocks = list(blocks)
        if not external or visit.found is None:
            return
        first, count = visit.local // self._size, external // self._size
        begin = first - visit.found.lease.first_block
        offsets = visit.found.lease.offsets[begin : begin + count]
        load = as_pages(visit.blocks[first : first + count])
        self._loads.append(Load(request.request_id, visit.found.session, offsets, load))

    def build(self, scheduled: Iterable[tuple[str, list[int], bool, int, int]]) -> Step:
        """The step's plan. Of each request that it computes: id, new blocks, whether they are all
        of its blocks, tokens computed before, tokens of this step."""
        share, planning = self._client.share(), self._planning
        step = Step(share, planning.record, planning.asynchronous, self._loads)
        self._loads = []
        tokens = 0
        for request_id, blocks, whole, computed, new in scheduled:
            tokens += new
            visit = self._visits.get(request_id)
            if visit is None:
                continue
            visit.blocks = list(blocks) if whole else visit.blocks + list(blocks)
            save = self._saves.plan(visit, computed + new)
            if save is not None:
                step.saves.append(save)
        self._saves.rate.begins(tokens)
        return step

    # ---- ends

    def worked(self, saved: dict[int, int]) -> None:
        """A step has ended: how many ranks have done each save."""
        self._saves.worked(saved)

    def finished(self, request: Any) -> None:
        visit = self._visits.get(request.request_id)
        if visit is not None:
            self._retire(visit)

    def _retire(self, visit: Visit) -> None:
        del self._visits[visit.request.request_id]
        visit.over = True
        self._saves.ended(visit)

    def close(self) -> None:
        """Waits for what is under way, and ends the session in order."""
        self._acquires.shutdown(wait=True, cancel_futures=True)
        self._saves.close()
        self._client.close()
