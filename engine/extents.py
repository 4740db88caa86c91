"""Where a tensor lies in a file, for who reads it when it is needed.

Not responsible for reading it: see weights and experts/store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """`num_bytes` from `begin` on of an open file. `digest`: xxh3_128 of them, known once the
    checkpoint has been read as a whole. The file is open as long as the checkpoint is."""

    name: str
    fd: int
    begin: int
    num_bytes: int
    digest: Callable[[], str]
