"""What the scheduler's side knows of a request, and the session that it is served in.

Not here: what is done with it (scheduler.py, saves.py).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2.answers import Acquired, Media
from kvc2.client import NamespaceHandle
from kvc2.client.staging import Staging


class Sessions(Staging):
    """Staging pages, and how many sessions there have been: a share knows each by its number."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.session = 0

    def on_attached(self, granted: NDArray[np.uint32]) -> None:
        self.session += 1
        super().on_attached(granted)


@dataclass(frozen=True)
class Found:
    """What an acquire brought: a lease of that session."""

    lease: Acquired
    session: int


@dataclass(eq=False)
class Visit:
    """One scheduling of a request: from its acquire to its end or its preemption."""

    request: Any
    lease_id: bytes
    namespace: NamespaceHandle
    extras: tuple[Media, ...]
    local: int  # tokens that vLLM has itself
    asked_at: float
    acquiring: Future[Found] | None = None
    found: Found | None = None
    blocks: list[int] = field(default_factory=list)  # vLLM's
    saving: int = -1  # blocks from the start that are kept or on their way; -1: not known
    with_ranks: int = 0  # saves that they have not told of
    stopped: bool = False  # a block was not kept: none behind it can be
    over: bool = False

    def cached_blocks(self, session: int) -> int:
        """From the start of the prompt, those that vLLM has among them; none of another session."""
        if self.found is None or self.found.session != session:
            return 0
        return self.found.lease.first_block + self.found.lease.offsets.size
