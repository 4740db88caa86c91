"""Chooses the next tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Raises ValueError for a field out of its range."""

    temperature: float = 1.0  # 0: always the best token
    top_p: float = 1.0  # in (0, 1]: the fewest tokens whose probabilities reach it
    top_k: int = 0  # the k best; 0: all
    seed: int | None = None  # None: a different stream each time

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: must be over 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (all) or more")

    def generator(self) -> torch.Generator:
        """A new random stream of this request: the same each time if `seed` is given."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of each row of float32 [R, vocab].

    Row i is drawn by params[i] from generators[i] alone, so that a request's tokens don't depend
    on what else is in the batch. Advances the generators of rows that aren't greedy.
    """
    best: list[int] = logits.argmax(-1).tolist()
    return [
        best[row] if p.temperature == 0 else _draw(logits[row], p, generator)
        for row, (p, generator) in enumerate(zip(params, generators, strict=True))
    ]


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token of float32 [vocab]: temperature, then top-k, then top-p, then the draw."""
    count = min(params.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits.cpu() / params.temperature, count)  # best first
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all better ones: the best always stays
    kept = probabilities * (before < params.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
