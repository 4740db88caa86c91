"""What a remote store must be able to do: the seam behind which each kind of it lies.

A store maps names to values of some MiB. It may lose any of them at any moment, and what it answers
is not believed (codec.py). Not here: deadlines (link.py), when to leave it alone (breaker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import Buffer


class StoreError(Exception):
    """A call did not do what it should, for whatever reason. Nothing is known of its effect."""


class StoreRefused(StoreError):
    """The store is there and has answered: it won't. It is full, or may only be read."""


class StoreUnable(StoreError):
    """The store is there, and has nothing with which it could do what is asked."""


class Store(Protocol):
    """All on the event loop of link.py's thread; several calls may be under way. Each raises
    StoreError alone, and may be cancelled."""

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Of each name, whether there is a value."""

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        """Of each name the first num_bytes + 1 bytes of its value, or fewer where it has fewer: so
        that one that is too long shows, and takes no memory. None: there is none."""

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        """Names and values, in the place of what was there; gone after ttl_s, unless that is 0.
        StoreUnable where it keeps no time, or takes no value of that size."""

    async def delete(self, names: Sequence[bytes]) -> None: ...

    async def ping(self) -> None:
        """Whether it answers."""

    async def close(self) -> None:
        """Never raises."""
