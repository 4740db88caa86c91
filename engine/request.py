"""What a caller asks of the engine, and what comes back: plain values that every floor above
shares.

Not responsible for when a request runs (scheduler), nor for the words of HTTP (http).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ContextLengthError, InvalidRequestError
from kvc2.answers import NO_HINTS, Hints, TierTokens

U32 = NDArray[np.uint32]
SEED_LIMIT = 1 << 63


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Raises ValueError for a field out of its range."""

    temperature: float = 1.0  # 0: always the best token
    top_p: float = 1.0  # in (0, 1]: the fewest tokens whose probabilities reach it
    top_k: int = 0  # the k best; 0: all
    min_p: float = 0.0  # in [0, 1]: those at least this times as probable as the best
    seed: int | None = None  # None: a different stream each time
    presence_penalty: float = 0.0  # off the logits of tokens that were generated
    frequency_penalty: float = 0.0  # the same, as often as each was
    repetition_penalty: float = 1.0  # logits of tokens of the prompt or generated: divided by it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit
    min_tokens: int = 0  # before that many no end token is chosen, and no stop string looked for

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: must be over 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (all) or more")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p = {self.min_p}: must be 0 to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}: must be over 0")
        if self.seed is not None and not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise ValueError(f"seed = {self.seed}: must be -2**63 to 2**63 - 1")

    def stream(self) -> int:
        """The name of this request's stream of random numbers: `seed`, or a new one each time."""
        return secrets.randbits(64) if self.seed is None else self.seed


@dataclass(frozen=True)
class Caller:
    """Whose cache a request may share: a tenant of the daemon, narrowed by a salt."""

    tenant: str = ""  # empty: the daemon's default
    salt: bytes = b""


@dataclass(frozen=True)
class Piece:
    """Text that a token made certain; `stop`: the stop string that was met, and cut off."""

    text: str
    stop: str | None = None


class TextStream(Protocol):
    """Turns one request's tokens into text as they come (engine/text.py)."""

    def push(self, token_id: int) -> Piece:
        """The text that this token settles; what may yet become a stop string is held back."""

    def flush(self) -> str:
        """What is still held back, at the end. Changes the stream: call it once."""


@dataclass(frozen=True)
class Pin:
    """The prompt's first `num_tokens` are to be evicted last for `ttl_s` seconds."""

    num_tokens: int
    ttl_s: int


@dataclass(frozen=True)
class Explanation:
    """Why a request's cached prefix was not longer, as the daemon saw it at the acquire.

    why: of the first block that was missing, in the words of kvc2.v1.ExplainResponse, or in ours:
    not_loaded (`tier` has it, and it was not brought in time), not_served (the daemon is there, the
    request ran without it), no_daemon (none, or it is gone), unknown (it didn't tell).
    missing_block: None when why is nothing, or not known. found: tokens by the tier that held them.
    cause, tier, policy, died_s_ago: of a block that died."""

    why: str
    missing_block: int | None = None
    cause: str = ""
    tier: str = ""
    policy: str = ""
    died_s_ago: float = 0.0
    found: TierTokens = field(default_factory=TierTokens)


@dataclass(frozen=True)
class RequestStats:
    """What a request cost, up to its first token. Times in milliseconds."""

    prompt_tokens: int
    matched_tokens: int
    tiers: TierTokens
    prefilled_tokens: int
    ttft_ms: float
    generated_tokens: int


@dataclass(frozen=True)
class ScoredToken:
    """A token, the model's raw logit for it, and its log-probability at temperature 1."""

    token_id: int
    logit: float
    logprob: float


Scored = tuple[ScoredToken, tuple[ScoredToken, ...]]  # a token, and the best ones in its place


@dataclass(frozen=True)
class Output:
    """One step's news of one request: a token, its end, or both.

    `finish` is None while it runs; then "stop" (end token or stop string), "length" or "error".
    `stop`: the stop string that ended it.
    `unavailable`: the error is the engine's state, not the request's fault: it may be tried again.
    """

    text: str = ""
    token_id: int | None = None
    chosen: ScoredToken | None = None  # where the request asks for scores
    top: tuple[ScoredToken, ...] = ()  # the best ones, best first, as many as were asked for
    prompt: tuple[Scored, ...] = ()  # with the first token, where asked for: from the second on
    finish: str | None = None
    stop: str | None = None
    error: str | None = None
    unavailable: bool = False
    stats: RequestStats | None = None  # with `finish`
    explanation: Future[Explanation] | None = None  # with `finish`, where the request asks for it
    held: Future[int] | None = None  # likewise: the leading tokens that the daemon has then


class Constraint(Protocol):
    """Which tokens a request's answer may go on with (engine/grammar.py)."""

    def allow(self, logits: Tensor) -> None:
        """Bans what may not follow, in place, of float32 [vocab] on the CPU."""

    def took(self, token: int) -> None:
        """It was generated. Changes the constraint."""


@dataclass(frozen=True)
class Request:
    """One prompt to be completed. `deliver` is called on the scheduler's thread; it must not
    block."""

    request_id: str
    tokens: U32  # the prompt, at least one
    max_tokens: int  # to generate, at least one
    sampling: SamplingParams
    text: TextStream
    deliver: Callable[[Output], None]
    caller: Caller = field(default_factory=Caller)
    end_token_ids: frozenset[int] = frozenset()
    top_scores: int | None = None  # None: no scores; else the chosen token's, and this many best
    prompt_scores: int | None = None  # likewise of the prompt's tokens, which are then all computed
    hints: Hints = NO_HINTS
    pins: tuple[Pin, ...] = ()  # as far as the daemon has room for them
    explain: bool = False
    tell_held: bool = False  # whether its last output has `held`
    constraint: Constraint | None = None
    deadline_s: float | None = None  # after its arrival; then it ends, however far it is


@dataclass(frozen=True)
class Bounds:
    """What the served model can compute: token ids below `vocab_size`, a prompt and its answer of
    `context_tokens` together."""

    vocab_size: int
    context_tokens: int

    def check(self, request: Request) -> None:
        """Raises InvalidRequestError for a request that no step may see. Its `tokens` stand for
        whatever text they were made of."""
        if not len(request.tokens):
            raise InvalidRequestError("tokens", "none", "at least one is needed")
        if request.max_tokens < 1:
            raise InvalidRequestError("max_tokens", request.max_tokens, "1 or more")
        if len(request.tokens) + request.max_tokens > self.context_tokens:
            raise ContextLengthError(len(request.tokens), request.max_tokens, self.context_tokens)
        largest = int(request.tokens.max())
        if largest >= self.vocab_size:
            allowed = f"the model has weights for the ids below {self.vocab_size} only"
            raise InvalidRequestError("tokens", largest, allowed)
        biased = max(request.sampling.logit_bias, default=0)
        if biased >= self.vocab_size:
            allowed = f"the model has tokens below {self.vocab_size} only"
            raise InvalidRequestError("logit_bias", biased, allowed)
        if request.sampling.min_tokens > request.max_tokens:
            allowed = f"at most max_tokens, {request.max_tokens}"
            raise InvalidRequestError("min_tokens", request.sampling.min_tokens, allowed)
        for name in ("top_scores", "prompt_scores"):
            if not 0 <= (getattr(request, name) or 0) <= self.vocab_size:
                value = getattr(request, name)
                raise InvalidRequestError(name, value, f"0 to {self.vocab_size}")
