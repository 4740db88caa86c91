"""Whether there is a session with the daemon, and if not, why: for log, health page and counters.

The log gets a line at the first failure and then one a minute while it lasts, with the reason of
that moment. Not responsible for what a session means for pages (sessions.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from kvc2 import errors
from kvc2.client.counters import NO_COUNTERS, Counters

log = logging.getLogger(__name__)

AGAIN_S = 60.0  # between two lines of one failure that lasts


class DaemonHealth:
    """`address`: None where there is no daemon to attach to. The client's thread tells, any may
    ask."""

    def __init__(
        self,
        address: str | None,
        counters: Counters = NO_COUNTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._attached = False
        self._reason: str | None = "not_tried_yet"
        self._words = ""
        self._logged_at: float | None = None  # of the failure that lasts

    def failed(self, error: errors.Kvc2Error) -> None:
        """A try to attach was in vain."""
        reason = error.reason if isinstance(error, errors.Unreachable) else "refused"
        self._counters.attach_failed(reason)
        now = self._clock()
        with self._lock:
            self._reason, self._words = reason, str(error)
            quiet = self._logged_at is not None and now - self._logged_at < AGAIN_S
            if not quiet:
                self._logged_at = now
        if not quiet:
            log.warning(
                "not attached to the daemon at %s: %s (%s); running without hits, trying again",
                self._address,
                error,
                reason,
            )

    def begun(self, session: int, granted: int) -> None:
        """A session, with so many pages to begin with."""
        with self._lock:
            self._attached, self._reason, self._words = True, None, ""
            self._logged_at = None
        self._counters.attached()
        log.info(
            "attached to the daemon at %s: session %d, %d pages granted",
            self._address,
            session,
            granted,
        )

    def ended(self, detached: errors.Detached) -> None:
        """The session is over; what one that could not begin says comes by `failed`."""
        with self._lock:
            if not self._attached:
                return
            self._attached, self._reason, self._words = False, detached.reason, str(detached)
        self._counters.detached(detached.reason)
        log.warning("%s; running without hits", detached)

    def state(self) -> dict[str, Any] | None:
        """For a health page: `address`, `attached`, `reason` and, after a failure, `message`. None
        where there is no daemon to attach to."""
        if self._address is None:
            return None
        with self._lock:
            found = {"address": self._address, "attached": self._attached, "reason": self._reason}
            return found | ({"message": self._words} if self._words else {})
