"""Blocks on their way to the daemon: staging pages that the ranks fill, and commits that copy them.

Not here: which steps there are (scheduler.py). Called by the one thread of vLLM that schedules;
commits and releases run in order on a thread of their own.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import LeaseCommit, beginning
from kvc2.client import Client
from kvc2.integrations.vllm.messages import Save, as_pages
from kvc2.integrations.vllm.visit import Sessions, Visit

log = logging.getLogger(__name__)

RATE_TOKENS_MIN = 256  # of a step that says how quick a prefill is
RATE_WEIGHT = 0.3
STEPS_MAX = 8  # under way; vLLM plans one or two ahead


@dataclass(frozen=True)
class Planned:
    """A save that the ranks are to do."""

    visit: Visit
    first_block: int
    pages: NDArray[np.uint32]
    era: int  # of the staging pages


class Saves:
    """`ranks` fill each page, and block_size tokens make a block."""

    def __init__(
        self,
        client: Client,
        sessions: Sessions,
        *,
        block_size: int,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate = PrefillRate(clock)
        self._client = client
        self._sessions = sessions
        self._size = block_size
        self._ranks = ranks
        self._planned: dict[int, Planned] = {}
        self._numbers = itertools.count(1)
        self._ordered = ThreadPoolExecutor(1, "kvc2-commit")

    def plan(self, visit: Visit, computed: int) -> Save | None:
        """Full blocks that this step completes, and earlier ones that found no page yet."""
        if visit.found is None or visit.stopped:
            return None
        if visit.saving < 0:
            visit.saving = visit.cached_blocks(self._sessions.session)
            visit.stopped = visit.found.session != self._sessions.session
        full = min(computed, visit.request.num_tokens) // self._size
        wanted = min(full, len(visit.blocks)) - visit.saving
        if wanted <= 0 or visit.stopped:
            return None
        era = self._sessions.era
        pages = self._sessions.take_now(wanted)
        if not pages.size:
            return None
        first, number = visit.saving, next(self._numbers)
        visit.saving += pages.size
        visit.with_ranks += 1
        self._planned[number] = Planned(visit, first, pages, era)
        return Save(number, pages, as_pages(visit.blocks[first : first + pages.size]))

    # ---- what the ranks did

    def worked(self, saved: dict[int, int]) -> None:
        """How many ranks have done each save."""
        self.rate.ended()
        for number, ranks in saved.items():
            planned = self._planned.pop(number, None)
            if planned is None:
                continue
            planned.visit.with_ranks -= 1
            if ranks == self._ranks:
                self._ordered.submit(self._commit, planned)
            else:
                planned.visit.stopped = True
                self._sessions.give_back(planned.pages)
            if planned.visit.over:
                self.ended(planned.visit)

    def _commit(self, planned: Planned) -> None:
        visit, first = planned.visit, planned.first_block * self._size
        end = first + planned.pages.size * self._size
        if visit.stopped:
            self._sessions.give_back(planned.pages)
            return
        tokens = np.array(visit.request.all_token_ids[first:end], np.uint32)
        begun = beginning(visit.extras, first, end)
        commit = LeaseCommit(visit.lease_id, planned.first_block, tokens, planned.pages, begun)
        try:
            answer = self._client.commit_copies(
                visit.namespace, [commit], prefill_tokens_per_s=self.rate.tokens_per_s
            )
        except errors.Detached:
            visit.stopped = True
            self._sessions.hold(planned.pages, planned.era)
        except errors.Kvc2Error as error:
            log.warning("kvc2: blocks were not kept: %s", error)
            visit.stopped = True
            self._sessions.give_back(planned.pages)
        else:
            visit.stopped = bool((answer.results[0] > _core.DUPLICATE).any())
            self._sessions.give_back(planned.pages)

    # ---- ends

    def ended(self, visit: Visit) -> None:
        """Its request is over: its lease ends when its last commit is answered."""
        if visit.with_ranks:
            return  # `worked` comes here again
        if visit.acquiring is not None:
            visit.acquiring.add_done_callback(lambda _: self.release(visit.lease_id))
        elif visit.found is not None:
            self.release(visit.lease_id)

    def release(self, lease_id: bytes) -> None:
        """End a lease, after the commits that were asked for before."""
        with suppress(RuntimeError):  # closing
            self._ordered.submit(self._released, lease_id)

    def _released(self, lease_id: bytes) -> None:
        with suppress(errors.Kvc2Error):  # it has ended with its session
            self._client.release([lease_id])

    def close(self) -> None:
        """Waits for what is under way."""
        self._ordered.shutdown(wait=True)


class PrefillRate:
    """Tokens a second of the steps that prefill, a running mean."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: list[tuple[int, float]] = []
        self._ended_at = 0.0
        self._lock = threading.Lock()
        self.tokens_per_s = 0.0  # 0: not known

    def begins(self, tokens: int) -> None:
        with self._lock:
            self._begun.append((tokens, self._clock()))
            del self._begun[:-STEPS_MAX]

    def ended(self) -> None:
        """The oldest step that has begun."""
        with self._lock:
            if not self._begun:
                return
            tokens, at = self._begun.pop(0)
            now = self._clock()
            seconds = now - max(at, self._ended_at)  # a step may be planned while another runs
            self._ended_at = now
            if tokens < RATE_TOKENS_MIN or seconds <= 0:
                return
            rate = tokens / seconds
            known = self.tokens_per_s
            self.tokens_per_s = known + RATE_WEIGHT * (rate - known) if known else rate
