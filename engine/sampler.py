"""Chooses the next tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import SamplingParams


def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of each row of float32 [R, vocab].

    Row i is drawn by params[i] from generators[i] alone, so that a request's tokens don't depend
    on what else is in the batch. Advances the generators of rows that aren't greedy. Raises
    ValueError for a row with nan or +inf: no token of it means anything. -inf is a token that is
    never chosen.
    """
    if not bool((logits < float("inf")).all()):  # nan compares as false
        raise ValueError("the model's logits hold nan or inf")
    best: list[int] = logits.argmax(-1).tolist()
    return [
        best[row] if p.temperature == 0 else _draw(logits[row], p, generator)
        for row, (p, generator) in enumerate(zip(params, generators, strict=True))
    ]


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token of float32 [vocab]: temperature, then top-k, min-p and top-p, then the draw."""
    count = min(params.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits.cpu(), count)  # best first
    # the best becomes 0 first, and in float64: no temperature over 0 makes inf or nan of it
    below = values.double() - values[0].double()
    probabilities = (below / params.temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all better ones: the best always stays
    kept = probabilities * (before < params.top_p)
    if params.min_p:
        kept = kept * (probabilities >= params.min_p * probabilities[0])
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
