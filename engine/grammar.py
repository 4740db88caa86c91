"""Which tokens a grammar allows next. The only file that asks llguidance.

Why llguidance: of the kept libraries it alone needs no torch or triton of its own, and a JSON
schema is ready in 1 ms, with some 30 us a token after that (2 cores of an EPYC, 49,152 tokens;
outlines-core took 500 ms for the same schema; xgrammar's package requires triton). Not responsible
for what grammars say (http.grammars), nor for drawing a token (sampler).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class GrammarError(Exception):
    """A grammar that can't be used: what is wrong with it."""


class Grammars:
    """Makes constraints for one model. Threads may share it. The tokenizer's tables are made at
    the first use, which takes some seconds for a large vocabulary."""

    def __init__(self, tokenizer_json: str, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._made_from = (tokenizer_json, vocab_size, list(end_token_ids))
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def constraint(self, grammar: str, *, begins_after: int | None = None) -> Constraint:
        """Of text by a Lark grammar, from the first token on, or once a token was generated. Raises
        GrammarError for a grammar, or a schema in it, that is none or asks for too much."""
        from llguidance import LLMatcher

        made = LLMatcher(self._tables(), LLMatcher.grammar_from_lark(grammar), log_level=0)
        if made.is_error():
            raise GrammarError(made.get_error().splitlines()[0][:500])
        return Constraint(made, begins_after)

    def _tables(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                made_from, vocab_size, ends = self._made_from
                self._tokenizer = LLTokenizer(made_from, n_vocab=vocab_size, eos_token=ends or None)
            return self._tokenizer


class Constraint:
    """One answer's. `allow` before a token is chosen, `took` after it, on one thread."""

    def __init__(self, matcher: Any, begins_after: int | None) -> None:
        self._matcher = matcher
        self._begins_after = begins_after

    def copy(self) -> Constraint:
        """Of another answer; nothing of this one may have been generated."""
        return Constraint(self._matcher.deep_copy(), self._begins_after)

    def allow(self, logits: Tensor) -> None:
        """Bans what may not follow, in place, of float32 [vocab] on the CPU."""
        if self._begins_after is not None:
            return
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(allowed, bitorder="little", count=len(logits))
        logits.masked_fill_(torch.from_numpy(bits == 0), float("-inf"))

    def took(self, token: int) -> None:
        """It was generated."""
        if self._begins_after is not None:
            if token == self._begins_after:
                self._begins_after = None
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)
