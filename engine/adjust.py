"""What one request changes of its logits before a token is chosen: biases, penalties, bans.

Each row is changed by its own request's data alone, so that a request's tokens don't depend on
what else is in the batch. Not responsible for the choice (sampler).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.request import Request

BANNED = float("-inf")
LARGEST = torch.finfo(torch.float32).max


def adjustment(request: Request) -> Adjustment | None:
    """None: the request changes nothing."""
    params = request.sampling
    plain = (
        not params.presence_penalty
        and not params.frequency_penalty
        and params.repetition_penalty == 1
        and not params.logit_bias
        and not (params.min_tokens and request.end_token_ids)
        and request.constraint is None
    )
    return None if plain else Adjustment(request)


class Adjustment:
    """One request's, with the tokens that were generated so far. Presence and frequency count
    generated tokens, repetition those of the prompt too, as other servers of open models do."""

    def __init__(self, request: Request) -> None:
        params = self._params = request.sampling
        self._constraint = request.constraint
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._ends = torch.tensor(sorted(request.end_token_ids), dtype=torch.int64)
        self._counts: dict[int, int] = {}  # of generated tokens
        self._generated = 0
        self._repeated: dict[int, None] = {}
        if params.repetition_penalty != 1:
            self._repeated = dict.fromkeys(np.unique(request.tokens).tolist())

    def took(self, token: int) -> None:
        """It was generated."""
        self._generated += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._params.repetition_penalty != 1:
            self._repeated[token] = None
        if self._constraint is not None:
            self._constraint.took(token)

    def change(self, changed: Tensor) -> None:
        """Changes float32 [vocab] on the CPU, and nothing else."""
        params = self._params
        if self._repeated:
            ids = torch.tensor(list(self._repeated))
            changed[ids] = penalised(changed[ids], params.repetition_penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            changed[ids] -= params.presence_penalty + params.frequency_penalty * counts
        changed[self._biased] += self._bias
        ends = self._ends[self._ends < len(changed)]
        if self._generated < params.min_tokens and len(ends) < len(changed):
            changed[ends] = BANNED
        if self._constraint is not None:
            self._constraint.allow(changed)


def penalised(logits: Tensor, by: float) -> Tensor:
    """float32: those above 0 divided by it (arXiv 1909.05858, section 4.1), the others times it, as
    other servers do. What is finite stays finite, whatever it is divided by."""
    exact = logits.double()
    found = torch.where(exact > 0, exact / by, exact * by).clamp(-LARGEST, LARGEST)
    return torch.where(logits.isfinite(), found.float(), logits)
