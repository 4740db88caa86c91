"""A process that is made to stand still, as one on a machine that swaps does."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod


class CanStandStill(ABC):
    """A double that is a process."""

    @property
    @abstractmethod
    def pid(self) -> int: ...

    def freeze(self) -> None:
        """It stands still until `thaw`, and nobody is told."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
