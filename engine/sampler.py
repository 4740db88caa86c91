"""Chooses the next tokens of a step, all rows in one call (csrc/decoder/sampler.h).

Not responsible for what a request changes of its logits (adjust), nor for when (scheduler).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import _kernels, kernels
from engine.adjust import Adjustment
from engine.request import SamplingParams

_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """How one row's token is chosen, and by which number: the `position`-th of the stream that
    `seed` names."""

    params: SamplingParams
    seed: int
    position: int
    adjustment: Adjustment | None = None


class Sampler:
    """Keeps the memory of rows that requests change. For one thread."""

    def __init__(self) -> None:
        self._changed = torch.empty(0)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | Exception]:
        """The next token of each row of float32 [R, vocab], or why it has none: what its adjustment
        raised, or ValueError where no token means anything (nan, +inf, all -inf).

        -inf is a token that is never chosen. Of equal logits the lower id is the better one. Row i
        is decided by draws[i] alone, so that a request's tokens don't depend on what else is in the
        batch; nothing is changed.
        """
        rows = logits.cpu().contiguous()
        plain = [i for i, draw in enumerate(draws) if draw.adjustment is None]
        found: list[int | Exception] = [ValueError("no row")] * len(draws)
        self._choose(rows, plain, plain, draws, found)
        changed, ready = self._adjusted(rows, draws, found)
        self._choose(changed, list(range(len(ready))), ready, draws, found)
        return found

    def _adjusted(
        self, logits: Tensor, draws: Sequence[Draw], found: list[int | Exception]
    ) -> tuple[Tensor, list[int]]:
        """Changed copies of rows, and which these are; what an adjustment raises is found then."""
        wanting = [i for i, draw in enumerate(draws) if draw.adjustment is not None]
        if not wanting:
            return logits, []
        if self._changed.numel() < len(wanting) * logits.shape[1]:
            self._changed = torch.empty(len(wanting) * logits.shape[1])
        copies = self._changed[: len(wanting) * logits.shape[1]].view(len(wanting), -1)
        ready: list[int] = []
        for i in wanting:
            adjustment, row = draws[i].adjustment, copies[len(ready)]
            assert adjustment is not None
            row.copy_(logits[i])
            try:
                adjustment.change(row)
            except Exception as error:  # it ends this request and no other
                found[i] = error
            else:
                ready.append(i)
        return copies, ready

    def _choose(
        self,
        logits: Tensor,
        rows: list[int],
        wanted: list[int],
        draws: Sequence[Draw],
        found: list[int | Exception],
    ) -> None:
        """Finds the tokens of draws[wanted[i]] in logits[rows[i]]."""
        if not rows:
            return
        chosen = [draws[i] for i in wanted]
        filters = [
            (p.temperature, p.top_k, p.top_p, p.min_p) for p in (draw.params for draw in chosen)
        ]
        streams = [(draw.seed & _WORD, draw.position) for draw in chosen]
        tokens = np.empty(len(rows), np.int64)
        _kernels.sample(
            kernels.workbench(),
            logits.numpy(),
            np.array(rows, np.int64),
            np.array(filters, np.float64),
            np.array(streams, np.uint64),
            tokens,
        )
        for i, token in zip(wanted, tokens.tolist(), strict=True):
            strange = ValueError("the model's logits hold nan or inf, or nothing else than -inf")
            found[i] = strange if token == _kernels.NO_TOKEN else token
