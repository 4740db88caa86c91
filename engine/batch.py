"""What one step of the runner computes: rows of several sequences, prefill and decode alike.

Not responsible for choosing them (scheduler), nor for who owns a page (prefix).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The tokens of one sequence that a step computes, and where its KV lies.

    `context_len` counts all tokens whose KV exists after the step, these included; `pages` hold
    them in order. `num_logits`: of the last so many tokens.
    """

    token_ids: Sequence[int]
    context_len: int
    pages: Sequence[int]
    num_logits: int


@dataclass(frozen=True)
class Batch:
    """S slices as flat arrays, T tokens in all. int64 what torch indexes with, int32 the rest."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    query_lens: Tensor  # int32 [S]
    context_lens: Tensor  # int32 [S], with this step's tokens
    block_tables: Tensor  # int32 [S, max_pages], rows padded with page 0, which isn't read
    logits_rows: Tensor  # int64 [R], rows of the T whose logits are wanted, ascending
    page_ids: Tensor  # int64 [T], where each token's KV goes
    page_offsets: Tensor  # int64 [T], its place in that page

    @classmethod
    def of(cls, slices: Sequence[Slice], page_size: int) -> Batch:
        """Flattens the slices. Raises ValueError for one that is empty or lacks pages."""
        for index, s in enumerate(slices):
            _check(index, s, page_size)
        query = np.array([len(s.token_ids) for s in slices], np.int32)
        context = np.array([s.context_len for s in slices], np.int32)
        ends = np.cumsum(query, dtype=np.int64)
        owner = np.repeat(np.arange(len(slices)), query)
        positions = np.arange(int(query.sum())) - (ends - context)[owner]
        tables = np.zeros((len(slices), max(len(s.pages) for s in slices)), np.int32)
        for row, s in enumerate(slices):
            tables[row, : len(s.pages)] = s.pages
        wanted = np.array([s.num_logits for s in slices], np.int64)
        rows = [np.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)]
        return cls(
            token_ids=torch.from_numpy(
                np.concatenate([np.asarray(s.token_ids, np.int64) for s in slices])
            ),
            positions=torch.from_numpy(positions),
            query_lens=torch.from_numpy(query),
            context_lens=torch.from_numpy(context),
            block_tables=torch.from_numpy(tables),
            logits_rows=torch.from_numpy(np.concatenate(rows)),
            page_ids=torch.from_numpy(tables[owner, positions // page_size].astype(np.int64)),
            page_offsets=torch.from_numpy(positions % page_size),
        )

    @property
    def only_decodes(self) -> bool:
        """Each slice is one token, whose logits are wanted."""
        return len(self.query_lens) == len(self.token_ids) == len(self.logits_rows)

    def padded(self, rows: int, page: int) -> Batch:
        """Decodes with more of them, so that they are `rows`: each is token 0, alone at the
        beginning of `page`, which nobody reads."""
        more = rows - len(self.token_ids)

        def with_more(part: Tensor, value: int) -> Tensor:
            return torch.cat((part, part.new_full((more, *part.shape[1:]), value)))

        return Batch(
            token_ids=with_more(self.token_ids, 0),
            positions=with_more(self.positions, 0),
            query_lens=with_more(self.query_lens, 1),
            context_lens=with_more(self.context_lens, 1),
            block_tables=with_more(self.block_tables, page),
            logits_rows=torch.arange(rows),
            page_ids=with_more(self.page_ids, page),
            page_offsets=with_more(self.page_offsets, 0),
        )


def _check(index: int, s: Slice, page_size: int) -> None:
    if not 0 < len(s.token_ids) <= s.context_len:
        tokens = len(s.token_ids)
        raise ValueError(f"slice {index}: {tokens} tokens in a context of {s.context_len}")
    if not 0 <= s.num_logits <= len(s.token_ids):
        raise ValueError(f"slice {index}: {s.num_logits} logits of {len(s.token_ids)} tokens")
    if len(s.pages) * page_size < s.context_len:
        pages = len(s.pages)
        raise ValueError(f"slice {index}: {pages} pages for a context of {s.context_len}")
