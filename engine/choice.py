"""How a token's experts are chosen: a value, for the kernels and for torch's plain form of them.

Not responsible for choosing (layers, csrc/decoder), nor for what is made of it (experts/router).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class ChoiceRule:
    """Scores are the softmax or the sigmoid of a token's logits; the k best are chosen, best first,
    ties to the lower id, and weigh as much as they score.

    `normalize`: the weights sum to 1, before `scale`. With `groups`, experts side by side, only the
    best `chosen_groups` of them may be chosen; a group is worth its best expert, or its two best
    where the choice has a bias (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437).
    """

    experts_per_token: int
    normalize: bool = True
    scoring: Scoring = "softmax"
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
