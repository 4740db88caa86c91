"""Log-probabilities of tokens: of those that were generated, and of a prompt's own.

Not responsible for choosing a token (sampler), nor for their names (http).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate

import torch
from torch import Tensor

from engine.request import Scored, ScoredToken
from engine.sequence import Sequence

LEAST_LOGIT, LEAST_LOGPROB = -3e38, -9999.0  # of a token that is never chosen; JSON has no -inf


def scores(logits: Tensor, tokens: list[int], count: int) -> list[Scored]:
    """Of float32 logits [n, vocab] each row's token of the n, and its `count` best ones; ties by
    the lower token id."""
    logprobs = logits.log_softmax(-1)
    best = logits.topk(count).indices
    wanted = torch.cat([torch.tensor(tokens, device=best.device)[:, None], best], 1)
    values, logs = logits.gather(1, wanted).tolist(), logprobs.gather(1, wanted).tolist()
    found = []
    for ids, raw, log in zip(wanted.tolist(), values, logs, strict=True):
        each = [
            ScoredToken(token, max(logit, LEAST_LOGIT), max(logprob, LEAST_LOGPROB))
            for token, logit, logprob in zip(ids, raw, log, strict=True)
        ]
        found.append((each[0], tuple(each[1:])))
    return found


def apart(logits: Tensor, counts: Many[int]) -> list[Tensor]:
    """Rows by whose they are: the first so many, the next, ..."""
    ends = list(accumulate(counts))
    return [logits[end - count : end] for end, count in zip(ends, counts, strict=True)]


def last_rows(logits: Tensor, rows: Many[Tensor]) -> Tensor:
    """The last row of each of these parts of the logits; at no cost where that is all of them."""
    if len(rows) == len(logits):
        return logits
    return torch.stack([mine[-1] for mine in rows]) if rows else logits[:0]


def score_prompts(sequences: Many[Sequence], rows: Many[Tensor]) -> None:
    """Scores of the prompt's tokens that follow those of the last computed rows, where a request
    wants them. Changes these sequences; one that fails is told so when its token is taken."""
    for sequence, mine in zip(sequences, rows, strict=True):
        if sequence.request.prompt_scores is not None and not sequence.generated:
            try:
                _score_prompt(sequence, mine, sequence.request.prompt_scores)
            except Exception as error:
                sequence.unscored = error


def _score_prompt(sequence: Sequence, logits: Tensor, count: int) -> None:
    first = sequence.computed - len(logits)
    if first == 0:  # also where it was set back
        sequence.prompt_scores.clear()
    following = sequence.request.tokens[first + 1 : sequence.computed + 1].tolist()
    if following:
        sequence.prompt_scores += scores(logits[: len(following)], following, count)
