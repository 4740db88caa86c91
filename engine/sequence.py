"""One request on its way through the scheduler: its tokens, what is computed, its lease, its times.

Not responsible for any decision (scheduler).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from engine.adjust import Adjustment, adjustment
from engine.prefix import Lease
from engine.request import U32, Explanation, Request, RequestStats, Scored
from engine.sampler import Draw
from kvc2.answers import TierTokens


@dataclass
class Sequence:
    """`tokens` are the prompt and what was generated. KV exists for the first `computed`.

    waiting -> acquiring [admit]    acquiring -> running | deferred [acquired]
    deferred -> acquiring [the other one committed, or the wait is over]
    running -> waiting [preempt, prefix lost]    any -> gone [finish, cancel]
    """

    request: Request
    order: int  # of arrival; rises
    arrived: float
    tokens: list[int]
    seed: int  # of its stream of random numbers
    page_size: int
    adjustment: Adjustment | None = None  # of its logits, before a token is chosen
    computed: int = 0
    lease: Lease | None = None
    acquiring: Future[Lease] | None = None
    attempts: int = 0  # leases asked for; makes their ids unique
    announced: bool = False  # the daemon was told of it while it had no place
    cached: bool = True  # False: its prefix was lost or it wants scores; it computes everything
    # waiting for another's commits
    wait_until: float | None = None  # set at the first wait, and never moved
    wait_tokens: int = 0  # matched tokens that end the wait
    wait_for: Sequence | None = None  # one of ours, or None: another engine's
    matching: Future[int] | None = None
    match_at: float = 0.0  # not to be asked before
    starved_since: float | None = None
    # what RequestStats reports, fixed by the first token
    begun: bool = False  # it had a lease to run with
    first_token_at: float | None = None
    matched_tokens: int = 0
    tiers: TierTokens = field(default_factory=TierTokens)
    explanation: Future[Explanation] | None = None  # of the lease that these count
    prefilled_tokens: int = 0
    prompt_scores: list[Scored] = field(default_factory=list)  # until the first token
    unscored: Exception | None = None  # why its prompt has no scores

    @classmethod
    def of(cls, request: Request, order: int, arrived: float, page_size: int) -> Sequence:
        """A request that arrived."""
        return cls(
            request=request,
            order=order,
            arrived=arrived,
            tokens=[int(token) for token in request.tokens],
            seed=request.sampling.stream(),
            page_size=page_size,
            adjustment=adjustment(request),
            cached=request.prompt_scores is None,
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)

    @property
    def tenant(self) -> str:
        return self.request.caller.tenant

    def overdue(self, now: float) -> bool:
        """Its deadline has passed."""
        deadline_s = self.request.deadline_s
        return deadline_s is not None and now > self.arrived + deadline_s

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Only its last token lacks KV, and that one was generated."""
        return self.generated > 0 and self.computed == len(self.tokens) - 1

    def draw(self) -> Draw:
        """How its next token is chosen."""
        return Draw(self.request.sampling, self.seed, self.generated, self.adjustment)

    def took(self, chosen: int | Exception) -> int:
        """That token was chosen, and is its last one now. Raises why there is none."""
        if self.unscored is not None:
            raise self.unscored
        if isinstance(chosen, Exception):
            raise chosen
        self.tokens.append(chosen)
        if self.adjustment is not None:
            self.adjustment.took(chosen)
        return chosen

    def logits_wanted(self, count: int) -> int:
        """Of how many of the next `count` tokens, the last ones: one where they reach the end, and
        all of a prompt that is to be scored."""
        if self.request.prompt_scores is not None and not self.generated:
            return count
        return int(self.computed + count == len(self.tokens))

    def take_prompt_scores(self) -> tuple[Scored, ...]:
        """They are told once."""
        taken = tuple(self.prompt_scores)
        self.prompt_scores.clear()
        return taken

    def lease_id(self) -> bytes:
        """Of the present attempt: a late release of an earlier one never closes a later one. The
        first one's is the request's own, by which `kvc2 explain` finds it."""
        again = f"/{self.attempts}" if self.attempts > 1 else ""
        return f"{self.request.request_id}{again}".encode()

    def counts(self, lease: Lease) -> bool:
        """Whether what this lease found is what its answer reports: after a preemption that may
        hold blocks of its own, so the first one counts, or one that found less, as that is lost."""
        if self.first_token_at is not None:
            return False
        return not self.begun or lease.matched_tokens < self.matched_tokens

    def begin(self, lease: Lease) -> None:
        """It runs, from the end of its cached prefix."""
        if self.counts(lease):
            self.matched_tokens, self.tiers = lease.matched_tokens, lease.tiers
        self.lease, self.computed = lease, lease.matched_tokens
        self.begun = True

    def array(self, end: int | None = None) -> U32:
        """The first `end` tokens, or all."""
        return np.array(self.tokens[:end], np.uint32)

    def stats(self) -> RequestStats:
        """As of now; ttft_ms is 0 before the first token."""
        first = self.first_token_at
        return RequestStats(
            prompt_tokens=self.prompt_tokens,
            matched_tokens=self.matched_tokens,
            tiers=self.tiers,
            prefilled_tokens=self.prefilled_tokens,
            ttft_ms=0.0 if first is None else 1000 * (first - self.arrived),
            generated_tokens=self.generated,
        )
