"""The handles of the namespaces whose KV an engine's callers share, as many as may be kept.

Not here: opening one in a session (keeper.py), and what the daemon knows of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from kvc2.client.counters import Counters
from kvc2.shares import SharedTable

NAMESPACES_MAX = 1024  # whose handles are kept until a daemon has said how many a session may open


class Caller(Protocol):
    """Whose KV a request may share: a daemon's tenant, narrowed by a salt. Equal ones share."""

    @property
    def tenant(self) -> str:
        """Empty: the daemon's default tenant."""

    @property
    def salt(self) -> bytes:
        """Empty: what all callers of the tenant share."""

    def __hash__(self) -> int: ...


class Namespaces:
    """Handles by caller, `most` of them; `make` opens one. Threads may share it."""

    def __init__(self, make: Callable[[str, bytes], Any], counters: Counters) -> None:
        self._make = make
        self._counters = counters
        self.most = NAMESPACES_MAX
        self._lock = threading.Lock()
        self._handles: SharedTable[str, Caller, Any] = SharedTable()

    def of(self, caller: Caller) -> Any:
        """The handle of this caller's namespace. Salts are the callers' choice: the handle of one
        that was not used for long is let go of, and made again when it comes back."""
        with self._lock:
            known = self._handles.use(caller)
        if known is not None:
            return known
        opened = self._make(caller.tenant, caller.salt)
        with self._lock:
            if len(self._handles) >= self.most and caller not in self._handles:
                self._handles.drop(next(self._handles.victims(caller.tenant)))
                self._counters.salt_let_go()
            self._handles.put(caller.tenant, caller, opened)
        return opened
